"""What to read, how to split and pack it: the one dataclass that describes a data set."""

import dataclasses
import shlex
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smdlm.data.conversations import Chat
from smdlm.data.documents import Source
from smdlm.data.readers import printable
from smdlm.data.sources import SOURCES, Lab, own_fields
from smdlm.data.tokenizer import check_spec
from smdlm.files import path_of

FRAMINGS = ("stream", "bos_eos")


@dataclass(frozen=True)
class Prepared:
    """Blocks that `smdlm.data.prepare` wrote into a folder: no documents, so nothing is left to split or tokenise."""

    folder: str

    def __post_init__(self):
        path_of("data.source", self.folder)


def check_seed(field: str, seed: Any) -> None:
    """ValueError unless it is one of the 2^32 seeds: a larger number would silently be one of them too."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(f"{field}: got {seed!r}, wanted 0 <= seed < 2**32")


# What may stand before the colon of config.data.source: a view, so that what is added to SOURCES is here as well.
KINDS: Mapping[str, type] = ChainMap({"prepared": Prepared, "chat": Chat}, SOURCES)


def spec_of(source: Source | Prepared | Chat) -> str:
    """'kind:target', as a config spells it."""
    kind = next(kind for kind, cls in KINDS.items() if type(source) is cls)
    return f"{kind}:{getattr(source, dataclasses.fields(source)[0].name)}"


@dataclass(frozen=True)
class DataConfig:
    """config.data; the fields of the source (field, train_split, ...) stand beside these.

    Attributes:
      source: of KINDS; a config spells it 'kind:target'.
      tokenizer: a spec of `smdlm.data.tokenizer.make_tokenizer`.
      seq_len: tokens in a block.
      batch_size: blocks in a batch, over all processes.
      framing: 'stream' cuts documents joined by EOS into blocks; 'bos_eos' cuts the same stream into pieces of
        seq_len - 2 tokens and puts BOS before and EOS after each, as the MDLM reference does for OpenWebText.
      val_fraction: share of the documents that a hash of their name sends to validation. A source of a single document
        gives the last part of it.
      val_documents: when positive, the last so many documents are validation instead.
      seed: of the shuffle.
    """

    source: Source | Prepared | Chat
    tokenizer: str
    seq_len: int
    batch_size: int
    framing: str = "stream"
    val_fraction: float = 0.05
    val_documents: int = 0
    seed: int = 0

    def __post_init__(self):
        check_spec(self.tokenizer)
        if self.framing not in FRAMINGS:
            raise ValueError(f"data.framing: got {self.framing!r}, wanted one of {FRAMINGS}")
        smallest = 3 if self.framing == "bos_eos" else 2
        if self.seq_len < smallest:
            raise ValueError(f"data.seq_len: got {self.seq_len}, wanted at least {smallest} with {self.framing!r}")
        if isinstance(self.source, Lab):
            self.source.check(self.tokenizer, self.framing, self.seq_len)
        if isinstance(self.source, Chat):
            self.source.lengths(self.seq_len)
            if self.framing != "stream":
                raise ValueError(f"data.framing: got {self.framing!r} for conversations, wanted 'stream': no packing")
        if self.batch_size < 1:
            raise ValueError(f"data.batch_size: got {self.batch_size}, wanted at least 1")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"data.val_fraction: got {self.val_fraction}, wanted a share between 0 and 1")
        if self.val_documents < 0:
            raise ValueError(f"data.val_documents: got {self.val_documents}, wanted 0 (use val_fraction) or more")
        check_seed("data.seed", self.seed)

    def prepare_command(self) -> str:
        """The command that prepares this data set (with placeholders where only the user knows)."""
        prepared = isinstance(self.source, Prepared)
        flags = {"source": "jsonl:GLOB" if prepared else spec_of(self.source), "tokenizer": self.tokenizer}
        flags |= {"seq_len": self.seq_len, "framing": self.framing}
        if not prepared:
            own = {field.name: getattr(self.source, field.name) for field in own_fields(type(self.source))}
            defaults = {field.name: field.default for field in own_fields(type(self.source))}
            flags |= {name: value for name, value in own.items() if value != defaults[name]}
        out = shlex.quote(self.source.folder) if prepared else "DIR"
        given = [f"--{name}={shlex.quote(str(value))}" for name, value in flags.items()]
        return printable(" ".join(["python -m smdlm.data.prepare", *given, f"--out={out}"]))
