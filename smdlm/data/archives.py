"""Corpora in the form in which they are handed round: the archives of OpenWebText, and text8."""

import functools
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from smdlm.data.documents import Document, Files, NoText
from smdlm.data.readers import matching_files, opened, printable, sizes, unpacked
from smdlm.files import local_path

PACKED = (".tar", ".tgz", ".txz", ".xz", ".gz", ".bz2", ".zst")  # endings of an archive inside an archive


@dataclass(frozen=True)
class OpenWebText(Files):
    """Tar archives of texts, or of such archives (openwebtext.tar.xz, its *_data.xz, the subsets/*.tar of the hub).

    A file .txt is a document. Three and more line ends in a row become two and blanks around a text are dropped, as in
    the copy of the Hugging Face hub, on which the published models were trained. An archive can only be read from its
    beginning to its end, so that every look at the documents unpacks all of it.
    """

    def documents(self) -> Iterator[Document]:
        for name, path in matching_files("data.source", self.glob):
            with opened(path, "a tar archive of texts") as file:
                _check_end(path)
                yield from _members(file, name)


def _members(file: IO[bytes], name: str) -> Iterator[Document]:
    """The texts of an open archive, and of the archives in it."""
    try:
        with tarfile.open(fileobj=file, mode="r|") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                inside, ending = f"{name}/{member.name}", os.path.splitext(member.name)[1]
                if ending == ".txt":
                    yield Document(inside, functools.partial(_text, archive.extractfile(member).read(), inside))
                elif ending in PACKED:
                    yield from _members(unpacked(archive.extractfile(member), member.name), inside)
        file.read(1)  # the end of what is packed: it raises where that was cut off
    except tarfile.TarError as error:
        raise ValueError(
            f"data: got an unreadable archive {printable(name)} ({error}), wanted a tar archive of texts "
            "(.tar, .tar.xz, .xz, ..): copy it again"
        ) from error


def _check_end(path: Path) -> None:
    """ValueError for a plain tar file that was cut off between two of its members, which tarfile takes for its end."""
    if path.suffix != ".tar":
        return
    with open(path, "rb") as file:
        file.seek(-min(1024, path.stat().st_size), os.SEEK_END)
        if file.read().strip(b"\0"):
            raise ValueError(
                f"data: got an archive {printable(path)} without its end, wanted a whole one: copy it again"
            )


def _text(content: bytes, name: str) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: got {printable(name)} that is not UTF-8 at byte {error.start}, wanted text") from error
    text = re.sub("\n\n\n+", "\n\n", text.replace("\r\n", "\n")).strip()
    if not text:
        raise NoText(f"data: got an empty text {printable(name)}, wanted some")
    return text


TEXT8 = 100_000_000  # characters, of which 90 % train, the next 5 % validate and the last 5 % test


@dataclass(frozen=True)
class Text8:
    """text8 (plain, or text8.zip as it is downloaded): the first 90 million characters to train on.

    Attributes:
      path: the file.
      held_out: what validates: 'val', the next five million characters, or 'test', the last five million.
    """

    path: str
    held_out: str = "val"

    def __post_init__(self):
        local_path("data.source", self.path)
        if self.held_out not in ("val", "test"):
            raise ValueError(f"data.held_out: got {self.held_out!r}, wanted 'val' or 'test'")

    def documents(self) -> Iterator[Document]:
        parts = {"train": slice(0, TEXT8 * 90 // 100), "val": slice(TEXT8 * 90 // 100, TEXT8 * 95 // 100)}
        if self.held_out == "test":
            parts["val"] = slice(TEXT8 * 95 // 100, TEXT8)
        for split, part in parts.items():
            yield Document(f"text8/{split}", functools.partial(self._read, part), split)

    def _read(self, part: slice) -> str:
        ((_, path),) = matching_files("data.source", self.path)
        if path.suffix == ".zip":
            try:
                with zipfile.ZipFile(path) as archive:
                    content = archive.read("text8")
            except (zipfile.BadZipFile, KeyError) as error:
                raise ValueError(f"data: got an unreadable {printable(path)} ({error}), wanted text8.zip") from error
        else:
            with opened(path, "text8") as file:
                content = file.read()
        content = content.rstrip(b"\n")
        if len(content) != TEXT8 or re.search(rb"[^a-z ]", content):
            raise ValueError(
                f"data: got {len(content):,} bytes in {printable(path)}, wanted text8: {TEXT8:,} letters and spaces"
            )
        return content[part].decode("ascii")

    def identity(self) -> str:
        return sizes(matching_files("data.source", self.path))
