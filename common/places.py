"""Where relative paths are found: in the working directory, or in the project's folder."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def find_in_project(path: str | Path) -> Path:
    """Return a path as it is where it exists, else where it lies in the project's folder, else as it is."""
    path = Path(path)
    return PROJECT / path if _is_in_project_alone(path) else path


def describe_elsewhere(path: str | Path) -> str:
    """Return where a relative path that does not exist was looked for, and where it is; "" in the project's folder.

    The result follows "PATH does not exist": " (looked for in /home/me; it is in /home/me/ced: run the command there)".
    """
    path = Path(path)
    if path.is_absolute() or Path.cwd() == PROJECT:
        return ""
    way_out = f"; it is in {PROJECT}: run the command there" if _is_in_project_alone(path) else ""
    return f" (looked for in {Path.cwd()}{way_out})"


def _is_in_project_alone(path: Path) -> bool:
    return not path.is_absolute() and not path.exists() and (PROJECT / path).exists()
