"""Whether a command goes on with the run that a workdir holds, or would silently make another one of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from smdlm.config import Config, read
from smdlm.io.checkpoint import Checkpointer
from smdlm.train import NonFinite

# Sections and fields that do not change what the weights become.
FREE_SECTIONS = {"sampling", "generate", "eval", "mesh"}
FREE_FIELDS = {f"train.{name}" for name in ("steps", "log_every", "save_every", "eval_every", "keep", "accumulate")}
DIVERGED = "diverged"  # a file in the workdir: training ended with NaN or inf, and waits for another optimizer


def check_same_run(workdir: Path, checkpointer: Checkpointer, config: Config) -> None:
    """ValueError, before any data is read, unless the newest checkpoint is of a run with this config.

    After training has diverged the optimizer's fields may differ. A checkpoint without a config (a conversion) fits.
    """
    newest = checkpointer.latest_step()
    if newest is None:
        return
    if newest > config.updates:
        raise ValueError(
            f"train.steps: got {config.updates} updates for {workdir}, which has done {newest}, wanted at least "
            f"{newest}: name another --workdir"
        )
    saved = checkpointer.read_meta().get("config")
    free = {"optimizer"} if (workdir / DIVERGED).exists() else set()
    if saved is not None and (different := differences(saved, config, free)):
        raise ValueError(
            f"{workdir}: got a run with another {', '.join(different)}, wanted the same: name another --workdir, or "
            "--overwrite"
        )


def check_same_data(workdir: Path, checkpointer: Checkpointer, content_hash: str) -> None:
    """ValueError if the documents behind the same name are others than those of the newest checkpoint."""
    saved = checkpointer.read_meta().get("content_hash") if checkpointer.latest_step() is not None else None
    if saved not in (None, content_hash):
        raise ValueError(
            f"{workdir}: got a run with other content behind the same data.source ({saved[:12]}, now "
            f"{content_hash[:12]}), wanted the same documents: name another --workdir, or --overwrite"
        )


def differences(saved: Mapping[str, Any], config: Config, free: set[str] = frozenset()) -> list[str]:
    """Names of the fields, with the saved and the present value, that shape training and differ."""
    try:
        before = _flat(read(saved))
    except ValueError as error:  # of a version whose fields had other names
        return [f"config, which this version does not read ({error})"]
    now = _flat(config)
    names = [n for n in {**before, **now} if n.partition(".")[0] not in FREE_SECTIONS | free and n not in FREE_FIELDS]
    missing = object()
    return [
        f"{name} ({before.get(name)!r}, now {now.get(name)!r})"
        for name in names
        if before.get(name, missing) != now.get(name, missing)
    ]


def _flat(config: Config) -> dict[str, Any]:
    """{'section.field': value} of all sections; an object that a field names by its class, and by its own fields."""
    found = {}
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        found |= _fields(section.name, value) if dataclasses.is_dataclass(value) else {f"model.{section.name}": value}
    return found


def _fields(section: str, value: Any) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            found[f"{section}.{field.name}"] = type(inner).__name__
            found |= _fields(section, inner)
        else:
            found[f"{section}.{field.name}"] = inner
    return found


@contextlib.contextmanager
def diverged(workdir: Path) -> Iterator[None]:
    """Keeps a note in the workdir when training ends with NaN or inf, and takes it away when it ends well."""
    note, chief = workdir / DIVERGED, jax.process_index() == 0
    try:
        yield
    except NonFinite as error:
        if chief:
            with contextlib.suppress(OSError):
                note.write_text(f"{error}\n")
        raise
    if chief:
        note.unlink(missing_ok=True)
