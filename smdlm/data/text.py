"""From a DataConfig to blocks of token ids, and from blocks to batches that resume and shard exactly."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import logging

from smdlm.data import sft
from smdlm.data.config import DataConfig, Prepared, spec_of
from smdlm.data.conversations import Chat
from smdlm.data.packing import (
    TOKENIZER_FILE,
    ArrayBlocks,
    Packer,
    RecordBlocks,
    block_dtype,
    here,
    prefetched,
    read_manifest,
    too_short,
)
from smdlm.data.readers import key_bytes, printable
from smdlm.data.split import Account, with_splits
from smdlm.data.tokenizer import bpe_tokenizer, make_tokenizer
from smdlm.data.vocabulary import Tokenizer, grouped
from smdlm.files import path_of

__all__ = ["Blocks", "DataConfig", "TextData", "batches", "load"]

Blocks = ArrayBlocks | RecordBlocks
IN_MEMORY_CHARS = 2**31


@dataclass(frozen=True)
class TextData:
    """A data set ready to train on.

    Attributes:
      train, val: sequences of int32 [seq_len].
      tokenizer: what made the ids.
      content_hash: SHA-256 (hex) of the documents and their split (of the shards, for prepared data).
    """

    train: Blocks
    val: Blocks
    tokenizer: Tokenizer
    content_hash: str

    @property
    def row_tokens(self) -> float:
        """Tokens of a training block."""
        return len(self.train[0])

    def train_ids(self, most: int) -> np.ndarray:
        """The first blocks of training one behind the other, about `most` tokens."""
        return np.concatenate([self.train[i] for i in range(min(len(self.train), -(-most // len(self.train[0]))))])

    def train_batches(self, **options: Any) -> Iterator[dict[str, np.ndarray]]:
        """`batches` without an end."""
        return batches(self.train, **options)

    def eval_batches(self, blocks: int, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Once through the first `blocks` blocks of the validation split, in order."""
        chosen = [self.val[i] for i in range(min(blocks, len(self.val)))]
        return batches(chosen, batch_size=min(batch_size, len(chosen)), seed=0, shuffle=False, repeat=False)


def load(config: DataConfig, cache_dir: str | os.PathLike | None = None) -> TextData | sft.ChatData:
    """Reads, splits by document, tokenises and packs; prepared data is only opened, conversations are not packed.

    Args:
      config: the data set.
      cache_dir: where a BPE trained here is kept, None to train it each time.

    Raises:
      ValueError: no file, unreadable or empty text, too little text for a block, data not prepared or damaged.
    """
    if isinstance(config.source, Chat):
        return sft.load(config)
    if isinstance(config.source, Prepared):
        return _load_prepared(config)
    account = Account()
    texts, digest = _read_texts(config, account)
    for split in texts:
        if not texts[split]:
            raise too_short(split, 0, config.seq_len)
    tokenizer = make_tokenizer(config.tokenizer, texts["train"], cache_dir)
    packed = {split: _pack(config, tokenizer, account, split, texts[split]) for split in texts}
    for line in account.warnings(tokenizer):
        logging.warning("data: %s", line)
    return TextData(packed["train"], packed["val"], tokenizer, digest)


def _read_texts(config: DataConfig, account: Account) -> tuple[dict[str, list[str]], str]:
    texts, digest, room = {"train": [], "val": []}, hashlib.sha256(), IN_MEMORY_CHARS
    for split, document in with_splits(config):
        text = account.text(document)
        if not text:
            continue
        texts[split].append(text)
        digest.update(key_bytes(f"{split}\0{document.key}\0{len(text)}\0{text}"))
        room -= len(text)
        if room < 0:
            raise ValueError(
                f"data: got more than {IN_MEMORY_CHARS / 2**30:.0f} Gi characters from "
                f"{printable(spec_of(config.source))!r}, wanted less to hold in memory: run "
                f"{config.prepare_command()} and set data.source to 'prepared:DIR'"
            )
    if not account.read:
        raise account.no_text(printable(spec_of(config.source)))
    return texts, digest.hexdigest()


def _pack(config: DataConfig, tokenizer: Tokenizer, account: Account, split: str, texts: list[str]) -> ArrayBlocks:
    packer, dtype = Packer(tokenizer, config.seq_len, config.framing), block_dtype(tokenizer)
    blocks = [
        packer.add(packer.document(tokens)).astype(dtype)
        for group in grouped(texts, len, 2**22)
        for tokens in account.encode(tokenizer, group)
    ]
    packed = np.concatenate(blocks)
    if not len(packed):
        raise too_short(split, len(packer.waiting), config.seq_len)
    return ArrayBlocks(packed)


def _load_prepared(config: DataConfig) -> TextData:
    folder = here(path_of("data.source", config.source.folder), config.prepare_command())
    manifest = read_manifest(folder, config.prepare_command())
    made = manifest["settings"]
    if config.tokenizer.startswith("bpe:") and made["tokenizer"] == config.tokenizer:
        tokenizer = bpe_tokenizer(int(config.tokenizer[4:]), (), folder / TOKENIZER_FILE)
    elif config.tokenizer.startswith("bpe:"):
        raise ValueError(
            f"data.tokenizer: got {config.tokenizer!r}, wanted {made['tokenizer']!r} as in {printable(folder)}"
        )
    else:
        tokenizer = make_tokenizer(config.tokenizer)
    got = {"seq_len": config.seq_len, "framing": config.framing, "fingerprint": tokenizer.fingerprint}
    wrong = [f"{key} {value!r} (there: {made[key]!r})" for key, value in got.items() if made[key] != value]
    if wrong:
        raise ValueError(
            f"data: got {', '.join(wrong)}, wanted what {printable(folder)} was prepared with (tokenizer "
            f"{made['tokenizer']!r}): change the config or run {config.prepare_command()} with another --out"
        )
    dtype, splits = np.dtype(manifest["dtype"]), manifest["splits"]
    train, val = (RecordBlocks(folder, splits[split], dtype, config.seq_len) for split in ("train", "val"))
    return TextData(train, val, tokenizer, manifest["content_hash"])


class _LocalBatches:
    """The rows `local` of every global batch from `start` on, as a random-access source."""

    def __init__(self, rows: Any, batch_size: int, start: int, local: np.ndarray):
        self._rows, self._batch_size, self._start, self._local = rows, batch_size, start, local
        self._seq_len = len(rows[0])

    def __len__(self) -> int:
        return max(-(-len(self._rows) // self._batch_size) - self._start, 0)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        wanted = (self._start + index) * self._batch_size + self._local
        # Rows past the end exist only in the last batch of a single pass.
        valid = wanted < len(self._rows)
        tokens = np.zeros((len(wanted), self._seq_len), np.int32)
        for row in np.flatnonzero(valid):
            tokens[row] = self._rows[int(wanted[row])]
        return {"tokens": tokens, "valid": valid}


def batches(
    blocks: Blocks,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    shuffle: bool = True,
    repeat: bool = True,
    rows: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """A grain iterator over {'tokens': int32 [B_local, L], 'valid': bool [B_local]}.

    Global batch n is rows n*B .. (n+1)*B of the blocks, shuffled anew each epoch, and depends on (seed, n) alone; a
    process reads only its own rows of it. With `repeat` every row is valid and batches run over the end of an
    epoch; without, the last batch is padded with id 0 and its real rows are marked in 'valid'.

    Args:
      blocks: sequence of int32 [L].
      batch_size: B, rows over all processes.
      seed: of the shuffle, 0 <= seed < 2**32.
      start: number of the first batch to yield, reached without reading those before it.
      shuffle, repeat: both for training, neither for evaluation.
      rows: which rows of every batch are wanted, in 0 .. B - 1; None for all of them.

    Raises:
      ValueError: no blocks, a number out of range.
    """
    if not len(blocks):
        raise ValueError("batches: got no blocks, wanted at least one")
    if batch_size < 1:
        raise ValueError(f"batches: got batch_size {batch_size}, wanted at least 1")
    local = np.arange(batch_size) if rows is None else np.asarray(rows)
    if not len(local) or local.min() < 0 or local.max() >= batch_size:
        raise ValueError(f"batches: got rows {local.tolist()}, wanted some of 0 .. {batch_size - 1}")
    if start < 0:
        raise ValueError(f"batches: got start {start}, wanted the number of a batch, 0 or more")
    import grain

    stream = grain.MapDataset.source(blocks).seed(seed)
    if shuffle:
        stream = stream.shuffle()
    if repeat:
        stream = stream.repeat()
    return prefetched(_LocalBatches(stream, batch_size, start, local))
