"""What every evaluation gives and gets: values with intervals, from a model with its weights and data.

A new metric is one class in one file of this folder, with an entry in EVALUATORS (`__init__.py`); its fields are fields
of config.eval. Whoever writes, draws or prints values loops over them and knows no metric by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from smdlm.data.lab import Law
from smdlm.objective import Objective

NORMAL_95 = 1.96  # half-width of a 95 % interval in standard errors


@dataclasses.dataclass(frozen=True)
class Value:
    """A number that can be believed.

    Attributes:
      interval: half-width of its 95 % interval, None where there is none.
      unit: 'bits/byte', 'nats/token', ..
      label: words for a person. Values with one label are one row of a table, those with one unit a column.
    """

    mean: float
    interval: float | None
    unit: str
    label: str

    def plain(self) -> dict[str, Any]:
        """For JSON: the four fields above, whatever else a kind of value has."""
        return {"mean": self.mean, "interval": self.interval, "unit": self.unit, "label": self.label}


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
      objective: has the denoiser, the schedule and the range of t.
      params: its weights.
      token_bytes: [V] UTF-8 bytes per token.
      batches: (blocks, batch size) -> {'tokens' [B, L] i32, 'valid' [B] bool}, once through the first blocks of the
        validation split.
      place: puts host arrays that every process holds whole on the devices.
      sample: ids [N, L] i32 of sampling.count texts, drawn as config.sampling says; None where nothing samples.
      law: the true distribution of the data where it is known (`lab:...`), else None.
    """

    objective: Objective
    params: Any
    token_bytes: np.ndarray
    batches: Callable[[int, int], Iterable[Mapping[str, np.ndarray]]]
    place: Callable[[Any], Any] = lambda x: x
    sample: Callable[[], np.ndarray] | None = None
    law: Law | None = None


class Evaluator(Protocol):
    """A frozen dataclass; its fields are fields of config.eval."""

    def run(self, subject: Subject) -> dict[str, Value]:
        """Values by the names under which they are logged (val/NAME). ValueError where nothing can be said."""
        ...


def ratio(amounts: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """(sum of amounts / sum of sizes, half-width of its 95 % interval), both [N] over N independent examples.

    The standard error is that of a ratio of sums, by the delta method. For the difference of two models on the same
    examples give the differences as amounts: the interval is then that of the pairs.
    """
    value = amounts.sum() / sizes.sum()
    residual = amounts - value * sizes
    error = np.sqrt(np.sum(residual**2) / max(1, len(amounts) - 1) * len(amounts)) / sizes.sum()
    return float(value), float(NORMAL_95 * error)


def check_omega(field: str, value: str) -> None:
    if value not in ("ema", "live"):
        raise ValueError(f"{field}: got {value!r}, wanted 'ema' or 'live'")


def weights(ema: Any, params: Any, omega: str) -> Any:
    """The averaged weights, with the averaged ('ema') or the last ('live') omega."""
    return ema if omega == "ema" else {**ema, "softmask": params["softmask"]}
