"""Documents of a source, in a fixed order, each with the split it belongs to; texts are read one at a time."""

import functools
import glob
import gzip
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from smdlm.data import corpus
from smdlm.data.config import DataConfig

MAX_FILE_BYTES = 2**30


class Document(NamedTuple):
    """A document that is not read yet."""

    key: str  # a name that does not depend on the machine; the split hashes it
    ref: object  # what the source needs to read it
    split: str = ""  # 'train' or 'val' where the source says so


class Source(Protocol):
    """An ordered set of documents."""

    def documents(self) -> Iterator[Document]:
        """All documents, cheaply: without parsing or decoding them where that can be avoided."""

    def text(self, document: Document) -> str:
        """The text; ValueError naming the document when it cannot be read."""

    def identity(self) -> str:
        """Changes when the documents do, as far as names and sizes tell."""


def make_source(config: DataConfig) -> Source:
    """The source of a config whose kind is not 'prepared'; ValueError when nothing is there."""
    if config.kind == "stdlib":
        return StdlibSource(config.target)
    if config.kind == "text":
        return TextSource(config.target, 0.0 if config.val_documents else config.val_fraction)
    if config.kind == "jsonl":
        return JsonlSource(config.target, config.field)
    return TfdsSource(config)


def with_splits(config: DataConfig, source: Source) -> Iterator[tuple[str, Document]]:
    """('train' or 'val', document) in the order of the source."""
    first_of_val = None
    if config.val_documents:
        total = _count(source)
        first_of_val = total - config.val_documents
        if first_of_val < 1:
            raise ValueError(f"data.val_documents: got {config.val_documents}, wanted fewer than the {total} documents")
    for index, document in enumerate(source.documents()):
        if document.split:
            yield document.split, document
        elif first_of_val is not None:
            yield ("val" if index >= first_of_val else "train"), document
        else:
            yield ("val" if corpus.share(document.key) < config.val_fraction else "train"), document


@functools.lru_cache(maxsize=1)
def _count(source: Source) -> int:
    return sum(1 for _ in source.documents())


class StdlibSource:
    """Source code or docstrings of the running Python's standard library."""

    def __init__(self, part: str):
        self.part = part

    def documents(self) -> Iterator[Document]:
        return (Document(name, path) for name, path in corpus.files())

    def text(self, document: Document) -> str:
        return corpus.document_text(document.ref, self.part)

    def identity(self) -> str:
        return f"{platform.python_version()} {_sizes(corpus.files())}"


class TextSource:
    """Plain UTF-8 files; a single file is cut at a line end, its last part being validation."""

    def __init__(self, pattern: str, single_file_val_fraction: float):
        self.files = _matching_files(pattern)
        self.cut = 1 - single_file_val_fraction if len(self.files) == 1 and single_file_val_fraction else None
        for name, path in self.files:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ValueError(
                    f"data.source: got a file of {path.stat().st_size / 2**30:.1f} GiB ({name}), wanted at most 1: a "
                    "text file is one document and is read whole; split it or write one JSON line per document"
                )

    def documents(self) -> Iterator[Document]:
        if self.cut is None:
            return (Document(name, (path, "")) for name, path in self.files)
        name, path = self.files[0]
        return (Document(f"{name}#{split}", (path, split), split) for split in ("train", "val"))

    def text(self, document: Document) -> str:
        path, split = document.ref
        text = _decode(path)
        if not split:
            return text
        end = text.find("\n", int(len(text) * self.cut)) + 1 or int(len(text) * self.cut)
        return text[:end] if split == "train" else text[end:]

    def identity(self) -> str:
        return _sizes(self.files)


class JsonlSource:
    """One JSON object per line, its text under `field`; files may be gzipped."""

    def __init__(self, pattern: str, field: str):
        self.files, self.field = _matching_files(pattern), field

    def documents(self) -> Iterator[Document]:
        for name, path in self.files:
            opened = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
            try:
                with opened as lines:
                    for number, line in enumerate(lines, 1):
                        if line.strip():
                            yield Document(f"{name}:{number}", line)
            except OSError as error:
                raise ValueError(f"data: got an unreadable {path} ({error}), wanted JSON lines") from error

    def text(self, document: Document) -> str:
        try:
            example = json.loads(document.ref)
        except ValueError as error:
            raise ValueError(f"data: got a line that is not JSON at {document.key} ({error})") from error
        if not isinstance(example, dict) or not isinstance(example.get(self.field), str):
            got = f"a {type(example).__name__}"
            if isinstance(example, dict):
                got = f"fields { {key: type(value).__name__ for key, value in sorted(example.items())} }"
            raise ValueError(f"data: got {got} at {document.key}, wanted text in {self.field!r}: set data.field")
        # JSON can spell lone surrogates, which UTF-8 cannot hold.
        return example[self.field].encode("utf-8", errors="replace").decode("utf-8")

    def identity(self) -> str:
        return _sizes(self.files)


class TfdsSource:
    """A TensorFlow Datasets name, read without TensorFlow; downloaded and prepared by tfds at first use."""

    def __init__(self, config: DataConfig):
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ValueError(f"data.source: got {config.source!r} without tfds: pip install 'smdlm[tfds]'") from error
        self.name, self.field = config.target, config.field
        self.splits = {"train": config.train_split} | ({"val": config.val_split} if config.val_split else {})
        try:
            self.data = {split: tfds.data_source(self.name, split=name) for split, name in self.splits.items()}
        except Exception as error:  # tfds raises its own families of errors for names, splits, network and disk
            cause = " ".join(str(error).split())[:300]
            raise ValueError(
                f"data.source: got no {config.source!r} with splits {list(self.splits.values())} from tfds "
                f"({type(error).__name__}: {cause}), wanted a data set that is on disk or can be downloaded"
            ) from error

    def documents(self) -> Iterator[Document]:
        for split, data in self.data.items():
            fixed = split if "val" in self.data else ""
            for index in range(len(data)):
                yield Document(f"{self.name}/{self.splits[split]}/{index}", (split, index), fixed)

    def text(self, document: Document) -> str:
        split, index = document.ref
        example = self.data[split][index]
        value = example.get(self.field)
        if isinstance(value, bytes):
            return value.decode("utf-8", errors="replace")
        if not isinstance(value, str):
            raise ValueError(
                f"data: got fields {sorted(example)} in {self.name}, wanted text in {self.field!r}: set data.field"
            )
        return value

    def identity(self) -> str:
        return " ".join(f"{self.name}/{self.splits[split]}:{len(data)}" for split, data in self.data.items())


def _matching_files(pattern: str) -> list[tuple[str, Path]]:
    """(name relative to the folder they share, file), sorted by name."""
    found = [Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True)]
    paths = [path for path in found if path.is_file()]
    if not paths:
        raise ValueError(f"data.source: got no file that matches {pattern!r} (in {os.getcwd()}), wanted at least one")
    root = os.path.commonpath([path.absolute().parent for path in paths])
    return sorted((Path(os.path.relpath(path.absolute(), root)).as_posix(), path) for path in paths)


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: got {path} that is not UTF-8 at byte {error.start}: convert or exclude it") from error
    except OSError as error:
        raise ValueError(f"data: got an unreadable {path} ({error.strerror}), wanted a text file") from error


def _sizes(files: list[tuple[str, Path]]) -> str:
    listing = "\n".join(f"{name} {path.stat().st_size}" for name, path in files)
    return f"{len(files)} files {hashlib.sha256(listing.encode()).hexdigest()[:16]}"
