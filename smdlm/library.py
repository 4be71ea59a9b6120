"""A trained model in a few lines, for notebooks and programs; `smdlm.load` is its front door."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from smdlm import command, experiment
from smdlm.build import Experiment, assemble, make_sampler
from smdlm.config import Config, read
from smdlm.data.chat import Messages
from smdlm.data.config import check_seed
from smdlm.data.kept import load_tokenizer, tokenizer_of_run
from smdlm.data.vocabulary import Tokenizer
from smdlm.denoiser import Denoiser
from smdlm.evaluate.base import NORMAL_95, Subject, Value
from smdlm.evaluate.likelihood import LABELS, Likelihood
from smdlm.files import local_path, path_of, workdir_of
from smdlm.io import released, viewer
from smdlm.io.viewer import Page
from smdlm.mesh.rules import MeshConfig
from smdlm.sampling.generate import GenerateConfig, Generated, Generator, Prompt, parse
from smdlm.sampling.trace import Trace

BLANK = "____"
OF_GENERATE = {field.name for field in dataclasses.fields(GenerateConfig)}
# Fields that a method would ignore, and what they are for.
ELSEWHERE = {
    "sample": dict.fromkeys(OF_GENERATE, "generate([prompt], ..) for it"),
    "infill": {
        **dict.fromkeys(OF_GENERATE, "generate([{'prompt': 'Return [MASK].', 'tokens': 8}], ..) for it"),
        "prompt": "it in the text itself",
        "viewer": "none: watch(path, prompt) shows a run",
    },
    "generate": {
        "prompt": "it in the list of prompts",
        "count": "a prompt in the list for each answer",
        "viewer": "none: watch(path, prompt, new_tokens=..) shows a run",
    },
}
CONTEXT = 2048  # tokens that a converted decoder, whose positions have no end, is shown at once


def load(workdir: str | Path, config: str | Path | None = None, changes: Mapping[str, Any] | None = None) -> Trained:
    """The EMA weights of a workdir's newest checkpoint, ready to sample, infill and score on one device.

    Args:
      workdir: of `smdlm.main`, or of `smdlm.convert import`; or a released model: its folder, or the name of one that
        came with the package ("miniature").
      config: a config file; without one that of the run is used, and a converted decoder or GPT-2 describes itself.
      changes: {'section.field': value} of that config, e.g. {'data.seq_len': 2048}.

    Raises:
      FileNotFoundError, ValueError: one line; no checkpoint, no config, another size or vocabulary.
    """
    workdir = workdir_of(path_of("workdir", workdir))
    if not isinstance(changes or {}, Mapping):
        raise ValueError(f"load: got changes {changes!r}, wanted {{'section.field': value}}")
    if (folder := released.find(workdir)) is not None:
        return _load_released(folder, config, changes or {})
    checkpointer = experiment.checkpointer_of(workdir)
    if checkpointer.latest_step() is None:
        known = ", ".join(released.names())
        raise FileNotFoundError(
            f"got no checkpoint in {checkpointer.directory}, wanted a trained run, or a released model ({known})"
        )
    if config is not None:
        settings = command.load_config(config).to_dict()
    else:
        meta = checkpointer.read_meta()
        settings = meta.get("config") or _described(meta, workdir)
    if settings is None:
        raise ValueError(
            f"{workdir}: got a converted checkpoint, wanted its config beside it: load(workdir, config=FILE)"
        )
    settings = _changed(settings, changes or {})
    made = read(settings, list(changes or {}))
    assembled = _on_one_device(made, tokenizer_of_run(workdir, made.data.tokenizer))
    with jax.set_mesh(assembled.mesh):
        params, step = experiment.restore(assembled, checkpointer, made.sampling.omega)
    return Trained(assembled, params, step, settings)


def _changed(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config, by sections, with {'section.field': value} put into it."""
    settings = copy.deepcopy(dict(settings))
    for name, value in changes.items():
        section, _, field = name.partition(".")
        settings[section] = {**settings.get(section, {}), field: value}
    return settings


def _on_one_device(config: Config, tokenizer: Tokenizer) -> Experiment:
    return assemble(config, tokenizer, MeshConfig(data=1).make(jax.devices()[:1]), None)


def _load_released(folder: Path, config: str | Path | None, changes: Mapping[str, Any]) -> Trained:
    """A released model. ValueError, one line; it brings its own config, or is damaged."""
    if config is not None:
        raise ValueError(f"load: got config {config} for the released model {folder}, wanted none: it has its own")
    about, arrays = released.about(folder), released.weights(folder)
    settings = _changed(about["config"], changes)
    assembled = _on_one_device(read(settings, list(changes)), load_tokenizer(folder / released.TOKENIZER))
    experiment.check_vocabulary(assembled, about)
    abstract = traverse_util.flatten_dict(assembled.abstract_params()[0], sep="/")
    got, wanted = ({name: x.shape for name, x in tree.items()} for tree in (arrays, abstract))
    if wrong := sorted(name for name in got.keys() | wanted.keys() if got.get(name) != wanted.get(name)):
        raise ValueError(f"{folder}: got other {', '.join(wrong)} than its config wants: copy the folder again")
    params = traverse_util.unflatten_dict({name: jnp.asarray(x) for name, x in arrays.items()}, sep="/")
    return Trained(assembled, {"backbone": {}, "softmask": {}} | params, about["step"], settings)


def _described(meta: Mapping[str, Any], workdir: Path) -> dict[str, Any] | None:
    """The config of a converted decoder or GPT-2; None for other checkpoints, which do not say how long a text is."""
    kind = meta.get("convert", {}).get("kind")
    if kind not in ("decoder", "gpt2"):
        return None
    data = {"source": "stdlib:docstrings", "tokenizer": f"hf:{workdir / 'tokenizer'}"}
    model, convert = meta["model"], meta["convert"]
    made_up, k = convert.get("new", ()), convert.get("k")  # an omega of the import, the k of one that was trained
    described = {
        "model": {"name": kind, **model},
        "data": {**data, "seq_len": min(CONTEXT, model.get("positions", CONTEXT)), "batch_size": 1},
        "softmask": {"p_sm": 0.5, "k": k} if k else {"p_sm": 0.0},
        "train": {"steps": 1},
    }
    if made_up:  # it is in the checkpoint, but has learned nothing: feedback only if it is asked for
        variant = "full" if "softmask/raw_temperature" in made_up else "topk"
        described |= {"softmask": {"variant": variant}, "sampling": {"use_feedback": False}}
    return described


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with its weights; see `load`.

    Attributes:
      experiment: what it was assembled of. step: of the checkpoint.
      params: {'backbone', 'softmask'}, for those who go on in JAX: `model.denoiser(model.params, tokens)`.
      settings: the config, by sections.
    """

    experiment: Experiment = dataclasses.field(repr=False)
    params: Any = dataclasses.field(repr=False)
    step: int
    settings: Mapping[str, Any] = dataclasses.field(repr=False)

    @property
    def denoiser(self) -> Denoiser:
        return self.experiment.denoiser

    @property
    def tokenizer(self) -> Any:
        return self.experiment.vocabulary

    @property
    def length(self) -> int:
        """Tokens of a canvas."""
        return self.experiment.config.data.seq_len

    def sample(self, prompt: str = "", *, count: int = 1, seed: int = 0, **sampling: Any) -> list[str]:
        """Texts that begin with the prompt; the same seed gives the same texts.

        sampling: fields of config.sampling (steps, policy and its parameters, temperature, top_p, ...); what is not
        given is as the run was configured.
        """
        _refuse("sample", sampling)
        changed = self._sampling(prompt=prompt, count=count, seed=seed, **sampling)
        with jax.set_mesh(self.experiment.mesh):
            if sampling.get("viewer"):
                experiment.write_viewer(changed, self.params)
            return experiment.sample(changed, self.params).texts

    def infill(
        self, text: str, *, blank: str = BLANK, tokens: int = 16, count: int = 1, seed: int = 0, **sampling: Any
    ) -> list[str]:
        """The text with every blank filled by `tokens` tokens, `count` times.

        Raises:
          ValueError: no blank, an AR model (it writes left to right only), or more tokens than the canvas holds.
        """
        if self.denoiser.model.causal:
            raise ValueError("infill: got a causal (AR) model, wanted a diffusion model: it writes left to right only")
        if not isinstance(text, str) or not isinstance(blank, str) or not blank:
            raise ValueError(f"infill: got text {text!r} and blank {blank!r}, wanted two strings")
        _refuse("infill", sampling)
        pieces = text.split(blank)
        if len(pieces) == 1:
            raise ValueError(f"infill: got no {blank!r} in the text, wanted at least one")
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
            raise ValueError(f"infill: got tokens={tokens!r}, wanted a whole number, at least 1 per blank")
        holes = np.full(tokens, self.denoiser.mask_id, np.int32)
        parts = [self.tokenizer.encode(pieces[0])]
        for piece in pieces[1:]:
            parts += [holes, self.tokenizer.encode(piece)]
        row = np.concatenate(parts)
        if len(row) > self.length:
            raise ValueError(f"infill: got {len(row)} tokens, wanted at most {self.length}: a shorter text or blanks")
        changed = self._sampling(count=count, seed=seed, **sampling)
        with jax.set_mesh(self.experiment.mesh):
            return experiment.fill(changed, self.params, np.tile(row, (count, 1)), seed).texts

    def watch(
        self,
        path: str | Path | None = None,
        prompt: str = "",
        *,
        against: Trained | None = None,
        seed: int = 0,
        **sampling: Any,
    ) -> Page:
        """A page that plays how `sample(prompt, seed=seed, ..)` is written, step by step; a notebook shows it.

        Args:
          path: of a file to write: .html, or .svg for an animated picture.
          against: another model of the same vocabulary and canvas, played beside this one with the same noise, e.g.
            the binary control of a soft-masked run; without it the same weights with nothing fed back.
          sampling: fields of config.sampling, for both. With one of config.generate (new_tokens, block, cache, ..) it
            plays the answer of `generate([prompt], ..)`, beside it the same without the cache.

        Raises:
          ValueError: one line; an AR model, another vocabulary or canvas, an ending that is not known.
        """
        if path is not None:
            viewer.check_path("watch", str(path))
        if against is not None and not isinstance(against, Trained):
            raise ValueError(f"watch: got against={against!r}, wanted a model: against=smdlm.load(WORKDIR)")
        if against and (against.tokenizer.fingerprint, against.length) != (self.tokenizer.fingerprint, self.length):
            raise ValueError("watch: got against= with another vocabulary or canvas, wanted the same")
        runs = self._watched(prompt=prompt, seed=seed, **sampling)
        if against:
            (name, mine), *_ = runs.items()
            (other, theirs), *_ = against._watched(prompt=prompt, seed=seed, **sampling).items()
            runs = {name: mine, other if other != name else f"{other}, against": theirs}
        show = experiment.show(self._sampling(seed=seed, **sampling), runs)
        if path is not None:
            viewer.write(local_path("watch", path), show)
        return Page(viewer.page(show))

    def _watched(self, prompt: str, seed: int, **fields: Any) -> dict[str, Trace]:
        with jax.set_mesh(self.experiment.mesh):
            if not OF_GENERATE & set(fields):
                return experiment.watch(self._sampling(prompt=prompt, seed=seed, **fields), self.params)
            asked = parse({"prompt": prompt, "seed": seed}, self.tokenizer, seed, "watch")
            return experiment.watch_answer(self._sampling(**fields), self.params, asked)

    def generate(self, prompts: Sequence[str | Mapping[str, Any]], *, seed: int = 0, **fields: Any) -> Generated:
        """Answers to prompts, with what they took: forward passes, FLOPs, seconds.

        Args:
          prompts: texts to be continued (or filled, where they hold '[MASK]'), or objects as the lines of a file of
            prompts are (`smdlm.sampling.generate.parse`): with a suffix, a chat, texts that end the answer, ..
          seed: of the first; each has the next one. The same seed gives the same answer, whoever shares its batch.
          fields: of config.sampling and config.generate (steps, temperature, new_tokens, block, cache, ...); what is
            not given is as the run was configured.

        Raises:
          ValueError: one line; a prompt that is empty or does not fit, an AR model.
        """
        if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable):
            raise ValueError(f"generate: got {prompts!r}, wanted a list of prompts")
        check_seed("generate: seed", seed)
        records = [{"prompt": prompt} if isinstance(prompt, str) else prompt for prompt in prompts]
        return self.answer(
            [parse(x, self.tokenizer, (seed + i) % 2**32, f"prompt {i + 1}") for i, x in enumerate(records)], **fields
        )

    def answer(self, prompts: Sequence[Prompt], **fields: Any) -> Generated:
        """`generate` of prompts that are tokens already (`smdlm.sampling.generate.parse`, `continued`)."""
        if not prompts:
            raise ValueError("generate: got no prompts, wanted at least 1")
        generator = self.generator(**fields)
        with jax.set_mesh(self.experiment.mesh):
            return generator(self.params, prompts)

    def generator(self, **fields: Any) -> Generator:
        """What answers prompts with these fields; its `batches` say what does not fit before anything is computed."""
        _refuse("generate", fields)
        return experiment.make_generator(self._sampling(**fields))

    def chat(self, messages: str | Messages, *, prefix: str = "", stop: Sequence[str] = (), **fields: Any) -> str:
        """The assistant's next turn, of a tokenizer with a chat template.

        Args:
          messages: {'role': .., 'content': ..} first to last; a text is what the user says.
          prefix: how the turn begins; it is a part of the answer. stop: texts that end it.
          fields: as in `generate`.
        """
        if not isinstance(messages, Iterable) or isinstance(messages, Mapping):
            raise ValueError(f"chat: got {messages!r}, wanted a text, or a list of messages")
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        record = {"messages": turns, "prefix": prefix, "stop": list(stop)}
        return prefix + self.generate([record], **fields).answers[0].text

    def score(self, texts: Sequence[str], *, draws: int = 8, seed: int = 0) -> list[dict[str, Value]]:
        """How likely the model finds each text: values by name, each labelled with the likelihood it is.

        A text is scored alone, in blocks of the canvas's length. Diffusion models have a bound that is estimated from
        `draws` draws of masks; the interval is over them.

        Raises:
          ValueError: an empty text.
        """
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise ValueError(f"score: got {texts!r}, wanted a list of strings")
        texts = list(texts)
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"score: got {wrong[0]!r}, wanted a list of strings")
        check_seed("score: seed", seed)
        if any(not text for text in texts):
            raise ValueError("score: got an empty text, wanted at least one character in each")
        if not isinstance(draws, int) or draws < 2:
            raise ValueError(f"score: got draws={draws!r}, wanted at least 2, for an interval")
        found = [self._likelihoods(self.tokenizer.encode(text), draws, seed) for text in texts]
        return [_per_text(nll, len(text.encode("utf-8"))) for nll, text in zip(found, texts, strict=True)]

    def _likelihoods(self, ids: np.ndarray, draws: int, seed: int) -> dict[str, tuple[np.ndarray, int]]:
        """{estimate: (nll of the whole text in nats [draws], tokens)}."""
        count = -(-len(ids) // self.length)
        padded = np.zeros((count, self.length), np.int32)
        padded.reshape(-1)[: len(ids)] = ids
        valid = np.arange(padded.size).reshape(padded.shape) < len(ids)
        batches = [
            {"tokens": padded[i : i + 1], "valid": np.ones(1, bool), "attend": valid[i : i + 1]} for i in range(count)
        ]
        subject = Subject(
            objective=self.experiment.objective,
            params=self.params,
            token_bytes=self.tokenizer.token_bytes,
            batches=lambda blocks, size: batches,
            place=self.experiment.place,
        )
        with jax.set_mesh(self.experiment.mesh):
            all_draws = [Likelihood(seed=seed + draw).blockwise(subject) for draw in range(draws)]
        tokens = int(all_draws[0][2].sum())
        return {name: (np.array([nll[name].sum() for nll, _, _ in all_draws]), tokens) for name in all_draws[0][0]}

    def _sampling(self, **fields: Any) -> Experiment:
        """The experiment with other fields of config.sampling and config.generate, checked like a command line's."""
        given = {f"{'generate' if name in OF_GENERATE else 'sampling'}.{name}": x for name, x in fields.items()}
        config = read(_changed(self.settings, given), list(given))
        config = dataclasses.replace(self.experiment.config, sampling=config.sampling, generate=config.generate)
        sampler = make_sampler(config, self.denoiser, self.tokenizer.bos_id)
        return dataclasses.replace(self.experiment, config=config, sampler=sampler)


def _refuse(method: str, fields: Mapping[str, Any]) -> None:
    """ValueError for a field that the method would ignore."""
    for name in fields:
        if name in ELSEWHERE[method]:
            raise ValueError(f"{method}: got {name}, wanted {ELSEWHERE[method][name]}")


def _per_text(likelihoods: Mapping[str, tuple[np.ndarray, int]], size: int) -> dict[str, Value]:
    """bits_per_byte_NAME and nats_per_token_NAME of a text of `size` bytes; intervals over the draws."""
    values = {}
    for name, (nll, tokens) in likelihoods.items():
        error = NORMAL_95 * nll.std(ddof=1) / np.sqrt(len(nll))
        for unit, amount in (("bits/byte", size * np.log(2)), ("nats/token", tokens)):
            key = f"{unit.replace('/', '_per_')}_{name}"
            values[key] = Value(float(nll.mean() / amount), float(error / amount), unit, LABELS[name])
    return values
