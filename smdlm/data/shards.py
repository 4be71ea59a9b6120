"""What a preparation writes: ArrayRecord shards, whole or not at all, and an account of the documents in them."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from array_record.python import array_record_module

from smdlm import files


@dataclass(frozen=True)
class Tally:
    """Documents that were read, so that two copies of a corpus can be told apart.

    digest: sum of the SHA-256 of their texts modulo 2^256, in hex: the same in any order and any kind of file. Against
      damage and mistakes, not against somebody who forges texts.
    """

    documents: int = 0
    characters: int = 0
    digest: str = "0" * 64

    def add(self, text: str) -> "Tally":
        return self + Tally(1, len(text), hashlib.sha256(text.encode("utf-8")).hexdigest())

    def __add__(self, other: "Tally") -> "Tally":
        digest = (int(self.digest, 16) + int(other.digest, 16)) % 2**256
        return Tally(self.documents + other.documents, self.characters + other.characters, f"{digest:064x}")


class Shard:
    """A shard under a temporary name until it is complete."""

    def __init__(self, folder: Path, name: str):
        self.name, self.blocks = name, 0
        self._file, self._temporary = folder / name, folder / f"{name}.tmp"
        # A group is one record, so that reading a block costs one block; ids hardly compress, and without
        # compression the size of the output is known beforehand.
        self._writer = array_record_module.ArrayRecordWriter(str(self._temporary), "group_size:1,uncompressed")

    def write(self, block: bytes) -> None:
        with self._errors_of_disk():
            self._writer.write(block)
        self.blocks += 1

    def close(self) -> dict:
        """Completes the file and returns its line of the manifest. OSError on a full disk."""
        with self._errors_of_disk():
            self._writer.close()
        os.replace(self._temporary, self._file)
        size = self._file.stat().st_size
        return {"file": self.name, "blocks": self.blocks, "bytes": size, "sha256": files.sha256(self._file)}

    def discard(self) -> None:
        """Leaves nothing behind of a shard that will not be completed."""
        with contextlib.suppress(RuntimeError):
            self._writer.close()
        self._temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors_of_disk(self) -> Iterator[None]:
        """ArrayRecord says RuntimeError where its file cannot be written."""
        try:
            yield
        except RuntimeError as error:
            self._temporary.unlink(missing_ok=True)
            raise OSError(f"{self._file}: {files.one_line(error)}; the same command continues") from error
