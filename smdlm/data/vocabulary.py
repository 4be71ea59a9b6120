"""The Tokenizer every other module sees, and how one is made from a backend of the `tokenizers` library."""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from smdlm.data.backend import Backend, TextEncoder, byte_of_character, is_byte_level

END_OF_TEXT = "<|endoftext|>"
PIECE_CHARS = 2**16  # `tokenizers` needs over 100 bytes of memory per byte of one input, so long texts are cut
CALL_CHARS = 2**20


def checked_text(text: Any) -> str:
    """The text itself. ValueError, one line, if it is none, or has what UTF-8 has not (a shell's bytes become that)."""
    if not isinstance(text, str):
        raise ValueError(f"got {text!r}, wanted a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"got {text[:40]!r}, wanted Unicode text (half of a surrogate pair is none)") from None
    return text


@dataclass(frozen=True)
class Vocabulary:
    """The sizes of a `Tokenizer` without its files: all that a model needs to be built. Fields as there."""

    model_vocab_size: int
    mask_id: int
    bos_id: int


def spells_everything(texts: list[str], encoded: list[np.ndarray]) -> int:
    """count_unspelled of a vocabulary that has every byte."""
    return 0


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary with its encoder.

    Attributes:
      name: the spec it was made from.
      pieces: for each id the bytes of text it stands for; b'' for special tokens.
      eos_id, bos_id: ends and begins a document (the same id in most vocabularies).
      mask_id: `vocab_size`, or the id of the vocabulary's own mask token.
      encode_batch: list of texts -> list of int32 arrays [n_tokens]. All of a text is text: no special token is added,
        and one that the text spells out ('[MASK]') is spelled with ordinary tokens.
      count_unspelled: (texts, their ids) -> number of their characters, blanks aside, that the vocabulary lacks.
      backend: what it was made from; None for bytes.
      chat_template: Jinja source of how a chat is spelled (data/chat.py); '' where the files have none.
    """

    name: str
    pieces: tuple[bytes, ...]
    eos_id: int
    bos_id: int
    mask_id: int
    encode_batch: Callable[[list[str]], list[np.ndarray]]
    count_unspelled: Callable[[list[str], list[np.ndarray]], int] = spells_everything
    backend: Backend | None = None
    chat_template: str = ""

    @property
    def vocab_size(self) -> int:
        """Number of ids without a mask appended behind the vocabulary."""
        return len(self.pieces)

    @property
    def model_vocab_size(self) -> int:
        """Rows an embedding table needs: the vocabulary, and the mask if it lies behind it."""
        return max(self.vocab_size, self.mask_id + 1)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes of text per id, 0 for special tokens."""
        return np.array([len(piece) for piece in self.pieces], np.int32)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the vocabulary: equal fingerprints read the same ids."""
        digest = hashlib.sha256(f"{self.eos_id},{self.bos_id},{self.mask_id},{len(self.pieces)};".encode())
        for piece in self.pieces:
            digest.update(len(piece).to_bytes(4, "little") + piece)
        return digest.hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """int32 [n_tokens]. ValueError, one line, for what is no text."""
        return self.encode_batch([checked_text(text)])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids: '[MASK]' for the mask and for ids out of range, a newline for EOS and BOS.

        Other special tokens are left out; bytes that are not UTF-8 become U+FFFD.
        """
        return b"".join(self._shown(int(i)) for i in ids).decode("utf-8", errors="replace")

    def _shown(self, i: int) -> bytes:
        if i == self.mask_id or not 0 <= i < len(self.pieces):
            return b"[MASK]"
        return b"\n" if i in (self.eos_id, self.bos_id) else self.pieces[i]


def wrap(name: str, backend: Backend, chat_template: str = "") -> Tokenizer:
    """A Tokenizer from a backend; without a mask of its own one is appended."""
    encoder, pieces = TextEncoder(backend), _pieces(backend)

    def parts_of(text: str) -> list[str]:
        return cut(text) if encoder.byte_level else [text]

    def encode_batch(texts: list[str]) -> list[np.ndarray]:
        parts = [(i, part) for i, text in enumerate(texts) for part in parts_of(text)]
        found: list[list[np.ndarray]] = [[] for _ in texts]
        for group in grouped(parts, lambda item: len(item[1]), CALL_CHARS):
            try:
                encoded = encoder.encode([part for _, part in group])
            except Exception as error:  # `tokenizers` raises bare Exception, e.g. for a vocabulary without its [UNK]
                raise ValueError(
                    f"tokenizer {name!r}: got a text it cannot encode ({error}): mend its files"
                ) from error
            for (i, _), ids in zip(group, encoded, strict=True):
                found[i].append(ids)
        return [np.concatenate(arrays) for arrays in found]

    def count_unspelled(texts: list[str], encoded: list[np.ndarray]) -> int:
        suspects = [text for text, ids in zip(texts, encoded, strict=True) if encoder.may_lose(ids)]
        return sum(encoder.unspelled(part) for text in suspects for part in parts_of(text))

    ids = backend.tokenizer.token_to_id
    return Tokenizer(
        name,
        pieces,
        eos_id=ids(backend.eos),
        bos_id=ids(backend.bos),
        mask_id=ids(backend.mask) if backend.mask else len(pieces),
        encode_batch=encode_batch,
        count_unspelled=count_unspelled,
        backend=backend,
        chat_template=chat_template,
    )


def _pieces(backend: Backend) -> tuple[bytes, ...]:
    """For each id the bytes of text it stands for; b'' for special tokens and ids without a token."""
    state = json.loads(backend.tokenizer.to_str())
    outside = json.dumps([state["pre_tokenizer"], state["decoder"]])
    byte_level = is_byte_level(state)
    special = {token["id"] for token in state["added_tokens"] if token["special"]}
    special |= {backend.tokenizer.token_to_id(token) for token in (backend.eos, backend.bos, backend.mask) if token}
    literal = {token["id"] for token in state["added_tokens"]}
    to_byte = byte_of_character()

    def piece(token: str, i: int) -> bytes:
        if i in special:
            return b""
        if i in literal:
            return token.encode("utf-8")
        if byte_level:
            return b"".join(to_byte.get(c) or c.encode("utf-8") for c in token)
        if '"WordPiece"' in outside:  # drops whitespace: a word counts with the one space that decoding puts back
            return token[2:].encode("utf-8") if token.startswith("##") else b" " + token.encode("utf-8")
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode("utf-8")

    vocabulary = backend.tokenizer.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        pieces[i] = piece(token, i)
    return tuple(pieces)


def grouped(items: Iterable, weight: Callable[..., int], limit: int) -> Iterator[list]:
    """Lists of consecutive items whose weights add up to `limit` or just over it."""
    group, total = [], 0
    for item in items:
        group.append(item)
        total += weight(item)
        if total >= limit:
            yield group
            group, total = [], 0
    if group:
        yield group


def cut(text: str) -> list[str]:
    """Cuts before a lone space between two words, where no byte-level split pattern ever joins the two sides."""
    pieces, start, lone_space = [], 0, re.compile(r"(?<=\S) (?=\S)")
    while len(text) - start > PIECE_CHARS and (found := lone_space.search(text, start + PIECE_CHARS)):
        pieces.append(text[start : found.start()])
        start = found.start()
    return [*pieces, text[start:]]
