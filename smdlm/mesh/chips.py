"""Published figures of accelerators, and which of them this machine has."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip.

    Attributes:
      kinds: what jax calls it (the beginning of `device_kind`, in lower case).
      hbm_gib: nominal memory; limit_gib: what a program may use of it: where the TPU compiler stops, and 95 % of what
        an H100 has (jax takes 75 % unless XLA_PYTHON_CLIENT_MEM_FRACTION=.95).
      flops: bf16 dense peak per second; hbm: bytes per second; links: bytes per second that a chip sends to its
        neighbours over all links together (half of the "bidirectional" figure).
      source: where the figures are published.
    """

    name: str
    kinds: tuple[str, ...]
    hbm_gib: float
    limit_gib: float
    flops: float
    hbm: float
    links: float
    source: str


_TPU = "cloud.google.com/tpu/docs"
CHIPS = {
    c.name: c
    for c in (
        Chip("v4", ("tpu v4",), 32, 30.75, 275e12, 1.2e12, 300e9, f"{_TPU}/v4"),
        Chip("v5e", ("tpu v5 lite", "tpu v5e"), 16, 15.75, 197e12, 0.819e12, 200e9, f"{_TPU}/v5e"),
        Chip("v5p", ("tpu v5p", "tpu v5"), 95, 95.73, 459e12, 2.765e12, 600e9, f"{_TPU}/v5p"),
        Chip("v6e", ("tpu v6 lite", "tpu v6e"), 32, 31.24, 918e12, 1.6e12, 400e9, f"{_TPU}/v6e"),
        Chip("h100", ("nvidia h100",), 80, 75.18, 989e12, 3.35e12, 450e9, "nvidia.com/en-us/data-center/h100 (SXM)"),
    )
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that jax calls so; None for one without figures here, and for CPUs."""
    kind = device_kind.lower()
    return next((chip for chip in CHIPS.values() if kind.startswith(chip.kinds)), None)
