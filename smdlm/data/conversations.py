"""Conversations to fine-tune on, one record each: JSON lines, Parquet files, or a data set saved by Hugging Face.

A record has its turns, [{'role': .., 'content': ..}, ..], in one field. The last turn of the assistant is the response
that is learned; what stands before it is the prompt, what stands behind it is left out.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smdlm.data import records
from smdlm.data.documents import Document, NoText
from smdlm.data.readers import UNPACK, matching_files, printable, read_records, sizes
from smdlm.files import local_path, one_line

JSON_LINES = (".jsonl", *UNPACK)


@dataclass(frozen=True)
class Chat:
    """config.data.source 'chat:PATH': fine-tuning on the responses of conversations.

    Attributes:
      path: files (a pattern of .jsonl, plain or packed, .parquet or .arrow), or a folder of .arrow files as
        `Dataset.save_to_disk` writes it.
      field: name of the turns in a record.
      buckets: lengths to which conversations are padded, joined by commas, the last of them data.seq_len ('' is that
        alone). Every batch is of one length, and every length is one compiled program.
      min_response: tokens below which a response is left out.
      supervise_pads: whether the EOS tokens that fill up a row are noised and learned like its response, so that the
        model learns where to end (as Dream does); otherwise nothing attends to them.
    """

    path: str
    field: str = "messages"
    buckets: str = ""
    min_response: int = 5
    supervise_pads: bool = True

    def __post_init__(self):
        local_path("data.source", self.path)
        if not self.field:
            raise ValueError("data.field: got '', wanted the name of the turns, e.g. 'messages'")
        if self.min_response < 1:
            raise ValueError(f"data.min_response: got {self.min_response}, wanted at least 1 token")

    def lengths(self, seq_len: int) -> tuple[int, ...]:
        """The buckets, ascending. ValueError unless they are numbers that end in seq_len."""
        texts = self.buckets.split(",") if self.buckets else [str(seq_len)]
        found = [int(text) if text.strip().isdigit() else 0 for text in texts]
        if found != sorted(set(found)) or found[0] < 2 or found[-1] != seq_len:
            raise ValueError(
                f"data.buckets: got {self.buckets!r}, wanted ascending lengths of at least 2, joined by commas, the "
                f"last of them data.seq_len = {seq_len}"
            )
        return tuple(found)

    def files(self) -> list[tuple[str, Path]]:
        folder = local_path("data.source", self.path)
        if not folder.is_dir():
            return matching_files("data.source", self.path)
        if (folder / "dataset_dict.json").is_file():
            raise ValueError(f"data.source: got {self.path}, which holds several splits, wanted one of its folders")
        return matching_files("data.source", f"{self.path}/*.arrow")

    def documents(self) -> Iterator[Document]:
        """Every record; `read` gives its turns. ValueError if there are fewer than two."""
        found = self._documents()
        head = list(itertools.islice(found, 2))
        if len(head) < 2:
            got = f"{len(head)} conversations in {printable(self.path)}"
            raise ValueError(f"data.source: got {got}, wanted at least two: one to train and one to validate on")
        yield from itertools.chain(head, found)

    def _documents(self) -> Iterator[Document]:
        for name, path in self.files():
            for number, read in _records(path):
                key = f"{name}:{number}"
                yield Document(key, functools.partial(self._turns, printable(key), read))

    def _turns(self, key: str, read: Any) -> list[dict[str, Any]]:
        """Up to the last turn of the assistant. NoText where the record is no such conversation."""
        record = read(key)
        turns = record.get(self.field) if isinstance(record, Mapping) else None
        if isinstance(record, Mapping) and not isinstance(turns, list):
            kinds = {name: type(value).__name__ for name, value in sorted(record.items())}
            raise NoText(f"data: got fields {kinds} at {key}, wanted turns in {self.field!r}: set data.field")
        if not turns or not all(isinstance(turn, Mapping) for turn in turns):
            raise NoText(f"data: got no turns at {key}, wanted [{{'role': .., 'content': ..}}, ..]")
        turns = [{name: value for name, value in turn.items() if value is not None} for turn in turns]
        answers = [i for i, turn in enumerate(turns) if turn.get("role") == "assistant"]
        if not answers or not answers[-1]:
            raise NoText(f"data: got no turn of the assistant behind another one at {key}, wanted a response to learn")
        turns = turns[: answers[-1] + 1]
        if any(turn.get("role") == "tool" or turn.get("tool_calls") for turn in turns):
            raise NoText(f"data: got a call of tools at {key}, wanted turns of text")
        return turns

    def identity(self) -> str:
        return sizes(self.files())


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, function of the record's name that reads it) of a file."""
    if path.suffix in records.SUFFIXES:
        numbers = itertools.count()
        for rows in records.groups(path):
            yield from ((next(numbers), functools.partial(_row, rows, index)) for index in range(len(rows)))
    elif path.suffix in JSON_LINES:
        for number, line in read_records(path):
            yield number, functools.partial(_parsed, line)
    else:
        wanted = ", ".join((*JSON_LINES, *records.SUFFIXES))
        raise ValueError(f"data.source: got {printable(path)}, wanted files of conversations ({wanted})")


def _row(rows: records.Rows, index: int, key: str) -> Any:
    return rows.row(index)


def _parsed(line: bytes, key: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data: got no JSON at {key} ({one_line(error)}), wanted an object on every line") from error
