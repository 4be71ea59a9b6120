"""Chips, topologies by name, and what compiling for them without hardware needs."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip.

    Attributes:
      hbm_gib: nominal memory; limit_gib: what the compiler lets a program use of it.
      flops: bf16 dense peak per second; hbm: bytes per second; links: bytes per second that a chip sends to its
        neighbours over all links together (half of the "bidirectional" figure).
      source: where the figures are published.
    """

    name: str
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
        Chip("v4", 32, 30.75, 275e12, 1.2e12, 300e9, f"{_TPU}/v4"),
        Chip("v5e", 16, 15.75, 197e12, 0.82e12, 200e9, f"{_TPU}/v5e"),
        Chip("v5p", 95, 95.74, 459e12, 2.765e12, 600e9, f"{_TPU}/v5p"),
        Chip("v6e", 32, 31.25, 918e12, 1.64e12, 448e9, f"{_TPU}/v6e"),
        Chip("h100", 80, 79.15, 989e12, 3.35e12, 450e9, "nvidia.com/en-us/data-center/h100 (SXM)"),
    )
}
EXAMPLES = "v5e:2x4, v5e:4x4, v5p:2x2x4, v6e:2x4, v6e:4x4, v4:2x2x4, h100:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A chip and how many of them in which shape: 'v5e:4x4', 'v5p:2x2x4', 'h100:8'."""

    name: str

    def __post_init__(self):
        chip, _, shape = self.name.partition(":")
        dims = {"v4": 3, "v5p": 3, "h100": 1}.get(chip, 2)
        if chip not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") != dims - 1:
            raise ValueError(
                f"--topology: got {self.name!r}, wanted CHIP:SHAPE with two numbers for v5e and v6e, three for v4 and "
                f"v5p, one for h100, e.g. {EXAMPLES}"
            )

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name.partition(":")[0]]

    def devices(self) -> list[Any]:
        """Descriptions of the chips, to make a mesh of.

        Raises:
          ValueError: the compiler knows no such shape. ImportError: its wheels are missing.
        """
        if importlib.util.find_spec("libtpu") is None:
            raise ImportError(
                f"--topology: got {self.name} without libtpu, wanted its compiler: pip install -e '.[aot]'"
            )
        # A machine without TPUs has no metadata server to ask, and no workers.
        os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
        megacore = {"chip_config_name": "megacore"} if self.chip.name == "v4" else {}
        try:
            return list(topologies.get_topology_desc(platform="tpu", topology_name=self.name, **megacore).devices)
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"--topology: got {self.name!r} ({reason}), wanted e.g. {EXAMPLES}") from None
