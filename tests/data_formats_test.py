"""Every form in which people hold a corpus gives the same documents; a damaged one is one line."""

import bz2
import gzip
import io
import json
import lzma
import sys
import tarfile
import types
import zipfile

import pytest
from data_helpers import config_of

from smdlm.data import archives, prepare, records
from smdlm.data.readers import matching_files
from smdlm.data.sources import make_source
from smdlm.data.split import with_splits
from smdlm.data.text import load

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import ipc, parquet  # noqa: E402

TEXTS = [f"Document {i} says hello,\n\nand then {i * i} more things." for i in range(60)]
LINES = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()


def packed_zst(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": packed_zst}


def tar(members):
    """{name: bytes} as a tar file."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, text in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return content.getvalue()


def openwebtext(texts, per=7):
    """The outer tar file: xz-packed tar files of texts, seven each, with more blank lines than are kept."""
    inner = {}
    for start in range(0, len(texts), per):
        part = {f"{i:07d}-ab.txt": (text.replace("\n\n", "\n\n\n\n") + "\n").encode() for i, text in
                enumerate(texts[start : start + per], start)}  # fmt: skip
        inner[f"openwebtext/urlsf_subset00-{start:04d}_data.xz"] = lzma.compress(tar(part))
    return tar(inner)


def table(texts):
    return pyarrow.table({"id": list(range(len(texts))), "text": texts})


def write_arrow(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = table(texts)
    with ipc.new_stream(path, rows.schema) as stream:
        stream.write_table(rows, max_chunksize=9)
    return path


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """{name: spec} of the same corpus in every form."""
    folder = tmp_path_factory.mktemp("forms")
    found = {}
    for suffix, pack in PACK.items():
        (folder / f"lines.jsonl{suffix}").write_bytes(pack(LINES))
        found[f"jsonl{suffix}"] = f"jsonl:{folder}/lines.jsonl{suffix}"
        (folder / f"text{suffix}").mkdir()
        for i, text in enumerate(TEXTS):
            (folder / f"text{suffix}" / f"{i:03d}.txt{suffix}").write_bytes(pack(text.encode()))
        found[f"text{suffix}"] = f"text:{folder}/text{suffix}/*"
        (folder / f"openwebtext.tar{suffix}").write_bytes(pack(openwebtext(TEXTS)))
        found[f"openwebtext{suffix}"] = f"openwebtext:{folder}/openwebtext.tar{suffix}"
    (folder / "unpacked").mkdir()
    with tarfile.open(folder / "openwebtext.tar") as archive:
        archive.extractall(folder / "unpacked", filter="data")
    found["openwebtext unpacked once"] = f"openwebtext:{folder}/unpacked/openwebtext/*.xz"
    for number, part in enumerate((TEXTS[:40], TEXTS[40:])):
        (folder / "hub" / "plain_text").mkdir(parents=True, exist_ok=True)
        name = folder / "hub" / "plain_text" / f"train-{number:05d}-of-00002.parquet"
        parquet.write_table(table(part), name, row_group_size=9)
        write_arrow(folder / "saved" / f"data-{number:05d}-of-00002.arrow", part)
        write_arrow(folder / "splits" / "train" / f"data-{number:05d}-of-00002.arrow", part)
        write_arrow(folder / "cache" / "0.0.0" / f"corpus-train-{number:05d}-of-00002.arrow", part)
    (folder / "saved" / "state.json").write_text("{}")
    write_arrow(folder / "splits" / "test" / "data-00000-of-00001.arrow", ["another"] * 5)
    write_arrow(folder / "cache" / "0.0.0" / "corpus-test.arrow", ["another"] * 5)
    found["parquet"] = f"parquet:{folder}/hub/plain_text/*.parquet"
    return found | {f"hf {name}": f"hf:{folder}/{name}" for name in ("hub", "saved", "splits", "cache")}


def texts_of(spec, **fields):
    return [document.read() for document in make_source(spec, fields).documents()]


def test_every_form_holds_the_same(forms):
    assert len(forms) == 21
    for name, spec in forms.items():
        assert texts_of(spec) == TEXTS, name
        keys = [document.key for document in make_source(spec, {}).documents()]
        assert len(set(keys)) == len(keys) and not any(key.startswith("/") for key in keys), name


def test_a_split_of_a_folder_validates(forms):
    for name in ("hf splits", "hf cache"):
        config = config_of(forms[name], val_split="test")
        owners = [owner for owner, _ in with_splits(config)]
        assert owners == ["train"] * 60 + ["val"] * 5, name
    assert texts_of(forms["hf splits"], train_split="test") == ["another"] * 5
    with pytest.raises(ValueError, match="got no split 'train' in .*wanted one that is there: set data.train_split"):
        texts_of(forms["hf saved"], val_split="dev")


def test_the_name_of_a_file_decides_before_that_of_its_folder(tmp_path):
    for name, text in (("train", "one"), ("test", "two")):
        write_arrow(tmp_path / "train" / f"{name}-00000-of-00001.arrow", [text])
    assert texts_of(f"hf:{tmp_path}") == ["one"] and texts_of(f"hf:{tmp_path}", train_split="test") == ["two"]


def test_preparations_of_all_forms_say_the_same_hash(forms, tmp_path, capsys):
    """The shards, too: order and text decide. Another order changes the splits, and not the sum of both."""
    said = []
    for name in ("parquet", "openwebtext.xz", "jsonl.zst"):
        out = tmp_path / name
        flags = ["--tokenizer=bytes", "--seq-len=16", "--val-documents=10", f"--out={out}"]
        assert prepare.main([f"--source={forms[name]}", *flags]) == 0
        said.append([line for line in capsys.readouterr().out.splitlines() if "sha256" in line])
    train, val, both, _ = said[0]
    assert said == [said[0]] * 3 and train.split()[:3] == ["train", "50", "documents"] and val.split()[1] == "10"
    lines = LINES.splitlines(keepends=True)
    (tmp_path / "reversed.jsonl").write_bytes(b"".join(reversed(lines)))
    assert prepare.main([f"--source=jsonl:{tmp_path}/reversed.jsonl", *flags[:-1], f"--out={tmp_path}/r"]) == 0
    other = [line for line in capsys.readouterr().out.splitlines() if "sha256" in line]
    assert other[2].split()[-1] == both.split()[-1] and other[0].split()[-1] != train.split()[-1]
    (tmp_path / "changed.jsonl").write_bytes(LINES.replace(b"hello", b"hallo", 1))
    assert prepare.main([f"--source=jsonl:{tmp_path}/changed.jsonl", *flags[:-1], f"--out={tmp_path}/c"]) == 0
    assert both.split()[-1] not in capsys.readouterr().out


def test_counting_reads_no_row(forms, monkeypatch):
    """Which documents are the last is found without decoding any; then only the groups that are read are loaded."""
    loaded, load_group = [], records._row_group

    def noting(path, number, columns):
        loaded.append((number, columns))
        return load_group(path, number, columns)

    monkeypatch.setattr(records, "_row_group", noting)
    config = config_of(forms["parquet"], val_documents=3)
    documents = [document for split, document in with_splits(config) if split == "val"]
    assert loaded == [] and [document.read() for document in documents] == TEXTS[-3:]
    assert loaded == [(1, ["text"]), (2, ["text"])]  # of 20 rows in groups of nine


# Damage


def one_line(action):
    with pytest.raises(ValueError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


FORMS = ["jsonl.gz", "jsonl.zst", "jsonl.xz", "jsonl.bz2", "text.zst", "openwebtext", "openwebtext.xz",
         "openwebtext.zst", "parquet", "hf saved"]  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.98])
def test_a_cut_file_is_one_line_and_leaves_no_shard(forms, tmp_path, capsys, name, share):
    kind, _, pattern = forms[name].partition(":")
    _, path = files_of(kind, pattern)[-1]
    content = path.read_bytes()
    cut = tmp_path / path.name
    end = len(content.rstrip(b"\0")) if name == "openwebtext" else len(content)  # behind it a tar file is padded
    cut.write_bytes(content[: int(share * end)] or b"x")
    (tmp_path / "state.json").write_text("{}")
    spec = f"hf:{tmp_path}" if kind == "hf" else f"{kind}:{cut}"
    message = one_line(lambda: texts_of(spec))
    assert path.name in message and "wanted" in message
    flags = ["--tokenizer=bytes", "--seq-len=16", f"--out={tmp_path}/out"]
    assert prepare.main([f"--source={spec}", *flags]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"
    assert {file.suffix for file in (tmp_path / "out").iterdir()} <= {".json"}


def files_of(kind, pattern):
    return matching_files("data.source", f"{pattern}/*.arrow" if kind == "hf" else pattern)


def test_a_tar_file_cut_between_two_members_is_seen(forms, tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(tar({"a.txt": b"x" * 100, "b.txt": b"y" * 100})[:1024])
    assert "without its end" in one_line(lambda: texts_of(f"openwebtext:{path}"))


def test_columns_and_bytes_that_are_no_text(tmp_path):
    rows = table(["a text", None, "another"])
    parquet.write_table(rows, tmp_path / "a.parquet")
    wanted = "got columns 'id', 'text' in .*a.parquet, wanted text in 'body': set data.field"
    for spec in (f"parquet:{tmp_path}/*.parquet", f"hf:{tmp_path}"):
        with pytest.raises(ValueError, match=wanted):
            next(make_source(spec, {"field": "body", **({"train_split": "a"} if spec[:2] == "hf" else {})}).documents())
    with pytest.raises(ValueError, match="at a.parquet:1, wanted text in 'text'"):
        texts_of(f"parquet:{tmp_path}/*.parquet")
    broken = pyarrow.array([b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "b.parquet")
    assert "b.parquet that is not UTF-8" in one_line(lambda: texts_of(f"parquet:{tmp_path}/b.parquet"))
    (tmp_path / "c.tar").write_bytes(tar({"c.txt": b"caf\xe9"}))
    assert "c.tar/c.txt that is not UTF-8 at byte 3" in one_line(lambda: texts_of(f"openwebtext:{tmp_path}/c.tar"))
    (tmp_path / "d.txt.zst").write_bytes(packed_zst(b"caf\xe9"))
    assert "d.txt.zst that is not UTF-8" in one_line(lambda: texts_of(f"text:{tmp_path}/d*"))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("parquet:{}/none*.parquet", "got no file that matches"),
        ("openwebtext:{}/none*", "got no file that matches"),
        ("hf:{}", "got no .parquet or .arrow file in"),
        ("hf:{}/nowhere", "got no .parquet or .arrow file in"),
        ("hf:{}/some", "got no split 'train' in .* \\(files: b.arrow, ..\\), wanted one that is there"),
        ("text8:{}/nowhere", "got no file that matches"),
    ],
)
def test_what_is_not_there(tmp_path, spec, words):
    if spec.endswith("some"):
        write_arrow(tmp_path / "some" / "b.arrow", ["x"])
    with pytest.raises(ValueError, match=words):
        texts_of(spec.format(tmp_path))


def test_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(packed_zst(LINES))
    parquet.write_table(table(TEXTS), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for spec in (f"jsonl:{tmp_path}/a.jsonl.zst", f"parquet:{tmp_path}/a.parquet"):
        assert "pip install 'smdlm[data]'" in one_line(lambda spec=spec: texts_of(spec))


# Recipes


@pytest.mark.parametrize("name", ["text8", "text8.zip", "text8.xz"])
def test_text8(tmp_path, monkeypatch, name):
    monkeypatch.setattr(archives, "TEXT8", 2000)
    content = ("abc defg " * 300)[:1800].encode() + b"v" * 100 + b"t" * 100
    if name.endswith(".zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("text8", content)
    else:
        (tmp_path / name).write_bytes(PACK[name[5:]](content))
    for held_out, letter in (("val", "v"), ("test", "t")):
        train, val = texts_of(f"text8:{tmp_path}/{name}", held_out=held_out)
        assert train == content[:1800].decode() and val == letter * 100
    monkeypatch.setattr(archives, "TEXT8", 2001)
    assert "got 2,000 bytes in" in one_line(lambda: texts_of(f"text8:{tmp_path}/{name}"))
    with pytest.raises(ValueError, match="data.held_out: got 'dev'"):
        make_source("text8:x", {"held_out": "dev"})


def test_recipes_are_the_settings_of_the_literature(forms, tmp_path, capsys):
    read = prepare._config
    owt = read("owt", {"source": "parquet:x"})
    settings = (owt.tokenizer, owt.seq_len, owt.framing, owt.val_documents)
    assert settings == ("gpt2", 1024, "bos_eos", 100_000)
    assert read("owt", {"source": "parquet:x", "val_fraction": 0.5, "seq_len": 8}).val_documents == 0
    text8 = read("text8", {"source": "text8:x"})
    assert (text8.tokenizer, text8.seq_len, text8.source.held_out) == ("bytes", 256, "val")
    lm1b = read("lm1b", {"tokenizer": "hf:bert"})
    assert (lm1b.seq_len, lm1b.framing, lm1b.source.rules, lm1b.source.val_split) == (128, "bos_eos", "lm1b", "test")
    assert "folder of bert-base-uncased" in one_line(lambda: read("lm1b", {}))
    flags = ["--recipe=owt", f"--source={forms['parquet']}", "--tokenizer=bytes", "--seq-len=16", "--val-documents=9"]
    assert prepare.main([*flags, f"--out={tmp_path}/out"]) == 0
    assert "warning: 60 documents; the public copy of OpenWebText has 8,013,769" in capsys.readouterr().err
    data = load(config_of(f"prepared:{tmp_path}/out", framing="bos_eos"))
    assert data.train[0][0] == data.train[0][-1] == 256


def test_rules_undo_tokenisation(monkeypatch):
    examples = [{"text": b'he said : " yes , it \'s done . "'}]
    fake = types.SimpleNamespace(data_source=lambda name, split: examples)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
    assert texts_of("tfds:lm1b", rules="lm1b") != texts_of("tfds:lm1b") == [examples[0]["text"].decode()]
    assert texts_of("tfds:lm1b", rules="lm1b")[0].startswith("he said: \"yes, it's done.")
    with pytest.raises(ValueError, match="data.rules: got 'x', wanted one of 'none', 'wikitext'"):
        make_source("tfds:lm1b", {"rules": "x"})
