"""Prepared shards: the same as in memory, after a kill too; limits, checks and damage."""

import json
import resource

import numpy as np
import pytest
from data_helpers import config_of, stream_of, write_documents

from smdlm import files
from smdlm.data import prepare
from smdlm.data.config import spec_of
from smdlm.data.text import batches, load


def shard_config(folder, **changes):
    return config_of(write_documents(folder / "documents"), **({"val_fraction": 0.2} | changes))


SMALL = 10 * 16 * 2 / 2**20  # MiB: ten blocks of 16 uint16 in a shard


@pytest.mark.parametrize("framing", ["stream", "bos_eos"])
@pytest.mark.parametrize("spec", ["bytes", "bpe:260"])
def test_prepared_equals_in_memory(tmp_path, framing, spec):
    config = shard_config(tmp_path, framing=framing, tokenizer=spec)
    manifest = prepare.prepare(config, prepare.Output(tmp_path / "out", SMALL))
    plain = load(config)
    data = load(config_of(f"prepared:{tmp_path}/out", framing=framing, tokenizer=spec))
    assert len(manifest["splits"]["train"]) > 3 and manifest["dtype"] == "uint16"
    assert {shard["blocks"] for shard in manifest["splits"]["train"][:-1]} == {10}
    assert manifest["tokens"]["train"] == len(plain.train) * 16
    for one, other in ((plain.train, data.train), (plain.val, data.val)):
        assert len(one) == len(other)
        np.testing.assert_array_equal(stream_of(one), stream_of(other))
    assert data.train[0].dtype == np.int32 and data.tokenizer.fingerprint == plain.tokenizer.fingerprint
    first, second = (next(batches(d.train, batch_size=4, seed=1, start=5))["tokens"] for d in (plain, data))
    np.testing.assert_array_equal(first, second)


class Killed(BaseException):
    """Not an Exception: nothing may catch it, as nothing catches kill -9."""


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_preparation_continues_to_the_same_files(tmp_path, monkeypatch, when):
    config = shard_config(tmp_path, framing="bos_eos")
    prepare.prepare(config, prepare.Output(tmp_path / "straight", SMALL))
    total = len(files_of(tmp_path / "straight")) - 1
    close, calls = prepare.Shard.close, []

    def dying_close(shard):
        """Every second shard dies with the process: before its file has its name, or just after."""
        calls.append(shard.name)
        if len(calls) % 2 and when == "before":
            raise Killed
        line = close(shard)
        if len(calls) % 2:
            raise Killed
        return line

    monkeypatch.setattr(prepare.Shard, "close", dying_close)
    for _ in range(total + 1):
        try:
            prepare.prepare(config, prepare.Output(tmp_path / "out", SMALL))
            break
        except Killed:
            with pytest.raises(ValueError, match="unfinished.*run python -m smdlm.data.prepare"):
                load(config_of(f"prepared:{tmp_path}/out", framing="bos_eos"))
    assert len(calls) == 2 * total and all(calls.count(name) == 2 for name in calls)  # finished shards stay
    assert files_of(tmp_path / "out") == files_of(tmp_path / "straight")


def test_one_long_document_spans_shards_across_a_kill(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("".join(f"{i} " for i in range(2000)))
    config = config_of(f"text:{tmp_path}/a.txt")
    prepare.prepare(config, prepare.Output(tmp_path / "straight", SMALL))
    write_json, count = files.write_json, []

    def dying_write(file, value):
        write_json(file, value)
        count.append(file)
        if len(count) == 9:
            raise Killed

    monkeypatch.setattr(files, "write_json", dying_write)
    with pytest.raises(Killed):
        prepare.prepare(config, prepare.Output(tmp_path / "out", SMALL))
    prepare.prepare(config, prepare.Output(tmp_path / "out", SMALL))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "straight")


def test_max_gb_limits_the_output(tmp_path, capsys):
    lines = (json.dumps({"text": f"{i} " * 2000}) for i in range(600))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = config_of(f"jsonl:{tmp_path}/a.jsonl", seq_len=512, val_fraction=0.3)
    plain, sizes = load(config), []
    for limit in (3.3, 5.5):  # MB; the whole is 10 MB
        out = tmp_path / str(limit)
        prepare.prepare(config, prepare.Output(out, shard_mb=1, max_gb=limit / 1000))
        sizes.append(sum(path.stat().st_size for path in out.iterdir()) / 1e6)
        assert 0.8 * limit < sizes[-1] <= limit
        data = load(config_of(f"prepared:{out}", seq_len=512))
        for one, other in ((data.train, plain.train), (data.val, plain.val)):
            assert 0 < len(one) < len(other)
            np.testing.assert_array_equal(stream_of(one), stream_of(other)[: len(one) * 512])
    command = [f"--source={spec_of(config.source)}", "--tokenizer=bytes", f"--out={tmp_path}/out", "--max-gb=0.001"]
    assert prepare.main(command) == 2
    assert "--max-gb: got 0.001, too little for one block of the val split" in capsys.readouterr().err


def test_command_line_and_checks(tmp_path, capsys):
    source = write_documents(tmp_path / "documents")
    out = tmp_path / "out"
    ready = config_of(f"prepared:{out}")
    with pytest.raises(ValueError, match="not prepared.*run python -m smdlm.data.prepare .*--tokenizer=bytes.*--out="):
        load(ready)
    command = [f"--source={source}", "--tokenizer=bytes", "--seq_len=16", "--val-documents=9", f"--out={out}"]
    assert prepare.main(command) == 0
    assert f"data.source='prepared:{out}'" in capsys.readouterr().out
    (out / "progress.json").write_text("left by a kill right after the manifest")
    assert prepare.main(command) == 0
    assert not (out / "progress.json").exists()
    assert "already prepared" in capsys.readouterr().out
    assert prepare.main(["--verify", f"--out={out}"]) == 0

    assert prepare.main([*command, "--framing=bos_eos"]) == 2
    assert "another preparation: framing 'bos_eos' (there: 'stream')" in capsys.readouterr().err
    assert prepare.main([f"--source=text:{tmp_path}/none", f"--out={out}"]) == 2
    assert "got no file that matches" in capsys.readouterr().err
    assert prepare.main([f"--source=prepared:{out}", f"--out={out}"]) == 2
    assert "data.source: got 'prepared:" in capsys.readouterr().err
    assert prepare.main([*command, "--shard-mb=0"]) == 2
    assert "--shard-mb: got 0.0" in capsys.readouterr().err

    for changes, message in [
        ({"seq_len": 8}, "got seq_len 8 \\(there: 16\\)"),
        ({"framing": "bos_eos"}, "got framing 'bos_eos' \\(there: 'stream'\\)"),
        ({"tokenizer": "bpe:300"}, "got 'bpe:300', wanted 'bytes' as in"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(config_of(f"prepared:{out}", **changes))
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["settings"]["fingerprint"] = "0"
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="got fingerprint '[0-9a-f]+' \\(there: '0'\\)"):
        load(ready)


def test_a_preparation_that_wrote_nothing_stands_in_nobodys_way(tmp_path, capsys):
    """A wrong field is named as what it is, and the corrected command may use the same --out."""
    lines = [json.dumps({"text": f"record {i} of many, with some words"}) for i in range(200)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    flags = [f"--source=jsonl:{tmp_path}/docs.jsonl", "--tokenizer=bytes", "--seq_len=32", f"--out={tmp_path}/out"]
    assert prepare.main([*flags, "--field=body"]) == 2
    assert "wanted text in 'body'" in capsys.readouterr().err
    assert prepare.main(flags) == 0
    assert prepare.main([*flags, "--seq_len=16"]) == 2 and "another preparation" in capsys.readouterr().err


def test_damaged_shards(tmp_path, capsys):
    out = tmp_path / "out"
    prepare.prepare(shard_config(tmp_path), prepare.Output(out, SMALL))
    shard = out / "train-00001.array_record"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert prepare.main(["--verify", f"--out={out}"]) == 2
    assert "got other checksums for train-00001.array_record" in capsys.readouterr().err
    shard.write_bytes(data[:100])
    (out / "val-00000.array_record").unlink()
    with pytest.raises(ValueError, match="2 damaged shards .*train-00001.array_record \\(100 bytes\\).*val.*missing"):
        load(config_of(f"prepared:{out}"))
    (out / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="got an unreadable .*manifest.json"):
        load(config_of(f"prepared:{out}"))


def test_a_full_disk_is_one_line_and_the_same_command_continues(tmp_path, capsys):
    source = write_documents(tmp_path / "documents")
    command = [f"--source={source}", "--tokenizer=bytes", "--seq-len=16", f"--shard-mb={SMALL}", "--val-fraction=.2"]
    assert prepare.main([*command, f"--out={tmp_path}/straight"]) == 0
    command.append(f"--out={tmp_path}/out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # less than a shard, more than the progress
    try:
        assert prepare.main(command) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "val-00000.array_record" in error and "File too large" in error
    assert prepare.main(command) == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "straight")


def test_an_output_that_is_not_utf8_is_refused(tmp_path, capsys):
    assert prepare.main(["--source=stdlib:source", "--tokenizer=bytes", f"--out={tmp_path}/caf\udce9"]) == 2
    assert "caf\\udce9, wanted a name in UTF-8" in capsys.readouterr().err and not list(tmp_path.iterdir())
