"""Reading of pickles as data: no class is imported, no function of the file's choice is called.

A pickle is a program. This reader runs the few operations that plain values need, calls only functions of a table, and
bounds what a small file can expand to: no keys that take long to hash, no values that contain one another without end.
"""

import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

_MAX_DEPTH = 100  # of nested values
_MAX_KEY = 16  # values in a tuple that is a key
_KEYS = (str, bytes, int, float, bool, type(None))
# Those that torch.save and Python's protocol 2 write.
_OPERATIONS = (
    *("PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINSTRING", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND"),
    *("APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "GLOBAL"),
    *("REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
)


class ForeignObjectError(Exception):
    """A pickle contains an object of a class that its reader does not know; the message is the name of the class."""


class Record:
    """The attributes of an object of a known class, whose code is not run."""

    def __init__(self, *_: Any) -> None:
        self.attributes: dict[str, Any] = {}


class PlainUnpickler(pickle._Unpickler):
    """Reads one pickle of plain values.

    Args:
        file: positioned at the pickle: an `io.BytesIO` or an `mmap.mmap`, whose `read` allocates no more than there
            is left.
        functions: module and name -> what stands for it: a function, or a subclass of `Record`.
        get_storage: called with the persistent id of a tensor's storage.

    Raises:
        ForeignObjectError: on `load`, a name that is not in `functions`.
        Exception: on `load`, of any type, where it is no such pickle.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[..., Any]]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPERATIONS
    }

    def __init__(
        self,
        file: Any,
        functions: Mapping[tuple[str, str], Any],
        get_storage: Callable[[Any], Any] = lambda _: None,
    ) -> None:
        super().__init__(file, encoding="bytes")
        self._functions, self._get_storage = functions, get_storage

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a class or function."""
        if (module, name) not in self._functions:
            raise ForeignObjectError(ascii(f"{module}.{name}")[1:-1][:100])
        return self._functions[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage that a persistent id describes."""
        return self._get_storage(pid)

    def load_append(self) -> None:
        """Append to a list, not to whatever has a method of that name."""
        value = self.stack.pop()
        self._get_container(list).append(value)

    def load_appends(self) -> None:
        """Append several values to a list."""
        values = self.pop_mark()
        self._get_container(list).extend(values)

    def load_setitem(self) -> None:
        """Set an entry of a dictionary."""
        value, key = self.stack.pop(), self.stack.pop()
        self._get_container(dict)[check_key(key)] = value

    def load_setitems(self) -> None:
        """Set several entries of a dictionary."""
        entries = self.pop_mark()
        container = self._get_container(dict)
        for key, value in zip(entries[::2], entries[1::2], strict=True):
            container[check_key(key)] = value

    def load_newobj(self) -> None:
        """Make a record; no other class is instantiated."""
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not (isinstance(kind, type) and issubclass(kind, Record) and isinstance(arguments, tuple)):
            raise pickle.UnpicklingError("an object of an unknown kind")
        self.stack.append(kind())

    def load_build(self) -> None:
        """Set the attributes of a record; those of other objects are left out."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record) and isinstance(state, dict):
            self.stack[-1].attributes = state

    def _get_container(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise pickle.UnpicklingError(f"found a {type(self.stack[-1]).__name__}, expected a {kind.__name__}")
        return self.stack[-1]


for _operation in ("append", "appends", "setitem", "setitems", "newobj", "build"):
    PlainUnpickler.dispatch[getattr(pickle, _operation.upper())[0]] = getattr(PlainUnpickler, f"load_{_operation}")


def check_key(key: Any) -> Any:
    """Return a key of a dictionary, or an item of a set, that can be hashed at once.

    Raises:
        UnpicklingError: it is neither plain nor a short tuple of plain values: nested ones take for ever to hash.
    """
    parts = key if isinstance(key, tuple) else (key,)
    if len(parts) > _MAX_KEY or not all(isinstance(part, _KEYS) for part in parts):
        raise pickle.UnpicklingError(f"a key is a {type(key).__name__}, expected text or a number")
    return key


def build_dict(pairs: Iterable[tuple[Any, Any]] = ()) -> dict[Any, Any]:
    """Stands for `dict` and its subclasses; its keys are checked, see `check_key`."""
    return {check_key(key): value for key, value in pairs}


def build_set(items: Iterable[Any] = ()) -> set[Any]:
    """Stands for `set`; its items are checked, see `check_key`."""
    return {check_key(item) for item in items}


def check_expansion(value: Any, n_bytes: int) -> None:
    """Check that plain values are nested no deeper than `_MAX_DEPTH`, and are about as large as their file.

    A value that contains another one twice, which contains a third one twice, ... has 2**n parts in n bytes: whatever
    walks through it, even to print it, would never end.

    Args:
        value: dictionaries, lists, tuples, sets and records are looked into.
        n_bytes: of the file that they were read from.

    Raises:
        ValueError: there are more parts, deeper ones, or one that contains itself.
    """
    remaining = 1000 + 10 * n_bytes
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        following: list[Any] = []
        for part in level:
            children: Iterable[Any] = ()
            if isinstance(part, Record):
                part = part.attributes
            if isinstance(part, dict):
                children = [*part.keys(), *part.values()]
            elif isinstance(part, list | tuple | set):
                children = part
            following += children
            if len(following) > remaining:
                raise ValueError("its values contain one another over and over")
        remaining -= len(following)
        level = following
        if not level:
            return
    raise ValueError(f"its values are nested more than {_MAX_DEPTH} deep")
