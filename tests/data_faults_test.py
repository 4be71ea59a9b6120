"""What users run into: files that are damaged, oddly named or oddly written give the right text or one line."""

import gzip
import json
import logging
import os
import sys
import types

import numpy as np
import pytest
from data_helpers import config_of, stream_of, write_documents

from smdlm.data import corpus, prepare
from smdlm.data.config import spec_of
from smdlm.data.readers import matching_files, read_text
from smdlm.data.split import cut_in_two, with_splits
from smdlm.data.text import batches, load

RECORDS = "".join(json.dumps({"text": f"record {i} " * 4}) + "\n" for i in range(60))


def one_line(action, *names):
    """The text of the ValueError, on one line and with every name in it."""
    with pytest.raises(ValueError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message and message.isprintable() and all(name in message for name in names), message
    return message


def texts_of(config):
    return {split: [d.read() for owner, d in with_splits(config) if owner == split] for split in ("train", "val")}


# Unreadable files


def damaged_gz(data, how):
    if how == "cut":
        return data[: len(data) // 2]
    if how == "flipped":
        return data[:40] + bytes(b ^ 255 for b in data[40:60]) + data[60:]
    return {"empty": data[:3], "checksum": data[:-8] + b"\0" * 8, "not gzip": b"plain"}[how]


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "checksum", "not gzip"])
def test_a_damaged_gz_is_one_line(tmp_path, how, capsys):
    (tmp_path / "good.jsonl").write_text(RECORDS)
    (tmp_path / "z.jsonl.gz").write_bytes(damaged_gz(gzip.compress(os.urandom(500).hex().encode() + b"\n" * 2), how))
    one_line(lambda: load(config_of(f"jsonl:{tmp_path}/*")), "z.jsonl.gz")
    assert prepare.main([f"--source=jsonl:{tmp_path}/*", "--tokenizer=bytes", f"--out={tmp_path}/out"]) == 2
    assert "z.jsonl.gz" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "x"}\n{"text":\n', ("a.jsonl:2", "not JSON")),
        (b'{"text": "x"}\n{"text": "\xff"}\n', ("a.jsonl:2", "not JSON")),
        (b'{"text": "x"}\n' + b"[" * 100_000 + b"\n", ("a.jsonl:2", "not JSON")),
        (b'[{"text": "x"}, {"text": "y"}]\n', ("a.jsonl", "got a JSON array", "jq -c '.[]'")),
        (b'\n[\n {"text": "x"},\n {"text": "y"}\n]\n', ("a.jsonl", "got a JSON array")),
        (b'{\n "text": "x"\n}\n', ("a.jsonl:1", "not JSON")),
        (b"", ("no text from 'jsonl:",)),
        (b'{"body": "x"}\n{"body": "y"}\n', ("{'body': 'str'} at a.jsonl:1", "set data.field")),
        (b"[1]\n[2]\n", ("got a list at a.jsonl:1",)),
        (b'{"text": " "}\n{"text": ""}\n', ("empty text in 'text' at a.jsonl:1",)),
    ],
)
def test_bad_json_lines(tmp_path, content, words):
    (tmp_path / "a.jsonl").write_bytes(content)
    one_line(lambda: load(config_of(f"jsonl:{tmp_path}/a.jsonl")), *words)


@pytest.mark.parametrize("suffix", [".7z", ".rar", ".zip"])
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_other_compressions_are_named(tmp_path, suffix, kind):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(b"(\xb5/\xfd")
    one_line(lambda: load(config_of(f"{kind}:{tmp_path}/*")), f"a.jsonl{suffix}", "unpack it with")


def test_what_tfds_raises_is_one_line(monkeypatch):
    class Examples(list):
        def __getitem__(self, index):
            if index == 3:
                raise RuntimeError("Failed to read\nthe chunk")
            return super().__getitem__(index)

    examples = Examples({"text": b"some text of it"} for _ in range(30))
    monkeypatch.setitem(
        sys.modules, "tensorflow_datasets", types.SimpleNamespace(data_source=lambda name, split: examples)
    )
    one_line(lambda: load(config_of("tfds:tiny")), "tiny/train/3", "RuntimeError: Failed to read the chunk")


# Records without text


def test_records_without_text_are_left_out_and_counted(tmp_path, caplog, capsys):
    lines = RECORDS.splitlines()
    without = ['{"text": null}', '{"text": ""}', '{"text": " "}', '{"id": 1}', '{"text": 7}', '["text"]', "null"]
    for i, line in enumerate(without):
        lines.insert(3 + 5 * i, line)
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = config_of(f"jsonl:{tmp_path}/a.jsonl", val_documents=10)
    with caplog.at_level(logging.WARNING):
        data = load(config)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "left out 7 records without text" in said and "at a.jsonl:4" in said
    clean = "".join(json.loads(line)["text"] + "\n" for line in RECORDS.splitlines()[:50])
    assert clean.startswith(data.tokenizer.decode(stream_of(data.train)))

    spec = ["--seq-len=16", "--tokenizer=bytes", "--val-documents=10", f"--out={tmp_path}/out"]
    assert prepare.main([f"--source={spec_of(config.source)}", *spec]) == 0
    assert capsys.readouterr().err.count("left out 7 records without text") == 1
    ready = load(config_of(f"prepared:{tmp_path}/out"))
    np.testing.assert_array_equal(stream_of(ready.train), stream_of(data.train))


def test_empty_files_are_left_out_and_counted(tmp_path, caplog):
    source = write_documents(tmp_path)
    before = stream_of(load(config_of(source)).train)
    (tmp_path / "d000a.txt").write_text(" \n")
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(stream_of(load(config_of(source)).train), before)
    assert "left out 1 records without text" in caplog.text and "d000a.txt" in caplog.text


# The cut of a lone document

WORDS = " ".join(f"word{i}" for i in range(400))


@pytest.mark.parametrize(
    ("text", "share", "train_ends", "val_begins"),
    [
        ("ab\ncd\nef\ngh\nij\n", 0.5, "ef\n", "gh"),  # the first line end behind the wanted place, as ever
        (WORDS, 0.05, WORDS[: int(len(WORDS) * 0.95)][-3:], ""),  # no line end behind it: at the place, as ever
        (WORDS + "\n", 0.05, " ", "word"),  # text8 with a newline: at a space
        (WORDS + "\n \n\n", 0.05, " ", "word"),
        (WORDS[: int(len(WORDS) * 0.95)] + "\n" + WORDS[: len(WORDS) // 20].replace(" ", "_") + "\n", 0.05, "\n", "w"),
        ("title\n" + WORDS + "\n", 0.05, " ", "word"),  # not the title alone
        ("x" * 1000 + "\n", 0.05, "x", "x" * 50),  # no space either: at any character
        ("\n\n" + "x" * 1000, 0.999, "x", "x"),
        ("xy", 0.05, "x", "y"),
        ("   x y ", 0.9, "x", " y"),
        ("x\n", 0.05, "", ""),  # only one side can be had
    ],
)
def test_a_lone_document_is_cut_so_that_both_sides_have_text(text, share, train_ends, val_begins):
    cut = cut_in_two(text, share)
    train, val = text[:cut], text[cut:]
    assert train.endswith(train_ends) and val.startswith(val_begins)
    if len(text.strip()) > 1:
        assert train.strip() and val.strip()


def test_every_cut_of_a_long_line_leaves_both_sides():
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(rng.choice(list("ab \n"), rng.integers(2, 40)))
        if len(text.split()) < 2:
            continue
        cut = cut_in_two(text, float(rng.uniform(0.001, 0.999)))
        assert text[:cut].strip() and text[cut:].strip(), (text, cut)


def test_one_long_line_trains(tmp_path):
    (tmp_path / "one.txt").write_text(WORDS + "\n")
    data = load(config_of(f"text:{tmp_path}/one.txt"))
    assert len(data.val) * 16 == pytest.approx(0.05 * len(WORDS), abs=32)
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": WORDS}))
    other = load(config_of(f"jsonl:{tmp_path}/one.jsonl"))
    assert len(other.val) > 0 and len(other.train) == pytest.approx(len(data.train), abs=1)


# Names of files and folders


@pytest.mark.parametrize("folder", ["[2024]", "a*b", "what?", "[!x]/[abc]"])
def test_names_that_look_like_patterns(tmp_path, folder):
    write_documents(tmp_path / folder)
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "other.txt").write_text("of another folder")
    for pattern, count in (("*.txt", 60), ("d00[0-3].txt", 4), ("d000.txt", 1), ("d0?0.txt", 6)):
        found = matching_files("data.source", f"{tmp_path}/{folder}/{pattern}")
        assert [path.parent for _, path in found] == [tmp_path / folder] * count
    assert len(matching_files("data.source", f"{tmp_path}/[0-9]/*.txt")) == 1
    one_line(lambda: load(config_of(f"text:{tmp_path}/{folder}")), "got no file that matches", "not a folder")


def test_a_file_whose_name_is_a_pattern_is_itself(tmp_path):
    for name in ("a[1].txt", "a1.txt", "a*.txt"):
        (tmp_path / name).write_text("x")
    assert [name for name, _ in matching_files("source", f"{tmp_path}/a[1].txt")] == ["a[1].txt"]
    assert [name for name, _ in matching_files("source", f"{tmp_path}/a*.txt")] == ["a*.txt"]
    assert len(matching_files("source", f"{tmp_path}/a*")) == 3


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "..")
    write_documents(tmp_path / "docs")
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "a.jsonl").write_text(RECORDS)
    assert len(load(config_of("text:~/docs/*.txt")).train) and len(load(config_of("jsonl:~/lines/*.jsonl")).train)
    command = ["--source=text:~/docs/*.txt", "--tokenizer=bytes", "--seq-len=16", "--val-fraction=.2", "--out=~/ready"]
    assert prepare.main(command) == 0
    assert len(load(config_of("prepared:~/ready")).train)
    assert not os.path.exists("~")


@pytest.mark.parametrize("flag", ["--out=gs://b/d", "--source=text:gs://b/*.txt", "--tokenizer=hf:s3://b/t"])
def test_urls_are_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, flag):
    monkeypatch.chdir(tmp_path)
    flags = ["--source=stdlib:docstrings", "--tokenizer=bytes", "--out=out", flag]
    assert prepare.main(flags) == 2
    assert "got the URL" in capsys.readouterr().err and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="cache_dir: got the URL"):
        load(config_of("stdlib:docstrings", tokenizer="bpe:300"), "az://b/cache")


def test_a_file_name_that_is_not_utf8(tmp_path):
    """Read, split by its bytes and packed like any other; in a message it is printable."""
    folder = os.fsencode(tmp_path)
    names = [b"caf\xe9 %d.txt" % i for i in range(40)]
    for name in names:
        with open(os.path.join(folder, name), "wb") as file:
            file.write(b"text of a file " * 3)
    data = load(config_of(f"text:{tmp_path}/*.txt", val_fraction=0.3))
    assert len(data.train) and len(data.val)
    splits = {os.fsencode(d.key): split for split, d in with_splits(config_of(f"text:{tmp_path}/*", val_fraction=0.3))}
    assert splits.keys() == set(names)
    assert corpus.share("caf\xe9.txt") == corpus.share(os.fsdecode("caf\xe9.txt".encode()))
    command = [f"--source=text:{os.fsdecode(folder)}/caf\udce9*", "--tokenizer=bytes", "--seq-len=16"]
    assert prepare.main([*command, "--val-fraction=.3", f"--out={tmp_path}/out"]) == 0
    np.testing.assert_array_equal(stream_of(load(config_of(f"prepared:{tmp_path}/out")).val), stream_of(data.val))
    with open(os.path.join(folder, names[3]), "wb") as file:
        file.write(b"\xff")
    one_line(lambda: load(config_of(f"text:{tmp_path}/*.txt")), "caf\\udce9 3.txt", "not UTF-8")
    one_line(lambda: load(config_of(f"text:{tmp_path}/\udce9/*.txt")), "\\udce9", "got no file")


def test_a_terminal_that_is_ascii(tmp_path, capsys):
    source = write_documents(tmp_path / "caf\u00e9")
    out = tmp_path / "caf\u00e9" / "out"
    sys.stdout.reconfigure(encoding="ascii")
    command = [f"--source={source}", "--tokenizer=bytes", "--seq-len=16", "--val-fraction=.2", f"--out={out}"]
    assert prepare.main(command) == 0
    assert "caf\\xe9" in capsys.readouterr().out


# Byte order marks and line ends


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_text_has_neither_bom_nor_carriage_returns(tmp_path, bom, end):
    lines = [b"def f(x):", b"", b"    return caf\xc3\xa9", b""]
    (tmp_path / "a.txt").write_bytes(bom + end.join(lines))
    assert read_text(tmp_path / "a.txt") == "def f(x):\n\n    return caf\u00e9\n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_have_neither_bom_nor_carriage_returns_around(tmp_path, name):
    """Inside a string they are the author's: JSON spells them out."""
    lines = [json.dumps({"text": f"line {i}\r\nand \ufeff more"}) for i in range(40)]
    content = b"\xef\xbb\xbf" + "\r\n".join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    texts = texts_of(config_of(f"jsonl:{tmp_path}/*", val_documents=5))
    assert texts["train"] + texts["val"] == [json.loads(line)["text"] for line in lines]


# Prepared shards


def test_a_damaged_shard_is_named_while_training(tmp_path):
    config = config_of(write_documents(tmp_path / "documents"), val_fraction=0.2)
    prepare.prepare(config, prepare.Output(tmp_path / "out", 10 * 16 * 2 / 2**20))
    shard = tmp_path / "out" / "train-00001.array_record"
    data = shard.read_bytes()
    block = load(config).train[13].astype(np.uint16).tobytes()
    place = data.index(block)  # a record in the middle: its index at the end of the file stays whole
    shard.write_bytes(data[:place] + bytes(b ^ 85 for b in block) + data[place + len(block) :])
    ready = load(config_of(f"prepared:{tmp_path}/out"))
    assert len(ready.train[12]) == len(ready.train[14]) == 16
    one_line(lambda: ready.train[13], "train-00001.array_record", "--verify")
    one_line(lambda: list(batches(ready.train, batch_size=4, seed=0, repeat=False)), "train-00001.array_record")
    other = tmp_path / "out" / "train-00015.array_record"  # of the same size, with fewer blocks
    assert other.stat().st_size == len(data)
    for content in (b"\0" * len(data), data[:65536] + b"\0" * (len(data) - 65536), other.read_bytes()):
        shard.write_bytes(content)
        one_line(lambda: load(config_of(f"prepared:{tmp_path}/out")), "train-00001.array_record")


def test_flags_of_prepare_are_the_fields_of_the_sources(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": f"text {i} " * 9}) + "\n" for i in range(40)))
    command = [f"--source=jsonl:{tmp_path}/a.jsonl", "--tokenizer=bytes", "--seq-len=16", f"--out={tmp_path}/out"]
    assert prepare.main([*command, "--field=body", "--val-fraction=.2"]) == 0
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert settings["source"] == f"jsonl:{tmp_path}/a.jsonl" and settings["field"] == "body"
    capsys.readouterr()
    for flags, words in (
        (["--train-split=test"], "got train_split for 'jsonl', wanted field"),
        ([f"--source=text:{tmp_path}/*", "--field=x"], "got field for 'text', wanted none"),
    ):
        assert prepare.main([*command, *flags]) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "out" / "manifest.json").write_text("[]")
    assert prepare.main([*command, "--field=body", "--val-fraction=.2"]) == 2
    assert "got an unreadable" in capsys.readouterr().err
