"""Whether a command goes on with the run that a workdir holds, or would silently make another one of it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smdlm.config import Config, read
from smdlm.io.checkpoint import Checkpointer
from smdlm.train import NonFinite

# Sections and fields that do not change what the weights become.
FREE_SECTIONS = {"sampling", "generate", "eval", "mesh"}
FREE_FIELDS = {f"train.{name}" for name in ("steps", "log_every", "save_every", "eval_every", "keep", "accumulate")}
FREE_FIELDS |= {"train.init_import", "train.profile", "train.wandb"}  # the weights imported are those of init_from
FREE_FIELDS |= {"model.remat", "model.unroll", "model.attention"}  # up to rounding
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


@jax.jit
def _mixed(leaf: jax.Array) -> jax.Array:
    """[2] u32 of one array: sums, modulo 2^32, of its bits times odd numbers that depend on the place."""
    words = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize])
    places, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        places += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * np.uint32(stride % 2**32)
        stride *= leaf.shape[axis]
    words = words.astype(jnp.uint32) + np.uint32(1)
    factors = (np.uint32(0x9E3779B9), np.uint32(0x85EBCA6B))
    return jnp.stack([jnp.sum(words * ((places * f) ^ (places >> 15) | 1), dtype=jnp.uint32) for f in factors])


def weights_hash(tree: Any) -> str:
    """Hex SHA-256 of sums over the bits of every array, by path: the same on any mesh, at the speed of the memory.

    For telling weights apart, not against somebody who forges them. All processes must call it.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digest.update(f"{name} {leaf.dtype.name}{list(leaf.shape)} {np.asarray(_mixed(leaf)).tolist()};".encode())
    return digest.hexdigest()


def check_same_base(saved: Mapping[str, Any] | None, base: Mapping[str, Any]) -> None:
    """ValueError unless base and kind of adapter are those with which a checkpoint was trained; both as in its meta."""
    if not saved or saved["hash"] != base["hash"]:
        got = f"weights {saved['hash'][:12]} of {saved['workdir']}" if saved else "no frozen base"
        raise ValueError(
            f"train.init_from: got {base['workdir']} with weights {base['hash'][:12]} for a checkpoint trained beside "
            f"{got}, wanted that base"
        )
    if saved["adapter"] != base["adapter"]:
        raise ValueError(f"adapter: got {base['adapter']} for a checkpoint of {saved['adapter']}, wanted that")


def differences(saved: Mapping[str, Any], config: Config, free: set[str] = frozenset()) -> list[str]:
    """Names of the fields, with the saved and the present value, that shape training and differ."""
    try:
        before = flat(read(saved))
    except ValueError as error:  # of a version whose fields had other names
        return [f"config, which this version does not read ({error})"]
    now = flat(config)
    # A sum over micro-batches depends on how many there are.
    fields = FREE_FIELDS - ({"train.accumulate"} if config.train.accumulation == "sum" else set())
    names = [n for n in {**before, **now} if n.partition(".")[0] not in FREE_SECTIONS | free and n not in fields]
    missing = object()
    return [
        f"{name} ({before.get(name)!r}, now {now.get(name)!r})"
        for name in names
        if before.get(name, missing) != now.get(name, missing)
    ]


def flat(config: Config) -> dict[str, Any]:
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
            with contextlib.suppress(Exception):  # buckets have errors of their own; training's is the one to tell
                note.write_text(f"{error}\n")
        raise
    if chief:
        note.unlink(missing_ok=True)
