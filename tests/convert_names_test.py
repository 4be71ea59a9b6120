"""Names of wrappers in keys, shards with an index, and paths: what is taken, what is refused in one line."""

import io
import json
import sys

import numpy as np
import pytest
import safetensors.numpy
from convert_inputs import (
    CONFIG,
    bits,
    lightning,
    make_shadow,
    make_tensors,
    refused,
    run,
    write_checkpoint,
)

from smdlm.convert import files, mdlm, torchfile
from smdlm.convert.table import ConversionError, unwrap
from smdlm.io.checkpoint import Checkpointer

# ------------------------------------------------------------------------------------------------------------ wrappers


def after_first(part):
    """Wraps the parts below the first one: backbone.x -> backbone.PART.x."""

    def rename(name):
        first, rest = name.split(".", 1)
        return f"{first}.{part}.{rest}"

    return rename


def in_blocks(name):
    """Only every block is wrapped, as by torch.compile(block)."""
    parts = name.split(".")
    return ".".join([*parts[:3], "_orig_mod", *parts[3:]]) if parts[1] == "blocks" else name


def mixed(name):
    """Every other name, by its length: the wrappers need not be the same everywhere."""
    return f"model._orig_mod.{name}" if len(name) % 2 else after_first("module")(name)


RENAMES = {
    "compile": ("_orig_mod.{}".format, "_orig_mod."),
    "ddp": ("module.{}".format, "module."),
    "lightning": ("model.{}".format, "model."),
    "three": ("model.module._orig_mod.{}".format, "_orig_mod., module., model."),
    "twice": ("module.module.{}".format, "module."),
    "inside": (after_first("_orig_mod"), "_orig_mod."),
    "blocks": (in_blocks, "_orig_mod."),
    "mixed": (mixed, "_orig_mod., module., model."),
    "fsdp": (after_first("_fsdp_wrapped_module"), "_fsdp_wrapped_module."),
}


@pytest.mark.parametrize("case", RENAMES)
def test_wrappers_are_stripped(tmp_path, capsys, case):
    rename, wrappers = RENAMES[case]
    tensors = make_tensors()
    wrapped = {rename(name): value for name, value in tensors.items()}
    wrapped["n_averaged"] = np.array(3, np.int64)
    wrapped["module.n_averaged"] = np.array(3, np.int64)
    files.save(tmp_path / "in.ckpt", files.Source("x", wrapped))
    assert run("import", "mdlm", tmp_path / "in.ckpt", tmp_path / "run") == 0
    notes = [line for line in capsys.readouterr().out.split("\n") if "stripped from" in line]
    assert len(notes) == 1 and f"stripped from the names: {wrappers}" in notes[0] and "n_averaged" in notes[0]
    assert run("export", "mdlm", tmp_path / "run", tmp_path / "out.ckpt") == 0
    assert bits(files.load(tmp_path / "out.ckpt").tensors) == bits(tensors)


def test_plain_names_have_no_note(tmp_path, capsys):
    assert run("import", "mdlm", write_checkpoint(tmp_path / "x.ckpt"), tmp_path / "run") == 0
    assert "stripped from" not in capsys.readouterr().out


def test_an_averaged_model_as_ema(tmp_path, capsys):
    """What torch.optim.swa_utils.AveragedModel of a compiled model saves."""
    averaged = {f"module._orig_mod.{name}": value for name, value in make_tensors(seed=1).items()}
    torchfile.write(tmp_path / "swa.pt", {"n_averaged": np.array(100, np.int64), **averaged})
    files.save(tmp_path / "raw.ckpt", lightning(make_tensors()))
    assert run("import", "mdlm", tmp_path / "raw.ckpt", tmp_path / "run", f"--ema={tmp_path / 'swa.pt'}") == 0
    assert "ema: stripped from the names: _orig_mod., module.; left out: n_averaged" in capsys.readouterr().out
    assert run("export", "mdlm", tmp_path / "run", tmp_path / "out.ckpt") == 0
    made = files.load(tmp_path / "out.ckpt")
    assert [x.tobytes() for x in made.shadow] == [x.tobytes() for x in make_shadow()]
    assert bits(made.tensors) == bits(make_tensors())


def test_errors_have_the_names_of_the_file(tmp_path, capsys):
    wrapped = {f"module.{name}": value for name, value in make_tensors().items()}
    wrapped["module._orig_mod.backbone.extra"] = np.zeros(2, np.float32)
    wrapped["module.backbone.blocks.0.norm1.weight"] = np.zeros(3, np.float32)
    files.save(tmp_path / "x.ckpt", files.Source("x", wrapped))
    message = refused(capsys, tmp_path / "run", "import", "mdlm", tmp_path / "x.ckpt", tmp_path / "run")
    assert "  module._orig_mod.backbone.extra: got float32[2], wanted nothing" in message
    assert "  module.backbone.blocks.0.norm1.weight: got float32[3], wanted float32[16]" in message
    assert "2 differences" in message
    files.save(tmp_path / "ema.ckpt", files.Source("x", wrapped))
    source = write_checkpoint(tmp_path / "good.ckpt")
    command = ("import", "mdlm", source, tmp_path / "run", f"--ema={tmp_path / 'ema.ckpt'}")
    assert "  ema: module._orig_mod.backbone.extra: got" in refused(capsys, tmp_path / "run", *command)
    other = {f"model.{name}": np.zeros(2, np.float32) for name in ("encoder.weight", "decoder.weight")}
    files.save(tmp_path / "other.ckpt", files.Source("x", other))
    command = ("import", "mdlm", tmp_path / "other.ckpt", tmp_path / "run")
    assert "model.encoder.weight, model.decoder.weight" in refused(capsys, tmp_path / "run", *command)


def test_two_sets_of_weights_in_one_file(tmp_path, capsys):
    """A model and its average side by side: stripping would let one of them win."""
    tensors = make_tensors()
    both = tensors | {f"module.{name}": value for name, value in make_tensors(seed=1).items()}
    files.save(tmp_path / "x.ckpt", files.Source("x", both))
    message = refused(capsys, tmp_path / "run", "import", "mdlm", tmp_path / "x.ckpt", tmp_path / "run")
    name = "backbone.vocab_embed.embedding"
    assert f"  module.{name}: got it beside {name}, wanted one of them" in message
    assert f"got {len(tensors)} names twice" in message


def test_names_of_a_file_can_not_break_a_line():
    with pytest.raises(ConversionError) as error:
        unwrap({"a\n\x1b[2J": np.zeros(2), "module.a\n\x1b[2J": np.zeros(2)}, "x")
    assert len(str(error.value).split("\n")) == 2 and "\x1b" not in str(error.value)


# -------------------------------------------------------------------------------------------------------------- shards


def write_shards(folder, form="safetensors", count=3):
    """A model directory whose weights lie in several files; returns the parsed index."""
    folder.mkdir()
    tensors = make_tensors()
    names = list(tensors)
    stem, suffix = ("model", ".safetensors") if form == "safetensors" else ("pytorch_model", ".bin")
    weight_map = {}
    for i in range(count):
        shard = f"{stem}-{i + 1:05d}-of-{count:05d}{suffix}"
        part = {name: tensors[name] for name in names[i::count]}
        if form == "safetensors":
            safetensors.numpy.save_file(part, folder / shard)
        else:
            torchfile.write(folder / shard, part)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return index


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("by_index", [False, True])
def test_shards(tmp_path, form, by_index):
    write_shards(tmp_path / "hf", form)
    config = {"model_type": "mdlm", "n_heads": CONFIG.heads, "dropout": 0.25}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    source = next((tmp_path / "hf").glob("*.index.json")) if by_index else tmp_path / "hf"
    assert bits(files.load(source).tensors) == bits({n: make_tensors()[n] for n in files.load(source).tensors})
    assert run("import", "mdlm", source, tmp_path / "run") == 0
    assert Checkpointer(tmp_path / "run" / "checkpoints").read_meta()["model"]["dropout"] == 0.25
    assert run("export", "mdlm", tmp_path / "run", tmp_path / "out.ckpt") == 0
    assert bits(files.load(tmp_path / "out.ckpt").tensors) == bits(make_tensors())


def test_shards_without_a_config(tmp_path):
    """As accelerate writes them; the rotary buffer tells the heads."""
    write_shards(tmp_path / "hf")
    assert run("import", "mdlm", tmp_path / "hf", tmp_path / "run") == 0


def test_broken_shards(tmp_path, capsys):
    def message(change):
        folder = tmp_path / f"hf{len(list(tmp_path.iterdir()))}"
        index = write_shards(folder)
        change(folder, index)
        file = folder / "model.safetensors.index.json"
        if file.exists() and "raw" not in index:
            file.write_text(json.dumps(index))
        return refused(capsys, tmp_path / "run", "import", "mdlm", folder, tmp_path / "run")

    second = "model-00002-of-00003.safetensors"
    names = list(make_tensors())

    def missing(folder, index):
        (folder / second).unlink()

    def two_missing(folder, index):
        (folder / second).unlink()
        (folder / second.replace("2", "3", 1)).unlink()

    def absent(folder, index):
        index["weight_map"]["backbone.absent"] = second

    def twice(folder, index):
        part = safetensors.numpy.load_file(folder / second)
        safetensors.numpy.save_file(part | {names[0]: make_tensors()[names[0]]}, folder / second)

    def unnamed(folder, index):
        del index["weight_map"][names[0]]

    def no_map(folder, index):
        del index["weight_map"]

    def odd_map(folder, index):
        index["weight_map"] = dict.fromkeys(names, 3)

    def outside(folder, index):
        index["weight_map"][names[0]] = "../model.safetensors"

    def no_json(folder, index):
        index["raw"] = (folder / "model.safetensors.index.json").write_text("{")

    def cut(folder, index):
        (folder / second).write_bytes((folder / second).read_bytes()[:-5])

    table = {
        missing: f"got no file {second}, wanted all 3 shards",
        two_missing: f"got no file {second}, model-00003-of-00003.safetensors, wanted",
        absent: f"{second}: got no backbone.absent",
        twice: f"{second}: got {names[0]}, which another shard holds too",
        unnamed: f"got {names[0]}, which model.safetensors.index.json does not name",
        no_map: "got no weight_map",
        odd_map: "got no weight_map",
        outside: "got shards ../model.safetensors",
        no_json: "model.safetensors.index.json: got a file that is no JSON",
        cut: f"{second}: got a damaged or truncated file",
    }
    for change, wanted in table.items():
        found = message(change)
        assert wanted in found and len(found.strip().split("\n")) == 1, found


# --------------------------------------------------------------------------------------------------------------- paths


def test_urls_are_refused_before_anything_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    absent, here = tmp_path / "absent.ckpt", tmp_path / "run"
    table = {
        "SRC": ("import", "mdlm", "gs://bucket/x.ckpt", here),
        "DST": ("import", "mdlm", absent, "s3://bucket/run"),
        "--ema": ("import", "mdlm", absent, here, "--ema=https://example.org/ema.ckpt"),
        "--config": ("import", "mdlm", absent, here, "--config=gs://bucket/c.py"),
    }
    exports = {"SRC": ("export", "mdlm", "gs://bucket/run", here), "DST": ("export", "mdlm", absent, "hf://a/b.ckpt")}
    for cases in (table, exports):
        for what, command in cases.items():
            assert f"error: {what}: got the URL " in refused(capsys, here, *command)
    assert list(tmp_path.iterdir()) == []


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "in.ckpt")
    assert run("import", "mdlm", "~/in.ckpt", "~/run", "--ema=~/in.ckpt") == 0
    assert run("export", "mdlm", "~/run", "~/out.ckpt") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.ckpt", "out.ckpt", "run"]


def test_checkpoints_may_be_named(tmp_path):
    """The folder `checkpoints` stands for its workdir."""
    source = write_checkpoint(tmp_path / "in.ckpt")
    assert run("import", "mdlm", source, tmp_path / "run" / "checkpoints") == 0
    assert Checkpointer(tmp_path / "run" / "checkpoints").latest_step() == 0
    assert run("export", "mdlm", tmp_path / "run" / "checkpoints", tmp_path / "out.ckpt") == 0


def test_impossible_targets(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "in.ckpt")
    assert run("import", "mdlm", source, tmp_path / "run") == 0
    (tmp_path / "file").write_bytes(b"x")
    for target in ("file/out.ckpt", "file/deep/out.ckpt", "file", "in.ckpt", "run", "out.h5", "n" * 300 + ".ckpt"):
        assert refused_or_os(capsys, tmp_path, "export", "mdlm", tmp_path / "run", tmp_path / target)
    for target in ("file", "file/run"):
        assert "Not a directory" in refused_or_os(capsys, tmp_path, "import", "mdlm", source, tmp_path / target)
    assert (tmp_path / "file").read_bytes() == b"x"


def refused_or_os(capsys, folder, *argv):
    """The one line of a command that must fail without writing; the system's own words will do."""
    capsys.readouterr()
    before = sorted(folder.rglob("*"))
    assert run(*argv) == 2 and sorted(folder.rglob("*")) == before
    message = capsys.readouterr().err
    assert message.startswith("error: ") and len(message.strip().split("\n")) == 1, message
    return message


def test_a_failed_export_leaves_nothing(tmp_path, capsys, monkeypatch):
    """The disk is full in the middle of the file."""
    source = write_checkpoint(tmp_path / "in.ckpt")
    assert run("import", "mdlm", source, tmp_path / "run") == 0

    def full(path, *_, **__):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torchfile, "write", full)
    monkeypatch.setattr(safetensors.numpy, "save_file", lambda tensors, path, metadata: full(path))
    for target in ("out.ckpt", "out.safetensors", "out"):
        assert "No space left" in refused_or_os(capsys, tmp_path, "export", "mdlm", tmp_path / "run", tmp_path / target)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_plain_terminals(tmp_path, monkeypatch, encoding):
    """Every line can be printed, also with names that the terminal has no characters for."""
    source = write_checkpoint(tmp_path / "in\u03c9.ckpt")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert run("import", "mdlm", source, tmp_path / "\u03bb") == 0
    assert run("export", "mdlm", tmp_path / "\u03bb", tmp_path / "out\u4e2d.ckpt") == 0
    assert run("import", "ar", source, tmp_path / "other\u4e2d") == 2
    for stream in (out, err):
        stream.flush()
    assert out.buffer.getvalue().count(b"wrote ") == 2 and err.buffer.getvalue().startswith(b"error: ")


def test_the_rotary_buffer_may_be_wrapped(tmp_path):
    """It tells the number of heads, under whatever name."""
    wrapped = {f"_orig_mod.{name}": value for name, value in make_tensors().items()}
    assert f"_orig_mod.{mdlm.ROTARY}" in wrapped
    files.save(tmp_path / "x.ckpt", files.Source("x", wrapped))
    assert mdlm.import_source(files.load(tmp_path / "x.ckpt"), "mdlm").config.heads == CONFIG.heads
