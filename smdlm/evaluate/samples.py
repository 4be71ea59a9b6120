"""Samples as metrics read them, and what a metric over samples gives.

Samples are written to JSONL first, one object a line with its 'text' and 'ids'; metrics read the file, so that a new
metric needs no new samples. A new one is one frozen dataclass in one file of this folder, with an entry in
SAMPLE_METRICS (`__init__.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from smdlm import files
from smdlm.evaluate.base import NORMAL_95, Value, ratio


@dataclasses.dataclass(frozen=True, eq=False)
class Ratio(Value):
    """A value that is a sum over samples divided by another (`exp`: the exponential of that), with its terms.

    Two models whose samples share their noise are compared by the pairs of their terms (`paired`).

    Attributes:
      amounts, sizes: [N] f64, one of each per sample.
    """

    amounts: np.ndarray
    sizes: np.ndarray
    exp: bool = False

    @classmethod
    def of(cls, amounts: Any, sizes: Any, unit: str, label: str, exp: bool = False) -> Ratio:
        """The value and interval of the terms; sizes None for the mean over samples."""
        amounts = np.asarray(amounts, np.float64)
        sizes = np.ones(len(amounts)) if sizes is None else np.asarray(sizes, np.float64)
        mean, interval = ratio(amounts, sizes)
        if exp:
            mean, interval = float(np.exp(mean)), float(np.exp(mean) * interval)
        return cls(mean, interval, unit, label, amounts, sizes, exp)

    @property
    def influence(self) -> np.ndarray:
        """[N]: what each sample adds to the deviation of the value, whose standard error is that of their mean."""
        plain = self.amounts.sum() / self.sizes.sum()
        return (self.mean if self.exp else 1.0) * (self.amounts - plain * self.sizes) / self.sizes.mean()


def paired(a: Ratio, b: Ratio) -> tuple[float, float]:
    """(b - a, half-width of its 95 % interval), the samples of both being pairs: the same number, the same noise."""
    parts = b.influence - a.influence
    error = np.sqrt(np.sum(parts**2) / max(1, len(parts) - 1) / len(parts))
    return b.mean - a.mean, float(NORMAL_95 * error)


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """What is measured.

    Attributes:
      texts: N texts. ids: [N, L] i32 tokens of the model that wrote them.
      tokenizer: fingerprint of its tokenizer, '' if unknown.
      cache: folder where slow metrics keep what they have computed, None for nowhere.
      settings: of the sampler, as the file tells; {} if unknown.
      known_words: those of the training text, where that is at hand.
    """

    texts: tuple[str, ...]
    ids: np.ndarray
    tokenizer: str = ""
    cache: Path | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    known_words: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.texts)

    @functools.cached_property
    def identity(self) -> str:
        """SHA-256 (hex) of texts and ids."""
        digest = hashlib.sha256("\0".join(self.texts).encode("utf-8"))
        digest.update(f"{self.ids.shape} {self.tokenizer}".encode() + np.ascontiguousarray(self.ids).tobytes())
        return digest.hexdigest()


class SampleMetric(Protocol):
    """A frozen dataclass; its fields are part of the protocol under which its values were measured."""

    def run(self, samples: Samples) -> dict[str, Value]:
        """Values by name, those that are ratios over samples as `Ratio`. ValueError where nothing can be said."""
        ...


def facts(metric: SampleMetric) -> dict[str, Any]:
    """What a metric's values depend on beside the samples: its fields as JSON, objects by their `identity`."""
    values = {field.name: getattr(metric, field.name) for field in dataclasses.fields(metric)}
    return {name: getattr(value, "identity", value) for name, value in values.items()}


# -------------------------------------------------------------------------------------------------------------- files


def read_samples(path: Path, tokenizer: str = "", cache: Path | None = None) -> Samples:
    """The samples of a JSONL file.

    Raises:
      FileNotFoundError, ValueError: one line; no file, a line that is cut or not JSON, no sample, one without text or
        ids, ids of several lengths.
    """
    if not path.is_file():
        raise FileNotFoundError(f"samples: got no file {path}, wanted samples/NAME.jsonl of --mode=sample or score")
    records = [_record(path, number, line) for number, line in enumerate(_lines(path), 1)]
    if not records:
        raise ValueError(f"{path}: got no samples, wanted at least one line")
    lengths = sorted({len(record["ids"]) for record in records})
    if len(lengths) > 1:
        raise ValueError(f"{path}: got samples of {lengths[0]} to {lengths[-1]} tokens, wanted one length")
    # JSON can spell lone surrogates, which UTF-8 and tokenizers refuse
    texts = tuple(record["text"].encode("utf-8", errors="replace").decode("utf-8") for record in records)
    ids = np.array([record["ids"] for record in records], np.int32)
    return Samples(texts, ids, tokenizer, cache, records[0].get("settings", {}))


def _lines(path: Path) -> list[bytes]:
    content = path.read_bytes()
    lines = content.split(b"\n")
    if lines.pop():
        raise ValueError(
            f"{path}: got a last line ({len(lines) + 1}) that is cut, wanted whole lines: let the sampling go on, "
            "or delete that line (or the file, if it is a study's, which draws it again)"
        )
    return lines


def _record(path: Path, number: int, line: bytes) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: got line {number} that is not JSON ({error}), wanted one object a line") from error
    good = isinstance(record, dict) and isinstance(record.get("text"), str) and isinstance(record.get("ids"), list)
    if not good or not all(isinstance(i, int) for i in record["ids"]):
        raise ValueError(f"{path}: got no 'text' with its 'ids' in line {number}, wanted both: a text and token ids")
    return record


def kept(path: Path) -> list[dict[str, Any]]:
    """The records of a file that is still being written; the rest of a line that a killed run left is cut off."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        files.write(path, whole)
    return [json.loads(line) for line in whole.splitlines()]


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Adds records to the end of a file; a run killed in the middle leaves half a line, which `kept` cuts off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)


def in_batches(
    samples: Samples, what: Mapping[str, Any], batch_size: int, compute: Callable[[Sequence[int]], np.ndarray]
) -> np.ndarray:
    """[N, C]: compute(numbers of some samples) -> [n, C], batch by batch.

    With a cache every batch is kept as soon as it is there, so that a run that was killed goes on where it was.

    Args:
      what: facts that name the computation; the samples' identity and the batch size are added.
    """
    named = json.dumps([samples.identity, batch_size, what], sort_keys=True)
    key = hashlib.sha256(named.encode("utf-8")).hexdigest()[:16]
    parts = []
    for start in range(0, len(samples), batch_size):
        file = samples.cache and samples.cache / f"{key}-{start:06d}.npy"
        if file and file.exists():
            parts.append(np.load(file))
            continue
        parts.append(np.asarray(compute(range(start, min(start + batch_size, len(samples))))))
        if file:
            buffer = io.BytesIO()
            np.save(buffer, parts[-1])
            files.write(file, buffer.getvalue())
    return np.concatenate(parts)
