"""Steps of a bucket to which orbax does not write (s3://): they are made, and read, in a folder of this host.

A folder of this process under $TMPDIR, with room for a checkpoint: a step is uploaded from there when orbax has written
it, and downloaded to there before orbax reads it. That is right for one process only: several would each hold a part.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import uuid
import weakref
from collections.abc import Iterable
from pathlib import Path

import jax

from smdlm import buckets, files


class Staging:
    """The folder for the checkpoints in `directory`, deleted by `close` and at the end of the process."""

    def __init__(self, directory: Path):
        """Raises ValueError with more than one process."""
        if jax.process_count() > 1:
            raise ValueError(
                f"checkpoints: got {directory} with {jax.process_count()} processes, wanted one: only one can write to "
                "s3:// and read from it; name a folder that all hosts share, or one in gs://"
            )
        self._directory = directory
        self.folder = _made()
        self.close = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def upload(self, folder: Path, step: int) -> None:
        """Copies a step that lies here in `folder` to where it belongs. OSError."""
        for name in files.tree(folder):
            buckets.upload(folder / name, str(self._directory / str(step) / name))

    def download(self, step: int, names: Iterable[str]) -> Path:
        """The folder here with the named files of a step, and with nothing else. OSError."""
        self.clear()
        for name in names:
            buckets.download(str(self._directory / str(step) / name), self.folder / str(step) / name)
        return self.folder / str(step)

    def clear(self) -> None:
        """Deletes all that lies here; called when nothing is being saved or read."""
        for path in self.folder.glob("*"):
            files.remove_tree(path)


def _made() -> Path:
    """A folder that says whose it is; deletes those that killed processes of this host left, a checkpoint each."""
    temporary, host = Path(tempfile.gettempdir()), socket.gethostname()
    for left in temporary.glob(f"smdlm_steps_*_{host}"):
        if buckets.dead_here({"pid": int(left.name.split("_")[2]), "host": host}):
            files.remove_tree(left)
    folder = temporary / f"smdlm_steps_{os.getpid()}_{uuid.uuid4().hex}_{host}"
    folder.mkdir(mode=0o700)
    return folder
