"""Commands made of functions and classes."""

import sys
from typing import Any

import fire


def run_commands(component: Any) -> None:
    """Hand the command line to Fire, and `--help` wherever it stands: Fire alone takes it for an option of ours."""
    words = sys.argv[1:]
    if "--" not in words and any(word in ("--help", "-h") for word in words):
        words = [*(word for word in words if word not in ("--help", "-h")), "--", "--help"]
    fire.Fire(component, command=words)
