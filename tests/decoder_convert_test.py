"""Folders of decoders, there and back; what is wrong with one is told at once, and nothing is written."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from chat_test import write_folder
from conftest import make_params
from decoder_test import DREAM, LLAMA, MASK, V
from safetensors.numpy import save_file

from smdlm.convert import __main__ as convert
from smdlm.convert import decoder, folders
from smdlm.convert.streams import read_folder
from smdlm.denoiser import Denoiser
from smdlm.experiment import checkpointer_of

ROWS = 26
CONFIGS = {
    "llama": {**decoder.config_of(LLAMA, ROWS), "eos_token_id": 3},
    "dream": {**decoder.config_of(DREAM, ROWS), "mask_token_id": MASK},
}
MODELS = {"llama": LLAMA, "dream": DREAM}


def random_tensors(name, dtype, seed=0):
    rng = np.random.default_rng(seed)
    leaves = decoder.table(MODELS[name], ROWS)
    return {leaf.source: rng.normal(size=leaf.shape).astype(dtype) for leaf in leaves}


def write(folder, name, tensors, shards=1):
    """A folder as Hugging Face writes it, in one file or several."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[name], indent=2))
    (folder / "generation_config.json").write_text('{"alg":"origin"}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    where = {
        key: f"model-{i * shards // len(names) + 1:05d}-of-{shards:05d}.safetensors" for i, key in enumerate(names)
    }
    for file in set(where.values()):
        mine = {key: tensors[key] for key in names if where[key] == file}
        save_file(mine, folder / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def run(*words):
    return convert.main([str(word) for word in words])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "name, dtype, shards",
    [("dream", ml_dtypes.bfloat16, 3), ("dream", np.float32, 1), ("dream", np.float16, 2), ("llama", np.float32, 2)],
)
def test_there_and_back_byte_for_byte(tmp_path, capsys, name, dtype, shards):
    """Every file; also of a language model, which has no mask and gets a row for one meanwhile."""
    folder = write(tmp_path / "hf", name, random_tensors(name, dtype), shards)
    assert run("import", "decoder", folder, tmp_path / "run") == 0
    ids, rows = (V + 2, ROWS) if name == "dream" else (ROWS + 1, 128)
    assert f"{ids} ids in {rows} rows, mask {MASK if name == 'dream' else ROWS}" in capsys.readouterr().out
    assert run("export", "decoder", tmp_path / "run", tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(folder)


def test_the_checkpoint_is_the_model(tmp_path):
    """Types as in the folder, or as asked for; the released numbers in their places; the soft mask's scalars beside."""
    folder = write(tmp_path / "hf", "dream", random_tensors("dream", ml_dtypes.bfloat16), 2)
    for flags, dtype in (([], "bfloat16"), (["--dtype=float32"], "float32")):
        workdir = tmp_path / dtype
        run("import", "decoder", folder, workdir, *flags)
        params, meta = checkpointer_of(workdir).restore_params(None, "params")
        model = folders.Decoder(**meta["model"])
        assert meta["mask_id"] == MASK and model.param_dtype == dtype and model.table_rows == ROWS
        boxed = jax.eval_shape(Denoiser(model, ROWS, MASK, folders.OPERATORS["topk"]).init, jax.random.key(0))
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), folders.nn.meta.unbox(boxed))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == shapes
        kernel = random_tensors("dream", ml_dtypes.bfloat16)["model.layers.1.self_attn.k_proj.weight"]
        assert np.array_equal(np.asarray(params["backbone"]["blocks"]["k"]["kernel"][1]).reshape(16, 8).T, kernel)


def test_a_trained_model_is_exported_without_an_import(tmp_path):
    """From its fields alone; the folder read again gives the same weights."""
    denoiser = Denoiser(DREAM, V, MASK)
    backbone = jax.tree.map(np.asarray, make_params(denoiser)["backbone"])
    meta = {"model": folders.dataclasses.asdict(DREAM)}
    (tmp_path / "out").mkdir()
    folders.write_folder(tmp_path / "out", "decoder", backbone, meta)
    found = folders.find("decoder", tmp_path / "out", *read_folder(tmp_path / "out"), None)
    assert (found.model.shift, found.model.causal, found.model.eps) == (True, False, DREAM.eps)
    assert found.meta["convert"]["rows"] == DREAM.table_rows > V  # as they were released, not only those with ids
    again = jax.tree.map(lambda leaf: leaf.whole(), found.tree, is_leaf=lambda leaf: hasattr(leaf, "whole"))
    for name in ("norm", "blocks"):
        assert jax.tree.all(jax.tree.map(np.array_equal, again[name], backbone[name]))
    assert np.array_equal(again["embed"][:V], backbone["embed"][:V])


@pytest.fixture
def sharded(tmp_path):
    return write(tmp_path / "hf", "dream", random_tensors("dream", np.float32), 3)


def refused(tmp_path, capsys, folder, *flags):
    """The message; nothing was written."""
    with pytest.raises(SystemExit):
        run("import", "decoder", folder, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()
    return capsys.readouterr().err.strip()


def test_half_of_the_shards(tmp_path, capsys, sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    message = refused(tmp_path, capsys, sharded)
    assert "got no model-00002-of-00003.safetensors, wanted all 3 shards" in message and "\n" not in message


def test_a_damaged_shard(tmp_path, capsys, sharded):
    path = sharded / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    message = refused(tmp_path, capsys, sharded)
    assert "got a damaged or truncated file" in message and "\n" not in message
    path.write_bytes(b"\xff" * 100)
    assert "got a damaged or truncated file" in refused(tmp_path, capsys, sharded)


def test_an_index_and_shards_that_differ(tmp_path, capsys, sharded):
    """A tensor in two shards, one in another than the index says, one in none: all told at once."""
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    where = content["weight_map"]
    where["model.norm.weight"] = where["model.embed_tokens.weight"]
    where["extra"] = where["lm_head.weight"]
    index.write_text(json.dumps(content))
    message = refused(tmp_path, capsys, sharded)
    assert "got 2 tensors elsewhere" in message and "model.norm.weight" in message and "extra: got nothing" in message


def test_an_index_with_a_name_twice(tmp_path, capsys, sharded):
    """JSON takes the last of two values in silence; the first would have been another shard."""
    index = sharded / "model.safetensors.index.json"
    line = '"model.norm.weight": "model-00001-of-00003.safetensors",'
    index.write_text(index.read_text().replace('"weight_map": {', '"weight_map": {' + line))
    message = refused(tmp_path, capsys, sharded)
    assert "index.json: got model.norm.weight more than once, wanted each name once" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_files_that_are_not_utf8(tmp_path, capsys, sharded, name):
    if name.startswith("tokenizer"):
        write_folder(sharded)
    (sharded / name).write_bytes(b'{"a": "\xff"}')
    message = refused(tmp_path, capsys, sharded)
    assert name in message and "wanted" in message and "\n" not in message


def test_a_tokenizer_of_another_model(tmp_path, capsys, sharded):
    """One with more ids than the tables have rows; one whose mask is another id than config.json says."""
    write_folder(sharded)
    message = refused(tmp_path, capsys, sharded)
    assert f"got a tokenizer of 260 ids for tables of {ROWS} rows, wanted that of the model" in message
    model = folders.dataclasses.replace(DREAM, vocab_size=272, table_rows=272)
    leaves = decoder.table(model, 272)
    save_file({leaf.source: np.zeros(leaf.shape, np.float32) for leaf in leaves}, sharded / "model.safetensors")
    (sharded / "config.json").write_text(json.dumps({**decoder.config_of(model, 272), "mask_token_id": 270}))
    message = refused(tmp_path, capsys, sharded)
    assert "got a tokenizer with mask 259, wanted 270 as in config.json" in message and "\n" not in message


def test_every_difference_is_listed(tmp_path, capsys):
    tensors = random_tensors("dream", np.float32)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((24, 16), np.float32)
    tensors["model.norm.weight"] = np.zeros(17, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int32)
    lines = refused(tmp_path, capsys, write(tmp_path / "hf", "dream", tensors)).splitlines()
    assert "got weights with 4 differences" in lines[0] and [line.split(":")[0].strip() for line in lines[1:]] == [
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.2.mlp.up_proj.weight",
    ]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mamba"}, "got model_type 'mamba', wanted one of llama, qwen2, Dream"),
        ({"hidden_size": None}, "got no hidden_size, wanted all sizes"),
        ({"num_attention_heads": 5}, "got sizes that fit no model"),
        ({"rope_scaling": {"type": "yarn"}}, "got rope_scaling"),
        ({"hidden_act": "gelu"}, "got hidden_act 'gelu', wanted 'silu'"),
        ({"head_dim": 8}, "got head_dim 8, wanted 4"),
        ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight: got nothing"),
    ],
)
def test_another_model_is_refused(tmp_path, capsys, sharded, changes, message):
    (sharded / "config.json").write_text(json.dumps({**CONFIGS["dream"], **changes}))
    assert message in refused(tmp_path, capsys, sharded)


def test_what_is_there_already_is_left_alone(tmp_path, capsys, sharded):
    run("import", "decoder", sharded, tmp_path / "run")
    for words in (("import", "decoder", sharded, tmp_path / "run"), ("export", "decoder", tmp_path / "run", sharded)):
        with pytest.raises(SystemExit):
            run(*words)
    with pytest.raises(SystemExit):
        run("export", "gpt2", tmp_path / "run", tmp_path / "out")
    assert "got a checkpoint of another model, wanted one of kind gpt2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_mask_that_is_missing_becomes_the_mean_row(tmp_path):
    tensors = random_tensors("llama", np.float32)
    folder = write(tmp_path / "hf", "llama", tensors)
    found = folders.find("decoder", folder, *read_folder(folder), None)
    table = jnp.asarray(found.tree["embed"].whole())
    np.testing.assert_allclose(table[ROWS], tensors["model.embed_tokens.weight"].mean(0), rtol=1e-5, atol=1e-6)
    assert not np.any(table[ROWS + 1 :]) and found.meta["mask_id"] == ROWS
