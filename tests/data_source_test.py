"""Sources: the built-in corpus, files, JSON lines and tfds; what each bad input says."""

import gzip
import json
import sys
import types

import pytest
from data_helpers import config_of, stream_of, write_documents

from smdlm.data import corpus, readers, text
from smdlm.data.text import load


def test_corpus_is_ordered_and_has_no_tests():
    names = [name for name, _ in corpus.files()]
    assert names == sorted(set(names)) and len(names) > 300
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}
    assert not any(name.startswith("_sysconfigdata") for name in names)
    validation = sum(corpus.share(name) < 0.05 for name in names) / len(names)
    assert 0.02 < validation < 0.09
    # Changes only when every validation set of the project is to change.
    assert corpus.share("argparse.py") == pytest.approx(0.7861274, abs=1e-6)


def test_prose_is_the_paragraphs_of_sentences_alone(tmp_path):
    """Unwrapped, one a line; without columns, examples, signs and what is shorter than a sentence."""
    kept = "Return the number of items of a list.  Spaces behind\na full stop are no columns."
    others = (
        "name      what the column says of it here",
        ">>> f(1) and then a long line of words",
        "-- * -- | " * 9,
        "Short.",
    )
    (tmp_path / "a.py").write_text(f'"""{kept}\n\n' + "\n\n".join(others) + '\n"""\n')
    found = corpus.document_text(tmp_path / "a.py", "prose")
    assert found == "Return the number of items of a list. Spaces behind a full stop are no columns."


def test_docstrings_are_cleaned_and_in_order(tmp_path):
    source = '"""Top.\n\n    Indented.\n"""\n\nclass A:\n    """  Of A."""\n    def f(self):\n        """Of f."""\n'
    source += 'try:\n    def t():\n        "Of t."\nexcept Exception:\n    def e():\n        "Of e."\n'
    source += 'async def g():\n    r"""Of \\g."""\n\ndef h():\n    return "no docstring"\n'
    (tmp_path / "a.py").write_text(source)
    assert (
        corpus.document_text(tmp_path / "a.py", "docstrings")
        == "Top.\n\nIndented.\n\nOf A.\n\nOf f.\n\nOf t.\n\nOf e.\n\nOf \\g."
    )
    assert corpus.document_text(tmp_path / "a.py", "source") == source
    (tmp_path / "b.py").write_bytes(b'"""caf\xe9"""')
    assert corpus.document_text(tmp_path / "b.py", "source") == ""


def test_stdlib_is_loaded_by_file(monkeypatch):
    some = [(name, path) for name, path in corpus.files() if name.startswith(("json/", "email/"))]
    monkeypatch.setattr(corpus, "files", lambda: some)
    data = load(config_of("stdlib:docstrings", val_fraction=0.3, tokenizer="bpe:400"))
    kept = {"train": [], "val": []}
    for name, one in corpus.documents("docstrings"):
        kept["val" if corpus.share(name) < 0.3 else "train"].append(one)
    assert min(map(len, kept.values())) > 2
    for split, blocks in (("train", data.train), ("val", data.val)):
        joined = "\n".join(kept[split])
        assert joined.startswith(data.tokenizer.decode(stream_of(blocks)))
        assert len(blocks) * 16 > len(data.tokenizer.encode(joined)) - 16


def test_jsonl(tmp_path):
    lines = [json.dumps({"id": i, "body": f"document {i} \ud800"}) + "\n\n" for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(lines[:20]))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("".join(lines[20:]))
    config = config_of(f"jsonl:{tmp_path}/*", field="body", val_documents=10, seq_len=2)
    data = load(config)
    assert data.tokenizer.decode(stream_of(data.train)).splitlines() == [f"document {i} ?" for i in range(30)]
    assert data.tokenizer.decode(stream_of(data.val)).splitlines() == [f"document {i} ?" for i in range(30, 40)]
    with pytest.raises(ValueError, match="got fields {'body': 'str', 'id': 'int'} at a.jsonl:1, wanted text in 'text'"):
        load(config_of(f"jsonl:{tmp_path}/*"))
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text":\n')
    with pytest.raises(ValueError, match="got a line that is not JSON at a.jsonl:2"):
        load(config_of(f"jsonl:{tmp_path}/*.jsonl"))
    (tmp_path / "b.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="got an unreadable .*b.jsonl.gz"):
        load(config_of(f"jsonl:{tmp_path}/*.gz"))


def test_tfds(monkeypatch):
    splits = {split: [{"text": f"{split} {i}".encode()} for i in range(50)] for split in ("train", "test")}

    def data_source(name, split):
        assert name == "tiny"
        return splits[split]

    monkeypatch.setitem(sys.modules, "tensorflow_datasets", types.SimpleNamespace(data_source=data_source))
    data = load(config_of("tfds:tiny", val_split="test", seq_len=2))
    assert data.tokenizer.decode(stream_of(data.train)).splitlines() == [f"train {i}" for i in range(50)]
    assert data.tokenizer.decode(stream_of(data.val)).splitlines() == [f"test {i}" for i in range(50)]
    hashed = load(config_of("tfds:tiny", val_fraction=0.3, seq_len=2))
    shown = [hashed.tokenizer.decode(stream_of(b)).splitlines() for b in (hashed.train, hashed.val)]
    assert not set(shown[0]) & set(shown[1]) and sorted(shown[0] + shown[1]) == sorted(f"train {i}" for i in range(50))
    with pytest.raises(ValueError, match="got fields {'text': 'bytes'} at tiny/train/0, wanted text in 'passage'"):
        load(config_of("tfds:tiny", field="passage"))
    with pytest.raises(ValueError, match="got no 'tfds:tiny' with splits \\['nope'\\] from tfds"):
        load(config_of("tfds:tiny", train_split="nope"))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match="pip install tensorflow-datasets importlib_resources"):
        load(config_of("tfds:tiny"))


def test_bad_corpora(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="got no file that matches '.*none"):
        load(config_of(f"text:{tmp_path}/none*"))
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(ValueError, match="got an empty file .*a.txt, wanted text"):
        load(config_of(f"text:{tmp_path}/*.txt"))
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="got .*a.txt that is not UTF-8 at byte 3"):
        load(config_of(f"text:{tmp_path}/*.txt"))
    source = write_documents(tmp_path / "few")
    with pytest.raises(ValueError, match="data: the val split has [0-9]+ tokens, a block needs 1000"):
        load(config_of(source, seq_len=1000))
    with pytest.raises(ValueError, match="data: the val split has 0 tokens, a block needs 16"):
        load(config_of(source, val_fraction=1e-9))
    monkeypatch.setattr(text, "IN_MEMORY_CHARS", 100)
    with pytest.raises(
        ValueError, match="run python -m smdlm.data.prepare --source='?text:.*--framing=stream --out=DIR"
    ):
        load(config_of(source))
    monkeypatch.setattr(readers, "MAX_FILE_BYTES", 20)
    with pytest.raises(ValueError, match="got a file of more than 0.0 GiB"):
        load(config_of(source))


def test_file_without_permission(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    source = write_documents(tmp_path)
    monkeypatch.setattr(readers, "open", refuse, raising=False)  # chmod does not stop root
    with pytest.raises(ValueError, match="got an unreadable .*d000.txt \\(Permission denied\\)"):
        load(config_of(source))
