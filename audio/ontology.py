"""AudioSet's ontology: which classes are kinds of others.

The file is AudioSet's `ontology.json`: a list of {"id": MID, "name": ..., "child_ids": [MID, ...], ...}. It is no part
of this project.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.parsing import read_json

FILE = "ontology.json"


@dataclass(frozen=True)
class Ontology:
    """The classes of an ontology by name, which is the display name of those that AudioSet's clips are labelled with.

    Attributes:
        children: name → names of the classes directly below it.
    """

    children: dict[str, list[str]]

    @classmethod
    def read(cls, path: str | Path) -> "Ontology":
        """Read AudioSet's `ontology.json`.

        Raises:
            UserError: the file cannot be read, or is not such a list.
        """
        entries = read_json(path, f"expected AudioSet's {FILE}", list)
        if not (entries and all(map(_is_class, entries))):
            raise UserError(
                f"{path}: is not AudioSet's ontology; expected a list of objects with id, name and child_ids"
            )
        names = {entry["id"]: entry["name"] for entry in entries}
        return cls(
            {names[entry["id"]]: [names[mid] for mid in entry["child_ids"] if mid in names] for entry in entries}
        )

    def descendants(self, name: str) -> set[str]:
        """Return the names of all classes below a class; none for one that is not in the ontology."""
        found: set[str] = set()
        pending = [name]
        while pending:
            new = [child for child in self.children.get(pending.pop(), []) if child not in found]
            found.update(new)
            pending += new
        return found - {name}


def _is_class(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    children = entry.get("child_ids")
    texts = isinstance(entry.get("id"), str) and isinstance(entry.get("name"), str)
    return texts and isinstance(children, list) and all(isinstance(child, str) for child in children)
