"""The two who meet in the sandbox, each in a process of its own: the candidate, and the checker with the tests.

The candidate holds the program and answers: load it, call this function, read that name. The checker runs the tests and
sees of the program only plain data, copied, so that nothing of it is in the process that says 'passed': no object that
is equal to everything, no patched builtin, no frame to climb. Both speak through pipes to the parent, who hands on what
they say and reads nothing but the checker's verdict, which carries a word that the candidate has never seen.
"""

from __future__ import annotations

import ast
import builtins
import collections
import decimal
import fractions
import importlib
import json
import numbers
import os
import struct
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

SCALARS = (type(None), bool, int, float, str)
# {name on the wire: (type, to a list, back)}
KINDS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "tuple": (tuple, list, tuple),
    "set": (set, list, set),
    "frozenset": (frozenset, list, frozenset),
    "deque": (collections.deque, list, collections.deque),
    "keys": (type({}.keys()), list, lambda keys: dict.fromkeys(keys).keys()),
    "items": (type({}.items()), list, lambda pairs: dict(pairs).items()),
    "iterator": (Iterator, list, iter),
    "range": (range, lambda x: [x.start, x.stop, x.step], lambda x: range(*x)),
    "complex": (complex, lambda x: [x.real, x.imag], lambda x: complex(*x)),
    "bytes": (bytes, list, bytes),
    "bytearray": (bytearray, list, bytearray),
    "fraction": (fractions.Fraction, lambda x: [x.numerator, x.denominator], lambda x: fractions.Fraction(*x)),
    "decimal": (decimal.Decimal, lambda x: [str(x)], lambda x: decimal.Decimal(*x)),
}


def encode(value: Any, opaque: Callable[[Any], Any]) -> Any:
    """Plain data as JSON; what is none, by `opaque`. Subclasses become the plain type that they are made of."""
    if isinstance(value, SCALARS):
        return value
    if isinstance(value, list):
        return [encode(item, opaque) for item in value]
    if isinstance(value, dict):
        return {"@": "dict", "of": [[encode(k, opaque), encode(v, opaque)] for k, v in value.items()]}
    for kind, (type_, to_list, _) in KINDS.items():
        if isinstance(value, type_):
            return {"@": kind, "of": [encode(item, opaque) for item in to_list(value)]}
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a scalar of numpy
        return encode(value.item(), opaque)
    if isinstance(value, numbers.Integral):
        return int(value)
    return opaque(value)


def decode(value: Any, remote: Callable[[Mapping[str, Any]], Any]) -> Any:
    if isinstance(value, list):
        return [decode(item, remote) for item in value]
    if not isinstance(value, dict):
        return value
    if value["@"] == "dict":
        return {decode(k, remote): decode(v, remote) for k, v in value["of"]}
    if value["@"] in KINDS:
        return KINDS[value["@"]][2]([decode(item, remote) for item in value["of"]])
    return remote(value)


class Channel:
    """JSON through two pipes, each message behind its length. A side that is gone ends this process."""

    def __init__(self, source: int, sink: int):
        self.source, self.sink = source, sink

    def send(self, message: Any, kind: bytes = b"") -> None:
        """kind: b'?' and b'!' tell the parent a question from a verdict."""
        content = kind + json.dumps(message).encode()
        content = memoryview(struct.pack(">I", len(content)) + content)
        while content:
            content = content[os.write(self.sink, content) :]

    def receive(self) -> Any:
        (size,) = struct.unpack(">I", self._read(4))
        return json.loads(self._read(size))

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            part = os.read(self.source, min(size, 1 << 20))
            if not part:
                os._exit(0)
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


# ---------------------------------------------------------------------------------------------------------- candidate


def candidate(channel: Channel) -> None:
    """Answers questions about a program until nobody asks."""
    module = types.ModuleType("program")
    held: list[Any] = []

    def opaque(value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            return {"@": "module", "name": value.__name__}
        held.append(value)
        return {"@": "remote", "number": len(held) - 1}

    def answer(op: str, target: Any = None, **given: Any) -> Any:
        if op == "load":
            module.__name__ = given["name"]
            sys.modules[module.__name__] = module
            exec(compile(given["program"], "program", "exec"), module.__dict__)
            return None
        if op == "name":
            return module.__dict__[given["name"]]
        args = decode(given["args"], lambda remote: held[remote["number"]])
        if op == "call":
            return held[target](*args, **decode(given["kwargs"], lambda remote: held[remote["number"]]))
        return {"get": getattr, "set": setattr}[op](held[target], *args)

    while True:
        question = channel.receive()
        try:
            reply = {"value": encode(answer(**question), opaque)}
        except Exception as error:
            reply = {"raised": [type(error).__name__, " ".join(str(error).split())[:200]]}
        channel.send(reply)


# ------------------------------------------------------------------------------------------------------------ checker


class Remote:
    """Something of the candidate's that is no plain data: it can be called, and handed back to it, but not believed."""

    def __init__(self, ask: Callable[..., Any], number: int):
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plain = encode(list(args), _handed_back), encode(kwargs, _handed_back)
        return self._ask(op="call", target=self._number, args=plain[0], kwargs=plain[1])

    def __getattr__(self, name: str) -> Any:
        return self._ask(op="get", target=self._number, args=[name])

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask(op="set", target=self._number, args=[name, encode(value, _handed_back)])

    def _refuse(self, *_: Any) -> Any:
        raise TypeError("the program's answer is an object of its own, no plain data to compare")

    __eq__ = __ne__ = __bool__ = _refuse
    __hash__ = None


def _handed_back(value: Any) -> Any:
    if isinstance(value, Remote):
        return {"@": "remote", "number": value._number}
    raise TypeError(f"tests hand the program a {type(value).__name__}, wanted plain data")


class Names(dict):
    """Globals of the tests: their own, then builtins, then what the program defines."""

    def __init__(self, ask: Callable[..., Any]):
        super().__init__(__name__="tests")
        self.ask = ask

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):  # the program's own `all` or `set` would let every test pass
            raise KeyError(name)
        self[name] = self.ask(op="name", name=name)
        return self[name]


def checker(channel: Channel) -> None:
    """Runs one job: {'word', 'program', 'setup', 'tests', 'entry_point'}; sends {'word', 'status'}."""
    job = channel.receive()

    def remote(value: Mapping[str, Any]) -> Any:
        if value["@"] == "module":
            return importlib.import_module(value["name"])  # our own, not the one that the program may have patched
        return Remote(ask, value["number"])

    def ask(**question: Any) -> Any:
        channel.send(question, b"?")
        reply = channel.receive()
        if "raised" in reply:
            raise _exception(*reply["raised"])
        return decode(reply["value"], remote)

    channel.send({"word": job["word"], "status": _judge(job, ask)}, b"!")


def _judge(job: Mapping[str, Any], ask: Callable[..., Any]) -> str:
    """One line: 'passed', 'failed', 'memory', or 'error: ..'."""
    names = Names(ask)
    try:
        if job["tests"] is None:  # nothing of a whole program may be left out
            (program, tests), name = split(job["program"]), "__main__"
        else:  # what an answer has under '__main__' is its own demonstration; the usual harnesses do not run it, either
            program, tests, name = job["program"], job["tests"], "program"
        ask(op="load", program=program, name=name)
        exec(compile(job["setup"], "setup", "exec"), names)
        if job["entry_point"]:
            names[job["entry_point"]] = ask(op="name", name=job["entry_point"])
        exec(compile(tests, "tests", "exec"), names)
    except AssertionError:
        return "failed"
    except MemoryError:
        return "memory"
    except BaseException as error:  # whatever tests raise
        return f"error: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "passed"


def split(whole: str) -> tuple[str, str]:
    """(program, tests) of both in one piece, as harnesses join them.

    The tests begin at the last `def check` if there is one, else at the first assert behind the last definition or
    import. A program without them has passed when it has run to its end.
    """
    body = ast.parse(whole).body
    first = [i for i, node in enumerate(body) if isinstance(node, ast.FunctionDef) and node.name == "check"][-1:]
    if not first:
        defines = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
        behind = max((i + 1 for i, node in enumerate(body) if isinstance(node, defines)), default=0)
        first = [i for i in range(behind, len(body)) if isinstance(body[i], ast.Assert)][:1]
    if not first:
        return whole, ""
    lines = whole.splitlines(keepends=True)
    cut = body[first[0]].lineno - 1
    return "".join(lines[:cut]), "".join(lines[cut:])


def _exception(name: str, text: str) -> Exception:
    """What the program raised; of its own classes only the name remains."""
    known = getattr(builtins, name, None)
    if isinstance(known, type) and issubclass(known, Exception):
        try:
            return known(text)
        except TypeError:  # UnicodeDecodeError and its like want more than a text
            pass
    return RuntimeError(f"{name}: {text}")


def start(role: str, sandbox: str, folder: str, cpu_s: int, memory: int, put_up: Callable[..., list[str]]) -> None:
    """The program of the new process: takes its pipes from stdin and stdout, puts up the walls, says so, and works."""
    channel = Channel(os.dup(0), os.dup(1))
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    try:
        walls = put_up(sandbox, folder, cpu_s, memory)
    except (OSError, ValueError, AttributeError) as error:  # AttributeError: a C library without the function
        channel.send({"refused": getattr(error, "strerror", None) or str(error)})
        os._exit(3)
    sys.set_int_max_str_digits(0)
    channel.send({"walls": walls})
    {"candidate": candidate, "checker": checker}[role](channel)
    os._exit(0)
