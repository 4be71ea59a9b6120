"""Of a text nothing but text: state of inference and special tokens in a tokenizer's files never act on a corpus."""

import json
import logging

import numpy as np
import pytest
import tokenizers
from data_helpers import config_of, stream_of
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from smdlm.data import prepare, vocabulary
from smdlm.data.kept import load_tokenizer, save_tokenizer, tokenizer_of_run
from smdlm.data.text import load
from smdlm.data.tokenizer import make_tokenizer

EOS, MASK, PAD = "<|endoftext|>", "[MASK]", "[PAD]"
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
LINES = [" ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(12)) + "." for i in range(200)]
SPELLS = f"alpha {MASK} beta{EOS}{PAD}gamma [mask] delta"


def byte_level(special):
    """A byte-level BPE with special tokens flagged; [PAD] and the like are spelled by bytes."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    return backend


def word_piece(lower=False, pre=None):
    """Characters and words of LINES, all special tokens in the vocabulary and none of them flagged."""
    letters = sorted(set("".join(LINES) + "[]<|>MASKPDmaskpdentfox") - {" "})
    vocab = ["[UNK]", EOS, MASK, PAD, *(["[mask]"] if lower else []), *letters, *(f"##{c}" for c in letters), *WORDS]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase() if lower else None
    backend.pre_tokenizer = pre or pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece()
    return backend


def unigram():
    """[MASK] is a piece with a good score, as a piece of text is."""
    letters = sorted(set("".join(LINES) + SPELLS) - {" "})
    pieces = [("<unk>", 0.0), (EOS, -1.0), (MASK, -1.0), (PAD, -1.0), ("\u2581", -3.0)]
    pieces += [(f"\u2581{word}", -4.0) for word in WORDS] + [(letter, -6.0) for letter in letters]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def merged():
    """A BPE of whole characters that learned [MASK] as a piece of text like any other."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    backend.train_from_iterator([*LINES, *[f"{MASK} {EOS} {PAD} [mask]"] * 500], trainer)
    assert all(backend.token_to_id(token) is not None for token in (MASK, EOS, PAD))
    return backend


def whole_words():
    """A vocabulary of words; what it lacks is EOS."""
    vocab = {token: i for i, token in enumerate([EOS, MASK, PAD, *WORDS])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=EOS))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def flagged(backend):
    backend.add_special_tokens([EOS, MASK, PAD])
    return backend


def unflagged(backend):
    """Added tokens that a normaliser acts on, none of them flagged as special."""
    backend.add_tokens([tokenizers.AddedToken(name, normalized=True, special=False) for name in (EOS, MASK, PAD)])
    return backend


BACKENDS = {
    "byte level": lambda: byte_level([EOS, MASK, PAD]),
    "byte level, added later": lambda: unflagged(byte_level([])),
    "word piece": word_piece,
    "word piece, flagged": lambda: flagged(word_piece()),
    "word piece, punctuation apart": lambda: word_piece(pre=pre_tokenizers.BertPreTokenizer()),
    "word piece, lower case": lambda: word_piece(lower=True),
    "word piece, lower case, added": lambda: unflagged(word_piece(lower=True)),
    "unigram": unigram,
    "unigram, flagged": lambda: flagged(unigram()),
    "merges": merged,
    "merges, flagged": lambda: flagged(merged()),
    "words": whole_words,
}
NAMES = {"eos_token": EOS, "mask_token": {"content": MASK}, "pad_token": PAD}


def save(folder, backend, names=NAMES, where="tokenizer_config.json", **state):
    """A Hugging Face directory; `state` replaces parts of tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(backend.to_str()) | state))
    (folder / where).write_text(json.dumps(names))
    return f"hf:{folder}"


@pytest.mark.parametrize("where", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("kind", BACKENDS)
def test_special_tokens_in_a_text_are_text(tmp_path, kind, where):
    names = NAMES | ({"mask_token": "[mask]", "additional_special_tokens": [MASK]} if "lower" in kind else {})
    tok = make_tokenizer(save(tmp_path, BACKENDS[kind](), names, where))
    id_of = tok.backend.tokenizer.token_to_id
    special = {tok.mask_id, tok.eos_id, tok.bos_id, id_of(EOS), id_of(MASK), id_of(PAD)} - {None}
    ids = tok.encode(SPELLS)
    assert len(ids) and not special & set(ids.tolist())
    for one in (MASK, "[mask]", EOS, PAD, f"{MASK}{MASK}", f"x{MASK}y"):
        assert not special & set(tok.encode(one).tolist()), one
    if kind != "words":
        shown = SPELLS.lower() if "lower" in kind else SPELLS
        assert tok.decode(ids).replace(" ", "") == shown.replace(" ", "")


@pytest.mark.parametrize("spec", ["bytes", "bpe:280"])
def test_special_tokens_in_a_text_are_text_for_our_own(spec):
    tok = make_tokenizer(spec, LINES)
    ids = tok.encode(SPELLS)
    assert tok.decode(ids) == SPELLS and not np.isin(ids, [tok.eos_id, tok.bos_id, tok.mask_id]).any()


@pytest.mark.parametrize("kind", BACKENDS)
def test_ordinary_text_has_the_ids_of_the_library(tmp_path, kind):
    backend = BACKENDS[kind]()
    tok = make_tokenizer(save(tmp_path, backend))
    for line in LINES[:20]:
        wanted = [i for i in backend.encode(line, add_special_tokens=False).ids if i != tok.eos_id]
        assert tok.encode(line).tolist() == wanted


def test_a_masked_corpus_trains_on_its_text(tmp_path):
    """[MASK] in every third line: not one mask in the blocks, and the text comes back."""
    spec = save(tmp_path / "t", byte_level([EOS, MASK]))
    text = "\n".join(line + (f" {MASK}" if i % 3 == 0 else "") for i, line in enumerate(LINES))
    (tmp_path / "a.txt").write_text(text)
    data = load(config_of(f"text:{tmp_path}/a.txt", tokenizer=spec))
    ids = stream_of(data.train)
    assert not np.isin(ids, [data.tokenizer.mask_id, data.tokenizer.eos_id]).any()
    assert text.startswith(data.tokenizer.decode(ids))


STATES = {
    "truncation": {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        **{"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": EOS},
    },
    "post_processor": json.loads(
        processors.TemplateProcessing(single=f"{EOS} $A {EOS}", special_tokens=[(EOS, 0)]).__getstate__()
    ),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("kind", ["byte level", "word piece", "unigram"])
def test_state_of_inference_does_nothing(tmp_path, kind, name):
    plain = make_tokenizer(save(tmp_path / "plain", BACKENDS[kind]()))
    tok = make_tokenizer(save(tmp_path / "state", BACKENDS[kind](), **{name: STATES[name]}))
    text = "\n".join(LINES)
    np.testing.assert_array_equal(tok.encode(text), plain.encode(text))
    assert len(tok.encode(text)) > 2000 and len(tok.encode("alpha")) < 5


def test_dropout_does_nothing(tmp_path):
    backend = byte_level([EOS])
    model = json.loads(backend.to_str())["model"]
    plain = make_tokenizer(save(tmp_path / "plain", backend))
    tok = make_tokenizer(save(tmp_path / "drop", backend, model=model | {"dropout": 0.5}))
    wanted = plain.encode("\n".join(LINES))
    for _ in range(3):
        np.testing.assert_array_equal(tok.encode("\n".join(LINES)), wanted)


def test_what_a_vocabulary_lacks_is_said(tmp_path, caplog, capsys):
    """The share of characters lost, once, in memory and in preparation; nothing where all can be spelled."""
    documents = [line + (" \u6771\u4eac" if i % 4 == 0 else "") for i, line in enumerate(LINES)]
    (tmp_path / "a.txt").write_text("\n".join(documents), "utf-8")
    total, lost = len("\n".join(documents)), 2 * 50
    for kind in ("word piece", "unigram", "merges", "byte level"):
        spec, source = save(tmp_path / kind.replace(" ", ""), BACKENDS[kind]()), f"text:{tmp_path}/a.txt"
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load(config_of(source, tokenizer=spec))
        said = [record.getMessage() for record in caplog.records]
        command = [f"--source={source}", f"--tokenizer={spec}", "--seq-len=16", f"--out={tmp_path}/{kind}"]
        assert prepare.main(command) == 0
        printed = [line for line in capsys.readouterr().err.splitlines() if "cannot spell" in line]
        wanted = [] if kind == "byte level" else [f"{lost} of {total:,} characters ({100 * lost / total:.2g} %)"]
        assert len(said) == len(printed) == len(wanted)
        assert all(wanted[0] in line and repr(spec) in line for line in said + printed)


def test_a_vocabulary_that_cannot_encode_is_one_line(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({EOS: 0, "alpha": 1}, unk_token="[UNK]"))
    tok = make_tokenizer(save(tmp_path, backend))
    with pytest.raises(ValueError, match="got a text it cannot encode .*mend its files"):
        tok.encode("beta")


def test_control_tokens_that_no_file_names_are_text_too(tmp_path):
    """A bare vocabulary of words: BERT's names mean what they mean there."""
    vocab = {token: i for i, token in enumerate(["[UNK]", "[CLS]", "[SEP]", MASK, PAD, *"[]", *"CLSEPADMUNK", "alpha"])}
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*vocab, *(f"##{c}" for c in "CLSEPADMUNK]")]))}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece()
    tok = make_tokenizer(save(tmp_path, backend, {}))
    text = "alpha [CLS] [SEP] [MASK] [PAD] [UNK]"
    ids = tok.encode(text)
    assert ids.min() > vocab[PAD] and tok.decode(ids).strip() == text


# Kept with a run


def kept_specs(folder):
    return ["bytes", "bpe:280", *(save(folder / str(i), make()) for i, make in enumerate(BACKENDS.values()))]


def test_a_kept_tokenizer_is_the_same_without_its_files(tmp_path):
    for number, spec in enumerate(kept_specs(tmp_path / "files")):
        tok = make_tokenizer(spec, LINES)
        workdir = tmp_path / f"run{number}"
        save_tokenizer(tok, workdir / "tokenizer")
        back = tokenizer_of_run(workdir, spec)
        assert (back.name, back.fingerprint, back.pieces) == (tok.name, tok.fingerprint, tok.pieces)
        assert (back.eos_id, back.bos_id, back.mask_id) == (tok.eos_id, tok.bos_id, tok.mask_id)
        for text in (SPELLS, LINES[0], "caf\u00e9"):
            np.testing.assert_array_equal(back.encode(text), tok.encode(text))
            assert back.decode(tok.encode(text)) == tok.decode(tok.encode(text))


@pytest.mark.parametrize("damage", ["config", "backend", "missing", "changed", "empty"])
def test_a_damaged_kept_tokenizer_is_one_line(tmp_path, damage):
    save_tokenizer(make_tokenizer("bpe:280", LINES), tmp_path / "tokenizer")
    config, backend = tmp_path / "tokenizer" / "tokenizer_config.json", tmp_path / "tokenizer" / "tokenizer.json"
    if damage == "config":
        config.write_bytes(config.read_bytes()[:50])
    elif damage == "backend":
        backend.write_bytes(backend.read_bytes()[:-1])
    elif damage == "missing":
        backend.unlink()
    elif damage == "changed":
        config.write_text(config.read_text().replace("bpe:280", "bytes"))
    else:
        config.unlink()
    with pytest.raises(ValueError, match="tokenizer: got an unreadable .*tokenizer_config.json") as error:
        load_tokenizer(tmp_path / "tokenizer")
    assert "\n" not in str(error.value)


def test_an_older_run_has_the_bpe_it_trained(tmp_path):
    tok = make_tokenizer("bpe:280", LINES, tmp_path)
    assert tokenizer_of_run(tmp_path, "bpe:280").fingerprint == tok.fingerprint
    assert tokenizer_of_run(tmp_path, "bytes").name == "bytes"
    with pytest.raises(ValueError, match="got 0 files bpe-281"):
        tokenizer_of_run(tmp_path, "bpe:281")
    make_tokenizer("bpe:280", LINES[1:], tmp_path)
    with pytest.raises(ValueError, match="got 2 files bpe-280"):
        tokenizer_of_run(tmp_path, "bpe:280")


def test_long_texts_are_counted_in_parts(tmp_path, monkeypatch):
    """A byte-level vocabulary that lacks bytes loses characters wherever the text is cut."""
    vocab = {c: i for i, c in enumerate(sorted({*"abcdefghijklmnopqrstuvwxyz.", "\u0120", EOS}))}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok = make_tokenizer(save(tmp_path, backend))
    texts = [" ".join(LINES[:9]) + " CAPS here", "lower"]
    whole = tok.count_unspelled(texts, tok.encode_batch(texts))
    monkeypatch.setattr(vocabulary, "PIECE_CHARS", 20)
    assert tok.count_unspelled(texts, tok.encode_batch(texts)) == whole == 4
