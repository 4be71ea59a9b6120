"""The weights of a run, of another run that this one begins at, and of the frozen network beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from smdlm.build import Experiment
from smdlm.convert.folders import import_weights
from smdlm.evaluate.base import weights
from smdlm.files import is_url, local_path, path_of
from smdlm.identity import check_same_base, weights_hash
from smdlm.io.checkpoint import Checkpointer, checkpointer_of
from smdlm.mesh.rules import replicated
from smdlm.optimizer import TrainState
from smdlm.train import TrainConfig


def restore(experiment: Experiment, checkpointer: Checkpointer, omega: str) -> tuple[Any, int]:
    """(weights for evaluation or sampling, step). Raises ValueError if they are of another size or vocabulary."""
    abstract, _ = experiment.abstract_params()
    ema, meta = checkpointer.restore_params(abstract, "ema")
    check_vocabulary(experiment, meta)
    params = checkpointer.restore_params(abstract, "params", meta["step"])[0] if omega == "live" else None
    base = None
    if experiment.frozen:
        base, facts = frozen_base(experiment, load_weights(experiment, init_source(experiment.config.train)))
        check_same_base(meta.get("base"), facts)
    return experiment.denoiser.whole(weights(ema, params, omega), base), meta["step"]


def described(experiment: Experiment) -> dict[str, Any]:
    """What a checkpoint keeps of the network, for conversions."""
    return {"model": dataclasses.asdict(experiment.network), "mask_id": experiment.denoiser.mask_id}


def check_vocabulary(experiment: Experiment, meta: Mapping[str, Any]) -> None:
    """ValueError if a checkpoint's ids mean other tokens: tables of equal padded size hide that."""
    tokenizer = experiment.vocabulary
    mine = {"model.vocab_size": experiment.denoiser.vocab_size, "mask_id": tokenizer.mask_id}
    theirs = {"model.vocab_size": meta.get("model", {}).get("vocab_size"), "mask_id": meta.get("mask_id")}
    mine["tokenizer"], theirs["tokenizer"] = tokenizer.fingerprint, meta.get("tokenizer")
    wrong = [name for name, value in theirs.items() if value not in (None, mine[name])]
    if wrong:
        raise ValueError(
            f"checkpoint: got {', '.join(f'{n} {theirs[n]}' for n in wrong)}, wanted "
            f"{', '.join(f'{n} {mine[n]}' for n in wrong)} (data.tokenizer {tokenizer.name!r}): "
            "use the tokenizer it was trained with"
        )


def init_source(config: TrainConfig) -> Checkpointer:
    """The checkpoints that train.init_from names, made by train.init_import where there are none.

    Raises:
      FileNotFoundError: there are none. ValueError: what they would be made of does not fit.
    """
    workdir = path_of("train.init_from", config.init_from)
    source = checkpointer_of(workdir)
    if source.latest_step() is None and config.init_import and jax.process_count() == 1 and not is_url(workdir):
        kind, _, path = config.init_import.partition(":")
        print(f"importing {path} into {workdir}", flush=True)
        for line in import_weights(kind, local_path("train.init_import", path), workdir):
            print(line, flush=True)
    if source.latest_step() is None:
        raise FileNotFoundError(
            f"train.init_from: got no checkpoint in {source.directory}, wanted a workdir that holds one: train it, or "
            f"python -m smdlm.convert import mdlm FILE {config.init_from}"
        )
    return source


def continue_from(experiment: Experiment, source: Checkpointer) -> tuple[TrainState, str]:
    """(fresh state with the raw weights of another run, a line that says what was loaded and where omega is from).

    The EMA starts at the loaded weights: the reference builds its EMA before it loads them, from a random start, which
    the warm-up forgets within a few dozen updates (weight 10! / n^9). Raises as `load_weights` does.
    """
    loaded = load_weights(experiment, source)
    return experiment.start_from(loaded.params), loaded.line


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The raw weights of another run, {'backbone', 'softmask'} on the mesh, and a line on what they are."""

    params: Any
    line: str


def load_weights(experiment: Experiment, source: Checkpointer) -> Loaded:
    """The newest raw weights of another run: the network's own, and an omega that this model has a place for.

    omega is newly initialised if the checkpoint has none of its own (it is binary, or a conversion made one up), and
    left out if this model has none.

    Raises:
      CheckpointMismatch: other sizes, every differing leaf listed. ValueError: another vocabulary.
    """
    abstract = {"backbone": experiment.abstract_base()[0], "softmask": experiment.abstract_params()[0]["softmask"]}
    saved, meta = source.shapes("params")
    made_up = meta.get("convert", {}).get("new", [])
    omega = saved.get("softmask", {})
    keep = bool(abstract["softmask"]) and any(f"softmask/{name}" not in made_up for name in omega)
    if not keep:
        everywhere = replicated(experiment.mesh)

        def whole(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

        abstract = {**abstract, "softmask": jax.tree.map(whole, omega)}
    params, _ = source.restore_params(abstract, "params", meta["step"])
    check_vocabulary(experiment, meta)
    if not keep:
        key = jax.random.key(experiment.config.train.seed)
        params["softmask"] = nn.meta.unbox(experiment.denoiser.init_omega(key))
    names = ", ".join(f"softmask/{name}" for name in sorted(params["softmask"]))
    origin = f"{'from the checkpoint' if keep else 'newly initialised'}: {names}" if names else "none"
    what = "beside the frozen" if experiment.frozen else "from"
    return Loaded(params, f"starting {what} step {meta['step']} of {source.directory}, raw weights; omega {origin}")


def frozen_base(experiment: Experiment, loaded: Loaded) -> tuple[Any, dict[str, Any]]:
    """(weights of the frozen network, what a checkpoint keeps of them)."""
    base = loaded.params["backbone"]
    config = experiment.config
    facts = {"workdir": config.train.init_from, "hash": weights_hash(base), "adapter": config.adapter.described}
    return base, facts
