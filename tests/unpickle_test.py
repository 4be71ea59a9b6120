"""Torch files without torch: what is read, what stays inert, what is refused; hostile and malformed pickles."""

import argparse
import collections
import copyreg
import datetime
import decimal
import enum
import fractions
import functools
import gc
import http
import inspect
import io
import json
import operator
import os
import pathlib
import pickle
import re
import signal
import socket
import struct
import sys
import tracemalloc
import types
import urllib.parse
import uuid
import zipfile
import zlib

import numpy as np
import pytest
from convert_inputs import bits, crafted, make_tensors, opcodes, refused, run, string
from flax import traverse_util

from smdlm.convert import files, torchfile
from smdlm.convert.unpickle import Opaque, TorchFileError, kind_of, unpickle


def tensor(key="0", elements=361, offset=0, shape=(19, 19), strides=(19, 1), kind="FloatStorage"):
    """Opcodes of a tensor over storage `key`; shape and strides may be opcodes."""

    def numbers(values):
        if isinstance(values, bytes):
            return values
        return b"(" + b"".join(b"J" + struct.pack("<i", v) for v in values) + b"t"

    storage = b"(" + string("storage") + f"ctorch\n{kind}\n".encode() + string(key) + string("cpu")
    storage += b"J" + struct.pack("<i", elements) + b"tQ"
    body = storage + b"J" + struct.pack("<i", offset) + numbers(shape) + numbers(strides) + b"\x89}"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + body + b"tR"


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Options(dict):
    """Like a config object in hyper_parameters: items, attributes, slots and a __setstate__ that must never run."""

    def __reduce__(self):
        return Options, (), {"flags": 1}, None, iter({"lr": 0.1}.items())

    def __setstate__(self, state):
        raise AssertionError("executed")


class Slots:
    __slots__ = ("tokens",)

    def __init__(self):
        self.tokens = [1]


@pytest.mark.parametrize("protocol", [2, 4])
def test_lightning_files_load(tmp_path, protocol):
    """Objects of unknown classes in parts that no conversion needs stay inert; the weights arrive."""
    objects = {"config": Options(), "slots": Slots(), "list": [Options()] * 2, "type": Options, "set": {1, 2}}
    extra = {name: opcodes(objects, protocol) for name in ("hyper_parameters", "callbacks", "anything")}
    path = crafted(tmp_path / "x.ckpt", extra)
    assert bits(files.load(path).tensors) == bits(make_tensors())
    tree = torchfile.read(path)["anything"]
    assert isinstance(tree["config"], Opaque) and isinstance(tree["slots"], Opaque)
    assert run("import", "mdlm", path, tmp_path / "run") == 0


class Colour(enum.Enum):
    RED = 1


class Access(enum.IntFlag):
    READ = 1
    WRITE = 2


HARMLESS = {
    "namespace": types.SimpleNamespace(a=1, inner=types.SimpleNamespace(b=2)),
    "enums": [Colour.RED, Access.READ | Access.WRITE, http.HTTPStatus.OK, signal.SIGTERM, socket.AF_INET],
    "streams": [io.BytesIO(b"x"), io.StringIO("x")],
    "paths": [pathlib.Path("a/b"), pathlib.PurePosixPath("c"), os.stat(".")],
    "times": [datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC), datetime.timedelta(1), datetime.date.today()],
    "partials": [functools.partial(len), functools.partial(os.path.join, "a"), operator.itemgetter(1), str.join],
    "options": argparse.Namespace(lr=0.1, path=pathlib.Path("x")),
    "numbers": [decimal.Decimal("0.1"), fractions.Fraction(1, 3), 1j, uuid.UUID(int=1), np.float32(1), range(3)],
    "containers": [collections.deque([1]), collections.Counter("aab"), collections.defaultdict(list, a=[1])],
    "others": [inspect.signature(len), re.compile("x"), slice(1, 2), bytearray(b"x"), ValueError("x"), Ellipsis],
    "url": urllib.parse.urlparse("https://example.org/a"),
}


# A stream has no form in protocol 0.
@pytest.mark.parametrize("name, protocol", [(n, p) for n in HARMLESS for p in (0, 2, 4, 5) if (n, p) != ("streams", 0)])
def test_the_standard_library_is_harmless(tmp_path, name, protocol):
    """Settings of all kinds in hyper_parameters load as inert stand-ins, and so do they beside the weights."""
    code = pickle.dumps(HARMLESS[name], protocol)
    code = code[11 if protocol >= 4 else 2 if protocol == 2 else 0 : -1]  # without header and STOP
    path = crafted(tmp_path / "x.ckpt", {"hyper_parameters": code, "anything": code})
    assert bits(files.load(path).tensors) == bits(make_tensors())
    found = torchfile.read(path)["anything"]
    kinds = {type(value) for value in (found if isinstance(found, list) else [found])}
    assert all(issubclass(kind, (Opaque, dict, bytearray)) or kind is type for kind in kinds), kinds


def test_enums_written_by_name(tmp_path):
    """Some Pythons write a member as getattr(Colour, 'RED'); an attribute is a dotted name and judged as such."""
    code = b"cbuiltins\ngetattr\ncpackage.settings\nColour\n" + string("RED") + b"\x86R"
    assert kind_of(torchfile.read(crafted(tmp_path / "x.ckpt", {"t": code}))["t"]) == "package.settings.Colour.RED"
    for name in ("__globals__", "__subclasses__"):
        with pytest.raises(TorchFileError, match=f"calls package.settings.Colour.{name}, .* refused"):
            torchfile.read(crafted(tmp_path / "x.ckpt", {"t": code.replace(string("RED"), string(name))}))


@pytest.mark.parametrize(
    "name",
    """os.system posix.system nt.system os.popen posix.execv os.remove subprocess.Popen subprocess.call builtins.eval
    builtins.exec __builtin__.eval builtins.__import__ builtins.open builtins.compile builtins.setattr io.open
    _io.FileIO types.CodeType types.FunctionType importlib.import_module importlib._bootstrap._load
    ctypes.CDLL socket.socket sys.modules sys.settrace pickle.loads _pickle.loads marshal.loads
    webbrowser.open shutil.rmtree runpy.run_path code.InteractiveConsole pty.spawn pdb.run timeit.timeit
    multiprocessing.Process urllib.request.urlopen copyreg.add_extension torch.hub.load torch.load""".split(),
)
def test_harmful_names_are_refused(name):
    module, _, attribute = name.rpartition(".")
    for program in (f"c{module}\n{attribute}\n.", f"(i{module}\n{attribute}\n."):
        with pytest.raises(TorchFileError) as error:
            unpickle(program.encode(), "x")
        assert f"calls {name}, " in str(error.value) and "refused, nothing was executed" in str(error.value)


@pytest.mark.parametrize(
    "module, name",
    [
        ("collections", "OrderedDict.__init__.__globals__"),
        ("collections", "_sys.modules"),
        ("logging", "os.system"),
        ("package.module", "Class.__subclasses__"),
        ("random", "_os.system"),
    ],
)
def test_walks_along_attributes_are_refused(module, name):
    with pytest.raises(TorchFileError, match="refused"):
        unpickle(string(module) + string(name) + b"\x93.", "x")


def test_modules_of_others_may_have_such_names():
    """A package's own module `types`, `code` or `io` is not that of the standard library."""
    for module, name in (
        ("package.types", "CodeType"),
        ("package.code", "Run"),
        ("package.os", "Path"),
        ("mytypes", "F"),
    ):
        assert kind_of(unpickle(f"c{module}\n{name}\n.".encode(), "x")) == f"{module}.{name}"


def test_hostile_pickles_are_refused(tmp_path, capsys):
    canary = tmp_path / "executed"
    command = f"touch {canary}"
    ways = {
        "reduce": opcodes(Hostile(os.system, command)),
        "protocol 4": opcodes(Hostile(os.system, command), 4),
        "eval": opcodes(Hostile(eval, f"open({str(canary)!r}, 'w')")),
        "inst": b"(" + string(command) + b"iposix\nsystem\n",
        "obj": b"(cposix\nsystem\n" + string(command) + b"o",
        "newobj": b"cposix\nsystem\n" + string(command) + b"\x85\x81",
        "only named": b"cos\nsystem\n",
        "import": b"cbuiltins\n__import__\n" + string("os") + b"\x85R",
        "stack global": string("subprocess") + string("call") + b"\x93" + string(command) + b"\x85R",
    }
    for name, code in ways.items():
        for where in ("hyper_parameters", "state_dict"):
            path = crafted(tmp_path / "x.ckpt", {where: code})
            message = refused(capsys, tmp_path / "run", "import", "mdlm", path, tmp_path / "run")
            assert "refused, nothing was executed" in message, (name, message)
    assert not canary.exists()


def test_a_load_leaves_nothing_behind():
    """Nothing is imported, no table of the process grows, and the stand-ins of two loads have nothing in common."""
    program = (
        b"(cturtle\nTurtle\n)R}" + string("x") + b"K\x01sbccollections\nOrderedDict\n}" + string("x") + b"K\x01sbt."
    )
    before = dict(copyreg._extension_cache), set(vars(collections.OrderedDict)), set(sys.modules)
    (first, names), (second, _) = unpickle(program, "x"), unpickle(program, "x")
    assert type(first) is not type(second) and issubclass(names, Opaque) and not hasattr(first, "x")
    assert (dict(copyreg._extension_cache), set(vars(collections.OrderedDict)), set(sys.modules)) == before
    del first, second, names, _
    gc.collect()
    assert not Opaque.__subclasses__()


def test_extensions_are_refused():
    """A number of copyreg's table would hand out the function itself, past every check."""
    copyreg.add_extension("os", "system", 77)
    copyreg._extension_cache[77] = os.system
    try:
        for code in (b"\x82\x4d", b"\x83\x4d\x00", b"\x84\x4d\x00\x00\x00", b"\x82\x05", b"\x82\x00"):
            with pytest.raises(TorchFileError, match="opcode EXT.*refused"):
                unpickle(b"\x80\x02" + code + b".", "x")
    finally:
        copyreg.remove_extension("os", "system", 77)
        copyreg._extension_cache.pop(77, None)


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
STATES = {
    "dict": b"}" + string("__code__") + b"K\x01s",
    "slots": b"N}" + string("__class__") + b"K\x01s\x86",
    "both": b"}" + string("shape") + b"K\x01s}" + string("kind") + string("x") + b"s\x86",
    "setstate": b"}" + string("__setstate__") + b"cos.path\nx\ns",
    "odd": b"K\x01",
}


@pytest.mark.parametrize("state", STATES)
def test_state_is_ignored(tmp_path, state):
    """BUILD on a name, an object, a tensor, a storage or an OrderedDict changes nothing of what they are or do next."""
    build = STATES[state] + b"b"
    array = np.arange(361, dtype=np.float32)
    code = tensor().replace(b"tQ", b"tQ" + build).replace(REBUILD, REBUILD + build) + build
    objects = b"(c__main__\nC\n" + build + b")R" + build + b"ccollections\nOrderedDict\n" + build + b")R" + build + b"t"
    tree = torchfile.read(crafted(tmp_path / "x.ckpt", {"t": code, "objects": objects}, [array]))
    assert np.array_equal(tree["t"], array.reshape(19, 19))
    unknown, empty = tree["objects"]
    assert unknown.kind == "__main__.C" and type(unknown).__name__ == "StandIn" and empty == {}


@pytest.mark.parametrize(
    "made",
    [
        b"cm\nC\n(K\x01tR",
        b"cm\nC\n(K\x01t\x81",
        b"cm\nC\n(K\x01t}" + string("k") + b"K\x02s\x92",
        b"(K\x01im\nC\n",
        b"(cm\nC\nK\x01o",
        b"cm\nC\n)R(K\x01tR",
        b"cm\nC\n)R" + string("k") + b"K\x02s",
        b"cm\nC\n)R(K\x01K\x02e",
        b"cm\nC\n)R(K\x01K\x02\x90",
        b"cm\nC\n)R(K\x01K\x02u",
    ],
)
def test_every_way_to_make_an_object(made):
    value = unpickle(b"\x80\x04" + made + b".", "x")
    assert isinstance(value, Opaque) and value.kind == "m.C" and not hasattr(value, "__dict__")


PAIRS = b"K\x01" + b"2\x86" * 60  # (x, x) of (x, x) of ...: 2^60 leaves
BOMBS = {
    "dict key": b"}" + PAIRS + b"Ns",
    "dict of a mark": b"(" + PAIRS + b"Nd",
    "items": b"}(" + PAIRS + b"Nu",
    "set": b"\x8f(" + PAIRS + b"\x90",
    "frozenset": b"(" + PAIRS + b"\x91",
    "nested frozensets": b"}(K\x01" + b"2\x86\x85q\x000(h\x00\x91" * 60 + b"Nu",
    "ordered": b"ccollections\nOrderedDict\n](" + PAIRS + b"N\x86e\x85R",
    "persistent id": PAIRS + b"Q",
    "persistent ids": PAIRS + b"q\x00" + b"0(" + b"h\x00" * 5 + b"tQ",
    "many dicts of one list": b"]("
    + b"".join(string(str(i)) + b"N\x86" for i in range(1000))
    + b"e\x85q\x000("
    + b"ccollections\nOrderedDict\nh\x00R" * 1000
    + b"l",
    "one long tuple for many calls": b"(" + b"N" * 50_000 + b"tq\x000(" + b"cm\nC\nh\x00R" * 20_000 + b"l",
    "text of 8 GB": b"\x8d" + struct.pack("<Q", 2**33) + b"x",
    "bytes of 2^62": b"\x8e" + struct.pack("<Q", 2**62) + b"x",
    "bytearray of 8 GB": b"\x96" + struct.pack("<Q", 2**33) + b"x",
    "bytearray of 2^64": b"\x96" + struct.pack("<Q", 2**64 - 1) + b"x",
    "integer of 2 GB": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"x",
    "negative length": b"\x8b" + struct.pack("<i", -(2**31)) + b"x",
    "text of 4 GB": b"X" + struct.pack("<I", 2**32 - 1) + b"x",
    "frame of 2^63": b"\x95" + struct.pack("<Q", 2**63) + b"N",
    "names without end": b"".join(f"cm\nC{i}\n".encode() for i in range(5000)),
    "a long name": b"c" + b"m" * 5000 + b"\nC\n",
    "digits": b"I" + b"9" * 100_000 + b"\n",
    "buffer": b"\x97",
    "name of numbers": b"K\x01K\x02\x93",
    "name of tuples": b"))\x93",
    "short persistent id": b"(" + string("storage") + b"tQ",
    "persistent text": b"Pstorage\n",
    "function that is text": string("os.system") + b")R",
    "object of a list": b"])\x81",
    "state of a dict": b"}}" + string("a") + b"K\x01sb",
}
BOMBS["shape"] = tensor(shape=PAIRS, strides=PAIRS)


@pytest.mark.parametrize("name", BOMBS)
def test_work_and_memory_are_in_proportion_to_the_file(name):
    """One line, at once, in little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(TorchFileError) as error:
            unpickle(b"\x80\x04" + BOMBS[name] + b".", "x.ckpt")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20e6
    assert "\n" not in str(error.value) and "malformed data.pkl" in str(error.value) and len(str(error.value)) < 300


def test_a_huge_place_in_the_memo_is_cheap():
    """The C unpickler makes an array of that length."""
    tracemalloc.start()
    try:
        for place in (b"r" + struct.pack("<I", 2**32 - 1), b"p99999999999999999999\n"):
            assert unpickle(b"\x80\x02N" + place + b".", "x") is None
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_shared_progress_is_cut(tmp_path):
    """64 times the same list, eight levels deep, in the part that becomes JSON."""
    code = b"(" + string("x") + b"l" + b"".join(b"q\x000(" + b"h\x00" * 64 + b"l" for _ in range(7))
    source = files.load(crafted(tmp_path / "x.ckpt", {"loops": code}))
    assert 1000 < len(json.dumps(source.progress)) < 1e6


def test_entries_that_share_their_bytes_are_refused(tmp_path):
    """A directory whose entries reach over those that follow, with the right checksums: 50 MB out of 1.5."""
    path, count, size = tmp_path / "x.ckpt", 50, 1_000_000
    codes = {f"t{i}": tensor(key=str(i), elements=size // 4, shape=(1,), strides=(1,)) for i in range(count)}
    crafted(path, codes, [np.zeros(4, np.float32)] * count + [np.zeros(size // 4, np.float32)])
    raw = path.read_bytes()
    with zipfile.ZipFile(path, "a") as archive:
        for info in archive.infolist()[1 : count + 1]:
            begin = info.header_offset + 30 + len(info.filename)
            info.file_size = info.compress_size = size
            info.CRC = zlib.crc32(raw[begin : begin + size])
        archive._didModify = True
    with pytest.raises(TorchFileError, match="got entries larger than the file"):
        torchfile.read(path)


def test_objects_among_the_weights_are_refused(tmp_path, capsys):
    unknown = b"cevil.module\nTensor\n)R"
    table = {
        "state_dict": (unknown, "state_dict: evil.module.Tensor"),
        "ema": (b"}(" + string("shadow_params") + b"]" + unknown + b"au", "ema.shadow_params[0]: evil.module.Tensor"),
    }
    for name, (code, wanted) in table.items():
        path = crafted(tmp_path / "x.ckpt", {name: code})
        assert wanted in refused(capsys, tmp_path / "run", "import", "mdlm", path, tmp_path / "run")
    # BUILD on a rebuild function or on OrderedDict must not change what they do next.
    state = b"}" + string("__code__") + b"K\x01s"
    code = b"ctorch._utils\n_rebuild_tensor_v2\n" + state + b"b0ccollections\nOrderedDict\n" + state + b"b"
    path = crafted(tmp_path / "x.ckpt", {"hyper_parameters": code})
    assert bits(files.load(path).tensors) == bits(make_tensors())


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": (19, 20), "strides": (20, 1)},
        {"offset": 1},
        {"offset": -1},
        {"strides": (19, -1)},
        {"strides": (1000, 1)},
        {"shape": (2**30, 2**30), "strides": (0, 0)},
        {"shape": (19,)},
        {"elements": 360, "shape": (18, 20), "strides": (20, 1)},
        {"key": "99"},
        {"key": "../data.pkl"},
        {"kind": "QUInt8Storage"},
        {"kind": "DoubleStorage"},
    ],
)
def test_tensors_stay_inside_their_storage(tmp_path, fields):
    arrays = [np.arange(361, dtype=np.float32)]
    good = torchfile.read(crafted(tmp_path / "x.ckpt", {"t": tensor()}, list(arrays)))["t"]
    assert np.array_equal(good, arrays[0].reshape(19, 19))
    view = tensor(offset=1, shape=(3, 2), strides=(1, 19))
    view = torchfile.read(crafted(tmp_path / "x.ckpt", {"t": view}, list(arrays)))["t"]
    assert np.array_equal(view, arrays[0].reshape(19, 19)[:2, 1:4].T)
    with pytest.raises(TorchFileError, match="got"):
        torchfile.read(crafted(tmp_path / "x.ckpt", {"t": tensor(**fields)}, list(arrays)))


def test_malformed_programs(tmp_path):
    bomb = b"(" + b"K\x01" + b"2\x86" * 60 + b"l"  # (x, x) of (x, x) of ...: small in the file, 2^60 when walked
    loop = b"]q\x00h\x00a"
    for code in (
        b"h\xff",
        b"0" * 9,
        b"R",
        b"(K\x01u",
        b"]]s",
        b"\x95",
        b"\x82\x01",
        b"K\x01)R",
        b"K\x01Q",
        loop,
        b"c\xff\n\n",
    ):
        with pytest.raises(TorchFileError, match="got"):
            torchfile.read(crafted(tmp_path / "x.ckpt", {"t": code}))
    torchfile.read(crafted(tmp_path / "x.ckpt", {"t": bomb}))
    files.load(crafted(tmp_path / "x.ckpt", {"loops": bomb}))
    rng = np.random.default_rng(0)
    path = crafted(tmp_path / "x.ckpt", {"hyper_parameters": opcodes(Options())})
    with zipfile.ZipFile(path) as archive:
        program = archive.read("a/data.pkl")
    for _ in range(300):  # random damage: an error of ours or a dict, never anything else
        data = bytearray(program)
        for at in rng.integers(0, len(data), 3):
            data[at] = rng.integers(256)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", bytes(data))
        try:
            files.load(path)
        except (TorchFileError, files.FileError) as error:
            assert "\n" not in str(error)


def test_written_values_come_back(tmp_path):
    tree = {
        "numbers": [0, -1, 2**31, -(2**31), 2**70, -(2**70), 1.5, float("inf"), True, False, None],
        "text": ["", "ü\n'", "x" * 300],
        "nested": {"a": (1, [2, {}], ())},
        "arrays": {str(d): np.ones((2, 0, 3), d) for d in torchfile.STORAGES},
        "scalar": np.array(2.5, np.float32),
    }
    torchfile.write(tmp_path / "x.pt", tree)
    back = torchfile.read(tmp_path / "x.pt")
    assert {k: back[k] for k in ("numbers", "text", "nested")} == {k: tree[k] for k in ("numbers", "text", "nested")}
    flat = traverse_util.flatten_dict(tree["arrays"])
    assert bits(traverse_util.flatten_dict(back["arrays"])) == bits(flat)
    assert back["scalar"].shape == () and back["scalar"] == 2.5
    with pytest.raises(TypeError, match="wanted arrays and plain values"):
        torchfile.write(tmp_path / "y.pt", {"x": object()})
