"""The workdir that an import makes: a new one, written whole at step 0 or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from smdlm import command
from smdlm.config import read
from smdlm.convert.files import FileError
from smdlm.feedback.gates import EntropyGate
from smdlm.feedback.mixers import Lerp
from smdlm.files import owned
from smdlm.full_softmask import FullSoftMask
from smdlm.io.checkpoint import Checkpointer, checkpointer_of
from smdlm.optimizer import TrainState
from smdlm.softmask import SoftMask


@contextlib.contextmanager
def new_workdir(workdir: Path) -> Iterator[Checkpointer]:
    """The checkpoints of a workdir that has none yet; nothing is made. FileError, ValueError: it can not be written."""
    with contextlib.closing(checkpointer_of(workdir)) as checkpointer:
        if (step := checkpointer.latest_step()) is not None:
            raise FileError(f"got {workdir}, which holds a checkpoint of step {step}, wanted a new workdir")
        command.check_folder("DST", checkpointer.directory)
        yield checkpointer


def check_papers_operator(src: object, meta: Mapping[str, Any]) -> None:
    """FileError if the run's soft mask is one that the public code does not have: it would be read as the paper's."""
    operator = read(meta["config"]).softmask.operator if "config" in meta else None
    if operator is None:
        return
    plain = type(operator) in (SoftMask, FullSoftMask) and type(operator.gate) is EntropyGate
    if not plain or operator.mixer != Lerp():
        raise FileError(
            f"got {src} with the soft mask {operator}, wanted gate 'entropy' and mixer 'lerp' of variant 'topk' or "
            "'full': the public code has no other"
        )


def save(checkpointer: Checkpointer, params: Any, ema: Any, meta: dict[str, Any]) -> None:
    """Writes step 0. OSError if it could not be written, ValueError if another process writes there."""
    with owned(checkpointer.directory.parent, "DST"):
        checkpointer.save(0, TrainState(jnp.int32(0), params, ema, {}), data={}, meta=meta)
        checkpointer.wait()
        if checkpointer.latest_step() != 0:
            raise OSError(f"could not write {checkpointer.directory}: the warning above says why")
