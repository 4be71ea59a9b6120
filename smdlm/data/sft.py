"""Rows for fine-tuning: conversations as ids, padded with EOS to the length of a bucket, never packed.

A batch holds rows of one bucket, so that there are as many compiled programs as buckets. Beside `tokens` [B, L] and
`valid` [B] it has `frozen` [B, L], what is never masked nor learned (prompts), and, unless padding is learned, `attend`
[B, L], what may be attended to.
"""

from __future__ import annotations

import collections
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from absl import logging

from smdlm.data.config import DataConfig, spec_of
from smdlm.data.documents import Document, NoText
from smdlm.data.packing import block_dtype, prefetched
from smdlm.data.readers import key_bytes, printable
from smdlm.data.split import with_splits
from smdlm.data.tokenizer import make_tokenizer
from smdlm.data.vocabulary import Tokenizer

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Rows(Sequence):
    """Conversations end to end: ids [N], ends [R] of each, tokens of its prompt [R]."""

    ids: np.ndarray
    ends: np.ndarray
    prompts: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """(prompt and response as i32, tokens of the prompt)."""
        begin = self.ends[index - 1] if index else 0
        return self.ids[begin : self.ends[index]].astype(np.int32), int(self.prompts[index])

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each, [R]."""
        return np.diff(self.ends, prepend=0)


@dataclass(frozen=True)
class ChatData:
    """A data set ready to fine-tune on.

    Attributes:
      content_hash: SHA-256 (hex) of the ids and their split.
    """

    config: DataConfig
    train: Rows
    val: Rows
    tokenizer: Tokenizer
    content_hash: str

    @property
    def row_tokens(self) -> float:
        """Tokens of a training row with its padding, on average."""
        lengths = np.array(self.config.source.lengths(self.config.seq_len))
        return float(lengths[np.searchsorted(lengths, self.train.sizes)].mean())

    def train_ids(self, most: int) -> np.ndarray:
        """The first conversations of training one behind the other, about `most` tokens."""
        count = np.searchsorted(np.cumsum(self.train.sizes), most) + 1
        return np.concatenate([self.train[i][0] for i in range(min(len(self.train), int(count)))])

    def train_batches(self, *, batch_size: int, seed: int, start: int, rows: np.ndarray) -> Iterator[Batch]:
        """Batches without an end from number `start` on, of each the given rows; n depends on (seed, n) alone."""
        return prefetched(_Batches(self, batch_size, seed, start, rows))

    def eval_batches(self, blocks: int, batch_size: int) -> Iterator[Batch]:
        """Once through the first `blocks` conversations of validation, in order, all padded to data.seq_len."""
        count = min(blocks, len(self.val))
        size = min(batch_size, count)
        for first in range(0, count, size):
            found = [self.val[i] for i in range(first, min(first + size, count))]
            yield self.padded(found, self.config.seq_len, size)

    def padded(self, rows: Sequence[tuple[np.ndarray, int]], length: int, size: int) -> Batch:
        """The rows as a batch of `size`; the rows that are missing are not valid."""
        tokens = np.full((size, length), self.tokenizer.eos_id, np.int32)
        prompt, end = np.full((size, 1), length), np.full((size, 1), length)
        for i, (ids, prompt_tokens) in enumerate(rows):
            tokens[i, : len(ids)] = ids
            prompt[i], end[i] = prompt_tokens, len(ids)
        frozen, valid = np.arange(length) < prompt, np.arange(size) < len(rows)
        if self.config.source.supervise_pads:
            return {"tokens": tokens, "valid": valid, "frozen": frozen}
        attend = np.arange(length) < end
        return {"tokens": tokens, "valid": valid, "frozen": frozen | ~attend, "attend": attend}


class _Batches:
    """The training batches of a process as a random-access source."""

    def __init__(self, data: ChatData, batch_size: int, seed: int, start: int, local: np.ndarray):
        self._data, self._batch_size, self._seed, self._start, self._local = data, batch_size, seed, start, local
        self._lengths = data.config.source.lengths(data.config.seq_len)
        self._bucket = np.searchsorted(self._lengths, data.train.sizes)
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def __len__(self) -> int:
        return 2**48  # epochs without an end

    def __getitem__(self, index: int) -> Batch:
        epoch, number = divmod(self._start + index, -(-len(self._data.train) // self._batch_size))
        bucket, rows = self._epoch(epoch)[number]
        found = [self._data.train[int(row)] for row in rows[self._local]]
        return self._data.padded(found, self._lengths[bucket], len(found))

    def _make_epoch(self, number: int) -> list[tuple[int, np.ndarray]]:
        """(bucket, rows) of every batch. Rows that do not fill a batch of their bucket go into the next longer one."""
        rng, size = np.random.default_rng([self._seed, number]), self._batch_size
        order, found, waiting = rng.permutation(len(self._bucket)), [], np.zeros(0, int)
        for bucket in range(len(self._lengths)):
            waiting = np.concatenate([waiting, order[self._bucket[order] == bucket]])
            full = len(waiting) // size * size
            found += [(bucket, rows) for rows in waiting[:full].reshape(-1, size)]
            waiting = waiting[full:]
        if len(waiting):  # the last batch is filled up with rows that come twice in this epoch
            found.append((bucket, np.concatenate([waiting, np.resize(order, size - len(waiting))])))
        return [found[i] for i in rng.permutation(len(found))]


# -------------------------------------------------------------------------------------------------------------- loading


def load(config: DataConfig) -> ChatData:
    """Reads, splits, renders and tokenises conversations.

    Raises:
      ValueError: one line; no file, a damaged one, no chat template, no conversation left to train or to validate on.
    """
    from smdlm.data import chat  # its Jinja is needed where conversations are read, and nowhere else

    tokenizer = make_tokenizer(config.tokenizer)
    reader = _Reader(functools.partial(chat.render, chat.ChatTemplate.of(tokenizer)), config)
    digest, rows = hashlib.sha256(), {"train": [], "val": []}
    for split, document in with_splits(config):
        row = reader.row(document)
        if row is not None:
            rows[split].append(row)
            digest.update(key_bytes(f"{split}\0{document.key}\0{row[1]}\0") + row[0].tobytes())
    for split, found in rows.items():
        if not found:
            reason = f": {reader.reasons[0]}" if reader.reasons else ", wanted more, or another share of validation"
            raise ValueError(
                f"data: got no conversation to {split} on from {printable(spec_of(config.source))}{reason}"
            )
    for line in reader.warnings():
        logging.warning("data: %s", line)
    return ChatData(config, *(_joined(rows[split], tokenizer) for split in rows), tokenizer, digest.hexdigest())


def _joined(rows: list[tuple[np.ndarray, int]], tokenizer: Tokenizer) -> Rows:
    ids = np.concatenate([ids for ids, _ in rows]).astype(block_dtype(tokenizer))
    return Rows(ids, np.cumsum([len(ids) for ids, _ in rows]), np.array([prompt for _, prompt in rows]))


class _Reader:
    """Documents -> (ids, tokens of the prompt), with an account of what was left out."""

    def __init__(self, render: Callable[..., np.ndarray], config: DataConfig):
        """render: `chat.render` with its template."""
        self._render, self._config = render, config
        self._left_out: collections.Counter[str] = collections.Counter()
        self._first: dict[str, str] = {}

    @property
    def reasons(self) -> list[str]:
        """Of what was left out, the first record of each kind; the most frequent first."""
        return [self._first[kind] for kind, _ in self._left_out.most_common()]

    def warnings(self) -> list[str]:
        return [
            f"left out {count:,} conversations ({kind}); the first: {self._first[kind]}"
            for kind, count in self._left_out.most_common()
        ]

    def row(self, document: Document) -> tuple[np.ndarray, int] | None:
        """None for a record that is left out. ValueError for a damaged file."""
        key = printable(document.key)
        try:
            turns = document.read()
        except NoText as error:
            return self._leave_out("no response to learn", str(error))
        try:
            prompt, ids = self._render(turns[:-1], answer=True), self._render(turns)
        except ValueError as error:
            return self._leave_out("the template does not take them", f"{error} at {key}")
        if not np.array_equal(ids[: len(prompt)], prompt):
            got = "a template that spells the prompt otherwise once it is answered"
            return self._leave_out("the template changes the prompt", f"data: got {got} at {key}, wanted the same")
        response, seq_len, least = len(ids) - len(prompt), self._config.seq_len, self._config.source.min_response
        if response < least:
            got = f"a response of {response} tokens at {key}"
            return self._leave_out("too short", f"data: got {got}, wanted at least {least} (data.min_response)")
        if len(ids) > seq_len:
            got = f"{len(prompt)} + {response} tokens at {key}"
            return self._leave_out("too long", f"data: got {got}, wanted at most {seq_len} (data.seq_len)")
        return ids, len(prompt)

    def _leave_out(self, kind: str, reason: str) -> None:
        self._left_out[kind] += 1
        self._first.setdefault(kind, reason)
