"""Which documents train and which validate, and their texts with an account of what was lost on the way."""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from smdlm.data import corpus
from smdlm.data.config import DataConfig
from smdlm.data.documents import Document, NoText, Source
from smdlm.data.readers import printable
from smdlm.data.vocabulary import Tokenizer


def with_splits(config: DataConfig) -> Iterator[tuple[str, Document]]:
    """('train' or 'val', document) in the order of the source; a lone document is cut in two."""
    first_of_val = _first_of_val(config)
    documents = config.source.documents()
    head = list(itertools.islice(documents, 2))
    if len(head) == 1 and not head[0].split:
        for split in ("train", "val"):
            read = functools.partial(_part, head[0], split, config.val_fraction)
            yield split, Document(f"{head[0].key}#{split}", read, split)
        return
    for index, document in enumerate(itertools.chain(head, documents)):
        if document.split:
            yield document.split, document
        elif first_of_val is not None:
            yield ("val" if index >= first_of_val else "train"), document
        else:
            yield ("val" if corpus.share(document.key) < config.val_fraction else "train"), document


def _first_of_val(config: DataConfig) -> int | None:
    """Number of the first document of validation; None where val_fraction rules."""
    if not config.val_documents:
        return None
    total = _count(config.source, config.source.identity())
    if config.val_documents >= total:
        raise ValueError(f"data.val_documents: got {config.val_documents}, wanted fewer than the {total} documents")
    return total - config.val_documents


@functools.lru_cache(maxsize=1)
def _count(source: Source, identity: str) -> int:
    """identity: of the source, which changes when its files do."""
    return sum(1 for _ in source.documents())


def _part(document: Document, split: str, val_fraction: float) -> str:
    text = document.read()
    end = cut_in_two(text, val_fraction)
    return text[:end] if split == "train" else text[end:]


def cut_in_two(text: str, val_fraction: float) -> int:
    """Where the last part of a text begins, so that both parts have more than blanks in them if that is possible.

    At the first line end behind the wanted place, or at that place if no line ends there. Where this leaves a part
    blank (one long line that ends in a newline), at a line end or a space near that place, else anywhere.
    """
    first, end = len(text) - len(text.lstrip()), len(text.rstrip())
    place = int(len(text) * (1 - val_fraction))
    furthest = 2 * place - len(text)  # further back the last part would be twice what was wanted

    def behind(mark: str) -> int:
        return text.find(mark, place) + 1

    def before(mark: str) -> int:
        return text.rfind(mark, max(furthest, 0), place) + 1

    wanted = (behind("\n") or place, before("\n"), behind(" "), before(" "), min(max(place, first + 1), end - 1))
    return next((cut for cut in wanted if first < cut < end), place)


@dataclass
class Account:
    """What a corpus lost on its way to token ids: said once, at the end.

    Attributes:
      read: documents with text.
      without_text, first: records left out because they have no text; why the first of them was.
      characters, unspelled: of all encoded text, and of these the ones that the vocabulary cannot spell.
    """

    read: int = 0
    without_text: int = 0
    first: str = ""
    characters: int = 0
    unspelled: int = 0

    def text(self, document: Document) -> str:
        """The text of a document; '' for one that has none, which is counted. ValueError for a damaged one."""
        try:
            text = document.read()
        except NoText as error:
            self.without_text += 1
            self.first = self.first or str(error)
            return ""
        if not text.strip():
            return ""
        self.read += 1
        return text

    def encode(self, tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
        """tokenizer.encode_batch, counted."""
        encoded = tokenizer.encode_batch(texts)
        self.characters += sum(map(len, texts))
        self.unspelled += tokenizer.count_unspelled(texts, encoded)
        return encoded

    def no_text(self, source: str) -> ValueError:
        """The error for a source in which no document has text."""
        return ValueError(self.first or f"data.source: got no text from {source!r}, wanted at least one document")

    def warnings(self, tokenizer: Tokenizer) -> list[str]:
        """One line for each kind of loss."""
        lines = []
        if self.without_text:
            lines.append(f"left out {self.without_text:,} records without text; the first: {printable(self.first)}")
        if self.unspelled:
            share = 100 * self.unspelled / self.characters
            lines.append(
                f"tokenizer {tokenizer.name!r} cannot spell {self.unspelled:,} of {self.characters:,} characters "
                f"({share:.2g} %): they are lost to the model"
            )
        return lines
