"""Relative paths: resolved in the working directory, or in the folder of the project."""

from pathlib import Path

MAX_NAME_BYTES = 200  # file systems allow 255; endings are added to it
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


def describe_unusable_name(name: str, *, folders: bool = False) -> str:
    """Return why a file or a folder cannot have this name, in a clause; "" where it can.

    Args:
        name: as given; what is written is put together from it, so that it must not lead to another folder.
        folders: whether it may be a path of several names, below the folder that it is for.
    """
    expected = "a path below that folder" if folders else "a name without / or \\"
    parts = name.split("/") if folders else [name]
    if any(part in ("", ".", "..") or "/" in part or "\\" in part for part in parts):
        return f"expected {expected}"
    if not name.isprintable():  # control characters, line breaks, and bytes that are not UTF-8
        return "expected printable characters"
    if any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        return f"expected at most {MAX_NAME_BYTES} bytes"
    return ""
