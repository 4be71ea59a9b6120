"""Where documents come from. A new source is one class here with its entry in SOURCES.

A source is a frozen dataclass behind the protocol `Source`. Its first field is what stands behind the colon of
config.data.source ('jsonl:owt/*.jsonl' is Jsonl('owt/*.jsonl')); its other fields are fields of config.data beside it,
and flags of `smdlm.data.prepare`.
"""

import dataclasses
import functools
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from smdlm.data import corpus, lab
from smdlm.data.readers import matching_files, printable, read_records, read_text, sizes
from smdlm.files import local_path, one_line

MAX_FILE_BYTES = 2**30


class NoText(ValueError):
    """A record without text where one was to be expected; among others with text it is left out and counted."""


class Document(NamedTuple):
    """A document that is not read yet.

    key: a name that does not depend on the machine; the split hashes it.
    read: the text. NoText where it is missing, '' where a document rightly has none (a module without docstrings), and
      another ValueError, with the document's name in it, where it is damaged.
    split: 'train' or 'val' where the source says so.
    """

    key: str
    read: Callable[[], str]
    split: str = ""


class Source(Protocol):
    """An ordered set of documents. Made while a config is read: it looks at no file before `documents`."""

    def documents(self) -> Iterator[Document]:
        """All documents, cheaply: without parsing or decoding them. ValueError if there are none."""
        ...

    def identity(self) -> str:
        """Changes when the documents do, as far as names and sizes tell."""
        ...


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
class Text:
    """Plain UTF-8 files, each of them one document."""

    glob: str

    def __post_init__(self):
        local_path("data.source", self.glob)

    def documents(self) -> Iterator[Document]:
        files = matching_files("data.source", self.glob)
        for name, path in files:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ValueError(
                    f"data.source: got a file of {path.stat().st_size / 2**30:.1f} GiB ({printable(name)}), wanted at "
                    "most 1: a text file is one document and is read whole; split it or write one JSON line per "
                    "document"
                )
        for name, path in files:
            yield Document(name, functools.partial(self._read, path))

    def _read(self, path: Path) -> str:
        text = read_text(path)
        if not text.strip():
            raise NoText(f"data: got an empty file {printable(path)}, wanted text")
        return text

    def identity(self) -> str:
        return sizes(matching_files("data.source", self.glob))


@dataclass(frozen=True)
class Jsonl:
    """Files of JSON lines (.jsonl, .jsonl.gz), each line one document: an object with its text under `field`.

    What stands inside a JSON string is the author's text and stays as it is, carriage returns too.
    """

    glob: str
    field: str = "text"

    def __post_init__(self):
        local_path("data.source", self.glob)
        if not self.field:
            raise ValueError("data.field: got '', wanted the name of the text, e.g. 'text'")

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

    def identity(self) -> str:
        return sizes(matching_files("data.source", self.glob))


@dataclass(frozen=True)
class Tfds:
    """A TensorFlow Datasets name, read without TensorFlow; downloaded and prepared by tfds at first use.

    Attributes:
      name: of the data set.
      field: name of the text in an example.
      train_split: the split to read.
      val_split: the split that is validation; '' takes validation from `train_split`.
    """

    name: str
    field: str = "text"
    train_split: str = "train"
    val_split: str = ""

    def __post_init__(self):
        if not self.field or not self.train_split:
            raise ValueError("data.field, data.train_split: got an empty name, wanted e.g. 'text' and 'train'")

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
        return text_of(example, self.field, key)

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


SOURCES: dict[str, type[Source]] = {"stdlib": Stdlib, "text": Text, "jsonl": Jsonl, "tfds": Tfds, "lab": Lab}


def text_of(record: Any, field: str, name: str) -> str:
    """The text of a record of fields; NoText, which lists its fields, if it has none."""
    value = record.get(field) if isinstance(record, Mapping) else None
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if isinstance(value, str) and value.strip():
        # JSON can spell lone surrogates, which UTF-8 cannot hold.
        return value.encode("utf-8", errors="replace").decode("utf-8")
    if isinstance(value, str):
        got = f"empty text in {field!r}"
    elif isinstance(record, Mapping):
        got = f"fields { {key: type(value).__name__ for key, value in sorted(record.items())} }"
    else:
        got = f"a {type(record).__name__}"
    raise NoText(f"data: got {got} at {name}, wanted text in {field!r}: set data.field")


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
