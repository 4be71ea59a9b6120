"""Blocks: documents joined by EOS, cut to one length, kept in memory or in ArrayRecord shards."""

import bisect
import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from smdlm import files
from smdlm.data.readers import printable
from smdlm.data.vocabulary import Tokenizer
from smdlm.files import one_line

MANIFEST = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"


class Packer:
    """Turns a stream of documents into blocks; what does not fill a block waits for the next document.

    'stream': a block is the next seq_len tokens. 'bos_eos': BOS, the next seq_len - 2 tokens, EOS.
    """

    def __init__(self, tokenizer: Tokenizer, seq_len: int, framing: str):
        self.bos_id, self.eos_id, self.framed = tokenizer.bos_id, tokenizer.eos_id, framing == "bos_eos"
        self.payload = seq_len - 2 if self.framed else seq_len
        self.waiting = np.zeros(0, np.int32)

    def document(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens of a document as they stand in the stream: with EOS behind them."""
        return np.append(tokens, np.int32(self.eos_id))

    def add(self, tokens: np.ndarray) -> np.ndarray:
        """int32 [n_blocks, seq_len]: the blocks that these tokens of the stream complete."""
        stream = np.concatenate([self.waiting, tokens])
        count = len(stream) // self.payload
        self.waiting = stream[count * self.payload :]
        blocks = stream[: count * self.payload].reshape(count, self.payload)
        if self.framed:
            blocks = np.pad(blocks, ((0, 0), (1, 1)), constant_values=((0, 0), (self.bos_id, self.eos_id)))
        return blocks


def block_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest unsigned type that holds every id."""
    return np.dtype(np.uint16 if tokenizer.model_vocab_size <= 2**16 else np.uint32)


def too_short(split: str, tokens: int, seq_len: int) -> ValueError:
    """The error for a split that does not fill one block."""
    return ValueError(
        f"data: the {split} split has {tokens} tokens, a block needs {seq_len}: give more text, a smaller seq_len or "
        "another share of validation (val_fraction, val_documents)"
    )


class ArrayBlocks(Sequence):
    """Blocks in memory, stored small; each is read as int32 [seq_len]."""

    def __init__(self, blocks: np.ndarray):
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._blocks[index].astype(np.int32)


class RecordBlocks(Sequence):
    """Blocks in ArrayRecord shards, one record each; each is read as int32 [seq_len]."""

    def __init__(self, folder: Path, shards: list[dict], dtype: np.dtype, seq_len: int):
        """shards: their lines of the manifest."""
        self._dtype, self._seq_len = dtype, seq_len
        self._files = [folder / shard["file"] for shard in shards]
        self._shards = [_open_shard(file, shard["blocks"]) for file, shard in zip(self._files, shards, strict=True)]
        self._ends = list(itertools.accumulate(map(len, self._shards)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        """ValueError that names the shard if it is damaged."""
        if not 0 <= index < len(self):  # a sequence ends with IndexError
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        shard, file = self._shards[number], self._files[number]
        with _naming(file):
            record = shard[index - self._ends[number] + len(shard)]
        if len(record) != self._seq_len * self._dtype.itemsize:
            raise _damaged(file, f"a block of {len(record)} bytes")
        return np.frombuffer(record, self._dtype).astype(np.int32)


def _open_shard(file: Path, blocks: int) -> Sequence[bytes]:
    import grain

    with _naming(file):
        shard = grain.sources.ArrayRecordDataSource([str(file)])
    if len(shard) != blocks:  # sizes are padded, so that many shards have the same
        raise _damaged(file, f"{len(shard)} blocks instead of {blocks}")
    return shard


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Whatever the reader of ArrayRecord raises inside becomes a ValueError that names the shard."""
    try:
        yield
    except Exception as error:
        raise _damaged(file, one_line(error)) from error


def _damaged(file: Path, cause: str) -> ValueError:
    return ValueError(
        f"data: got a damaged shard {printable(file)} ({cause}), wanted what was prepared: python -m "
        f"smdlm.data.prepare --verify --out={printable(file.parent)} lists all of them; delete the folder and prepare "
        "it again"
    )


def here(folder: Path, prepare_command: str) -> Path:
    """A prepared folder on this machine: itself, or of one in a bucket a copy, made once and checked file by file.

    In ~/.cache/smdlm ($XDG_CACHE_HOME). Reading blocks at random places of a bucket would be a request each.
    """
    if not files.is_url(folder):
        return folder
    try:
        content = (folder / MANIFEST).read_bytes()
        manifest = json.loads(content)
        shards = {shard["file"]: shard["sha256"] for split in ("train", "val") for shard in manifest["splits"][split]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"data: got no {folder}/{MANIFEST} ({one_line(error)}), wanted prepared data: run {prepare_command} with a "
            "local --out and copy that folder there"
        ) from error
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smdlm"
    copy = cache / f"prepared-{manifest['content_hash'][:16]}"
    if not (copy / MANIFEST).exists():
        print(f"copying {len(shards)} shards from {folder} to {copy}", flush=True)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: _fetch(folder / name, copy / name, shards[name]), shards))
        if (folder / TOKENIZER_FILE).exists():
            files.write(copy / TOKENIZER_FILE, (folder / TOKENIZER_FILE).read_bytes())
        files.write(copy / MANIFEST, content)  # last: it makes the copy complete
    return copy


def _fetch(source: Path, target: Path, digest: str) -> None:
    if target.exists() and files.sha256(target) == digest:
        return
    with files.whole(target) as temporary:
        try:
            with source.open("rb") as content, open(temporary, "wb") as file:
                shutil.copyfileobj(content, file, 2**24)
        except OSError as error:
            raise ValueError(f"data: got an unreadable {source} ({one_line(error)}), wanted it") from error
        if files.sha256(temporary) != digest:
            raise ValueError(f"data: got another checksum for {source}, wanted that of its {MANIFEST}: copy it again")


def read_manifest(folder: Path, prepare_command: str) -> dict:
    """The manifest of a prepared folder, its shards checked for presence and size; ValueError otherwise."""
    file = folder / MANIFEST
    if not file.is_file():
        state = "unfinished" if (folder / "progress.json").exists() else "not prepared"
        raise ValueError(f"data: got no {printable(file)} ({state}), wanted prepared data: run {prepare_command}")
    try:
        manifest = json.loads(file.read_text("utf-8"))
        shards = [shard for split in ("train", "val") for shard in manifest["splits"][split]]
        problems = []
        for shard in shards:
            path = folder / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                problems.append(f"{shard['file']} ({'missing' if size is None else f'{size} bytes'})")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"data: got an unreadable {printable(file)} ({error!r}): delete it and run {prepare_command}"
        ) from error
    if problems:
        raise ValueError(
            f"data: got {len(problems)} damaged shards in {printable(folder)} ({', '.join(problems)}), wanted the "
            f"sizes of {MANIFEST}: delete the folder and run {prepare_command}"
        )
    return manifest


def prefetched(source: Any) -> Iterator[Any]:
    """A grain iterator over a random-access source, read ahead by two threads."""
    import grain  # here and not above: half a second, which a program that only samples need not wait for

    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))
