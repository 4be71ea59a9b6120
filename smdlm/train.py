"""The train step and the loop around it: the only imperative shell of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from smdlm.evaluate.base import Value
from smdlm.files import path_of
from smdlm.io.checkpoint import Checkpointer
from smdlm.io.writer import Writer
from smdlm.mesh.rules import batch_sharding, replicated
from smdlm.meter import Meter, Profile, profiled_steps
from smdlm.objective import Objective
from smdlm.optimizer import TrainState, update_ema
from smdlm.stop import StopSignal


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Attributes:
      steps: updates of a run with one forward per update.
      update_budget: 'iso_update' does `steps` updates. 'iso_compute' does half of them when soft-masking is on: the
        paper's comparison at an equal number of forward passes.
      accumulate: micro-batches per update; the batch is divided, the result does not change.
      accumulation: 'mean': over all tokens of the batch, however it is divided. 'sum', of conversations: the means of
        the micro-batches are added up, as the code of Dream's fine-tuning does, which makes gradients `accumulate`
        times larger and weighs short responses more.
      log_every, save_every, eval_every: in updates; saves and evaluations fall on log points. eval_every 0: at the end.
      keep: checkpoints kept.
      seed: of parameters, noise and dropout.
      init_from: workdir whose newest raw weights a new run starts from, '' for random ones.
      init_import: 'KIND:SRC', what `smdlm.convert import KIND SRC` makes of init_from where there is nothing yet.
      profile: 'FIRST:LAST', e.g. '100:105': an xprof trace of the updates behind FIRST up to LAST; '' for none.
      wandb: a project of Weights & Biases to which metrics go as well; '' for none.
    """

    steps: int
    update_budget: str = "iso_update"
    accumulate: int = 1
    accumulation: str = "mean"
    log_every: int = 100
    save_every: int = 1000
    eval_every: int = 0
    keep: int = 2
    seed: int = 0
    init_from: str = ""
    init_import: str = ""
    profile: str = ""
    wandb: str = ""

    def __post_init__(self):
        for name in ("steps", "accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}: got {getattr(self, name)}, wanted at least 1")
        if self.init_from:
            path_of("train.init_from", self.init_from)
        if self.init_import and not (self.init_from and all(self.init_import.partition(":"))):
            raise ValueError(
                f"train.init_import: got {self.init_import!r} with init_from {self.init_from!r}, wanted 'KIND:SRC', "
                "and init_from as the place for it"
            )
        profiled_steps(self.profile)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"train.seed: got {self.seed}, wanted 0 <= seed < 2**32")
        if self.update_budget not in ("iso_update", "iso_compute"):
            raise ValueError(f"train.update_budget: got {self.update_budget!r}, wanted 'iso_update' or 'iso_compute'")
        if self.accumulation not in ("mean", "sum"):
            raise ValueError(f"train.accumulation: got {self.accumulation!r}, wanted 'mean' or 'sum'")
        for name in ("save_every", "eval_every"):
            if getattr(self, name) % self.log_every:
                raise ValueError(
                    f"train.{name}: got {getattr(self, name)}, wanted a multiple of log_every = {self.log_every} "
                    "(what is saved has been checked for NaN at a log point)"
                )

    def updates(self, p_sm: float) -> int:
        """Optimizer updates of the whole run."""
        return max(1, self.steps // 2) if self.update_budget == "iso_compute" and p_sm > 0 else self.steps


class NonFinite(FloatingPointError):
    """The loss or the weights became NaN or inf; the message names the steps."""


class NotSaved(OSError):
    """The weights of the last step are not on disk."""


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    ema_decay: float,
    accumulate: int,
    seed: int,
    mesh: Mesh,
    shardings: TrainState,
    frozen: Any = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """jit (state, batch) -> (state, metrics); the state is donated. batch: {'tokens' [B, L] i32, 'valid' [B] bool, ..}.

    frozen: shardings of the base beside which the state's parameters are trained; the step then takes the base as a
    third argument, which is neither changed nor donated.

    All noise is a function of (seed, state.step, position in the global batch), so a resumed run continues bit for bit
    and neither mesh nor micro-batches change the curve.
    """

    def gradients(params: Any, base: Any, examples: Any, coin: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        def loss_of(params: Any) -> tuple[jax.Array, jax.Array]:
            return objective(objective.denoiser.whole(params, base), examples, coin, key)

        (loss, _), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        return loss, grads

    def step_fn(state: TrainState, batch: Any, base: Any = None) -> tuple[TrainState, dict[str, jax.Array]]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return update(state, batch, base)

    def update(state: TrainState, batch: Any, base: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        key_noise, key_coin, key_dropout = jax.random.split(key, 3)
        examples = objective.corrupt(key_noise, batch)
        coin = jax.random.bernoulli(key_coin, objective.p_step)
        if accumulate == 1:
            loss, grads = gradients(state.params, base, examples, coin, key_dropout)
        else:
            # Micro-batch a takes the rows a, a + A, ...: a part of every device's rows. Weights are already divided by
            # the tokens of the whole batch, so the sums below are the gradients of the undivided batch.
            def fold(x: jax.Array) -> jax.Array:
                return jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1)

            def body(total: Any, xs: Any) -> tuple[Any, None]:
                part, index = xs
                new = gradients(state.params, base, part, coin, jax.random.fold_in(key_dropout, index))
                return jax.tree.map(jnp.add, total, new), None

            zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
            (loss, grads), _ = jax.lax.scan(body, zero, (jax.tree.map(fold, examples), jnp.arange(accumulate)))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, feedback=coin)
        params = optax.apply_updates(state.params, updates)
        done = state.step + 1
        ema = update_ema(state.ema, params, done, ema_decay)
        metrics = {
            "train/loss": loss,
            "train/grad_norm": optax.global_norm(grads),
            "train/masked": jnp.mean(examples.weights != 0),
            "train/feedback": coin.astype(jnp.float32),
        }
        metrics |= {f"train/{name}": value for name, value in objective.denoiser.omega(params).items()}
        return TrainState(done, params, ema, opt_state), metrics

    return jax.jit(
        step_fn,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh), *(() if frozen is None else (frozen,))),
        out_shardings=(shardings, replicated(mesh)),
    )


@dataclasses.dataclass(frozen=True)
class Training:
    """What the loop is given.

    Attributes:
      steps: updates at its end.
      step_fn: as from `make_train_step`, with its base bound to it, if it has one.
      batches: of this process, from the update at which the loop begins.
      put: moves a batch to the devices.
      tokens_per_batch: over all processes. flops_per_batch: the same, of an update, by count.
      meta: of the checkpoints, asked anew for each.
      evaluate: of a state, at config.eval_every; the loop only passes it to the writer.
      profile: where config.profile goes, on the process that writes.
    """

    config: TrainConfig
    steps: int
    step_fn: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    batches: Iterator[dict[str, np.ndarray]]
    put: Callable[[dict[str, np.ndarray]], Any]
    tokens_per_batch: int
    checkpointer: Checkpointer
    writer: Writer
    meta: Callable[[], dict[str, Any]]
    evaluate: Callable[[TrainState], Mapping[str, Value]]
    flops_per_batch: float = 0.0
    profile: Profile = dataclasses.field(default_factory=Profile)


def run(state: TrainState, training: Training, pending: Sequence[dict[str, float]] = ()) -> tuple[TrainState, float]:
    """Trains from state.step to `training.steps`: (final state, tokens per second, compilation left out).

    Metrics are fetched at log points only, one step late, so the device never waits for the host. SIGTERM (preemption)
    on any process ends the loop on all of them with a checkpoint after the same update, within a step or two. Its
    `data` holds the metrics of the updates since the last log point; given back as `pending`, the logged curve is that
    of a run without the interruption.

    Raises:
      NonFinite: within one logging interval; nothing that is not finite has been saved.
      NotSaved: the weights of the last step are not on disk.
      SystemExit: after a signal, with the state saved.
    """
    config, writer, checkpointer = training.config, training.writer, training.checkpointer
    meter, pending = Meter(training.tokens_per_batch, training.flops_per_batch), list(pending)
    with StopSignal() as stop, training.profile as profile:
        for step in range(int(state.step) + 1, training.steps + 1):
            state, metrics = training.step_fn(state, training.put(next(training.batches)))
            pending.append(metrics)
            meter.step(metrics)
            profile.step(step, metrics)
            last, stopped = step == training.steps, stop.reached(step)
            log = last or step % config.log_every == 0
            if not (log or stopped):
                continue
            pending = [{name: float(value) for name, value in metrics.items()} for metrics in pending]
            values = {name: np.mean([metrics[name] for metrics in pending]) for name in pending[-1]}
            if not np.isfinite(values["train/loss"]):
                what = f"loss {values['train/loss']} between steps {step - len(pending) + 1} and {step}"
                raise _non_finite(what, checkpointer)
            values |= meter.stop()
            if log:
                writer.scalars(step, values)
                writer.progress(step, values)
                if estimate := meter.estimate(training.steps - step):
                    writer.line(estimate)
                pending = []
            if step % config.save_every == 0 or last or stopped:
                # The loss of a step is of the weights before its update: it does not vouch for those after it.
                if bad := non_finite(state):
                    raise _non_finite(f"{bad} after step {step}", checkpointer)
                data = {"next_index": step, "pending": list(pending)}
                checkpointer.save(step, state, data=data, meta=training.meta())
            if stopped:
                _stop(training, step)
            if config.eval_every and step % config.eval_every == 0 and not last:
                writer.values(step, training.evaluate(state))
            meter.start()
        if stop.reached(training.steps + 1):  # a signal while the last update was saved
            _stop(training, training.steps)
    return state, meter.tokens_per_s


def _stop(training: Training, step: int) -> NoReturn:
    """After a signal, with the state of this step on its way to the disk."""
    training.writer.close()
    check_saved(training.checkpointer, step)
    logging.warning("stopped by a signal at step %d; the same command continues", step)
    raise SystemExit(0)


def _non_finite(what: str, checkpointer: Checkpointer) -> NonFinite:
    checkpointer.wait()
    newest = checkpointer.latest_step()
    return NonFinite(
        f"training: got {what}, wanted a finite number: lower optimizer.lr or optimizer.clip; "
        + ("there is no checkpoint yet" if newest is None else f"the last good checkpoint is step {newest}")
    )


def non_finite(state: TrainState) -> str:
    """Names of the parts of a state that hold NaN or inf, '' if none does; all processes must call it."""
    parts = {"parameters": state.params, "EMA": state.ema, "optimizer state": state.opt_state}
    finite = _finite(parts)
    return ", ".join(f"non-finite {name}" for name in parts if not bool(finite[name]))


@jax.jit
def _finite(parts: dict[str, Any]) -> dict[str, jax.Array]:
    def every(tree: Any) -> jax.Array:
        return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))

    return {name: every(tree) for name, tree in parts.items()}


def check_saved(checkpointer: Checkpointer, step: int) -> None:
    """Waits for the save under way. NotSaved unless the weights of this step are on disk then."""
    checkpointer.wait()
    newest = checkpointer.latest_step()
    if newest != step:
        raise NotSaved(
            f"the weights of step {step} were not saved (newest: {'none' if newest is None else newest}): the warning "
            "above says why; mend it and run the same command"
        )
