"""Checkpoints in and out: bijective tables, bit-for-bit round trips."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from convert_inputs import CAUSAL, CONFIG, bits, lightning, make_shadow, make_tensors, run, write_checkpoint

from smdlm.convert import files, mdlm, torchfile
from smdlm.denoiser import Denoiser
from smdlm.full_softmask import FullSoftMask
from smdlm.io.checkpoint import Checkpointer
from smdlm.models.dit import DiT
from smdlm.optimizer import TrainState
from smdlm.softmask import SoftMask


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "mdlm.ckpt")


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
    checkpointer.save(5, TrainState(jnp.int32(5), params, params, {}), data={}, meta={})
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
