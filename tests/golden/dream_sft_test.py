"""Dream's fine-tuning with DoRA: rows, noise, both passes, loss, gradients and one update, binary and soft-masked."""

import dataclasses
import functools
import json
import types
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from golden.arrays import LOSS, NOISE, Group, largest
from golden.dream import DREAM, load_dream
from smdlm.convert import mdlm, peft
from smdlm.data.conversations import Chat
from smdlm.data.sft import ChatData
from smdlm.denoiser import Denoiser
from smdlm.diffusion import LogLinear
from smdlm.full_softmask import FullSoftMask
from smdlm.objective import ResponseDiffusion
from smdlm.optimizer import OptimizerConfig, init_state, make_optimizer
from smdlm.readout import Readout
from smdlm.softmask import SoftMask

LOGITS = Group("SFT logits", 6e-6, relative=True)  # of two networks, one behind the other
MIXTURES = Group("SFT soft masks", 3e-6, relative=True)
GRADIENTS = Group("SFT gradients", 2e-5, relative=True)
UPDATED = Group("SFT after an update", 1e-6, relative=True)
CLIP = 7.0  # of the reference's trainer


class Unrestricted(Denoiser):
    """The public code lets its network predict the mask, which then stays a mask; ours never does."""

    def head(self, params):
        return self.model.head(params["backbone"])


def cases() -> list[tuple[str, str]]:
    """(batch, kind): 'binary', or soft-masked by the first candidates ('sm_topk3') or by all of them ('sm_temp')."""
    if not DREAM.has("sft.npz"):
        return []
    return [match.groups() for match in DREAM.arrays("sft.npz").matches(r"(batch\d+)_(\w+?)__loss")]


def operator(kind: str) -> SoftMask | FullSoftMask | None:
    if kind == "binary":
        return None
    return FullSoftMask(chunk=17) if kind == "sm_temp" else SoftMask(k=int(kind.removeprefix("sm_topk")))


@dataclasses.dataclass(frozen=True)
class Case:
    """A stored case behind our own objects: objective, its corrupted batch, what is trained, the frozen base."""

    objective: ResponseDiffusion
    example: Any
    params: Any
    base: Any
    lora: Any

    @property
    def denoiser(self) -> Denoiser:
        return self.objective.denoiser


@functools.cache
def adapted() -> tuple[Any, Any, Any]:
    """(adapted model, adapters, frozen weights)."""
    dream = load_dream()
    lora, adapters = peft.load(DREAM.need("dora"), dream.model)
    return lora, jax.tree.map(jnp.asarray, adapters), dream.params


@functools.cache
def case(batch: str, kind: str) -> Case:
    stored = DREAM.arrays("sft.npz")
    lora, adapters, base = adapted()
    config = load_dream().config
    softmask = operator(kind)
    denoiser = Unrestricted(lora, lora.vocab_size, config["mask_token_id"], softmask)
    omega = {}
    if softmask:
        omega = {name: stored[f"{batch}_{kind}__value_{theirs}"] for theirs, name in raw_names(softmask).items()}
    t = 1 / stored[f"{batch}_dsigma"]
    readout = Readout(k=softmask.k if softmask else 1, chunk=17)
    objective = ResponseDiffusion(denoiser, readout, 1.0 if softmask else 0.0, times=lambda _, size: jnp.full(size, t))
    params = {"backbone": adapters, "softmask": jax.tree.map(jnp.float32, omega)}
    return Case(objective, corrupted(objective, batch, config["pad_token_id"]), params, base, lora)


def raw_names(softmask: Any) -> dict[str, str]:
    """{name of a raw parameter there: ours}, of those that the operator has."""
    names = {name.removeprefix("tran_head."): ours for name, ours in mdlm.OMEGA.items()}
    return {theirs: ours for theirs, ours in names.items() if ours in softmask.init()}


def corrupted(objective: ResponseDiffusion, batch: str, pad_id: int) -> Any:
    """The stored conversations padded as ours are, with the stored masks."""
    stored = DREAM.arrays("sft.npz")
    settings, tokenizer = types.SimpleNamespace(source=Chat("none")), types.SimpleNamespace(eos_id=pad_id)
    rows = [
        (stored[match[0]], int(stored[f"{batch}_prompt_length_{match[1]}"]))
        for match in stored.matches(rf"{batch}_raw_ids_(\d+)")
    ]
    length = stored[f"{batch}_input_ids"].shape[1]
    padded = ChatData(settings, None, None, tokenizer, "").padded(rows, length, len(rows))
    assert np.array_equal(padded["tokens"], stored[f"{batch}_clean_ids"])
    uniforms = np.where(stored[f"{batch}_mask_idx"], 0.0, 1.0)
    with mock.patch("jax.random.uniform", lambda *args, **kwargs: jnp.asarray(uniforms)):
        return objective.corrupt(jax.random.key(0), jax.tree.map(jnp.asarray, padded))


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(objective: Any, params: Any, base: Any, example: Any) -> Any:
    def loss(params):
        return objective(objective.denoiser.whole(params, base), example, jnp.bool_(True), None)

    return jax.value_and_grad(loss, has_aux=True)(params)


@functools.partial(jax.jit, static_argnums=0)
def both_passes(objective: Any, params: Any, base: Any, canvas: Any) -> Any:
    """(hidden states of the first pass, embeddings of the second, lambda, feedback)."""
    denoiser, whole = objective.denoiser, objective.denoiser.whole(params, base)
    first, masked = denoiser(whole, canvas), canvas == denoiser.mask_id
    feedback = objective.readout.feedback(denoiser.head(whole), first, masked)
    feedback = denoiser.softmask.attach(feedback, first)
    table, head, omega = denoiser.model.table(whole["backbone"]), denoiser.head(whole), params["softmask"]
    mixed = denoiser.softmask(omega, table, head, canvas, feedback, denoiser.mask_id)
    entropy = denoiser.softmask.look_up(omega, table, head, canvas, feedback)[2]
    return first, mixed, denoiser.softmask.lam(omega, table, feedback, entropy)[..., 0], feedback


def by_name(lora: Any, tree: Any) -> dict[str, np.ndarray]:
    """Adapters (or gradients of them) under the names of the set."""
    flat, found = traverse_util.flatten_dict(tree, sep="/"), {}
    for leaf in peft.tensors_of(lora):
        value = np.asarray(flat[leaf.target][leaf.layer])
        value = value.reshape(leaf.shape[::-1]).T if len(leaf.shape) == 2 else value.reshape(leaf.shape)
        name = leaf.source.removeprefix("base_model.model.")
        found[name if name.endswith(".weight") else f"{name}.weight"] = value
    return found


@pytest.mark.parametrize("batch", sorted({batch for batch, _ in cases()}))
def test_rows_and_noise(batch):
    """The canvas, what is learned of it, and the chance of a mask at the stored t."""
    stored = DREAM.arrays("sft.npz")
    example = case(batch, "binary").example
    stored.check(NOISE, f"{batch}_input_ids", example.canvas)
    learned = np.asarray(example.weights) > 0
    stored.check(NOISE, f"{batch}_mask_idx", learned)
    stored.check(NOISE, f"{batch}_labels", np.where(learned, example.targets, -100))
    t, schedule = 1 / stored[f"{batch}_dsigma"], LogLinear()
    stored.check(NOISE, f"{batch}_p_mask", 1 - schedule.alpha(t) + schedule.eps)


@pytest.mark.parametrize("batch, kind", cases())
def test_loss_and_gradients(batch, kind):
    stored, this = DREAM.arrays("sft.npz"), case(batch, kind)
    prefix = f"{batch}_{kind}__"
    (loss, _), grads = loss_and_gradients(this.objective, this.params, this.base, this.example)
    stored.check(LOSS, f"{prefix}loss", loss)
    stored.check(LOSS, f"{prefix}ce", loss / stored[f"{batch}_dsigma"])
    named = by_name(this.lora, grads["backbone"])
    for match in stored.matches(rf"{prefix}grad_(model[.].*)"):
        stored.check(GRADIENTS, match[0], named[match[1]])
    stored.check(GRADIENTS, f"{prefix}grad_norm", optax.global_norm(grads))
    if this.denoiser.softmask:
        ours = raw_names(this.denoiser.softmask)
        raw = [f"{prefix}grad_raw_{name}" for name in ("scale", "centre_neg", "steep", "temperature")]
        size = largest(*(stored[name] for name in raw))  # sums of terms of one size
        for name in raw:
            own = ours.get(name.removeprefix(f"{prefix}grad_"))
            stored.check(GRADIENTS, name, grads["softmask"][own] if own else jnp.zeros(()), size=size)


@pytest.mark.parametrize("batch, kind", cases())
def test_both_passes(batch, kind):
    stored, this = DREAM.arrays("sft.npz"), case(batch, kind)
    prefix, canvas, dream = f"{batch}_{kind}__", this.example.canvas, load_dream()
    beside = dataclasses.replace(dream, params=this.lora.join(this.base, this.params["backbone"]))
    if not this.denoiser.softmask:
        stored.check(LOGITS, f"{prefix}logits", beside.logits(beside.hidden(beside.embed(canvas))))
        return
    first, mixed, lam, feedback = both_passes(this.objective, this.params, this.base, canvas)
    logits = beside.logits(first)
    stored.check(LOGITS, f"{prefix}prelim_shifted_logits", logits)
    stored.check(MIXTURES, f"{prefix}inputs_embeds", mixed)
    stored.check(LOGITS, f"{prefix}logits", beside.logits(beside.hidden(mixed)))
    stored.check(MIXTURES, f"{prefix}p_sm", mixture(this, kind, canvas, logits, lam, feedback))
    values = this.denoiser.omega(this.params)
    for name, ours in {"scale": "omega_s", "centre": "omega_b", "steepness": "omega_a"}.items():
        stored.check(MIXTURES, f"{prefix}{name}", values[ours])
    temperature = values.get("omega_t", jax.nn.softplus(stored[f"{prefix}value_raw_temperature"]) + 1e-6)
    stored.check(MIXTURES, f"{prefix}temperature", temperature)


def mixture(this: Case, kind: str, canvas: Any, logits: np.ndarray, lam: Any, feedback: Any) -> np.ndarray:
    """What each position is embedded as, over the vocabulary [B, L, V]."""
    one_hot = np.eye(logits.shape[-1])
    if kind == "sm_temp":
        raw = this.params["softmask"]["raw_temperature"]
        candidates = np.asarray(jax.nn.softmax(logits / (jax.nn.softplus(raw) + 1e-6)))
    else:
        pi = feedback.probs / np.maximum(feedback.probs.sum(-1, keepdims=True), 1e-30)
        candidates = np.einsum("blk,blkv->blv", pi, one_hot[np.asarray(feedback.ids)])
    lam = np.where(canvas == this.denoiser.mask_id, lam, 0.0)[..., None]
    return (1 - lam) * one_hot[np.asarray(canvas)] + lam * candidates


@pytest.mark.parametrize("batch, kind", cases())
def test_one_update(batch, kind):
    stored, this = DREAM.arrays("sft.npz"), case(batch, kind)
    prefix = f"{batch}_{kind}__"
    if not stored.matches(rf"{prefix}after1_.*"):
        pytest.skip("the set has no update of this case")
    (backbone, omega) = json.loads(DREAM.need("sft.json").read_text())[f"groups_{kind}"]
    settings = {"b1": backbone["betas"][0], "b2": backbone["betas"][1], "eps": backbone["eps"], "clip": CLIP}
    config = OptimizerConfig(lr=backbone["lr"], lr_softmask=omega["lr"], warmup=0, ema_decay=0.0, **settings)
    optimizer = make_optimizer(config, 1, this.lora.matrices())
    _, grads = loss_and_gradients(this.objective, this.params, this.base, this.example)
    state = init_state(this.params, optimizer)
    updates, _ = optimizer.update(grads, state.opt_state, this.params, feedback=bool(this.denoiser.softmask))
    after = optax.apply_updates(this.params, updates)
    named = by_name(this.lora, after["backbone"])
    for match in stored.matches(rf"{prefix}after1_(model[.].*)"):
        stored.check(UPDATED, match[0], named[match[1]])
    for match in stored.matches(rf"{prefix}after1_(raw_.*)"):
        own = raw_names(this.denoiser.softmask).get(match[1])
        stored.check(UPDATED, match[0], after["softmask"][own] if own else stored[f"{prefix}value_{match[1]}"])
