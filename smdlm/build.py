"""Assembles what a run is made of from a config: data, model, objective, optimizer, sampler, on a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from smdlm.config import Config
from smdlm.data.conversations import Chat
from smdlm.data.sft import ChatData
from smdlm.data.text import TextData, load
from smdlm.data.vocabulary import Tokenizer, Vocabulary
from smdlm.denoiser import Denoiser
from smdlm.mesh.arrays import local_rows, place, put
from smdlm.mesh.rules import assert_sharded, batch_sharding, batch_shards, param_shardings, state_shardings
from smdlm.models.base import Frozen, Model
from smdlm.objective import NextToken, Objective, ResponseDiffusion, SoftMaskedDiffusion
from smdlm.optimizer import TrainState, init_state, make_optimizer
from smdlm.sampling.ar import ARSampler
from smdlm.sampling.loop import Sampler
from smdlm.train import make_train_step


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything a run is made of; parameters and state are created by the methods.

    Attributes:
      vocabulary: the tokenizer, or only its sizes where nothing is encoded (ahead-of-time compilation).
      data: None where nothing is trained or evaluated.
    """

    config: Config
    vocabulary: Tokenizer | Vocabulary
    data: TextData | ChatData | None
    denoiser: Denoiser
    objective: Objective
    optimizer: optax.GradientTransformationExtraArgs
    sampler: Sampler | ARSampler
    mesh: Mesh

    @property
    def network(self) -> Model:
        """The model without what is trained beside it."""
        model = self.denoiser.model
        return model.base if isinstance(model, Frozen) else model

    @property
    def frozen(self) -> bool:
        """Whether the network's weights are a base that is not trained."""
        return isinstance(self.denoiser.model, Frozen)

    def abstract_params(self) -> tuple[Any, Any]:
        """(shapes with shardings, shardings) of the trained parameters."""
        return self._abstract(self.denoiser.init)

    def abstract_base(self) -> tuple[Any, Any]:
        """The same of the network's weights."""
        return self._abstract(self.network.init)

    def abstract_whole(self) -> Any:
        """Shapes with shardings of `Denoiser.whole`: what is evaluated and sampled from."""
        params = self.abstract_params()[0]
        if not self.frozen:
            return params
        return {**params, "backbone": self.denoiser.model.beside(self.abstract_base()[0], params["backbone"])}

    def _abstract(self, init: Callable[[jax.Array], Any]) -> tuple[Any, Any]:
        boxed = jax.eval_shape(init, jax.random.key(0))
        shardings = param_shardings(self.mesh, boxed)
        return _with_shardings(nn.meta.unbox(boxed), shardings), shardings

    def _init(self, key: jax.Array) -> TrainState:
        return init_state(nn.meta.unbox(self.denoiser.init(key)), self.optimizer)

    def _start(self, params: Any) -> TrainState:
        if self.frozen:
            key = jax.random.key(self.config.train.seed)
            model = self.denoiser.model
            adapters = model.start(params["backbone"], nn.meta.unbox(model.init(key)))
            params = {**params, "backbone": adapters}
        return init_state(params, self.optimizer)

    def shardings(self) -> TrainState:
        """Of the state. Raises ValueError if a large array would be whole on every chip."""
        abstract = jax.eval_shape(self._init, jax.random.key(0))
        shardings = state_shardings(self.mesh, abstract, self.abstract_params()[1])
        # Adapters have no axis that is long enough to be worth splitting; the base has.
        assert_sharded(self.abstract_base()[0] if self.frozen else _with_shardings(abstract, shardings), self.mesh)
        return shardings

    def abstract_state(self) -> TrainState:
        return _with_shardings(jax.eval_shape(self._init, jax.random.key(0)), self.shardings())

    def init_state(self) -> TrainState:
        """A fresh state from random parameters."""
        key = jax.random.key(self.config.train.seed)
        return jax.jit(self._init, out_shardings=self.shardings())(key)

    def start_from(self, params: Any) -> TrainState:
        """A fresh state from the network's weights and omega, {'backbone', 'softmask'}: these, or adapters of them."""
        return jax.jit(self._start, out_shardings=self.shardings())(params)

    def train_step(self) -> Callable[..., Any]:
        """(state, batch) -> (state, metrics); of a frozen network (state, batch, its weights)."""
        return make_train_step(
            self.objective,
            self.optimizer,
            ema_decay=self.config.optimizer.ema_decay,
            accumulate=self.config.train.accumulate,
            seed=self.config.train.seed,
            mesh=self.mesh,
            shardings=self.shardings(),
            frozen=self.abstract_base()[1] if self.frozen else None,
        )

    def train_batches(self, start: int) -> Any:
        data = self.config.data
        rows = local_rows(self.mesh, data.batch_size)
        return self.data.train_batches(batch_size=data.batch_size, seed=data.seed, start=start, rows=rows)

    def eval_batches(self, blocks: int, batch_size: int) -> Any:
        """Once through the first `blocks` blocks (or conversations) of the validation split, in order."""
        return self.data.eval_batches(blocks, batch_size)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes with shardings of a training batch; of conversations, one of the longest bucket."""
        data, sharding = self.config.data, batch_sharding(self.mesh)
        shapes = {"tokens": ((data.batch_size, data.seq_len), jnp.int32), "valid": ((data.batch_size,), bool)}
        if isinstance(data.source, Chat):
            marks = ("frozen",) if data.source.supervise_pads else ("frozen", "attend")
            shapes |= {name: ((data.batch_size, data.seq_len), bool) for name in marks}
        return {name: jax.ShapeDtypeStruct(*shape, sharding=sharding) for name, shape in shapes.items()}

    def put(self, batch: dict[str, np.ndarray]) -> Any:
        """This process's rows of a training batch -> one global array per entry."""
        return put(self.mesh, batch, self.config.data.batch_size)

    def place(self, tree: Any) -> Any:
        """Arrays that every process holds whole (evaluation batches, canvases) -> global arrays."""
        return place(self.mesh, tree)


def _with_shardings(tree: Any, shardings: Any) -> Any:
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


def assemble(
    config: Config, vocabulary: Tokenizer | Vocabulary, mesh: Mesh, data: TextData | ChatData | None
) -> Experiment:
    """Model, objective, optimizer and sampler for a vocabulary, before any data is touched.

    Raises:
      ValueError: one line; model.vocab_size is smaller than the vocabulary.
    """
    if jax.config.jax_enable_x64:
        raise ValueError(
            "JAX_ENABLE_X64: got 64 bits, wanted 32: unset it, or jax.config.update('jax_enable_x64', False)"
        )
    vocab = vocabulary.model_vocab_size
    wanted = vocab if config.vocab_size is None else config.vocab_size
    if wanted < vocab:
        raise ValueError(
            f"model.vocab_size: got {wanted}, wanted at least {vocab} ({config.data.tokenizer} and its mask id)"
        )
    if config.softmask.operator and config.softmask.k > wanted:
        raise ValueError(f"softmask.k: got {config.softmask.k}, wanted at most model.vocab_size = {wanted}")
    model = config.adapter.around(dataclasses.replace(config.model, vocab_size=wanted))
    denoiser = Denoiser(model, wanted, vocabulary.mask_id, config.softmask.operator)
    objective: Objective
    if model.causal:
        objective = NextToken(denoiser, config.readout)
    else:
        s = config.softmask
        rest = (denoiser, config.readout, s.p_sm, config.noise, config.times, s.coin, s.through)
        objective = ResponseDiffusion(*rest, config.parts) if config.chat else SoftMaskedDiffusion(*rest)
    return Experiment(
        config=config,
        vocabulary=vocabulary,
        data=data,
        denoiser=denoiser,
        objective=objective,
        optimizer=make_optimizer(config.optimizer, config.updates, denoiser.matrices()),
        sampler=make_sampler(config, denoiser, vocabulary.bos_id),
        mesh=mesh,
    )


def make_sampler(config: Config, denoiser: Denoiser, bos_id: int) -> Sampler | ARSampler:
    s = config.sampling
    if denoiser.model.causal:
        return ARSampler(denoiser, config.readout, bos_id, s.filters)
    return Sampler(
        denoiser=denoiser,
        readout=config.readout,
        policy=s.policy,
        filters=s.filters,
        steps=s.steps,
        use_feedback=s.use_feedback and denoiser.softmask is not None,
        feedback_source=s.feedback_source,
        refresh=s.refresh,
    )
