"""Topologies by name, and what compiling for them without hardware needs."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from smdlm.mesh.chips import CHIPS, Chip

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

    @property
    def gpu(self) -> bool:
        return self.chip.name == "h100"

    def prepare(self) -> None:
        """Sets the environment in which the compiler starts; for GPUs the process begins anew in it.

        Raises:
          ImportError: the compiler's wheels are missing.
        """
        package, extra = ("jax_cuda13_plugin", "cuda") if self.gpu else ("libtpu", "aot")
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"--topology: got {self.name} without its compiler, wanted: pip install -e '.[{extra}]'")
        # A machine without TPUs has no metadata server to ask, no other workers and nothing to lock; one without GPUs
        # no driver to check.
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-8",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_STDERR_LOG_LEVEL": "3",
            "TPU_MIN_LOG_LEVEL": "3",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        }
        roots = importlib.util.find_spec("nvidia").submodule_search_locations if self.gpu else ()
        folders = ":".join(sorted(str(folder) for root in roots for folder in Path(root).glob("*/lib")))
        known = os.environ.get("LD_LIBRARY_PATH", "")
        if folders not in known:
            # The loader reads it when a process starts.
            environment = {**os.environ, "LD_LIBRARY_PATH": f"{folders}:{known}".strip(":")}
            os.execve(sys.executable, [sys.executable, "-m", "smdlm.tools.aot", *sys.argv[1:]], environment)

    def devices(self) -> list[Any]:
        """Descriptions of the chips, to make a mesh of.

        Raises:
          ValueError: the compiler knows no such shape.
        """
        arguments = {"platform": "tpu", "topology_name": self.name}
        if self.gpu:
            target = (Path(__file__).parent / "h100.textproto").read_text()
            count = self.name.partition(":")[2]
            arguments = {
                "platform": "cuda",
                "topology_name": "h100",
                "target_config": target,
                "topology": f"1x1x{count}",
            }
        elif self.chip.name == "v4":
            arguments["chip_config_name"] = "megacore"  # one device per chip, as on the later ones
        try:
            return list(topologies.get_topology_desc(**arguments).devices)
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"--topology: got {self.name!r} ({reason}), wanted e.g. {EXAMPLES}") from None
