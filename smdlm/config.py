"""The only reader of ConfigDict: config -> frozen dataclasses.

Every section becomes `Foo(**section)`, so that a misspelt or superfluous field is an error and a missing one takes the
dataclass's documented default. A field that names a class of a table (a policy, a gate, a model, ..) becomes an object
of that class, whose own fields stand beside it in the same section.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import ml_collections

from smdlm.data.config import KINDS, DataConfig, check_seed
from smdlm.data.conversations import Chat
from smdlm.data.sources import own_fields, spelled
from smdlm.diffusion import LogLinear, TimeSampler
from smdlm.evaluate import EVALUATORS, SAMPLE_METRICS
from smdlm.evaluate.base import Evaluator, check_omega
from smdlm.feedback.committed import Stages
from smdlm.feedback.gates import GATES, Gate
from smdlm.feedback.mixers import MIXERS, Mixer
from smdlm.feedback.operators import OPERATORS
from smdlm.io.viewer import check_path
from smdlm.mesh.rules import MeshConfig
from smdlm.models import ADAPTERS, MODELS, Model
from smdlm.models.base import Frozen
from smdlm.ops.filters import Filters
from smdlm.optimizer import OptimizerConfig
from smdlm.readout import Readout
from smdlm.sampling.generate import GenerateConfig
from smdlm.sampling.loop import check_fields
from smdlm.sampling.policies import POLICIES, Policy
from smdlm.softmask import SoftMask
from smdlm.train import TrainConfig


@dataclasses.dataclass(frozen=True)
class SoftMaskConfig:
    """config.softmask; the fields of gate, mixer and variant (scale, ...) stand beside them.

    Attributes:
      p_sm: chance of soft-masking in training; 0 trains a binary model without omega.
      coin, through: of `SoftMaskedDiffusion`: a coin per 'step' or 'example'; a gradient through pass one.
      soften: a binary model (p_sm 0) is evaluated and sampled with feedback all the same, by a gate and an operator
        without parameters.
      k: remembered candidates.
      gate, mixer: of softmask.GATES and MIXERS.
      variant: of feedback.operators.OPERATORS: 'topk', 'full' (the whole distribution), ..
    """

    gate: Gate
    mixer: Mixer
    variant: SoftMask
    p_sm: float = 0.8
    k: int = 3
    coin: str = "step"
    through: bool = False
    soften: bool = False

    def __post_init__(self):
        if not 0 <= self.p_sm <= 1:
            raise ValueError(f"softmask.p_sm: got {self.p_sm}, wanted 0 <= p_sm <= 1")
        if self.coin not in ("step", "example"):
            raise ValueError(f"softmask.coin: got {self.coin!r}, wanted 'step' or 'example'")
        if self.soften and self.p_sm:
            raise ValueError(f"softmask.soften: got True with p_sm {self.p_sm}, wanted p_sm 0: it is trained already")
        if self.soften and (self.variant.matrices() or self.variant.init()):
            raise ValueError(
                "softmask.soften: got a gate or variant with parameters, which a binary model has not learned, wanted "
                "one without (gate 'constant', 'ramp', ..; softmask.learn False for variant 'full')"
            )

    @property
    def operator(self) -> SoftMask | None:
        """None for a binary model."""
        return self.variant if self.p_sm or self.soften else None


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """config.sampling: fields of `Sampler` and `Filters`; the fields of the policy (eta, ...) stand beside them.

    Attributes:
      policy: of sampling.policies.POLICIES.
      steps: nominal NFE; the causal model always takes data.seq_len - 1.
      omega: 'ema' samples with the averaged omega, 'live' with the last one beside the averaged backbone, as the
        reference does (its EMA leaves omega out).
      count: samples written.
      prompt: text at the start of each, '' for none.
      viewer: a file that plays the first sample, beside the same run without feedback: .html (a page) or .svg (an
        animation); '' for none.
    """

    policy: Policy
    steps: int = 128
    temperature: float = 1.0
    top_p: float = 0.9
    top_p_rule: str = "standard"
    top_k: int = 0
    use_feedback: bool = True
    feedback_source: str = "subs"
    refresh: str = "always"
    omega: str = "ema"
    count: int = 8
    prompt: str = ""
    viewer: str = ""
    seed: int = 0

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"sampling.count: got {self.count}, wanted at least 1")
        check_fields(self.steps, self.feedback_source, self.refresh)
        check_omega("sampling.omega", self.omega)
        check_seed("sampling.seed", self.seed)
        if self.viewer:
            check_path("sampling.viewer", self.viewer)
        _ = self.filters

    @property
    def filters(self) -> Filters:
        return Filters(self.temperature, self.top_p, self.top_p_rule, self.top_k)

    @property
    def described(self) -> dict[str, Any]:
        """As JSON values; without the viewer's file, which changes nothing."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "viewer"}
        return fields | {"policy": {"name": type(self.policy).__name__, **dataclasses.asdict(self.policy)}}


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """config.eval; the fields of the metrics stand beside them.

    Attributes:
      metrics: of evaluate.EVALUATORS, several joined by commas.
      omega: 'ema', or 'live': the last omega beside the averaged backbone (the reference's EMA leaves omega out).
      samples: of evaluate.SAMPLE_METRICS, joined by commas: what is measured on the samples at the end of a run.
    """

    metrics: tuple[Evaluator, ...]
    omega: str = "ema"
    samples: str = ""

    def __post_init__(self):
        check_omega("eval.omega", self.omega)
        for name in filter(None, self.samples.split(",")):
            pick("eval.samples", name, SAMPLE_METRICS)


@dataclasses.dataclass(frozen=True)
class _ModelConfig:
    """config.model: a name of models.MODELS and the fields of that class."""

    name: Model


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """config.adapter: what is trained beside a frozen base, which is the weights of train.init_from.

    Attributes:
      kind: 'none' trains the whole model, 'lora' and 'dora' adapters of `targets`, 'softmask' omega alone.
      targets: modules, by the last part of their path, joined by commas.
      rank, alpha: as in `LoRA`.
    """

    kind: str = "none"
    targets: str = "q,k,v,attention_out"
    rank: int = 16
    alpha: float = 16.0

    def __post_init__(self):
        if self.kind not in (known := ("none", *ADAPTERS, "softmask")):
            raise ValueError(f"adapter.kind: got {self.kind!r}, wanted one of {', '.join(map(repr, known))}")

    @property
    def described(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: equal for the same function of the same parameters."""
        if self.kind not in ADAPTERS:
            return {"kind": self.kind}
        return {**dataclasses.asdict(self), "targets": sorted(self.targets.split(","))}

    def around(self, model: Model) -> Model:
        """The model with what is trained beside it. ValueError, one line: modules that it lacks, an impossible rank."""
        if self.kind == "none":
            return model
        if self.kind == "softmask":
            return Frozen(model)
        return ADAPTERS[self.kind](model, tuple(self.targets.split(",")), self.rank, self.alpha)


SECTIONS: dict[str, type] = {
    "model": _ModelConfig,
    "adapter": AdapterConfig,
    "data": DataConfig,
    "noise": LogLinear,
    "times": TimeSampler,
    "softmask": SoftMaskConfig,
    "readout": Readout,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "sampling": SamplingConfig,
    "generate": GenerateConfig,
    "eval": EvalConfig,
    "mesh": MeshConfig,
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """A field that names a class.

    Attributes:
      several: names joined by commas, for a tuple of objects.
      same_names: fields of one name mean the same in all classes, so that a file's value stays for another class.
      target: the name is followed by a colon and the value of the class's first field ('jsonl:GLOB').
    """

    table: Mapping[str, type]
    default: str | None
    several: bool = False
    same_names: bool = False
    target: bool = False


# In the order in which they are made: a class may ask for the section's own fields and for what was made before it.
CHOICES: dict[str, dict[str, Choice]] = {
    "model": {"name": Choice(MODELS, "dit", same_names=True)},
    "data": {"source": Choice(KINDS, None, same_names=True, target=True)},
    "softmask": {
        "gate": Choice(GATES, "entropy"),
        "mixer": Choice(MIXERS, "lerp"),
        "variant": Choice(OPERATORS, "topk"),
    },
    "sampling": {"policy": Choice(POLICIES, "mdlm")},
    "eval": {"metrics": Choice(EVALUATORS, "likelihood", several=True, same_names=True)},
}
UNKNOWN_VOCABULARY = 2  # stands in for the size that the tokenizer will tell, so that all else can be checked


@dataclasses.dataclass(frozen=True)
class Config:
    """All sections as dataclasses.

    vocab_size: of the model, None if the tokenizer is to tell (`model` then has another one).
    """

    model: Model
    vocab_size: int | None
    adapter: AdapterConfig
    data: DataConfig
    noise: LogLinear
    times: TimeSampler
    softmask: SoftMaskConfig
    readout: Readout
    optimizer: OptimizerConfig
    train: TrainConfig
    sampling: SamplingConfig
    generate: GenerateConfig
    eval: EvalConfig
    mesh: MeshConfig

    @property
    def updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.train.updates(self.softmask.p_sm)

    @property
    def chat(self) -> bool:
        """Whether it is fine-tuned on the responses of conversations."""
        return isinstance(self.data.source, Chat)

    @property
    def parts(self) -> int:
        """Of a batch of conversations whose losses are means of their own and are added up."""
        return self.train.accumulate if self.train.accumulation == "sum" else 1


def read(config: ml_collections.ConfigDict, given_by_user: Collection[str] = ()) -> Config:
    """Validates every field of a config before anything is loaded or compiled.

    given_by_user: names of fields set on the command line. A choice among them (sampling.policy) starts from the
    defaults of its class: what the file meant for another class is dropped.

    Raises:
      ValueError: one line; unknown section or field, wrong type, value out of range, impossible combination.
    """
    unknown = set(config) - set(SECTIONS) - {"study"}  # that is for smdlm/study.py
    if unknown:
        raise ValueError(f"config: got section {sorted(unknown)}, wanted {', '.join(SECTIONS)}")
    for name in set(config) & set(SECTIONS):
        if not isinstance(config[name], (Mapping, ml_collections.ConfigDict)):
            raise ValueError(f"config.{name}: got {config[name]!r}, wanted a section of fields: config.{name}.FIELD")
    given = {name: dict(config[name]) if name in config else {} for name in SECTIONS}
    if "k" in given["readout"]:
        raise ValueError("config.readout.k: got a second value, wanted softmask.k alone")
    given["readout"]["k"] = given["softmask"].get("k", SoftMaskConfig.k)
    vocab_size = given["model"].setdefault("vocab_size", UNKNOWN_VOCABULARY)
    for section, choices in CHOICES.items():
        by_user = {name.removeprefix(f"{section}.") for name in given_by_user if name.startswith(f"{section}.")}
        for field in choices.keys() & by_user:
            dropped = _meant_for_another(section, field, given[section]) - by_user
            given[section] = {name: value for name, value in given[section].items() if name not in dropped}
    sections = {name: _section(name, given[name]) for name in SECTIONS}
    model = sections.pop("model").name
    told = "vocab_size" in config.get("model", {})
    made = Config(model=model, vocab_size=vocab_size if told else None, **sections)
    _check_combinations(made, given["sampling"])
    return made


def pick(field: str, name: Any, table: Mapping[str, Any]) -> Any:
    """table[name], or one clear line. No silent else: the reference samples without feedback on an unknown name."""
    if not isinstance(name, str):
        raise ValueError(f"config.{field}: got {name!r}, wanted str")
    if name not in table:
        raise ValueError(f"{field}: got {name!r}, wanted one of {', '.join(map(repr, table))}")
    return table[name]


def _section(section: str, values: dict[str, Any]) -> Any:
    """The dataclass of a section, with the objects that its choices name."""
    cls, choices = SECTIONS[section], CHOICES.get(section, {})
    classes = {field: _classes(section, field, values) for field in choices}
    chosen = [c for field in classes for c in classes[field]]
    own = _own_fields(section, *chosen)
    common = [f.name for f in dataclasses.fields(cls)]
    _refuse_unknown(section, values, [*common, *sorted(own)])
    made = _checked(section, cls, {k: v for k, v in values.items() if k in common and k not in choices}, skip=choices)
    for field, choice in choices.items():
        told = [values | (_behind_colon(c, values[field]) if choice.target else {}) for c in classes[field]]
        objects = tuple(_object(section, c, v, made) for c, v in zip(classes[field], told, strict=True))
        made[field] = objects if choice.several else objects[0]
    return cls(**made)


def _classes(section: str, field: str, values: Mapping[str, Any]) -> list[type]:
    """The classes that a choice names."""
    choice = CHOICES[section][field]
    name = values.get(field, choice.default)
    if choice.target and name is None and field not in values:
        raise ValueError(f"config.{section}: got no {field}, wanted {spelled(choice.table)}")
    if choice.target:
        return [_class_before_colon(f"{section}.{field}", name, choice.table)]
    names = name.split(",") if choice.several and isinstance(name, str) else [name]
    return [pick(f"{section}.{field}", name, choice.table) for name in names]


def _class_before_colon(field: str, spec: Any, table: Mapping[str, type]) -> type:
    """The class of 'name:target'."""
    if not isinstance(spec, str):
        raise ValueError(f"config.{field}: got {spec!r}, wanted str: {spelled(table)}")
    name, _, target = spec.partition(":")
    if name not in table or not target:
        raise ValueError(f"{field}: got {spec!r}, wanted {spelled(table)}")
    return table[name]


def _meant_for_another(section: str, field: str, values: Mapping[str, Any]) -> set[str]:
    """Fields that a file meant for the class it names itself, once the command line names a class."""
    choice = CHOICES[section][field]
    kept = _own_fields(section, *_classes(section, field, values)) if choice.same_names else set()
    return _own_fields(section, *choice.table.values()) - kept


def _object(section: str, cls: type, values: dict[str, Any], made: dict[str, Any]) -> Any:
    """An object of a chosen class: from what was made of the section so far, and from the fields beside it."""
    names = [f.name for f in dataclasses.fields(cls)]
    shared = {name: made[name] for name in names if name in made}
    return cls(**_checked(section, cls, {k: v for k, v in values.items() if k in names and k not in shared}, shared))


def _behind_colon(cls: type, spec: str) -> dict[str, str]:
    """{first field of the class: what stands behind the colon}."""
    return {dataclasses.fields(cls)[0].name: spec.partition(":")[2]}


def _own_fields(section: str, *classes: type) -> set[str]:
    """Fields of the classes that are no fields of the section itself and stand behind no colon."""
    with_target = {c for choice in CHOICES.get(section, {}).values() if choice.target for c in choice.table.values()}
    names = {f.name for c in classes for f in (own_fields(c) if c in with_target else dataclasses.fields(c))}
    return names - {f.name for f in dataclasses.fields(SECTIONS[section])}


def _refuse_unknown(section: str, values: Mapping[str, Any], known: Collection[str]) -> None:
    unknown = sorted(set(values) - set(known))
    if not unknown:
        return
    for field, choice in CHOICES.get(section, {}).items():
        owners = [name for name, cls in choice.table.items() if unknown[0] in _own_fields(section, cls)]
        if owners:
            raise ValueError(
                f"config.{section}: got {unknown[0]} (a field of {field} {', '.join(owners)}), wanted one of "
                f"{', '.join(known)}"
            )
    raise ValueError(f"config.{section}: got unknown field {', '.join(unknown)}, wanted one of {', '.join(known)}")


def _checked(
    section: str, cls: type, values: dict[str, Any], shared: Mapping[str, Any] | None = None, skip: Collection[str] = ()
) -> dict[str, Any]:
    """values with the defaults of the class and `shared`, after a look at their types; `skip` is made elsewhere."""
    shared = shared or {}
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in skip and f.name not in shared}
    missing = sorted(n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values)
    if missing:
        raise ValueError(f"config.{section}: got no {', '.join(missing)}, wanted a value for each")
    for name, value in values.items():
        wanted = getattr(fields[name].type, "__name__", fields[name].type)
        kind = {"int": int, "float": (int, float), "str": str, "bool": bool}[wanted]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            wanted = {"bool": "true or false"}.get(wanted, wanted)
            raise ValueError(f"config.{section}.{name}: got {value!r}, wanted {wanted}")
    return {**{n: f.default for n, f in fields.items()}, **values, **shared}


def _check_combinations(config: Config, sampling: Mapping[str, Any]) -> None:
    """sampling: the section as given, with the policy's name."""
    if config.model.causal:
        if config.softmask.p_sm:
            raise ValueError("softmask.p_sm: got > 0 for the causal (AR) model, wanted 0: it has no masks")
        if config.noise.replace:
            raise ValueError("noise.replace: got > 0 for the causal (AR) model, wanted 0: it is trained without noise")
        if config.softmask.soften and not isinstance(config.softmask.variant, Stages):
            raise ValueError("softmask.variant: got no 'stages' for the causal (AR) model, wanted it: it has no masks")
        defaults = {f.name: f.default for f in dataclasses.fields(SamplingConfig)}
        defaults["policy"] = CHOICES["sampling"]["policy"].default
        for field in ("policy", "use_feedback", "feedback_source", "refresh", "viewer"):
            got = sampling.get(field, defaults[field])
            if got != defaults[field]:
                raise ValueError(
                    f"sampling.{field}: got {got!r} for the causal (AR) model, wanted {defaults[field]!r}: it has no "
                    "such thing"
                )
    if config.train.accumulation == "sum" and not config.chat:
        raise ValueError("train.accumulation: got 'sum' for a text, wanted 'mean', or data.source 'chat:..'")
    if config.chat and config.model.causal:
        raise ValueError("data.source: got conversations for a causal (AR) model, wanted model.causal False")
    config.adapter.around(config.model)
    if config.adapter.kind != "none" and not config.train.init_from:
        raise ValueError(
            f"train.init_from: got '' with adapter.kind {config.adapter.kind!r}, wanted the workdir of the frozen base"
        )
    if getattr(config.model, "param_dtype", "") == "int8" and config.adapter.kind == "none":
        raise ValueError("model.param_dtype: got 'int8' with adapter.kind 'none', wanted a frozen base, or float32")
    if config.adapter.kind == "softmask" and not config.softmask.p_sm:
        raise ValueError("softmask.p_sm: got 0 with adapter.kind 'softmask', wanted > 0: nothing else is trained")
    operator = config.softmask.operator
    if config.adapter.kind == "softmask" and not (operator.matrices() or operator.init()):
        raise ValueError("softmask.gate: got one without parameters with adapter.kind 'softmask', wanted one to train")
    if config.data.batch_size % config.train.accumulate:
        raise ValueError(
            f"train.accumulate: got {config.train.accumulate} for data.batch_size {config.data.batch_size}, wanted a "
            "divisor"
        )
