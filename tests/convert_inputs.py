"""Checkpoints as the PyTorch code writes them, good and crafted, and the command line: for the tests of convert/."""

import dataclasses
import io
import pickle
import struct
import zipfile

import numpy as np

from smdlm.convert import __main__ as convert
from smdlm.convert import files, mdlm, torchfile
from smdlm.models.dit import DiT

CONFIG = DiT(vocab_size=19, width=16, depth=3, heads=2, cond=8, vocab_multiple=8)
CAUSAL = dataclasses.replace(CONFIG, causal=True, cond=128)


def make_tensors(config=CONFIG, *, head=True, rotary=True, seed=0):
    """A state_dict of the reference with random values."""
    rng = np.random.default_rng(seed)
    tensors = {leaf.source: rng.normal(size=leaf.shape).astype(np.float32) for leaf in mdlm.table(config)}
    if rotary:
        tensors[mdlm.ROTARY] = mdlm.rotary_frequencies(config.width // config.heads)
    if head and not config.causal:
        tensors |= {name: np.array(rng.normal(), np.float32) for name in mdlm.OMEGA}
    return tensors


def make_shadow(config=CONFIG):
    return [make_tensors(config, seed=1)[leaf.source] for leaf in mdlm.table(config)]


def lightning(tensors, shadow=None):
    progress = {"epoch": 2, "global_step": 7, "loops": {"fit_loop": {"epoch_progress": {"current": {"completed": 2}}}}}
    ema = {"decay": 0.999, "num_updates": 7}
    return files.Source("x", tensors, shadow, ema if shadow else {}, progress)


def write_checkpoint(path):
    """A complete MDLM checkpoint with EMA and soft-mask head; returns the path."""
    files.save(path, lightning(make_tensors(), make_shadow()))
    return path


def run(*argv):
    """The exit status."""
    try:
        return convert.main([str(a) for a in argv])
    except SystemExit as end:
        return end.code


def bits(tensors):
    return {name: (value.dtype, value.shape, value.tobytes()) for name, value in tensors.items()}


def refused(capsys, target, *argv):
    """The message of a command that must fail in one line (with its list), write nothing and show no traceback."""
    before = sorted(target.parent.rglob("*"))
    assert run(*argv) == 2
    assert sorted(target.parent.rglob("*")) == before
    message = capsys.readouterr().err
    first, *rest = message.strip().split("\n")
    assert first.startswith("error: ") and "got" in first and "wanted" in first, message
    assert all(line.startswith("  ") for line in rest), message
    return message


# ------------------------------------------------------------------------------------------------------------- pickles


def string(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def crafted(path, extra, arrays=None):
    """A torch file {'state_dict': good tensors, **extra}; extra: name -> the opcodes of its value."""
    arrays = [] if arrays is None else arrays
    program = string("state_dict") + torchfile._pickled(make_tensors(), arrays)
    program = b"\x80\x02}(" + program + b"".join(string(name) + code for name, code in extra.items()) + b"u."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", program)
        for i, array in enumerate(arrays):
            archive.writestr(f"a/data/{i}", array.tobytes())
    return path


def opcodes(value, protocol=2):
    """What Python's pickler writes for a value, without header and STOP (and without frames: they cover the whole)."""
    data = io.BytesIO()
    pickle._Pickler(data, protocol).dump(value)
    body = data.getvalue()[2:-1]
    return body[9:] if protocol >= 4 else body
