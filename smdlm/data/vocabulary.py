"""The Tokenizer every other module sees, and how one is made from a backend of the `tokenizers` library."""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers

END_OF_TEXT = "<|endoftext|>"
PIECE_CHARS = 2**16  # `tokenizers` needs over 100 bytes of memory per byte of one input, so long texts are cut
CALL_CHARS = 2**20


@dataclass(frozen=True)
class Vocabulary:
    """The sizes of a `Tokenizer` without its files: all that a model needs to be built. Fields as there."""

    model_vocab_size: int
    mask_id: int
    bos_id: int


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary with its encoder.

    Attributes:
      name: the spec it was made from.
      pieces: for each id the bytes of text it stands for; b'' for special tokens.
      eos_id, bos_id: ends and begins a document (the same id in most vocabularies).
      mask_id: `vocab_size`, or the id of the vocabulary's own mask token.
      encode_batch: list of texts -> list of int32 arrays [n_tokens], without any special token added.
    """

    name: str
    pieces: tuple[bytes, ...]
    eos_id: int
    bos_id: int
    mask_id: int
    encode_batch: Callable[[list[str]], list[np.ndarray]]

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
        """int32 [n_tokens]."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids: '[MASK]' for the mask and for ids out of range, a newline for EOS and BOS.

        Other special tokens are left out; bytes that are not UTF-8 become U+FFFD.
        """
        return b"".join(self._shown(int(i)) for i in ids).decode("utf-8", errors="replace")

    def _shown(self, i: int) -> bytes:
        if i == self.mask_id or not 0 <= i < len(self.pieces):
            return b"[MASK]"
        return b"\n" if i in (self.eos_id, self.bos_id) else self.pieces[i]


def wrap(name: str, backend: tokenizers.Tokenizer, eos: str, bos: str, mask: str | None) -> Tokenizer:
    """A Tokenizer from a backend and the names of its special tokens; without a mask of its own one is appended."""
    state = json.loads(backend.to_str())
    outside = json.dumps([state["pre_tokenizer"], state["decoder"]])
    byte_level = '"ByteLevel"' in outside
    special = {token["id"] for token in state["added_tokens"] if token["special"]}
    special |= {backend.token_to_id(token) for token in (eos, bos, mask) if token}
    literal = {token["id"] for token in state["added_tokens"]}
    to_byte = _byte_of_character()

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

    vocabulary = backend.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        pieces[i] = piece(token, i)

    def encode_batch(texts: list[str]) -> list[np.ndarray]:
        parts = [(i, part) for i, text in enumerate(texts) for part in (cut(text) if byte_level else [text])]
        found: list[list[np.ndarray]] = [[] for _ in texts]
        for group in grouped(parts, lambda item: len(item[1]), CALL_CHARS):
            encodings = backend.encode_batch_fast([part for _, part in group], add_special_tokens=False)
            for (i, _), encoding in zip(group, encodings, strict=True):
                found[i].append(np.array(encoding.ids, np.int32))
        return [np.concatenate(arrays) for arrays in found]

    mask_id = backend.token_to_id(mask) if mask else len(pieces)
    ids = {"eos_id": backend.token_to_id(eos), "bos_id": backend.token_to_id(bos), "mask_id": mask_id}
    return Tokenizer(name, tuple(pieces), **ids, encode_batch=encode_batch)


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


def _byte_of_character() -> dict[str, bytes]:
    """The byte-level alphabet: printable Latin-1 stands for itself, other bytes for the characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): bytes([b]) for b in printable} | {chr(256 + n): bytes([b]) for n, b in enumerate(others)}


def cut(text: str) -> list[str]:
    """Cuts before a lone space between two words, where no byte-level split pattern ever joins the two sides."""
    pieces, start, lone_space = [], 0, re.compile(r"(?<=\S) (?=\S)")
    while len(text) - start > PIECE_CHARS and (found := lone_space.search(text, start + PIECE_CHARS)):
        pieces.append(text[start : found.start()])
        start = found.start()
    return [*pieces, text[start:]]


def read_backend(file: Path) -> tokenizers.Tokenizer:
    """The backend in a tokenizer.json; ValueError when it cannot be read."""
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise ValueError(f"tokenizer: got an unreadable {file} ({error}), wanted a tokenizer.json") from error
