"""Reads the pickle inside a torch file without executing it.

A pickle is a program. Python's own unpickler runs it; here a small interpreter walks its opcodes, and nothing that the
pickle names is imported or called: a global becomes the inert record `Global`, and calling one gives an inert `Opaque`,
whatever it is. Only four names mean something: the rebuilding of a tensor and of a parameter, OrderedDict, and typed
storages. So a real Lightning file loads although its `hyper_parameters` hold OmegaConf and tokenizer objects (they
stay `Opaque`), while a file that names what can only do harm (os.system, eval, ...) is refused as a whole.
"""

from __future__ import annotations

import dataclasses
import io
import pickletools
from typing import Any

# Naming one of these has no place in a checkpoint. They would stay inert like any other name; the refusal tells the
# user what was handed to them.
HARMFUL_MODULES = frozenset(
    "os posix nt posixpath ntpath subprocess pty sys socket shutil importlib runpy ctypes code codeop pickle _pickle "
    "marshal types webbrowser multiprocessing signal asyncio urllib http requests ftplib smtplib timeit pdb bdb "
    "cProfile profile trace tempfile threading concurrent zipimport pkgutil pip ensurepip venv site atexit gc inspect "
    "io _io _posixsubprocess _thread commands popen2 platform joblib dill cloudpickle".split()
)
HARMFUL_BUILTINS = frozenset(
    "eval exec execfile compile open file input raw_input __import__ globals locals vars setattr delattr breakpoint "
    "apply memoryview".split()
)


class TorchFileError(ValueError):
    """The file is no torch checkpoint, is damaged, or holds something that is refused; one line."""


@dataclasses.dataclass(frozen=True)
class Global:
    """A name that the pickle mentions; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Opaque:
    """What calling an unknown global would have made. Inert: it ignores every further opcode."""

    def __init__(self, kind: str):
        self.kind = kind

    def __repr__(self) -> str:
        return f"<{self.kind}>"


@dataclasses.dataclass(frozen=True)
class Storage:
    """Raw memory in the file: torch's class name, the key of its zip entry, its number of elements."""

    kind: str
    key: str
    elements: int


@dataclasses.dataclass(frozen=True)
class TensorRef:
    """A tensor that is still in the file."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements


def interpret(program: bytes, file: str) -> Any:
    """The object that a pickle describes, built from dicts, lists, tuples, numbers, strings, TensorRef and Opaque."""
    machine = _Machine(file)
    try:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(program)):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
        raise ValueError("no STOP")
    except TorchFileError:
        raise
    except Exception as error:  # every malformed program: stack underflow, bad memo, unhashable key, cut-off opcode
        text = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise TorchFileError(f"{file}: got a malformed data.pkl ({text}), wanted one written by torch.save") from None


VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
CONTAINERS = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}
MARKED = {"TUPLE": tuple, "LIST": list, "FROZENSET": frozenset}
SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """Stack, marks and memo of one pickle."""

    def __init__(self, file: str):
        self.file = file
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def step(self, op: str, argument: Any) -> None:
        stack = self.stack
        if op in VALUES:
            stack.append(argument)
        elif op in CONSTANTS:
            stack.append(CONSTANTS[op])
        elif op in CONTAINERS:
            stack.append(CONTAINERS[op]())
        elif op in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif op == "MARK":
            self.marks.append(stack)
            self.stack = []
        elif op in MARKED:
            made = MARKED[op](self.pop_mark())
            self.stack.append(made)
        elif op in SHORT_TUPLES:
            self.stack[-SHORT_TUPLES[op] :] = [tuple(stack[-SHORT_TUPLES[op] :])]
        elif op in ("DICT", "SETITEMS"):
            items = self.pop_mark()
            if op == "DICT":
                self.stack.append({})
            self.set_items(items)
        elif op == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self.set_items([key, value])
        elif op in ("APPENDS", "ADDITEMS"):
            self.add_items(self.pop_mark())
        elif op == "APPEND":
            self.add_items([stack.pop()])
        elif op == "POP":
            stack.pop() if stack else self.pop_mark()
        elif op == "POP_MARK":
            self.pop_mark()
        elif op == "DUP":
            stack.append(stack[-1])
        elif op == "GLOBAL":
            stack.append(self.name(*argument.split(" ", 1)))
        elif op == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(self.name(module, name))
        elif op in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(self.call(function, arguments))
        elif op == "NEWOBJ_EX":
            _, arguments, function = stack.pop(), stack.pop(), stack.pop()
            stack.append(self.call(function, arguments))
        elif op in ("INST", "OBJ"):
            items = self.pop_mark()
            function = self.name(*argument.split(" ", 1)) if op == "INST" else items.pop(0)
            self.stack.append(self.call(function, tuple(items)))
        elif op == "BUILD":
            stack.pop()  # attributes of an object (also OrderedDict's `_metadata`): nothing here has any
            stack[-1]
        elif op in ("PERSID", "BINPERSID"):
            self.stack.append(self.storage(stack.pop() if op == "BINPERSID" else argument))
        elif op not in ("PROTO", "FRAME"):
            raise TorchFileError(f"{self.file}: got pickle opcode {op}, wanted those that torch.save writes: refused")

    def name(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global that is not named by strings")
        if module in ("builtins", "__builtin__"):
            harmful = name.split(".")[0] in HARMFUL_BUILTINS
        else:
            harmful = module.split(".")[0] in HARMFUL_MODULES
        if harmful:
            raise TorchFileError(
                f"{self.file}: got a pickle that calls {module}.{name}, wanted weights: refused, nothing was executed. "
                "Do not open this file with torch.load"
            )
        return Global(module, name)

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, (Global, Opaque)):
            raise ValueError(f"a call of a {type(function).__name__}")
        match str(function) if isinstance(function, Global) else "":
            case "torch._utils._rebuild_tensor_v2":
                storage, offset, shape, strides, *_ = arguments
                numbers = (offset, *shape, *strides)
                if not all(type(n) is int and n >= 0 for n in numbers) or len(shape) != len(strides):
                    raise ValueError(f"a tensor with shape {shape}, strides {strides}, offset {offset}")
                if not isinstance(storage, Storage):
                    raise ValueError(f"a tensor of a {type(storage).__name__}")
                return TensorRef(storage, offset, tuple(shape), tuple(strides))
            case "torch._utils._rebuild_parameter":
                return arguments[0]
            case "collections.OrderedDict":
                return {key: value for key, value in arguments[0]} if arguments else {}
            case _:
                return Opaque(str(function) if isinstance(function, Global) else function.kind)

    def storage(self, persistent: Any) -> Storage:
        tag, kind, key, _, elements = persistent
        if tag != "storage" or not isinstance(kind, Global) or not isinstance(key, str) or type(elements) is not int:
            raise ValueError(f"a persistent id {persistent!r}")
        return Storage(kind.name, key, elements)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        pairs = zip(items[::2], items[1::2], strict=True)
        if isinstance(target, dict):
            target.update(pairs)
        elif not isinstance(target, Opaque):
            raise ValueError(f"items for a {type(target).__name__}")

    def add_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, (list, set)):
            (target.extend if isinstance(target, list) else target.update)(items)
        elif not isinstance(target, Opaque):
            raise ValueError(f"elements for a {type(target).__name__}")
