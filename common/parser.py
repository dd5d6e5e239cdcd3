"""Command lines read by argparse, with errors that are sentences."""

import argparse
from typing import NoReturn

from common.errors import did_you_mean


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, with the nearest option where one is unknown."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence and exit with status 2."""
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            word = next((word for word in unknown.split() if word.startswith("-")), unknown.split()[0])
            known = [name for name in self._option_string_actions if name.startswith("--")]
            message = f"unknown option {word}{did_you_mean(word.partition('=')[0], known)}"
            if not word.startswith("-"):
                model = "; a model is given with -m" if "-m" in self._option_string_actions else ""
                message = f"{word!r} belongs to no option{model}"
        self.exit(2, f"error: {message}; {self.prog} --help lists all options\n")
