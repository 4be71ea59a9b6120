"""Checkpoints in and out: bijective tables, bit-for-bit round trips, every kind of bad input, hostile pickles."""

import dataclasses
import io
import json
import os
import pickle
import struct
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from smdlm.convert import __main__ as convert
from smdlm.convert import files, mdlm, torchfile
from smdlm.convert.unpickle import Opaque, TorchFileError
from smdlm.denoiser import Denoiser
from smdlm.full_softmask import FullSoftMask
from smdlm.io.checkpoint import Checkpointer
from smdlm.models.dit import DiT
from smdlm.softmask import SoftMask

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


@pytest.fixture
def checkpoint(tmp_path):
    """A complete MDLM checkpoint with EMA and soft-mask head."""
    files.save(tmp_path / "mdlm.ckpt", lightning(make_tensors(), make_shadow()))
    return tmp_path / "mdlm.ckpt"


def run(*argv):
    """The exit status."""
    try:
        return convert.main([str(a) for a in argv])
    except SystemExit as end:
        return end.code


def bits(tensors):
    return {name: (value.dtype, value.shape, value.tobytes()) for name, value in tensors.items()}


# --------------------------------------------------------------------------------------------------------- the tables


@pytest.mark.parametrize("config", [CONFIG, CAUSAL], ids=["mdlm", "ar"])
def test_tables_are_bijective(config):
    leaves = mdlm.table(config)
    assert len({leaf.source for leaf in leaves}) == len(leaves)
    assert len({(leaf.target, leaf.layer) for leaf in leaves}) == len(leaves)
    # Distinct numbers everywhere: each must arrive exactly once, next to nothing but padding.
    sizes = np.cumsum([0, *(int(np.prod(leaf.shape)) for leaf in leaves)])
    tensors = {
        leaf.source: np.arange(sizes[i] + 1, sizes[i + 1] + 1, dtype=np.float32).reshape(leaf.shape)
        for i, leaf in enumerate(leaves)
    }
    tree = mdlm.to_tree(tensors, config)
    shapes = nn.meta.unbox(jax.eval_shape(config.init, jax.random.key(0)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), tree) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    values = np.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
    assert np.array_equal(np.sort(values[values != 0]), np.arange(1, sizes[-1] + 1))
    padding = config.padded_vocab - config.vocab_size
    assert (values == 0).sum() == padding * (2 * config.width + 1)
    assert bits(mdlm.from_tree(tree, config)) == bits(tensors)


def test_linear_layout():
    """torch computes W x with W (out, in), and qkv rows are (three, head, dim)."""
    tensors = make_tensors()
    tree = mdlm.to_tree(tensors, CONFIG)
    x = np.random.default_rng(0).normal(size=CONFIG.width).astype(np.float32)
    wanted = (tensors["backbone.blocks.1.attn_qkv.weight"] @ x).reshape(3, CONFIG.heads, -1)
    np.testing.assert_allclose(np.einsum("d,dthe->the", x, tree["blocks"]["qkv"]["kernel"][1]), wanted, atol=1e-5)
    heads = x.reshape(CONFIG.heads, -1)
    wanted = tensors["backbone.blocks.2.attn_out.weight"] @ x
    np.testing.assert_allclose(
        np.einsum("he,hed->d", heads, tree["blocks"]["attention_out"]["kernel"][2]), wanted, atol=1e-5
    )


# --------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("kind, config", [("mdlm", CONFIG), ("ar", CAUSAL)])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_round_trip(tmp_path, kind, config, suffix):
    source = lightning(make_tensors(config), make_shadow(config) if suffix == ".ckpt" else None)
    files.save(tmp_path / f"in{suffix}", source)
    assert run("import", kind, tmp_path / f"in{suffix}", tmp_path / "run") == 0
    assert run("export", kind, tmp_path / "run", tmp_path / f"out{suffix}") == 0
    made = files.load(tmp_path / f"out{suffix}")
    assert bits(made.tensors) == bits(source.tensors)
    if suffix == ".ckpt":
        assert made.ema == source.ema and made.progress.items() >= source.progress.items()
        assert [x.tobytes() for x in made.shadow] == [x.tobytes() for x in source.shadow]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_directory(tmp_path):
    sizes = {"vocab_size": 19, "hidden_dim": 16, "n_blocks": 3, "n_heads": 2, "cond_dim": 8, "dropout": 0.25}
    config = {"model_type": "mdlm", **sizes, "time_conditioning": False, "model_length": 64, "custom": [1]}
    source = files.Source("hf", make_tensors(head=False, rotary=False), config=config)
    files.save(tmp_path / "hf", source)
    assert run("import", "mdlm", tmp_path / "hf", tmp_path / "run", "--softmask=none") == 0
    assert Checkpointer(tmp_path / "run" / "checkpoints").read_meta()["model"]["dropout"] == 0.25
    assert run("export", "mdlm", tmp_path / "run", tmp_path / "out") == 0
    made = files.load(tmp_path / "out")
    made.tensors.pop(mdlm.ROTARY)  # the number of heads, from which config.json spared the file
    assert bits(made.tensors) == bits(source.tensors) and made.config == config
    config["time_conditioning"] = True
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert run("import", "mdlm", tmp_path / "out", tmp_path / "run2") == 2


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_half_precision_comes_back_as_it_was(tmp_path, half, suffix):
    tensors = make_tensors()
    tensors = {n: v if n == mdlm.ROTARY or n.startswith("tran_head") else v.astype(half) for n, v in tensors.items()}
    files.save(tmp_path / f"in{suffix}", files.Source("x", tensors))
    assert run("import", "mdlm", tmp_path / f"in{suffix}", tmp_path / "run") == 0
    params, _ = Checkpointer(tmp_path / "run" / "checkpoints").restore_params(None)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert run("export", "mdlm", tmp_path / "run", tmp_path / f"out{suffix}") == 0
    assert bits(files.load(tmp_path / f"out{suffix}").tensors) == bits(tensors)


@pytest.mark.parametrize("softmask", [SoftMask(), FullSoftMask(), None], ids=["topk", "full", "none"])
@pytest.mark.parametrize("head", [True, False])
def test_a_model_restores_the_import(tmp_path, capsys, checkpoint, softmask, head):
    """The trees are those that a model of these sizes asks for; omega is new only where the file has no head at all."""
    tensors = files.load(checkpoint).tensors if head else make_tensors(head=False)
    files.save(tmp_path / "in.ckpt", lightning(tensors, make_shadow()))
    name = {SoftMask: "topk", FullSoftMask: "full", type(None): "none"}[type(softmask)]
    flags = [f"--softmask={name}", "--vocab_multiple=8"]
    assert run("import", "mdlm", tmp_path / "in.ckpt", tmp_path / "run", *flags) == 0
    said = capsys.readouterr().out
    denoiser = Denoiser(CONFIG, CONFIG.vocab_size, CONFIG.vocab_size - 1, softmask)
    abstract = nn.meta.unbox(jax.eval_shape(denoiser.init, jax.random.key(0)))
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints")
    params, meta = checkpointer.restore_params(abstract, "params")
    ema, _ = checkpointer.restore_params(abstract, "ema")
    assert meta["step"] == 0 and DiT(**meta["model"]) == CONFIG and meta["mask_id"] == CONFIG.vocab_size - 1
    for tree, values in ((params, tensors), (ema, make_tensors(seed=1))):
        flat = mdlm.from_tree(tree["backbone"], CONFIG)
        assert bits(flat) == bits({n: values[n] for n in flat})
        # The reference averages the backbone alone, and so the EMA stands beside the live omega.
        wanted = {ours: tensors[n] for n, ours in mdlm.OMEGA.items()} if head else softmask and softmask.init()
        for leaf, value in tree["softmask"].items():
            assert float(value) == float(wanted[leaf])
            assert (f"softmask/{leaf}" in said) == (not head)
    # Whatever the operator has no place for comes back on export.
    assert run("export", "mdlm", tmp_path / "run", tmp_path / "out.ckpt") == 0
    exported = files.load(tmp_path / "out.ckpt").tensors
    if head or softmask is None:
        assert bits(exported) == bits(tensors)
    else:
        assert set(exported) == set(tensors) | set(mdlm.OMEGA)


def test_choice_of_weights(tmp_path, checkpoint):
    raw, averaged = make_tensors(), make_tensors(seed=1)
    name = "backbone.blocks.1.mlp.0.weight"
    table = {None: (raw, averaged), "raw": (raw, raw), "ema": (averaged, averaged)}
    for weights, wanted in table.items():
        flags = [] if weights is None else [f"--weights={weights}"]
        target = tmp_path / f"run-{weights}"
        assert run("import", "mdlm", checkpoint, target, *flags) == 0
        for which, tensors in zip(("raw", "ema"), wanted, strict=True):
            out = tmp_path / f"{weights}-{which}.safetensors"
            assert run("export", "mdlm", target, out, f"--weights={which}") == 0
            assert files.load(out).tensors[name].tobytes() == tensors[name].tobytes()


def test_ema_in_a_second_file(tmp_path):
    averaged = make_tensors(seed=1)
    files.save(tmp_path / "raw.ckpt", lightning(make_tensors()))
    torchfile.write(tmp_path / "list.ckpt", {"ema": {"decay": 0.5, "num_updates": 3, "shadow_params": make_shadow()}})
    named = {leaf.source: averaged[leaf.source] for leaf in mdlm.table(CONFIG)}
    files.save(tmp_path / "named.safetensors", files.Source("x", named))
    for second in ("list.ckpt", "named.safetensors"):
        target = tmp_path / f"run-{second}"
        assert run("import", "mdlm", tmp_path / "raw.ckpt", target, f"--ema={tmp_path / second}") == 0
        assert run("export", "mdlm", target, tmp_path / f"{second}.out.ckpt") == 0
        made = files.load(tmp_path / f"{second}.out.ckpt")
        assert [x.tobytes() for x in made.shadow] == [x.tobytes() for x in make_shadow()]
        assert bits(made.tensors) == bits(make_tensors())
    assert made.ema["decay"] == 0.9999 and files.load(tmp_path / "list.ckpt.out.ckpt").ema["num_updates"] == 3


def test_export_after_training(tmp_path):
    """A checkpoint of a run, without an import's meta: the vocabulary without padding is all that must be told."""
    denoiser = Denoiser(CONFIG, CONFIG.vocab_size, CONFIG.vocab_size - 1, SoftMask())
    params = nn.meta.unbox(jax.jit(denoiser.init)(jax.random.key(0)))
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints")
    checkpointer.save(5, convert.TrainState(jnp.int32(5), params, params, {}), data={}, meta={})
    checkpointer.close()
    assert run("export", "mdlm", tmp_path / "run", tmp_path / "out.ckpt") == 2
    assert run("export", "mdlm", tmp_path / "run", tmp_path / "out.ckpt", "--vocab_size=19") == 0
    made = files.load(tmp_path / "out.ckpt")
    assert list(made.tensors) == list(make_order()) and made.progress["global_step"] == 5 == made.ema["num_updates"]
    assert made.progress["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"] == 5
    assert run("export", "ar", tmp_path / "run", tmp_path / "no.ckpt", "--vocab_size=19") == 2
    assert run("export", "mdlm", tmp_path / "run", tmp_path / "out.ckpt", "--vocab_size=19") == 2  # exists


def make_order():
    """The reference's state_dict: the rotary buffer before the blocks, the head last."""
    for leaf in mdlm.table(CONFIG):
        if leaf.source.startswith("backbone.blocks.0.norm1"):
            yield mdlm.ROTARY
        yield leaf.source
    yield from mdlm.OMEGA


# ----------------------------------------------------------------------------------------------------------- bad input


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


FILES = {
    "text": (b"wget: 404 not found\n", "text file"),
    "html": (b"<!DOCTYPE html>\n<html>", "text file"),
    "empty": (b"", "empty file"),
    "old": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "before 1.6"),
    "binary": (bytes(range(200)), "starts with"),
    "zip": (b"PK\x05\x06" + bytes(18), "0 NAME/data.pkl"),
}


@pytest.mark.parametrize("case", FILES)
def test_not_a_checkpoint(tmp_path, capsys, case):
    data, wanted = FILES[case]
    (tmp_path / "x.ckpt").write_bytes(data)
    assert wanted in refused(capsys, tmp_path / "run", "import", "mdlm", tmp_path / "x.ckpt", tmp_path / "run")
    (tmp_path / "x.safetensors").write_bytes(data)
    assert "damaged" in refused(
        capsys, tmp_path / "run", "import", "mdlm", tmp_path / "x.safetensors", tmp_path / "run"
    )


def test_truncated_and_damaged(tmp_path, capsys, checkpoint):
    data = checkpoint.read_bytes()
    bad = tmp_path / "bad.ckpt"
    for size in (3, 30, 1000, len(data) // 2, len(data) - 40, len(data) - 1):
        bad.write_bytes(data[:size])
        assert "truncated" in refused(capsys, tmp_path / "run", "import", "mdlm", bad, tmp_path / "run")
    middle = len(data) // 2
    bad.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    assert "damaged" in refused(capsys, tmp_path / "run", "import", "mdlm", bad, tmp_path / "run")
    with zipfile.ZipFile(checkpoint) as source, zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert "compressed" in refused(capsys, tmp_path / "run", "import", "mdlm", bad, tmp_path / "run")
    files.save(tmp_path / "x.safetensors", files.Source("x", make_tensors()))
    data = (tmp_path / "x.safetensors").read_bytes()
    for size in (4, 100, len(data) - 1):
        (tmp_path / "x.safetensors").write_bytes(data[:size])
        assert "truncated" in refused(
            capsys, tmp_path / "run", "import", "mdlm", tmp_path / "x.safetensors", tmp_path / "run"
        )


def test_every_problem_is_listed(tmp_path, capsys):
    tensors = make_tensors()
    del tensors["backbone.blocks.1.norm2.weight"], tensors["tran_head.raw_steep"]
    tensors["backbone.blocks.2.mlp.0.weight"] = np.zeros((3, 5), np.float32)
    tensors["backbone.blocks.0.norm1.weight"] = np.zeros(16, np.int64)
    tensors["backbone.output_layer.linear.weight"] = np.zeros((20, 16), np.float32)  # another vocabulary
    tensors["backbone.extra"] = np.zeros(2, np.float32)
    tensors["tran_head.raw_scale"] = np.zeros(1, np.float32)
    tensors[mdlm.ROTARY] = tensors[mdlm.ROTARY] * 0.5
    shadow = make_shadow()
    shadow[3] = np.zeros(5, np.float32)
    files.save(tmp_path / "x.ckpt", lightning(tensors, shadow))
    flags = ["--vocab_size=21"]
    message = refused(capsys, tmp_path / "run", "import", "mdlm", tmp_path / "x.ckpt", tmp_path / "run", *flags)
    for line in (
        "backbone.blocks.1.norm2.weight: got nothing, wanted float32[16]",
        "backbone.blocks.2.mlp.0.weight: got float32[3, 5], wanted float32[64, 16]",
        "backbone.blocks.0.norm1.weight: got int64[16], wanted float32[16]",
        "backbone.output_layer.linear.weight: got float32[20, 16], wanted float32[19, 16]",
        "backbone.extra: got float32[2], wanted nothing",
        "tran_head.raw_steep: got nothing, wanted float32[]",
        "tran_head.raw_scale: got float32[1], wanted float32[]",
        f"{mdlm.ROTARY}: got",
        "ema: backbone.sigma_map.mlp.2.weight: got float32[5], wanted float32[8, 8]",
        "vocab_size: got 19, wanted 21",
    ):
        assert f"  {line}" in message
    assert len(message.strip().split("\n")) == 11 and "10 differences" in message


def test_wrong_kind_and_sizes(tmp_path, capsys, checkpoint):
    files.save(tmp_path / "ar.ckpt", files.Source("x", make_tensors(CAUSAL)))
    files.save(tmp_path / "no_rotary.ckpt", files.Source("x", make_tensors(rotary=False)))
    torchfile.write(tmp_path / "list.ckpt", {"ema": {"shadow_params": make_shadow()}})
    torchfile.write(tmp_path / "other.ckpt", {"layer.weight": np.zeros((2, 2), np.float32)})
    files.save(tmp_path / "short.ckpt", lightning(make_tensors(), make_shadow()[:-1]))
    (tmp_path / "model.h5").write_bytes(b"x")
    cases = {
        ("ar", checkpoint): "sigma_map",
        ("mdlm", tmp_path / "ar.ckpt"): "is KIND right?",
        ("mdlm", tmp_path / "no_rotary.ckpt"): "--heads=N",
        ("mdlm", tmp_path / "list.ckpt"): "--ema=FILE",
        ("mdlm", tmp_path / "other.ckpt"): "layer.weight",
        ("mdlm", tmp_path / "short.ckpt"): "shadow_params",
        ("mdlm", tmp_path / "model.h5"): "suffix",
        ("mdlm", tmp_path / "absent.ckpt"): "no file",
        ("mdlm", checkpoint, "--heads=4"): "heads: got 2, wanted 4",
        ("mdlm", tmp_path / "ar.ckpt", "--weights=ema"): "is KIND right?",
        ("ar", tmp_path / "ar.ckpt", "--weights=ema"): "--weights=ema",
    }
    for (kind, path, *flags), wanted in cases.items():
        assert wanted in refused(capsys, tmp_path / "run", "import", kind, path, tmp_path / "run", *flags)
    assert run("import", "mdlm", tmp_path / "no_rotary.ckpt", tmp_path / "run", "--heads=2") == 0
    capsys.readouterr()
    assert "holds a checkpoint" in refused(capsys, tmp_path / "run", "import", "mdlm", checkpoint, tmp_path / "run")


def test_config_decides(tmp_path, capsys):
    """--config: sizes, vocabulary, padding and operator of a run."""
    config = dataclasses.replace(CONFIG, vocab_size=258, vocab_multiple=1)  # 256 bytes, EOS, mask
    files.save(tmp_path / "x.ckpt", lightning(make_tensors(config)))
    text = """
import ml_collections
def get_config():
    c = ml_collections.ConfigDict()
    c.model = dict(width={width}, depth=3, heads=2, cond=8, vocab_multiple={multiple})
    c.data = dict(source="stdlib:docstrings", tokenizer="bytes", seq_len=8, batch_size=2)
    c.softmask = dict(p_sm={p_sm}, k=3, variant="full")
    c.train = dict(steps=1)
    return c
"""
    command = ("import", "mdlm", tmp_path / "x.ckpt", tmp_path / "run", f"--config={tmp_path / 'c.py'}")
    (tmp_path / "c.py").write_text(text.format(width=32, multiple=1, p_sm=0.5))
    assert "width: got 16, wanted 32" in refused(capsys, tmp_path / "run", *command)
    (tmp_path / "c.py").write_text(text.format(width=16, multiple=4, p_sm=0.5))
    assert run(*command) == 0
    params, meta = Checkpointer(tmp_path / "run" / "checkpoints").restore_params(None)
    assert "raw_temperature" in params["softmask"] and params["backbone"]["embed"].shape == (260, 16)
    files.save(tmp_path / "y.ckpt", lightning(make_tensors()))
    command = ("import", "mdlm", tmp_path / "y.ckpt", tmp_path / "run2", f"--config={tmp_path / 'c.py'}")
    assert "vocab_size: got 19, wanted 258" in refused(capsys, tmp_path / "run2", *command)


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


def tensor(key="0", elements=361, offset=0, shape=(19, 19), strides=(19, 1), kind="FloatStorage"):
    """Opcodes of a tensor over storage `key`."""
    numbers = lambda values: b"(" + b"".join(b"J" + struct.pack("<i", v) for v in values) + b"t"  # noqa: E731
    storage = b"(" + string("storage") + f"ctorch\n{kind}\n".encode() + string(key) + string("cpu")
    storage += b"J" + struct.pack("<i", elements) + b"tQ"
    body = storage + b"J" + struct.pack("<i", offset) + numbers(shape) + numbers(strides) + b"\x89}"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + body + b"tR"


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
