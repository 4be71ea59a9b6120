"""What to read, how to split and pack it: the one dataclass that describes a data set."""

import shlex
from dataclasses import dataclass

from smdlm.data import corpus
from smdlm.data.tokenizer import check_spec

READABLE = "'stdlib:docstrings' | 'stdlib:source' | 'text:GLOB' | 'jsonl:GLOB' | 'tfds:NAME'"
SOURCES = f"{READABLE} | 'prepared:DIR'"
FRAMINGS = ("stream", "bos_eos")


@dataclass(frozen=True)
class DataConfig:
    """A data set.

    Attributes:
      source: one of SOURCES. A file of 'text' is a document, a line of 'jsonl' (.jsonl, .jsonl.gz) is a document.
      tokenizer: a spec of `smdlm.data.tokenizer.make_tokenizer`.
      seq_len: tokens in a block.
      batch_size: blocks in a batch, over all processes.
      framing: 'stream' cuts documents joined by EOS into blocks; 'bos_eos' cuts the same stream into pieces of
        seq_len - 2 tokens and puts BOS before and EOS after each, as the MDLM reference does for OpenWebText.
      val_fraction: share of the documents that a hash of their name sends to validation. A 'text' source of a single
        file gives the last part of that file.
      val_documents: when positive, the last so many documents are validation instead.
      field: name of the text in a 'jsonl' or 'tfds' example.
      train_split: the 'tfds' split to read.
      val_split: the 'tfds' split that is validation; '' takes validation from `train_split` by the rules above.
      seed: of the shuffle.
    """

    source: str
    tokenizer: str
    seq_len: int
    batch_size: int
    framing: str = "stream"
    val_fraction: float = 0.05
    val_documents: int = 0
    field: str = "text"
    train_split: str = "train"
    val_split: str = ""
    seed: int = 0

    def __post_init__(self):
        kind, target = self.kind, self.target
        if kind not in ("stdlib", "text", "jsonl", "tfds", "prepared") or not target:
            raise ValueError(f"data.source: got {self.source!r}, wanted {SOURCES}")
        if kind == "stdlib" and target not in corpus.PARTS:
            raise ValueError(f"data.source: got {self.source!r}, wanted 'stdlib:docstrings' | 'stdlib:source'")
        check_spec(self.tokenizer)
        if self.framing not in FRAMINGS:
            raise ValueError(f"data.framing: got {self.framing!r}, wanted one of {FRAMINGS}")
        smallest = 3 if self.framing == "bos_eos" else 2
        if self.seq_len < smallest:
            raise ValueError(f"data.seq_len: got {self.seq_len}, wanted at least {smallest} with {self.framing!r}")
        if self.batch_size < 1:
            raise ValueError(f"data.batch_size: got {self.batch_size}, wanted at least 1")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"data.val_fraction: got {self.val_fraction}, wanted a share between 0 and 1")
        if self.val_documents < 0:
            raise ValueError(f"data.val_documents: got {self.val_documents}, wanted 0 (use val_fraction) or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"data.seed: got {self.seed}, wanted 0 <= seed < 2**32")
        if not self.field or not self.train_split:
            raise ValueError("data.field, data.train_split: got an empty name, wanted e.g. 'text' and 'train'")

    @property
    def kind(self) -> str:
        """What stands before the colon of the source."""
        return self.source.partition(":")[0]

    @property
    def target(self) -> str:
        """What stands after the colon of the source."""
        return self.source.partition(":")[2]

    def prepare_command(self) -> str:
        """The command that prepares this data set (with placeholders where only the user knows)."""
        prepared = self.kind == "prepared"
        source = "jsonl:GLOB" if prepared else self.source
        return " ".join(
            [
                "python -m smdlm.data.prepare",
                f"--source={shlex.quote(source)} --tokenizer={shlex.quote(self.tokenizer)}",
                f"--seq_len={self.seq_len} --framing={self.framing}",
                f"--out={shlex.quote(self.target) if prepared else 'DIR'}",
            ]
        )
