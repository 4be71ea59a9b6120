"""What convert refuses, in one line and before anything is written, and the odd inputs that it takes."""

import dataclasses
import zipfile

import numpy as np
import pytest
from convert_inputs import (
    CAUSAL,
    CONFIG,
    lightning,
    make_shadow,
    make_tensors,
    refused,
    run,
    write_checkpoint,
)

from smdlm.convert import files, mdlm, torchfile
from smdlm.io.checkpoint import Checkpointer


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "mdlm.ckpt")


# ----------------------------------------------------------------------------------------------------------- bad input


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


def test_what_is_not_there(tmp_path, capsys):
    """A name of the hub is no folder here, and the line says how it becomes one."""
    told = refused(capsys, tmp_path / "run", "import", "decoder", "Dream-org/Dream-v0-Instruct-7B", tmp_path / "run")
    assert "got no folder Dream-org/Dream-v0-Instruct-7B" in told and "hf download" in told
    pytest.importorskip("gguf")
    told = refused(capsys, tmp_path / "run", "import", "gguf", tmp_path / "no.gguf", tmp_path / "run")
    assert f"got no readable {tmp_path / 'no.gguf'} (No such file or directory), wanted a GGUF file" in told


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
