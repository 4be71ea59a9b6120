"""Stored runs of Dream's generation behind our own decoder: its model, its policies, its noise."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from golden.dream import DREAM, Released, load_dream
from smdlm.denoiser import Denoiser
from smdlm.feedback.gates import EntropyGate
from smdlm.full_softmask import FullSoftMask
from smdlm.models.base import Head
from smdlm.ops.filters import Filters
from smdlm.readout import Draw, Readout
from smdlm.sampling.blocks import BlockDecoder, Forward
from smdlm.sampling.policies import Ancestral, Entropy, Margin, MaxProbability, Policy
from smdlm.sampling.transfer import Transfer
from smdlm.softmask import SoftMask

ORDERS = {"maskgit_plus": MaxProbability, "topk_margin": Margin, "entropy": Entropy}


def settings(name: str) -> dict[str, dict[str, Any]]:
    """{run: what it was told and what came of it} of a JSON file of the set."""
    return json.loads(DREAM.need(name).read_text())


class Unrestrained(Denoiser):
    """Predicts every column of its table, as the public code does; the set's mask is never the best."""

    def head(self, params: Any) -> Head:
        return self.model.head(params["backbone"])


@dataclasses.dataclass(frozen=True)
class Scheduled(EntropyGate):
    """The public code's schedules over the share of masks that are left, which is the time of our feedback."""

    schedule: str = "none"

    def __call__(self, omega: Any, seen: Any) -> jax.Array:
        left = seen.time
        factor = {"none": jnp.ones_like(left), "linear": left, "stepwise": (left > 0.5).astype(jnp.float32)}
        return factor[self.schedule] * super().__call__(omega, seen)


def operator(sm: dict[str, Any] | None) -> SoftMask | None:
    """Of the public code's names; it uses the numbers themselves, our gate adds 1e-6 to two of them."""
    if sm is None:
        return None
    centre, steepness = sm["transparency_centre"] + 1e-6, sm["transparency_steepness"] - 1e-6
    gate = Scheduled(sm["transparency_scale"], centre, steepness, sm["transparency_scheduling"])
    if sm["transparency_alg"] == "mixinputs_with_temp":
        return FullSoftMask(gate=gate, temperature=sm["mixture_temp"] - 1e-6, chunk=17)
    return SoftMask(sm["mixinputs_k"], gate)


def decoder(
    policy: Policy, sm: dict[str, Any] | None = None, dream: Released | None = None, **options: Any
) -> tuple[BlockDecoder, Any]:
    """(decoder with the set's weights, or those of `dream`, and the weights themselves)."""
    dream, softmask = dream or load_dream(), operator(sm)
    model = dataclasses.replace(dream.model, shift=True)
    denoiser = Unrestrained(model, model.rows, dream.config["mask_token_id"], softmask)
    readout = Readout(k=softmask.k if softmask else 1, chunk=17)
    params = {"backbone": dream.params, "softmask": softmask.init() if softmask else {}}
    options = {"use_feedback": softmask is not None, "filters": Filters(temperature=0.0), "parity": True} | options
    return BlockDecoder(denoiser, readout, policy, **options), params


def policy_of(run: dict[str, Any]) -> Policy:
    if run["alg"] == "origin":
        return Ancestral()
    if run.get("alg_temp") or not run.get("temperature"):
        return Transfer(ORDERS[run["alg"]](run.get("alg_temp") or 0.0), sampled=bool(run.get("temperature")))
    return Transfer(as_stored(ORDERS[run["alg"]])(), sampled=True)


@functools.cache
def as_stored(order: type) -> type:
    """The order with ties broken by u: at a low temperature many tokens are certain, and torch.topk takes any."""

    class AsStored(order):
        def score(self, u: jax.Array, draw: Draw) -> jax.Array:
            return super().score(u, draw) + 1e-6 * u

    return AsStored


def played(decode: BlockDecoder, params: Any, x: Any, seen: Any, first: int, steps: int, noise: Any = None):
    """All forward passes of a run. noise: [steps, 2, B, block] uniforms in place of random ones."""
    keys = jax.random.split(jax.random.key(0), len(x))

    def forwards() -> list[Forward]:
        return list(decode.forwards(params, keys, jnp.asarray(x), jnp.asarray(seen), first, steps))

    if noise is None:
        return forwards()
    with mock.patch.object(BlockDecoder, "noise", lambda self, keys, begin, index, block: noise[int(index)]):
        return forwards()


def recorded(stored, name, run, shape):
    """[steps, 2, B, block] uniforms that decide as the stored random numbers did; anything where none was used."""
    steps, batch, length = shape
    token = move = np.zeros((steps, batch, length), np.float32)
    if f"{name}__uniform" in stored:
        uniform = np.nan_to_num(stored[f"{name}__uniform"], nan=0.5)
        token, move = (token, uniform) if run["alg"] == "origin" else (uniform, move)
        history = np.concatenate([stored[f"{name}__x_init"][None], stored[f"{name}__history"]])
        move = move if run["alg"] == "origin" else (history[1:] != history[:-1]).astype(np.float32)
    if f"{name}__expo" in stored:  # an exponential of ours is -log(1 - u)
        move = -np.expm1(-np.nan_to_num(stored[f"{name}__expo"], nan=1.0))
    return np.stack([token, move], axis=1).astype(np.float32)


def replayed(name: str, dream: Released | None = None) -> tuple[BlockDecoder, Any, np.ndarray, list[Forward]]:
    """A run of generate.json again, with the set's weights or those of `dream`: (decoder, weights, seen [B, L] bool,
    its forward passes)."""
    stored, run = DREAM.arrays("generate.npz"), settings("generate.json")[name]
    start, first = stored[f"{name}__x_init"], stored["prompt"].shape[1]
    seen = np.ones(start.shape, bool)
    if run["padded"]:
        seen[:, :first] = stored["pad_attention_mask"].astype(bool)
        assert np.array_equal(start[:, :first], stored["pad_prompt"])
    filters = Filters(run.get("temperature") or 0.0, run.get("top_p") or 1.0, top_k=run.get("top_k") or 0)
    made, params = decoder(policy_of(run), run["sm"], dream, filters=filters)
    noise = recorded(stored, name, run, (run["steps"], *start.shape))[..., first:]
    return made, params, seen, played(made, params, start, seen, first, run["steps"], noise)


def history(forwards: list[Forward], steps: int) -> np.ndarray:
    """[steps, B, L] canvases: the public code runs every step, ours stops when no mask is left."""
    canvases = [np.asarray(forward.after.canvas) for forward in forwards]
    return np.stack(canvases + [canvases[-1]] * (steps - len(canvases)))


@dataclasses.dataclass(frozen=True)
class Threshold:
    """The surest mask, and all that are as sure as tau."""

    tau: float

    def init(self, masked: jax.Array) -> Any:
        return ()

    def __call__(self, u, canvas, masked, draw: Draw, times, carry):
        sure = jnp.where(masked, draw.feedback.probs[..., 0], -1.0)
        best = jnp.arange(masked.shape[1]) == jnp.argmax(sure, axis=1, keepdims=True)
        return best | (sure >= self.tau), jnp.zeros_like(masked), carry


@dataclasses.dataclass(frozen=True)
class Budget:
    """The public code without a cache: the n surest are candidates, n = masks / steps; those that are not as sure as
    tau are put off to the next step, the surest never. On the last step each that is put off is a step more.

    The carry is (candidates put off, n, step, steps), [B] each.
    """

    tau: float
    steps: int

    def init(self, masked: jax.Array) -> Any:
        zero = jnp.zeros(len(masked), jnp.int32)
        return zero, masked.sum(1) // self.steps, zero, zero + self.steps

    def __call__(self, u, canvas, masked, draw: Draw, times, carry):
        put_off, budget, step, steps = carry
        sure = jnp.where(masked, draw.feedback.probs[..., 0], -1.0)
        rank = jnp.argsort(jnp.argsort(sure, axis=1, descending=True), axis=1)
        candidate = rank < (budget + put_off)[:, None]
        commit = candidate & ((rank == 0) | (sure >= self.tau))
        put_off = candidate.sum(1) - commit.sum(1)
        last = step == steps - 1
        steps, budget = jnp.where(last, steps + put_off, steps), jnp.where(last, 0, budget)
        return commit, jnp.zeros_like(masked), (put_off, budget, step + 1, steps)
