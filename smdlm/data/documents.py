"""A document, and what gives documents."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from smdlm.data.readers import matching_files, sizes
from smdlm.files import local_path


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
class Files:
    """Base of the sources that are the files which one pattern names."""

    glob: str

    def __post_init__(self):
        local_path("data.source", self.glob)

    def identity(self) -> str:
        return sizes(matching_files("data.source", self.glob))


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
