"""Reads the pickle inside a torch file without executing it.

A pickle is a program that names functions and calls them. Here every name becomes a stand-in class, made anew for each
file; nothing is imported or looked up, and calling a stand-in, or setting its state, does nothing. Only four names mean
something: the rebuilding of a tensor and of a parameter, OrderedDict, and typed storages. So a real Lightning file
loads although its `hyper_parameters` hold OmegaConf and tokenizer objects (they stay inert), while a file that names
what can only do harm (os.system, eval, ...; see harmful.py) is refused as a whole.

The unpickler is the standard library's in its pure Python form. The C form takes an address in the memo for the size of
an array (2**31 is 32 GB), and neither form guards against work that is out of proportion to the file: a dict key of
pairs of pairs, 60 deep, takes 2**60 steps to hash. Here all such work is paid from a budget, the size of the program.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
import struct
import sys
from collections.abc import Callable
from typing import Any

from smdlm.convert.harmful import is_harmful

# No real file comes near: names that one file mentions, and characters of one of them.
MOST_NAMES, LONGEST_NAME = 4096, 1000
MOST_AXES = 64


class TorchFileError(ValueError):
    """The file is no torch checkpoint, is damaged, or holds something that is refused; one line."""


class Inert:
    """What unpickled objects have in common: the state that a pickle gives them (BUILD) is ignored."""

    __slots__ = ()

    @staticmethod
    def __setstate__(*state: Any) -> None:
        pass


class Opaque(Inert):
    """Instances stand for objects of unknown classes, subclasses for the classes; `kind` is the dotted name.

    Whatever a pickle does to them, they ignore: calls, items, elements, attributes.
    """

    __slots__ = ()
    origin = ("builtins", "object")  # module and name
    kind = "object"

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Opaque:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    add = extend = append

    def __repr__(self) -> str:
        return f"<{self.kind}>"


def is_opaque(value: Any) -> bool:
    """Whether it stands for an object or a class that is not known here."""
    return isinstance(value, Opaque) or (isinstance(value, type) and issubclass(value, Opaque))


def kind_of(value: Any) -> str:
    """The type of a value (of a class: the class) as the file calls it, fit for a line."""
    return shown(value.kind) if is_opaque(value) else type(value).__name__


@dataclasses.dataclass(frozen=True)
class Storage(Inert):
    """Raw memory in the file: torch's class name, the key of its zip entry, its number of elements."""

    kind: str
    key: str
    elements: int


@dataclasses.dataclass(frozen=True)
class TensorRef(Inert):
    """A tensor that is still in the file."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements


class Ordered(dict, Inert):
    """An OrderedDict; that of a state_dict is given `_metadata`, which nobody needs."""

    __slots__ = ()


def shown(text: Any, most: int = 200) -> str:
    """A name out of a file, fit for a line: no control characters, and not longer than a line should be."""
    text = str(text)[: most + 1]
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= most else f"{text[:most]}..."


def unpickle(program: bytes, file: str) -> Any:
    """The value that the program leaves: plain Python values, TensorRef, Opaque. TorchFileError in one line."""
    try:
        return _Unpickler(program, file).load()
    except TorchFileError:
        raise
    except Exception as error:  # every malformed program: stack underflow, bad memo, unhashable key, cut-off opcode
        text = shown(" ".join(f"{type(error).__name__}: {error}".split()), 120)
        raise TorchFileError(f"{file}: got a malformed data.pkl ({text}), wanted one written by torch.save") from None


class _Unpickler(pickle._Unpickler):
    """One load. Its methods are the only code that a program can reach."""

    def __init__(self, program: bytes, file: str):
        super().__init__(io.BytesIO(program), fix_imports=False, encoding="latin1")
        self.file = file
        self.names: dict[tuple[str, str], type] = {}
        self.budget = 1000 + 4 * len(program)

    def spend(self, amount: int) -> None:
        self.budget -= amount
        if self.budget < 0:
            raise ValueError("more work than a program of this size has")

    # ---- names ----

    def find_class(self, module: str, name: str) -> type:
        """The stand-in of a name; the same for the same name."""
        if (module, name) not in self.names:
            if len(module) + len(name) > LONGEST_NAME or len(self.names) == MOST_NAMES:
                raise ValueError(f"more than {MOST_NAMES} names, or one of more than {LONGEST_NAME} characters")
            if is_harmful(module, name):
                raise TorchFileError(
                    f"{self.file}: got a pickle that calls {shown(f'{module}.{name}')}, wanted weights: refused, "
                    "nothing was executed. Do not open this file with torch.load"
                )
            self.names[module, name] = self._stand_in(module, name)
        return self.names[module, name]

    def _stand_in(self, module: str, name: str) -> type:
        makers: dict[str, Callable[..., Any]] = {
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_parameter": _parameter,
            "collections.OrderedDict": self._ordered,
            "builtins.getattr": self._attribute,
            "__builtin__.getattr": self._attribute,
        }
        kind = f"{module}.{name}"
        make = makers.get(kind)

        def new(cls: type, *args: Any, **kwargs: Any) -> Any:
            self.spend(len(args))  # a tuple in the memo is handed over in two bytes, however long it is
            return make(*args) if make else object.__new__(cls)

        return type("StandIn", (Opaque,), {"__slots__": (), "origin": (module, name), "kind": kind, "__new__": new})

    def get_extension(self, code: int) -> None:
        # A number for a name in copyreg's table, which is shared by all that runs in this process.
        raise TorchFileError(f"{self.file}: got pickle opcode EXT, wanted those that torch.save writes: refused")

    def persistent_load(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) != 5:
            raise ValueError("a persistent id that is no tuple of five")
        tag, kind, key, _, elements = pid
        names_a_class = isinstance(kind, type) and is_opaque(kind)
        if tag != "storage" or not names_a_class or type(key) is not str or not _is_size(elements):
            raise ValueError("a persistent id that names no storage")
        return Storage(kind.kind, key, elements)

    def _attribute(self, owner: Any, name: Any, *default: Any) -> type:
        """How some Pythons write the members of enums and bound methods: as a dotted name, which is judged as such."""
        if type(name) is not str:
            raise ValueError("an attribute that is not named by a string")
        module, path = owner.origin if is_opaque(owner) else ("builtins", type(owner).__name__)
        return self.find_class(module, f"{path}.{name}")

    # ---- dicts and sets: keys are hashed and compared, which the size of a key must bound ----

    def _ordered(self, items: Any = ()) -> Ordered:
        items = list(items)
        self.spend(len(items))
        return self._fill(Ordered(), [part for key, value in items for part in (key, value)])

    def _fill(self, target: Any, items: list[Any]) -> Any:
        if not isinstance(target, (dict, Opaque)):
            raise ValueError(f"items for a {kind_of(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._check_key(key)
            target[key] = value
        return target

    def _check_key(self, key: Any) -> None:
        parts = [key]
        while parts:
            part = parts.pop()
            self.spend(1 + sys.getsizeof(part) // 64)
            if isinstance(part, (tuple, frozenset)):
                parts.extend(part)
            elif not (part is None or isinstance(part, (str, bytes, int, float)) or is_opaque(part)):
                raise ValueError(f"a key of type {kind_of(part)}")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._fill(self.stack[-1], items)

    def load_dict(self) -> None:
        self.append(self._fill({}, self.pop_mark()))

    def load_additems(self) -> None:
        items = self.pop_mark()
        for item in items:
            self._check_key(item)
            self.stack[-1].add(item)

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        for item in items:
            self._check_key(item)
        self.append(frozenset(items))

    def load_bytearray8(self) -> None:
        # The library makes the array before it looks whether the file has so many bytes.
        (size,) = struct.unpack("<Q", self.read(8))
        data = self.read(size)
        if len(data) != size:
            raise EOFError("a bytearray that is cut off")
        self.append(bytearray(data))

    dispatch = pickle._Unpickler.dispatch | {
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**63


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TensorRef:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError(f"a tensor of a {kind_of(storage)}, {kind_of(shape)} and {kind_of(strides)}")
    if len(shape) != len(strides) or len(shape) > MOST_AXES or not all(map(_is_size, (offset, *shape, *strides))):
        raise ValueError("a tensor whose offset, shape and strides are no sizes")
    return TensorRef(storage, offset, shape, strides)


def _parameter(data: Any, *_: Any) -> Any:
    return data
