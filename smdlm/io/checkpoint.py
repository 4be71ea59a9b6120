"""Checkpoints: the only user of orbax.

A step directory holds five items, so that evaluation reads the weights without building an optimizer:

    DIR/<step>/params, ema   the two sets of weights        data   JSON: where the data loader stands
    DIR/<step>/opt           optimizer state and step       meta   JSON: step, config snapshot, model fields, tokenizer
    DIR/<step>/manifest.json size and sha256 of every file of the five items

Orbax sees each pytree as one flat `{path: array}`: the tree itself (NamedTuples, MaskedNode, ...) always comes from the
caller's abstract state, so it comes back exactly, and comparing a checkpoint with a model is comparing two dicts.

A save is asynchronous and atomic: orbax writes `<step>.orbax-checkpoint-tmp`, the manifest goes in, then
commit_success.txt, and the directory is renamed. In a bucket nothing is renamed: `<step>` itself is written, and counts
once it has commit_success.txt, its last object. Orbax does not write to s3://: there the step is copied, both ways
(io/staging.py). Orbax does not checksum array payloads (a flipped byte restores as a wrong weight), so the manifest
decides what is damaged; whatever fails after it has been checked is an error of another kind and is raised as it is.
"""

import contextlib
import json
import logging as stdlib_logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import traverse_util
from jax.experimental import multihost_utils

from smdlm import buckets, files
from smdlm.files import one_line, sha256
from smdlm.io import streamed
from smdlm.io.staging import Staging

PyTree = Any
TREES = ("params", "ema", "opt")
JSONS = ("data", "meta")
MANIFEST = "manifest.json"
COMMIT_MARKER = "commit_success.txt"  # written by orbax just before it renames the directory


class CheckpointMismatch(ValueError):
    """The checkpoint is sound but was written by another model; the message lists every differing leaf."""


class CheckpointDamaged(RuntimeError):
    """No checkpoint that could be used passed its manifest."""


# Orbax tells of a failed save in many tracebacks; `Checkpointer` reports each failure once, in one line.
logging.get_absl_logger().addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
stdlib_logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())


def _leave_out_late_writes(before: Any) -> Any:
    """`sys.excepthook` without the tracebacks of writes that end after their failed save: some four hundred lines."""

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not (kind is RuntimeError and str(error) == "Event loop is closed"):
            before(kind, error, trace)

    return hook


sys.excepthook = _leave_out_late_writes(sys.excepthook)


class Checkpointer:
    """Saves and restores the train state in one directory; the newest `keep` steps stay.

    One process group writes a directory; others may read it meanwhile. A directory that already holds checkpoints is
    resumed with `restore` before the first `save`. Steps newer than the restored one (damaged ones after a fallback,
    or those a `restore(step=...)` went back behind) are deleted by the next `save`, so they never stand in its way.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 3):
        """Raises ValueError unless keep >= 1, or for s3:// with several processes. Creates nothing in `directory`."""
        if keep < 1:
            raise ValueError(f"got keep={keep}, wanted at least 1 checkpoint: set keep >= 1")
        directory = files.as_path(directory)
        self.directory = directory if files.is_url(directory) else directory.absolute()
        staged = files.is_url(directory) and not buckets.cloud_of(str(directory)).arrays
        self._staging = Staging(directory) if staged else None
        self._local = self._staging.folder if self._staging else self.directory  # where orbax writes and reads
        self._keep = keep
        self._saving: int | None = None  # the step being written in the background
        self._resumed: int | None = None  # the step this run continues; what is newer on disk is abandoned
        handlers = {name: streamed.handler() for name in TREES}
        handlers |= {name: ocp.JsonCheckpointHandler() for name in JSONS}
        self._manager = ocp.CheckpointManager(
            self._local,
            item_names=TREES + JSONS,
            item_handlers=handlers,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=False,
                lightweight_initialize=True,
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_manifest),
            ),
        )

    # ---- save ----

    def save(self, step: int, state: PyTree, *, data: dict, meta: dict) -> None:
        """Starts writing `state` (fields step, params, ema, opt_state) in the background; a step on disk is kept as is.

        data, meta: JSON dicts; `meta["step"]` is set here. Returns once the arrays may be donated. A save that fails
        (full disk) is reported in one warning, at the latest by the next `save` or `wait`, and never raises.
        Raises TypeError if data or meta is not JSON, ValueError if a key of the state holds a "/".
        """
        meta = {**meta, "step": step}
        json.dumps([data, meta])
        self.wait()
        args = {name: ocp.args.StandardSave(_named(tree)) for name, tree in _items(state).items()}
        args |= {"data": ocp.args.JsonSave(data), "meta": ocp.args.JsonSave(meta)}
        try:
            if jax.process_index() == 0:
                self._local.mkdir(parents=True, exist_ok=True)
                self._drop_leftovers()
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("smdlm_checkpoint_leftovers")
            if step in self.all_steps():
                return
            self._manager.reload()  # a failed save makes orbax forget the old steps it meant to delete after it
            self._saving = step
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)
            self._resumed = None
        except Exception as error:  # whatever it is, the run is worth more than this checkpoint
            self._report(step, error)

    def wait(self) -> None:
        """Blocks until the save under way is on disk or has failed; a failure is reported in one warning."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._report(self._saving, error)
        self._saving = None

    def close(self) -> None:
        """Waits for the save under way and frees the threads."""
        self.wait()
        self._manager.close()
        if self._staging:
            self._staging.close()

    def all_steps(self) -> list[int]:
        """Complete steps, oldest first (their contents are checked by restore, not here)."""
        return [step for step in self._steps_on_disk() if self._is_complete(step)]

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.all_steps(), default=None)

    # ---- restore ----

    def restore(self, abstract_state: PyTree, step: int | None = None) -> tuple[PyTree, dict, dict]:
        """Returns (state, data, meta); `abstract_state` gives structure, shapes, dtypes and shardings of the state.

        A damaged newest checkpoint is reported in one warning and the one before is taken (and so on); a named `step`
        is taken or refused. Raises FileNotFoundError (no checkpoint), CheckpointDamaged (none passes its manifest),
        CheckpointMismatch (another model: every differing leaf, since orbax would cast dtypes silently).
        """
        step = self._sound_step(step, TREES + JSONS)
        trees = self._restore_trees(step, _items(abstract_state))
        self._resumed = step
        state = abstract_state.replace(
            step=trees["opt"]["step"], params=trees["params"], ema=trees["ema"], opt_state=trees["opt"]["state"]
        )
        return state, self._read_json(step, "data"), self._read_json(step, "meta")

    def restore_params(
        self, abstract_params: PyTree | None, which: str = "ema", step: int | None = None
    ) -> tuple[PyTree, dict]:
        """Returns (params, meta), `which` is "ema" or "params"; checks, fallback and errors are those of `restore`.

        abstract_params=None gives the nested dict as saved, on the first local device.
        """
        if which not in ("ema", "params"):
            raise ValueError(f"got which={which!r}, wanted 'ema' or 'params'")
        saved, meta = self.shapes(which, step)
        abstract_params = saved if abstract_params is None else abstract_params
        return self._restore_trees(meta["step"], {which: abstract_params})[which], meta

    def shapes(self, which: str = "ema", step: int | None = None) -> tuple[PyTree, dict]:
        """Returns (nested dict of shapes and dtypes as saved, meta), read before any weight is."""
        step = self._sound_step(step, (which, "meta"))
        saved = self._saved_leaves(step, which)
        named = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in saved.items()}
        return traverse_util.unflatten_dict(named, sep="/"), self._read_json(step, "meta")

    def read_meta(self, step: int | None = None) -> dict:
        """The meta dict alone (of the newest sound checkpoint), read before a model is built."""
        return self._read_json(self._sound_step(step, ("meta",)), "meta")

    # ---- inside ----

    def _sound_step(self, step: int | None, items: tuple[str, ...]) -> int:
        """The newest step whose `items` pass the manifest (or `step` itself), warning once per damaged one."""
        self.wait()
        steps = self._steps_on_disk()
        if not steps or (step is not None and step not in steps):
            wanted = "a checkpoint" if step is None else f"step {step}"
            raise FileNotFoundError(
                f"got steps {steps} in {self.directory}, wanted {wanted}: train first, or name another step or workdir"
            )
        candidates = steps[::-1] if step is None else [step]
        for candidate, before in zip(candidates, [*candidates[1:], None], strict=True):
            damage = self._damage(candidate, items)
            # every process must take the same step, even if only one of them failed to read a file
            if jax.process_count() > 1 and multihost_utils.process_allgather(np.array(damage is not None)).any():
                damage = damage or "another process found it damaged"
            if damage is None:
                return candidate
            if before is not None:
                logging.warning("checkpoint at step %d is damaged (%s): trying step %d", candidate, damage, before)
        raise CheckpointDamaged(
            f"got {damage} at step {candidate}, wanted a sound checkpoint in {self.directory} (damaged: {candidates}): "
            f"copy one back, or start anew with another workdir"
        )

    def _damage(self, step: int, items: tuple[str, ...]) -> str | None:
        """What is wrong with the files of `items`, or None."""
        folder = self.directory / str(step)
        if not self._is_complete(step):
            return f"no {COMMIT_MARKER}: the save was not finished"
        try:
            listed = json.loads((folder / MANIFEST).read_text())
            listed = {name: entry for name, entry in listed.items() if name.split("/")[0] in items}
            if missing := set(items) - {name.split("/")[0] for name in listed}:
                return f"{MANIFEST} lists no file of {sorted(missing)}"
            if self._staging:  # what is checked is what will be read
                folder = self._staging.download(step, listed)
            for name, entry in listed.items():
                if (size := files.size(folder / name)) != entry["bytes"]:
                    return f"{name} has {size} bytes instead of {entry['bytes']}"
            for name, digest in _digests(folder, listed).items():
                if digest != listed[name]["sha256"]:
                    return f"{name} has another sha256 than when it was written"
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            if files.is_url(self.directory) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise  # a network that is down is no damage: an older step would be taken, and this one deleted
            return one_line(error)
        return None

    def _restore_trees(self, step: int, abstract: dict[str, PyTree]) -> dict[str, PyTree]:
        """Restores the trees of `abstract` ({item: pytree of shape/dtype/sharding}) after comparing every leaf."""
        wanted = {item: _named(tree) for item, tree in abstract.items()}
        lines = []
        for item, leaves in wanted.items():
            got = self._saved_leaves(step, item)
            for name in sorted(got.keys() | leaves.keys()):
                g = _describe(*got[name]) if name in got else "nothing"
                w = _describe(leaves[name].shape, leaves[name].dtype) if name in leaves else "nothing"
                if g != w:
                    lines.append(f"  {item}/{name}: got {g}, wanted {w}")
        if lines:
            raise CheckpointMismatch(
                f"checkpoint at step {step} in {self.directory} is of another model: {len(lines)} leaves differ "
                "(got: the checkpoint, wanted: this config). Use the config it was trained with, or another workdir.\n"
                + "\n".join(lines)
            )
        args = {item: ocp.args.StandardRestore(jax.tree.map(_placed, leaves)) for item, leaves in wanted.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        return {
            item: jax.tree.unflatten(jax.tree.structure(tree), [restored[item][name] for name in wanted[item]])
            for item, tree in abstract.items()
        }

    def _saved_leaves(self, step: int, item: str) -> dict[str, tuple[tuple[int, ...], Any]]:
        """{path: (shape, dtype)} of a saved tree, read from orbax metadata."""
        metadata = ocp.StandardCheckpointHandler().metadata(self._local / str(step) / item)
        return {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in metadata.tree.items()}

    def _read_json(self, step: int, item: str) -> dict:
        return self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]

    def _steps_on_disk(self) -> list[int]:
        """Step directories, complete or not, oldest first (orbax's own list is a cache that runs ahead of the disk)."""
        try:
            return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit())
        except (FileNotFoundError, NotADirectoryError):  # not `is_dir`, which is also false without a network
            return []

    def _is_complete(self, step: int) -> bool:
        return (self.directory / str(step) / COMMIT_MARKER).exists()

    def _write_manifest(self) -> None:
        """Called by orbax (primary process, background thread) when all items are written, before the rename.

        Also does what orbax does after it in other folders: the last object, and deleting old steps.
        """
        (folder,) = (p for p in self._local.iterdir() if p.name.split(".")[0] == str(self._saving))
        names = [f"{item}/{name}" for item in TREES + JSONS for name in files.tree(folder / item)]
        digests = _digests(folder, names)
        entries = {name: {"bytes": files.size(folder / name), "sha256": digests[name]} for name in sorted(names)}
        (folder / MANIFEST).write_text(json.dumps(entries, indent=1))
        if self._staging:
            self._staging.upload(folder, self._saving)
            files.write(self.directory / str(self._saving) / COMMIT_MARKER, "the upload is complete\n")
            with contextlib.suppress(Exception):  # the step is saved; what is not deleted now goes with the next one
                for step in self.all_steps()[: -self._keep]:
                    files.remove_tree(self.directory / str(step))

    def _drop_leftovers(self) -> None:
        """Deletes what killed, failed or abandoned saves left; called when no save is under way."""
        for step in self._steps_on_disk():
            if not self._is_complete(step) or (self._resumed is not None and step > self._resumed):
                files.remove_tree(self.directory / str(step))
        for path in self.directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
            files.remove_tree(path)
        if self._staging:
            self._staging.clear()

    def _report(self, step: int | None, error: Exception) -> None:
        """One warning about a failed save; what it left is deleted at once, since the disk may be full.

        Orbax does not stop the other writes of that save; what they still leave goes with the next save.
        """
        last = None
        with contextlib.suppress(Exception):  # the disk may be gone, too, or the network
            if jax.process_index() == 0:
                self._drop_leftovers()
            last = self.latest_step()
        last = "there is no good checkpoint yet" if last is None else f"last good checkpoint is step {last}"
        logging.warning("checkpoint at step %s failed: %s; %s", step, one_line(error), last)


def checkpointer_of(workdir: Path, keep: int = 1) -> Checkpointer:
    """The checkpoints of a run, WORKDIR/checkpoints."""
    return Checkpointer(workdir / "checkpoints", keep=keep)


def _items(state: PyTree) -> dict[str, PyTree]:
    """The three trees of a train state (concrete or abstract)."""
    return {"params": state.params, "ema": state.ema, "opt": {"step": state.step, "state": state.opt_state}}


def _named(tree: PyTree) -> dict[str, Any]:
    """{path joined by "/": leaf}, in leaf order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError(f"got {len(leaves)} leaves with {len(named)} distinct paths: keys must not contain '/'")
    return named


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """The leaf's shape and dtype with a sharding; without one orbax would ask for the devices it was saved on."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _digests(folder: Path, names: Any) -> dict[str, str]:
    """{name: sha256} of files in `folder`, in threads (hashing releases the GIL)."""

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(lambda name: sha256(folder / name), names), strict=True))


def _describe(shape: tuple[int, ...], dtype: Any) -> str:
    return f"{np.dtype(dtype).name}[{','.join(map(str, shape))}]"
