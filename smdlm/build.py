"""The only reader of ConfigDict: config -> frozen dataclasses -> objects.

Every section becomes `Foo(**section)`, so that a misspelt or superfluous field is an error and a missing one takes the
dataclass's documented default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from smdlm.checkpoint import Checkpointer
from smdlm.data.text import DataConfig, TextData, batches, load
from smdlm.data.tokenizer import Tokenizer, Vocabulary
from smdlm.denoiser import Denoiser
from smdlm.diffusion import LogLinear, TimeSampler
from smdlm.evaluate.likelihood import EvalConfig, check_omega
from smdlm.models.dit import DiT, DiTConfig
from smdlm.objective import NextToken, Objective, SoftMaskedDiffusion
from smdlm.partition import (
    MeshConfig,
    assert_sharded,
    batch_shards,
    local_rows,
    param_shardings,
    place,
    put,
    replicated,
    state_shardings,
)
from smdlm.readout import Readout
from smdlm.sampling.filters import Filters
from smdlm.sampling.loop import ARSampler, Sampler, check_fields
from smdlm.sampling.policies import (
    Ancestral,
    Cap,
    Confidence,
    Entropy,
    FirstHitting,
    ForwardBackward,
    Loop,
    Margin,
    MaxProbability,
    Policy,
    Rescale,
)
from smdlm.softmask import ConstantGate, EntropyGate, FullSoftMask, Lerp, NormLerp, Slerp, SoftMask
from smdlm.state import OptimizerConfig, TrainState, init_state, make_optimizer
from smdlm.train import TrainConfig, make_train_step

GATES = {"entropy": EntropyGate, "constant": ConstantGate}
MIXERS = {"lerp": Lerp, "slerp": Slerp, "norm_lerp": NormLerp}
POLICIES = {
    "mdlm": Ancestral,
    "remdm_cap": Cap,
    "remdm_rescale": Rescale,
    "remdm_conf": Confidence,
    "remdm_loop": Loop,
    "forward_backward": ForwardBackward,
    "max_prob": MaxProbability,
    "margin": Margin,
    "entropy": Entropy,
    "first_hitting": FirstHitting,
}


@dataclasses.dataclass(frozen=True)
class SoftMaskConfig:
    """config.softmask.

    Attributes:
      p_sm: chance of a soft-masked training step; 0 trains a binary model without omega.
      variant: 'topk', or 'full' (the whole distribution with a learned temperature).
      k: remembered candidates. gate, mixer: see softmask.py; scale, centre, steepness: where omega starts.
    """

    p_sm: float = 0.8
    variant: str = "topk"
    k: int = 3
    gate: str = "entropy"
    mixer: str = "lerp"
    scale: float = 1e-6
    centre: float = -0.75
    steepness: float = 6.66
    temperature: float = 1.0

    def make(self) -> SoftMask | None:
        if self.p_sm == 0:
            return None
        gate = pick("softmask.gate", self.gate, GATES)
        sizes = {"scale": self.scale}
        if gate is EntropyGate:
            sizes |= {"centre": self.centre, "steepness": self.steepness}
        parts = {"k": self.k, "gate": gate(**sizes), "mixer": pick("softmask.mixer", self.mixer, MIXERS)()}
        if pick("softmask.variant", self.variant, {"topk": False, "full": True}):
            return FullSoftMask(**parts, temperature=self.temperature)
        return SoftMask(**parts)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """config.sampling: fields of `Sampler` and `Filters`; the fields of the policy (eta, ...) stand beside them.

    Attributes:
      policy: one of POLICIES. steps: nominal NFE; the causal model always takes data.seq_len - 1.
      omega: 'ema' samples with the averaged omega, 'live' with the last one beside the averaged backbone, as the
        reference does (its EMA leaves omega out).
      count: samples written. prompt: text at the start of each, '' for none.
    """

    policy: str = "mdlm"
    steps: int = 128
    temperature: float = 1.0
    top_p: float = 0.9
    top_p_rule: str = "standard"
    use_feedback: bool = True
    feedback_source: str = "subs"
    refresh: str = "always"
    omega: str = "ema"
    count: int = 8
    prompt: str = ""
    seed: int = 0

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"sampling.count: got {self.count}, wanted at least 1")
        check_fields(self.steps, self.feedback_source, self.refresh)
        check_omega("sampling.omega", self.omega)
        Filters(self.temperature, self.top_p, self.top_p_rule)


SECTIONS = {
    "data": DataConfig,
    "noise": LogLinear,
    "times": TimeSampler,
    "softmask": SoftMaskConfig,
    "readout": Readout,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "sampling": SamplingConfig,
    "eval": EvalConfig,
    "mesh": MeshConfig,
}


def pick(field: str, name: str, table: dict[str, Any]) -> Any:
    """table[name], or one clear line. No silent else: the reference samples without feedback on an unknown name."""
    if name not in table:
        raise ValueError(f"{field}: got {name!r}, wanted one of {', '.join(map(repr, table))}")
    return table[name]


@dataclasses.dataclass(frozen=True)
class Config:
    """All sections as dataclasses. model stays a dict until the tokenizer tells the vocabulary."""

    model: dict[str, Any]
    data: DataConfig
    noise: LogLinear
    times: TimeSampler
    softmask: SoftMaskConfig
    readout: Readout
    optimizer: OptimizerConfig
    train: TrainConfig
    sampling: SamplingConfig
    eval: EvalConfig
    mesh: MeshConfig
    policy: Policy


def read(config: ml_collections.ConfigDict, given_by_user: Collection[str] = ()) -> Config:
    """Validates every field of a config before anything is loaded or compiled.

    given_by_user: names of fields set on the command line. A sampling.policy among them starts from its own defaults:
    parameters that the file meant for its policy are dropped.

    Raises:
      ValueError: one line; unknown section or field, wrong type, value out of range, impossible combination.
    """
    unknown = set(config) - set(SECTIONS) - {"model"}
    if unknown:
        raise ValueError(f"config: got section {sorted(unknown)}, wanted model, {', '.join(SECTIONS)}")
    given = {name: dict(config[name]) if name in config else {} for name in SECTIONS}
    if "k" in given["readout"]:
        raise ValueError("config.readout.k: got a second value, wanted softmask.k alone")
    given["readout"]["k"] = given["softmask"].get("k", SoftMaskConfig.k)
    if "sampling.policy" in given_by_user:
        dropped = {f.name for cls in POLICIES.values() for f in dataclasses.fields(cls)}
        dropped -= {name.removeprefix("sampling.") for name in given_by_user}
        given["sampling"] = {k: v for k, v in given["sampling"].items() if k not in dropped}
    given["sampling"], parameters = _split_policy(given["sampling"])
    sections = {name: _construct(name, cls, given[name]) for name, cls in SECTIONS.items()}
    sections["policy"] = _construct("sampling", POLICIES[sections["sampling"].policy], parameters)
    model = dict(config.get("model", {}))
    _construct("model", DiTConfig, {"vocab_size": 2, **model})
    softmask, train, data, sampling = (sections[n] for n in ("softmask", "train", "data", "sampling"))
    if not 0 <= softmask.p_sm <= 1:
        raise ValueError(f"softmask.p_sm: got {softmask.p_sm}, wanted 0 <= p_sm <= 1")
    softmask.make()
    if model.get("causal"):
        if softmask.p_sm:
            raise ValueError("softmask.p_sm: got > 0 for the causal (AR) model, wanted 0: it has no masks")
        for field in ("policy", "use_feedback", "feedback_source", "refresh"):
            got, default = getattr(sampling, field), getattr(SamplingConfig, field)
            if got != default:
                raise ValueError(
                    f"sampling.{field}: got {got!r} for the causal (AR) model, wanted {default!r}: it has no such thing"
                )
    if data.batch_size % train.accumulate:
        raise ValueError(
            f"train.accumulate: got {train.accumulate} for data.batch_size {data.batch_size}, wanted a divisor"
        )
    return Config(model=model, **sections)


def _split_policy(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.sampling -> (SamplingConfig's fields, the policy's parameters); one of another policy is refused."""
    name = values.get("policy", SamplingConfig.policy)
    if not isinstance(name, str):
        return values, {}  # refused below, for its type
    parameters = {key: [f.name for f in dataclasses.fields(cls)] for key, cls in POLICIES.items()}
    own, common = pick("sampling.policy", name, parameters), [f.name for f in dataclasses.fields(SamplingConfig)]
    for field in sorted(set(values) - set(own) - set(common)):
        owners = ", ".join(key for key in parameters if field in parameters[key])
        raise ValueError(
            f"config.sampling: got {field}{f' (a field of policy {owners})' if owners else ''} for policy {name!r}, "
            f"wanted one of {', '.join([*own, *common])}"
        )
    return {k: v for k, v in values.items() if k not in own}, {k: v for k, v in values.items() if k in own}


def _construct(section: str, cls: type, values: dict[str, Any]) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"config.{section}: got unknown field {', '.join(unknown)}, wanted one of {', '.join(fields)}")
    missing = sorted(n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values)
    if missing:
        raise ValueError(f"config.{section}: got no {', '.join(missing)}, wanted a value for each")
    for name, value in values.items():
        wanted = getattr(fields[name].type, "__name__", fields[name].type)
        kind = {"int": int, "float": (int, float), "str": str, "bool": bool}[wanted]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"config.{section}.{name}: got {value!r}, wanted {wanted}")
    return cls(**values)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything a run is made of; parameters and state are created by the methods. data: None if only compiled."""

    config: Config
    data: TextData | None
    denoiser: Denoiser
    objective: Objective
    optimizer: optax.GradientTransformationExtraArgs
    sampler: Sampler | ARSampler
    mesh: Mesh

    @property
    def steps(self) -> int:
        return self.config.train.updates(self.objective.p_sm)

    def abstract_params(self) -> tuple[Any, Any]:
        """(shapes with shardings, shardings) of the parameters."""
        boxed = jax.eval_shape(self.denoiser.init_params, jax.random.key(0))
        shardings = param_shardings(self.mesh, boxed)
        return _place(nn.meta.unbox(boxed), shardings), shardings

    def _init(self, key: jax.Array) -> TrainState:
        return init_state(nn.meta.unbox(self.denoiser.init_params(key)), self.optimizer)

    def shardings(self) -> TrainState:
        """Of the state. Raises ValueError if a large array would be whole on every chip."""
        abstract = jax.eval_shape(self._init, jax.random.key(0))
        shardings = state_shardings(self.mesh, abstract, self.abstract_params()[1])
        assert_sharded(_place(abstract, shardings), self.mesh)
        return shardings

    def abstract_state(self) -> TrainState:
        return _place(jax.eval_shape(self._init, jax.random.key(0)), self.shardings())

    def init_state(self) -> TrainState:
        key = jax.random.key(self.config.train.seed)
        return jax.jit(self._init, out_shardings=self.shardings())(key)

    def continue_from(self, source: Checkpointer) -> tuple[TrainState, str]:
        """(fresh state with the raw weights of another run, a line that says what was loaded and where omega is from).

        omega is newly initialised if the checkpoint has none of its own (it is binary, or a conversion made one up),
        and left out if this model has none. The EMA starts at the loaded weights: the reference builds its EMA before
        it loads them, from a random start, which the warm-up forgets within a few dozen updates (weight 10! / n^9).

        Raises:
          CheckpointMismatch: other sizes, every differing leaf listed. ValueError: another vocabulary.
        """
        abstract, _ = self.abstract_params()
        saved, meta = source.shapes("params")
        made_up = meta.get("convert", {}).get("new", [])
        omega = saved.get("softmask", {})
        keep = bool(abstract["softmask"]) and any(f"softmask/{name}" not in made_up for name in omega)
        if not keep:
            everywhere = replicated(self.mesh)
            place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
            abstract = {**abstract, "softmask": jax.tree.map(place, omega)}
        params, _ = source.restore_params(abstract, "params", meta["step"])
        self.check_vocabulary(meta)
        if not keep:
            params["softmask"] = self.denoiser.softmask.init() if self.denoiser.softmask else {}
        names = ", ".join(f"softmask/{name}" for name in sorted(params["softmask"]))
        origin = f"{'from the checkpoint' if keep else 'newly initialised'}: {names}" if names else "none"
        state = jax.jit(lambda p: init_state(p, self.optimizer), out_shardings=self.shardings())(params)
        return state, f"starting from step {meta['step']} of {source.directory}, raw weights; omega {origin}"

    def check_vocabulary(self, meta: dict[str, Any]) -> None:
        """ValueError if a checkpoint's ids mean other tokens: tables of equal padded size hide that."""
        tokenizer = self.data.tokenizer
        mine = {"model.vocab_size": self.denoiser.vocab_size, "mask_id": tokenizer.mask_id}
        theirs = {"model.vocab_size": meta.get("model", {}).get("vocab_size"), "mask_id": meta.get("mask_id")}
        mine["tokenizer"], theirs["tokenizer"] = tokenizer.fingerprint, meta.get("tokenizer")
        wrong = [name for name, value in theirs.items() if value not in (None, mine[name])]
        if wrong:
            raise ValueError(
                f"checkpoint: got {', '.join(f'{n} {theirs[n]}' for n in wrong)}, wanted "
                f"{', '.join(f'{n} {mine[n]}' for n in wrong)} (data.tokenizer {tokenizer.name!r}): "
                "use the tokenizer it was trained with"
            )

    def train_step(self) -> Callable[..., Any]:
        return make_train_step(
            self.objective,
            self.optimizer,
            ema_decay=self.config.optimizer.ema_decay,
            accumulate=self.config.train.accumulate,
            seed=self.config.train.seed,
            mesh=self.mesh,
            shardings=self.shardings(),
        )

    def train_batches(self, start: int) -> Any:
        data = self.config.data
        return batches(
            self.data.train,
            batch_size=data.batch_size,
            seed=data.seed,
            start=start,
            rows=local_rows(self.mesh, data.batch_size),
        )

    def eval_batches(self) -> Any:
        config = self.config.eval
        blocks = [self.data.val[i] for i in range(min(config.blocks, len(self.data.val)))]
        size = min(config.batch_size, len(blocks))
        return batches(blocks, batch_size=size, seed=0, shuffle=False, repeat=False)

    def put(self, batch: dict[str, np.ndarray]) -> Any:
        """This process's rows of a training batch -> one global array per entry."""
        return put(self.mesh, batch, self.config.data.batch_size)

    def place(self, tree: Any) -> Any:
        """Arrays that every process holds whole (evaluation batches, canvases) -> global arrays."""
        return place(self.mesh, tree)


def _place(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def build(config: Config, cache_dir: Path) -> Experiment:
    """Loads the data and assembles the experiment on all devices. Raises ValueError on what does not fit."""
    mesh = config.mesh.make()
    check_batch(config, mesh)
    data = load(config.data, cache_dir)
    return assemble(config, data.tokenizer, mesh, data)


def check_batch(config: Config, mesh: Mesh) -> None:
    """ValueError, one line, unless the mesh and the micro-batches divide the batch."""
    parts = batch_shards(mesh) * config.train.accumulate
    if config.data.batch_size % parts:
        raise ValueError(
            f"data.batch_size: got {config.data.batch_size}, wanted a multiple of {parts} (mesh.data x mesh.fsdp = "
            f"{batch_shards(mesh)}, times train.accumulate)"
        )


def assemble(config: Config, vocabulary: Tokenizer | Vocabulary, mesh: Mesh, data: TextData | None) -> Experiment:
    """Model, objective, optimizer and sampler for a vocabulary, before any data is touched.

    Raises:
      ValueError: one line; model.vocab_size is smaller than the vocabulary.
    """
    vocab = vocabulary.model_vocab_size
    wanted = config.model.get("vocab_size", vocab)
    if wanted < vocab:
        raise ValueError(
            f"model.vocab_size: got {wanted}, wanted at least {vocab} ({config.data.tokenizer} and its mask id)"
        )
    model = DiT(DiTConfig(**{**config.model, "vocab_size": wanted}))
    denoiser = Denoiser(model, wanted, vocabulary.mask_id, config.softmask.make())
    objective: Objective
    if model.config.causal:
        objective = NextToken(denoiser, config.readout)
    else:
        objective = SoftMaskedDiffusion(denoiser, config.readout, config.softmask.p_sm, config.noise, config.times)
    return Experiment(
        config=config,
        data=data,
        denoiser=denoiser,
        objective=objective,
        optimizer=make_optimizer(config.optimizer, config.train.updates(config.softmask.p_sm)),
        sampler=make_sampler(config, denoiser, vocabulary.bos_id),
        mesh=mesh,
    )


def make_sampler(config: Config, denoiser: Denoiser, bos_id: int) -> Sampler | ARSampler:
    s = config.sampling
    filters = Filters(s.temperature, s.top_p, s.top_p_rule)
    if denoiser.model.config.causal:
        return ARSampler(denoiser, config.readout, bos_id, filters)
    return Sampler(
        denoiser=denoiser,
        readout=config.readout,
        policy=config.policy,
        filters=filters,
        steps=s.steps,
        use_feedback=s.use_feedback and denoiser.softmask is not None,
        feedback_source=s.feedback_source,
        refresh=s.refresh,
    )
