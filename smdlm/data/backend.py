"""Backends of the `tokenizers` library made fit for a corpus: no state of inference, no special token out of a text.

A tokenizer.json holds what a program set for one input at inference (truncation, padding, dropout, the templates of a
post-processor). On a corpus it would cut, pad or randomise every document, so it is taken out where a file is read.

A special token that a document spells out ('[MASK]', '<|endoftext|>') is text. The library would turn it into the id:
because it is an added token, because the vocabulary has it as a word, or because a normaliser (lower case) makes it so.
For encoding, therefore, special tokens bear names in the backend that no text spells, under their own ids.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers

HIDDEN = "\uffff{}\uffff"  # U+FFFF is no character: Unicode keeps it out of texts


@dataclass(frozen=True, eq=False)
class Backend:
    """A backend as its files have it, and what these say of its special tokens.

    Attributes:
      tokenizer: without state of inference (`read`).
      eos, bos, mask: names of tokens in it; no mask where one is appended behind the vocabulary.
      special: names of all other tokens that mean something to a program and are not text.
    """

    tokenizer: tokenizers.Tokenizer
    eos: str
    bos: str
    mask: str | None = None
    special: tuple[str, ...] = ()


def read_backend(file: Path) -> tokenizers.Tokenizer:
    """The backend in a tokenizer.json, without its state of inference; ValueError when it cannot be read."""
    try:
        return plain(file.read_text("utf-8"))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise ValueError(f"tokenizer: got an unreadable {file} ({error}), wanted a tokenizer.json") from error


def plain(text: str) -> tokenizers.Tokenizer:
    """The backend of the text of a tokenizer.json, without its state of inference."""
    state = json.loads(text)
    state |= {"truncation": None, "padding": None, "post_processor": None}
    if state["model"].get("dropout"):
        state["model"]["dropout"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(state))


class TextEncoder:
    """Text -> ids of a backend, none of them special."""

    def __init__(self, backend: Backend):
        state = json.loads(backend.tokenizer.to_str())
        flagged = {token["content"] for token in state["added_tokens"] if token["special"]}
        never = {name for name in (backend.eos, backend.bos, backend.mask, *backend.special) if name}
        unknown = _unknown(state["model"])
        ids = {name: backend.tokenizer.token_to_id(name) for name in never | flagged | {unknown or backend.eos}}
        ids = {name: i for name, i in ids.items() if i is not None}
        _hide(state, ids)
        self._encoder = tokenizers.Tokenizer.from_str(json.dumps(state))
        vocabulary = self._encoder.get_vocab(with_added_tokens=True)
        self._allowed = np.ones(max(vocabulary.values()) + 1, bool)
        # The token for unknown words does come out of a text, unless it is EOS or the like as well.
        self._allowed[[i for name, i in ids.items() if name != unknown or name in never]] = False
        self._unknown = backend.tokenizer.token_to_id(unknown) if unknown else None
        self.byte_level = is_byte_level(state)
        self._spells_all = _spells_all(state, vocabulary)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """int32 [n_tokens] for each text."""
        encodings = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        return [self._text_only(np.array(encoding.ids, np.int32)) for encoding in encodings]

    def _text_only(self, ids: np.ndarray) -> np.ndarray:
        return ids[self._allowed[ids]]

    def may_lose(self, ids: np.ndarray) -> bool:
        """Whether `encode` may have left characters out of a text with these ids."""
        if self._spells_all:
            return False
        says_so = self._unknown is not None and self._allowed[self._unknown]
        return not says_so or self._unknown in ids

    def unspelled(self, text: str) -> int:
        """Characters of a text, blanks aside, that no token spells."""
        encoding = self._encoder.encode(text, add_special_tokens=False)
        spelled = np.array([c.isspace() for c in text], bool)
        for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if self._allowed[i] and i != self._unknown:
                spelled[start:end] = True
        return int((~spelled).sum())


def _hide(state: dict, ids: dict[str, int]) -> None:
    """Gives tokens names that no text spells, in the state of a backend: {name: id}."""
    hidden = {name: HIDDEN.format(i) for name, i in ids.items()}
    for token in state["added_tokens"]:
        if token["content"] in hidden:
            # A normaliser would make another name of it; without an entry the ids of those behind it would change.
            token |= {"content": hidden[token["content"]], "normalized": False, "single_word": False}
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(name, name): i for name, i in model["vocab"].items()}
    else:  # Unigram: a list of [name, score]
        model["vocab"] = [[hidden.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token") in hidden:
        model["unk_token"] = hidden[model["unk_token"]]
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        model["merges"] = [[a, b] for a, b in model["merges"] if not {a, b, a + b[prefix:]} & hidden.keys()]


def _unknown(model: dict) -> str | None:
    """Name of the token that stands for what the vocabulary lacks."""
    if model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _spells_all(state: dict, vocabulary: dict[str, int]) -> bool:
    """Whether every byte has an id, so that every text can be spelled."""
    if is_byte_level(state):
        return byte_of_character().keys() <= vocabulary.keys()
    return bool(state["model"].get("byte_fallback")) and {f"<0x{b:02X}>" for b in range(256)} <= vocabulary.keys()


def is_byte_level(state: dict) -> bool:
    """Whether the tokens of a backend are written in the byte-level alphabet."""
    return '"ByteLevel"' in json.dumps([state["pre_tokenizer"], state["decoder"]])


def byte_of_character() -> dict[str, bytes]:
    """The byte-level alphabet: printable Latin-1 stands for itself, other bytes for the characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): bytes([b]) for b in printable} | {chr(256 + n): bytes([b]) for n, b in enumerate(others)}
