"""Relative paths: resolved in the working directory, or in the folder of the project."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def find_in_project(path: str | Path) -> Path:
    """Return a path unchanged if it exists, else the one in the folder of the project if that exists."""
    path = Path(path)
    return PROJECT / path if _is_in_project_alone(path) else path


def describe_elsewhere(path: str | Path) -> str:
    """Return where a missing relative path was looked for, and where it exists; "" in the folder of the project.

    The result follows "PATH does not exist": " (looked for in /home/me; it is in /home/me/ced: run the command there)".
    """
    path = Path(path)
    if path.is_absolute() or Path.cwd() == PROJECT:
        return ""
    hint = f"; it is in {PROJECT}: run the command there" if _is_in_project_alone(path) else ""
    return f" (looked for in {Path.cwd()}{hint})"


def _is_in_project_alone(path: Path) -> bool:
    return not path.is_absolute() and not path.exists() and (PROJECT / path).exists()
