"""The workdir that an import makes: a new one, written whole at step 0 or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from smdlm import command
from smdlm.convert.files import FileError
from smdlm.files import owned
from smdlm.io.checkpoint import Checkpointer, checkpointer_of
from smdlm.optimizer import TrainState


@contextlib.contextmanager
def new_workdir(workdir: Path) -> Iterator[Checkpointer]:
    """The checkpoints of a workdir that has none yet; nothing is made. FileError, ValueError: it can not be written."""
    with contextlib.closing(checkpointer_of(workdir)) as checkpointer:
        if (step := checkpointer.latest_step()) is not None:
            raise FileError(f"got {workdir}, which holds a checkpoint of step {step}, wanted a new workdir")
        command.check_folder("DST", checkpointer.directory)
        yield checkpointer


def save(checkpointer: Checkpointer, params: Any, ema: Any, meta: dict[str, Any]) -> None:
    """Writes step 0. OSError if it could not be written, ValueError if another process writes there."""
    with owned(checkpointer.directory.parent, "DST"):
        checkpointer.save(0, TrainState(jnp.int32(0), params, ema, {}), data={}, meta=meta)
        checkpointer.wait()
        if checkpointer.latest_step() != 0:
            raise OSError(f"could not write {checkpointer.directory}: the warning above says why")
