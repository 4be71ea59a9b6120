"""Where documents come from. A new source is one class here with its entry in SOURCES.

A source is a frozen dataclass behind the protocol `Source`. Its first field is what stands behind the colon of
config.data.source ('jsonl:owt/*.jsonl' is Jsonl('owt/*.jsonl')); its other fields are fields of config.data beside it,
and flags of `smdlm.data.prepare`.
"""

import dataclasses
import functools
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smdlm.data import corpus, lab, readers, records
from smdlm.data.archives import OpenWebText, Text8
from smdlm.data.detokenise import RULES, detokenise
from smdlm.data.documents import Document, Files, NoText, Source, text_of
from smdlm.data.readers import matching_files, named_files, printable, read_records, read_text, sizes
from smdlm.files import local_path, one_line


@dataclass(frozen=True)
class Stdlib:
    """The standard library of the running Python, a document a file: 'docstrings', their 'prose', or the 'source'."""

    part: str

    def __post_init__(self):
        if self.part not in corpus.PARTS:
            wanted = " | ".join(f"'stdlib:{part}'" for part in corpus.PARTS)
            raise ValueError(f"data.source: got 'stdlib:{self.part}', wanted {wanted}")

    def documents(self) -> Iterator[Document]:
        for name, path in corpus.files():
            yield Document(name, functools.partial(corpus.document_text, path, self.part))

    def identity(self) -> str:
        return f"{platform.python_version()} {sizes(corpus.files())}"


@dataclass(frozen=True)
class Text(Files):
    """UTF-8 files, plain or packed (.gz, .zst, .xz, .bz2), each of them one document."""

    def documents(self) -> Iterator[Document]:
        files = matching_files("data.source", self.glob)
        for name, path in files:
            if path.stat().st_size > readers.MAX_FILE_BYTES:
                raise readers.too_large(name)
        for name, path in files:
            yield Document(name, functools.partial(self._read, path))

    def _read(self, path: Path) -> str:
        text = read_text(path)
        if not text.strip():
            raise NoText(f"data: got an empty file {printable(path)}, wanted text")
        return text


@dataclass(frozen=True)
class Jsonl(Files):
    """Files of JSON lines, plain or packed, each line one document: an object with its text under `field`.

    What stands inside a JSON string is the author's text and stays as it is, carriage returns too.
    """

    field: str = "text"

    def __post_init__(self):
        super().__post_init__()
        _check_field(self.field)

    def documents(self) -> Iterator[Document]:
        for name, path in matching_files("data.source", self.glob):
            for number, line in read_records(path):
                key = f"{name}:{number}"
                yield Document(key, functools.partial(self._read, key, line))

    def _read(self, key: str, line: bytes) -> str:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"data: got a line that is not JSON at {printable(key)} ({error})") from error
        return text_of(record, self.field, printable(key))


def _check_field(field: str) -> None:
    if not field:
        raise ValueError("data.field: got '', wanted the name of the text, e.g. 'text'")


def _rows(name: str, path: Path, field: str, split: str = "") -> Iterator[Document]:
    """The rows of a Parquet or Arrow file as documents; of `field` alone, and none of it before one is read."""
    number = 0
    for rows in records.groups(path, field):
        for index in range(len(rows)):
            key = f"{name}:{number}"
            yield Document(key, functools.partial(_row_text, rows, index, field, key), split)
            number += 1


def _row_text(rows: records.Rows, index: int, field: str, key: str) -> str:
    return text_of(rows.row(index), field, printable(key))


@dataclass(frozen=True)
class Parquet(Files):
    """Parquet files, each row one document with its text in the column `field`."""

    field: str = "text"

    def __post_init__(self):
        super().__post_init__()
        _check_field(self.field)

    def documents(self) -> Iterator[Document]:
        for name, path in matching_files("data.source", self.glob):
            yield from _rows(name, path, self.field)


@dataclass(frozen=True)
class HuggingFace:
    """A data set of Hugging Face on disk: what `save_to_disk` wrote, a folder of its cache, or its Parquet files.

    Attributes:
      folder: of the data set.
      field: the column of the text.
      train_split: the split to read; of a folder without splits, all of it.
      val_split: the split that is validation; '' takes validation from `train_split`.
    """

    folder: str
    field: str = "text"
    train_split: str = "train"
    val_split: str = ""

    def __post_init__(self):
        local_path("data.source", self.folder)
        _check_field(self.field)
        if not self.train_split:
            raise ValueError("data.train_split: got '', wanted the name of a split, e.g. 'train'")

    def documents(self) -> Iterator[Document]:
        for split, files in self._files():
            for name, path in files:
                yield from _rows(name, path, self.field, split)

    def _files(self) -> Iterator[tuple[str, list[tuple[str, Path]]]]:
        """('train', 'val' or '' for both, its files)."""
        folder = local_path("data.source", self.folder)
        found = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
        found = [path for path in found if path.suffix in records.SUFFIXES]
        if not found:
            raise ValueError(
                f"data.source: got no {' or '.join(records.SUFFIXES)} file in {printable(folder)}, wanted a folder "
                "that datasets' save_to_disk wrote, or of Parquet files"
            )
        parts = {self.train_split: "train" if self.val_split else ""}
        parts |= {self.val_split: "val"} if self.val_split else {}
        alone = len(parts) == 1 and (folder / "state.json").is_file()  # saved without splits
        for split, meaning in parts.items():
            # NAME-train.arrow, train-00000-of-00001.parquet; else of a folder: FOLDER/train/data-00000-of-00001.arrow
            of_split = re.compile(rf"(^|[-_.]){re.escape(split)}[-_.]")
            files = found if alone else [path for path in found if of_split.search(path.name)]
            files = files or [path for path in found if split in path.relative_to(folder).parts[:-1]]
            if not files:
                there = ", ".join(sorted(printable(p.relative_to(folder)) for p in found)[:4])
                raise ValueError(
                    f"data.source: got no split {split!r} in {printable(folder)} (files: {there}, ..), wanted one that "
                    "is there: set data.train_split, data.val_split"
                )
            yield meaning, named_files(files)

    def identity(self) -> str:
        return " ".join(f"{split}: {sizes(files)}" for split, files in self._files())


@dataclass(frozen=True)
class Tfds:
    """A TensorFlow Datasets name, read without TensorFlow; downloaded and prepared by tfds at first use.

    Attributes:
      name: of the data set.
      field: name of the text in an example.
      train_split: the split to read.
      val_split: the split that is validation; '' takes validation from `train_split`.
      rules: of detokenise.RULES, that undo how the set separates punctuation ('lm1b'); 'none' leaves texts as they are.
    """

    name: str
    field: str = "text"
    train_split: str = "train"
    val_split: str = ""
    rules: str = "none"

    def __post_init__(self):
        if not self.field or not self.train_split:
            raise ValueError("data.field, data.train_split: got an empty name, wanted e.g. 'text' and 'train'")
        if self.rules not in RULES:
            raise ValueError(f"data.rules: got {self.rules!r}, wanted one of {', '.join(map(repr, RULES))}")

    def documents(self) -> Iterator[Document]:
        for split, name, examples in self._open():
            for index in range(len(examples)):
                key = f"{self.name}/{name}/{index}"
                read = functools.partial(self._read, key, examples, index)
                yield Document(key, read, split if self.val_split else "")

    def _read(self, key: str, examples: Any, index: int) -> str:
        try:
            example = examples[index]
        except Exception as error:  # whatever reading and decoding an example raises
            raise ValueError(f"data: got a damaged example {key} ({one_line(error)}): delete and prepare it") from error
        return detokenise(text_of(example, self.field, key), RULES[self.rules])

    def _open(self) -> list[tuple[str, str, Any]]:
        """('train' or 'val', name of the split, its examples)."""
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ValueError(
                f"data.source: got 'tfds:{self.name}' without TensorFlow Datasets ({error}): "
                "pip install tensorflow-datasets importlib_resources"
            ) from error
        names = {"train": self.train_split} | ({"val": self.val_split} if self.val_split else {})
        try:
            return [(split, name, tfds.data_source(self.name, split=name)) for split, name in names.items()]
        except Exception as error:  # tfds raises its own families of errors for names, splits, network and disk
            raise ValueError(
                f"data.source: got no 'tfds:{self.name}' with splits {list(names.values())} from tfds "
                f"({one_line(error)}), wanted a data set that is on disk or can be downloaded"
            ) from error

    def identity(self) -> str:
        return " ".join(f"{self.name}/{name}:{len(examples)}" for _, name, examples in self._open())


@dataclass(frozen=True)
class Lab:
    """Text of a known distribution: 'markov:SYMBOLS:ORDER:SEED' or 'sums:DIGITS:SEED' (`smdlm.data.lab`)."""

    spec: str

    def __post_init__(self):
        lab.law(self.spec)

    @property
    def law(self) -> lab.Law:
        return lab.law(self.spec)

    def documents(self) -> Iterator[Document]:
        for split in ("train", "val"):
            yield Document(f"{self.spec}/{split}", functools.partial(self.law.text, split), split)

    def identity(self) -> str:
        return self.spec

    def check(self, tokenizer: str, framing: str, seq_len: int) -> None:
        """ValueError unless every token of a block is a symbol, and a block begins where the law does."""
        for name, got, wanted in (("tokenizer", tokenizer, "bytes"), ("framing", framing, "stream")):
            if got != wanted:
                raise ValueError(f"data.{name}: got {got!r} for 'lab:{self.spec}', wanted {wanted!r}")
        if seq_len % self.law.period:
            raise ValueError(
                f"data.seq_len: got {seq_len} for 'lab:{self.spec}', wanted a multiple of {self.law.period} (a line)"
            )


SOURCES: dict[str, type[Source]] = {
    "stdlib": Stdlib,
    "text": Text,
    "jsonl": Jsonl,
    "parquet": Parquet,
    "hf": HuggingFace,
    "openwebtext": OpenWebText,
    "text8": Text8,
    "tfds": Tfds,
    "lab": Lab,
}


def spelled(table: Mapping[str, type]) -> str:
    """How the sources of a table are written: 'text:GLOB' | ..., the first field of each behind its colon."""
    return " | ".join(f"'{kind}:{dataclasses.fields(cls)[0].name.upper()}'" for kind, cls in table.items())


def own_fields(cls: type) -> list[dataclasses.Field]:
    """The fields of a source that stand beside it in config.data: all but the first."""
    return list(dataclasses.fields(cls)[1:])


def make_source(spec: str, given: Mapping[str, str]) -> Source:
    """The source of 'kind:target' with the given fields, for those who have no config. ValueError, one line."""
    kind, _, target = spec.partition(":")
    if kind not in SOURCES or not target:
        raise ValueError(f"data.source: got {spec!r}, wanted {spelled(SOURCES)}")
    own = [field.name for field in own_fields(SOURCES[kind])]
    if unknown := [name for name in given if name not in own]:
        raise ValueError(f"data.source: got {', '.join(unknown)} for {kind!r}, wanted {', '.join(own) or 'none'}")
    return SOURCES[kind](target, **given)
