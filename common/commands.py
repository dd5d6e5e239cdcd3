"""Commands made of functions and classes."""

import sys
from typing import Any

import fire


def run_commands(component: Any, *, as_text: bool = False) -> None:
    """Hand the command line to Fire, and `--help` wherever it stands: Fire alone takes it for an option of ours.

    Args:
        component: a function or a class, as Fire takes it.
        as_text: pass every value on as the text that it is; Fire alone makes a set of `{label}`, a tuple of `a,b`.
    """
    words = sys.argv[1:]
    if "--" not in words and any(word in ("--help", "-h") for word in words):
        words = [*(word for word in words if word not in ("--help", "-h")), "--", "--help"]
    elif as_text:
        words = [_quote(word) for word in words]
    fire.Fire(component, command=words)


def _quote(word: str) -> str:
    """Make a Python string of a word of the command line, or of what stands behind its "="."""
    if not word.startswith("--"):
        return word if word.startswith("-") else repr(word)
    name, equals, value = word.partition("=")
    return f"{name}={value!r}" if equals else name
