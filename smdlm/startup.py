"""What a process does before it builds anything: join its peers, agree with them, and keep compiled programs."""

from __future__ import annotations

import hashlib
import logging as stdlib_logging
import os
import secrets
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from smdlm import memory
from smdlm.files import is_url, local_path, write


def prepare(compiled: Path) -> None:
    """What every program does first, before anything touches a device. compiled: see `keep_compiled`."""
    # INFO names every backend that is not there.
    stdlib_logging.getLogger("jax").setLevel(stdlib_logging.WARNING)
    if jax.config.jax_enable_x64:
        logging.warning("JAX_ENABLE_X64 is set and is ignored: smdlm computes in 32 and 16 bits")
        jax.config.update("jax_enable_x64", False)
    memory.return_after_compiling()
    keep_compiled(compiled)


def join_if(distributed: bool, coordinator: str | None, processes: int | None, process: int | None) -> None:
    """`join` where it is asked for; its details without it are refused."""
    if distributed:
        join(coordinator, processes, process)
    elif any(value is not None for value in (coordinator, processes, process)):
        raise ValueError("--coordinator, --num_processes, --process_id: got a value, wanted --distributed beside it")


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Makes this process one of a group (jax.distributed); must come before anything that touches a device.

    None: the cluster tells (TPU pods, Slurm, Kubernetes, Open MPI). On CPUs collectives go through gloo, jax's default.
    From here on SIGTERM only sets a notice, see `stop.StopSignal`.
    """
    host, _, port = (coordinator or "").rpartition(":")
    if coordinator and not (host and port.isdigit()):
        raise ValueError(f"--coordinator: got {coordinator}, wanted HOST:PORT of process 0, e.g. 10.0.0.1:8476")
    if coordinator:
        print(f"waiting at {coordinator} for all {processes} processes, at most five minutes", file=sys.stderr)
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except ValueError as error:
        raise ValueError(
            f"--distributed: got coordinator {coordinator}, {processes} processes, process {process} and a cluster "
            f"that does not tell the rest ({error}), wanted --coordinator=HOST:PORT --num_processes=N --process_id=I"
        ) from error


def meet(workdir: Path, **facts: Any) -> None:
    """ValueError unless all processes see the same folder behind `workdir` and hold the same facts; a barrier, too.

    Hosts with other code, data or Python would else train on a mixture, or wait for each other for ever.
    """
    count = jax.process_count()
    if count == 1:
        return
    token = int(multihost_utils.process_allgather(np.uint32(secrets.randbits(32)))[0])
    file = workdir / f".process-0-{token:08x}"
    if jax.process_index() == 0:
        write(file, b"")
    multihost_utils.sync_global_devices("smdlm_meet")
    facts = {"content of --workdir (a folder that all hosts share)": file.exists(), **facts}
    digests = [int(hashlib.sha256(repr(value).encode()).hexdigest()[:8], 16) for value in facts.values()]
    rows = multihost_utils.process_allgather(np.array(digests, np.uint32))
    if jax.process_index() == 0:
        file.unlink(missing_ok=True)
    if wrong := [name for name, column in zip(facts, rows.T, strict=True) if len(set(column.tolist())) > 1]:
        raise ValueError(
            f"--distributed: got another {', '.join(wrong)} on some of the {count} processes, wanted the same on all: "
            "same command, same code and Python, one shared folder"
        )


def keep_compiled(folder: Path) -> None:
    """Compiled programs are kept in $SMDLM_CACHE, else jax's own setting, else `folder`: a second run starts at once.

    Several processes may share the folder. A folder or file that is broken costs a compilation and a warning, no more.
    """
    if given := os.environ.get("SMDLM_CACHE"):
        given = str(local_path("SMDLM_CACHE", given))
    chosen = given or jax.config.jax_compilation_cache_dir or str(folder if is_url(folder) else folder.absolute())
    try:
        if "://" not in chosen:  # jax's own setting may name a bucket
            Path(chosen).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logging.warning("compiled programs are not kept (%s): set SMDLM_CACHE to a folder that can be written", error)
        jax.config.update("jax_compilation_cache_dir", None)
        return
    jax.config.update("jax_compilation_cache_dir", chosen)
