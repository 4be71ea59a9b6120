"""Configuration, splitting, packing and batches of the data package."""

import dataclasses
import re

import numpy as np
import pytest
from data_helpers import config_of, stream_of, write_documents

from smdlm.config import read
from smdlm.data import corpus, packing, prepare, sources
from smdlm.data.config import KINDS, Prepared, spec_of
from smdlm.data.readers import matching_files
from smdlm.data.split import with_splits
from smdlm.data.text import batches, load

# Configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spec": "disk:x"}, "data.source: got 'disk:x', wanted 'stdlib:PART' | 'text:GLOB'"),
        ({"spec": "text:"}, "data.source: got 'text:'"),
        (
            {"spec": "stdlib:comments"},
            "data.source: got 'stdlib:comments', wanted 'stdlib:docstrings' | 'stdlib:prose' | 'stdlib:source'",
        ),
        ({"spec": "text:gs://bucket/a.txt"}, "data.source: got the URL gs://bucket/a.txt, wanted a local path"),
        ({"spec": "prepared:az://bucket/dir"}, "data.source: got the URL az://bucket/dir, wanted a local path"),
        ({"tokenizer": "hf:https://host/dir"}, "data.tokenizer: got the URL https://host/dir, wanted a local path"),
        ({"tokenizer": "words"}, "tokenizer: got 'words'"),
        ({"framing": "none"}, "data.framing: got 'none'"),
        ({"seq_len": 1}, "data.seq_len: got 1, wanted at least 2"),
        ({"seq_len": 2, "framing": "bos_eos"}, "data.seq_len: got 2, wanted at least 3"),
        ({"batch_size": 0}, "data.batch_size: got 0"),
        ({"val_fraction": 0.0}, "data.val_fraction: got 0.0"),
        ({"val_documents": -1}, "data.val_documents: got -1"),
        ({"seed": -1}, "data.seed: got -1"),
        ({"spec": "jsonl:x", "field": ""}, "data.field: got ''"),
        ({"spec": "tfds:x", "train_split": ""}, "data.field, data.train_split: got an empty name"),
        ({"field": "body"}, "data.source: got field for 'stdlib', wanted none"),
        ({"spec": "jsonl:x", "val_split": "test"}, "data.source: got val_split for 'jsonl', wanted field"),
    ],
)
def test_bad_config(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        config_of(**({"spec": "stdlib:source"} | changes))
    assert "\n" not in str(caught.value)


def read_data(given_by_user=(), **data):
    """config.data of a config with these fields."""
    whole = {"model": {"width": 8, "depth": 1, "heads": 1}, "train": {"steps": 1}}
    common = {"tokenizer": "bytes", "seq_len": 16, "batch_size": 4}
    return read({**whole, "data": common | data}, given_by_user).data


def test_fields_of_a_source_stand_beside_it():
    assert read_data(source="jsonl:a:b.jsonl", field="body").source == sources.Jsonl("a:b.jsonl", "body")
    assert read_data(source="tfds:x", val_split="test").source == sources.Tfds("x", val_split="test")
    assert read_data(source="prepared:dir").source == Prepared("dir")
    for kind in KINDS:
        target = {"stdlib": "source", "lab": "markov:16:1:0"}.get(kind, "x")
        beside = {"tokenizer": "bytes", "framing": "stream", "seq_len": 32} if kind == "lab" else {}
        assert spec_of(read_data(source=f"{kind}:{target}", **beside).source) == f"{kind}:{target}"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"source": "web:x"},
            "data.source: got 'web:x', wanted 'stdlib:PART' | 'text:GLOB' | 'jsonl:GLOB' | 'parquet:GLOB'",
        ),
        ({"source": "jsonl"}, "data.source: got 'jsonl', wanted"),
        ({"source": 3}, "config.data.source: got 3, wanted str"),
        ({}, "config.data: got no source, wanted 'stdlib:PART'"),
        ({"source": "text:x", "field": "body"}, "field (a field of source jsonl"),
        ({"source": "jsonl:x", "train_split": "a"}, "train_split (a field of source hf, tfds)"),
        ({"source": "jsonl:x", "glob": "a"}, "got unknown field glob, wanted"),
        ({"source": "jsonl:x", "field": 3}, "config.data.field: got 3, wanted str"),
    ],
)
def test_sources_refuse_what_is_not_theirs(data, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_data(**data)
    assert "\n" not in str(caught.value)


def test_another_source_on_the_command_line_drops_the_fields_of_the_old_one():
    """Those that it has too stay: they mean the same."""
    file = {"field": "body", "val_split": "test"}
    assert read_data(["data.source"], source="text:x", **file).source == sources.Text("x")
    assert read_data(["data.source"], source="jsonl:x", **file).source == sources.Jsonl("x", "body")
    with pytest.raises(ValueError, match="a field of source jsonl"):
        read_data(["data.source", "data.field"], source="text:x", **file)


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A source of one class: the numbers up to a limit, in words of a base."""

    limit: str
    prefix: str = "n"

    def documents(self):
        for i in range(int(self.limit)):
            yield sources.Document(f"{i}", lambda i=i: f"{self.prefix}{i}", "val" if i % 5 == 0 else "train")

    def identity(self):
        return self.limit


def test_a_new_source_is_one_class_and_one_entry(monkeypatch, tmp_path):
    monkeypatch.setitem(sources.SOURCES, "numbers", Numbers)
    data = load(read_data(source="numbers:100", prefix="x"))
    assert data.tokenizer.decode(stream_of(data.train)).startswith("x1\nx2\nx3\nx4\nx6\n")
    command = ["--source=numbers:100", "--prefix=x", "--tokenizer=bytes", "--seq-len=16", f"--out={tmp_path}/out"]
    assert prepare.main(command) == 0
    ready = load(config_of(f"prepared:{tmp_path}/out"))
    np.testing.assert_array_equal(stream_of(ready.train), stream_of(data.train))


# Splitting and packing


def test_eos_between_documents_and_remainder_dropped(tmp_path):
    data = load(config_of(write_documents(tmp_path)))
    splits = {"train": b"", "val": b""}
    for name, path in matching_files("source", f"{tmp_path}/*.txt"):
        splits["val" if corpus.share(name) < 0.05 else "train"] += path.read_bytes() + b"\xff"
    for split, blocks in (("train", data.train), ("val", data.val)):
        wanted = np.frombuffer(splits[split], np.uint8).astype(np.int32)
        wanted[wanted == 0xFF] = data.tokenizer.eos_id
        assert len(blocks) == len(wanted) // 16 > 0
        np.testing.assert_array_equal(stream_of(blocks), wanted[: len(wanted) // 16 * 16])
    assert data.train[0].dtype == np.int32 and data.train[0].shape == (16,)


def test_bos_eos_framing_holds_the_same_stream(tmp_path):
    source = write_documents(tmp_path)
    plain = stream_of(load(config_of(source)).train)
    data = load(config_of(source, framing="bos_eos"))
    blocks = np.stack([data.train[i] for i in range(len(data.train))])
    assert (blocks[:, 0] == data.tokenizer.bos_id).all() and (blocks[:, -1] == data.tokenizer.eos_id).all()
    inner = blocks[:, 1:-1].ravel()
    length = min(len(inner), len(plain))
    np.testing.assert_array_equal(inner[:length], plain[:length])
    assert abs(len(inner) - len(plain)) < 16


def test_split_rules(tmp_path):
    source = write_documents(tmp_path / "many")
    config = config_of(source, val_documents=7)
    splits = [split for split, _ in with_splits(config)]
    assert splits == ["train"] * 53 + ["val"] * 7
    with pytest.raises(ValueError, match="data.val_documents: got 60, wanted fewer than the 60 documents"):
        load(config_of(source, val_documents=60))
    fraction = config_of(source, val_fraction=0.3)
    few = {d.key for split, d in with_splits(fraction) if split == "val"}
    (tmp_path / "many" / "zzz.txt").write_text("one more document does not move the others")
    more = {d.key for split, d in with_splits(fraction) if split == "val"}
    assert few and few == more - {"zzz.txt"}


def test_a_single_file_gives_its_tail_to_validation(tmp_path):
    lines = "".join(f"line {i}\n" for i in range(200))
    (tmp_path / "book.txt").write_text(lines)
    data = load(config_of(f"text:{tmp_path}/book.txt", val_fraction=0.2, seq_len=2))
    train, val = (data.tokenizer.decode(stream_of(blocks)) for blocks in (data.train, data.val))
    assert train.startswith("line 0\nline 1\n") and val.startswith("line 1") and val.rstrip().endswith("line 199")
    assert len(val) == pytest.approx(0.2 * len(lines), abs=12)
    assert (train.rstrip("\n") + "\n" + val.rstrip("\n") + "\n") == lines


def test_content_hash_follows_text_and_split(tmp_path):
    source = write_documents(tmp_path)
    first = load(config_of(source)).content_hash
    assert load(config_of(source, seq_len=8)).content_hash == first
    assert load(config_of(source, val_fraction=0.4)).content_hash != first
    (tmp_path / "d000.txt").write_text("changed")
    assert load(config_of(source)).content_hash != first


# Batches


def numbered(count, length=3):
    """Blocks in which every token is the number of its block."""
    return packing.ArrayBlocks(np.repeat(np.arange(count)[:, None], length, 1).astype(np.uint16))


def take(count, **options):
    found = batches(**({"blocks": numbered(10), "batch_size": 4, "seed": 3} | options))
    return [next(found)["tokens"] for _ in range(count)]


def test_epochs_are_whole_and_differ():
    rows = np.concatenate(take(10))[:, 0].reshape(4, 10)
    for epoch in rows:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in rows}) == 4
    assert not np.array_equal(np.concatenate(take(10, seed=4))[:, 0].reshape(4, 10), rows)
    ordered = np.concatenate(take(5, shuffle=False))[:, 0]
    assert ordered.tolist() == [*range(10), *range(10)]


def test_start_is_the_number_of_a_batch():
    straight = take(12)
    for start in (1, 7):
        np.testing.assert_array_equal(take(3, start=start), straight[start : start + 3])
    far = 10**9
    np.testing.assert_array_equal(take(2, start=far)[1], take(1, start=far + 1)[0])


@pytest.mark.parametrize("repeat", [True, False])
@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[0, 3], [1, 2]], [[0], [1], [2], [3]]])
def test_processes_share_the_global_batch(parts, repeat):
    def run(rows):
        found = batches(numbered(10), batch_size=4, seed=3, repeat=repeat, rows=rows, start=1)
        return [next(found) for _ in range(2)]

    whole = run(None)
    for rows in parts:
        for part, batch in zip(run(np.array(rows)), whole, strict=True):
            for key in ("tokens", "valid"):
                np.testing.assert_array_equal(part[key], batch[key][rows])
    assert whole[1]["valid"].tolist() == [True, True, repeat, repeat]


def test_a_single_pass_pads_its_last_batch():
    found = list(batches(numbered(10), batch_size=4, seed=0, shuffle=False, repeat=False))
    assert [batch["valid"].sum() for batch in found] == [4, 4, 2]
    assert all(batch["tokens"].shape == (4, 3) and batch["tokens"].dtype == np.int32 for batch in found)
    rows = np.concatenate([batch["tokens"][batch["valid"]] for batch in found])
    np.testing.assert_array_equal(rows[:, 0], np.arange(10))
    assert (found[-1]["tokens"][2:] == 0).all()
    assert list(batches(numbered(10), batch_size=4, seed=0, repeat=False, start=3)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": numbered(0)}, "got no blocks"),
        ({"batch_size": 0}, "got batch_size 0"),
        ({"rows": np.array([1, 4])}, r"got rows \[1, 4\], wanted some of 0 .. 3"),
        ({"start": -1}, "got start -1"),
    ],
)
def test_bad_batches(options, message):
    with pytest.raises(ValueError, match=message):
        take(1, **options)
