"""The EMA and five updates of AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from golden.arrays import LOSS, Group, largest
from golden.models import MDLM
from golden.replay import example
from smdlm.convert import files, mdlm
from smdlm.optimizer import OptimizerConfig, init_state, make_optimizer, update_ema

EMA = Group("EMA", 1e-6)
ADAMW = Group("AdamW", 1e-5)


def test_ema():
    stored = MDLM.arrays("ema_trace.npz")
    decay, shadow = float(stored["decay"]), jnp.asarray(stored["p0"])
    trace, decays = [], []
    for n, params in enumerate(stored["params"], start=1):
        shadow = update_ema(shadow, jnp.asarray(params), jnp.int32(n), decay)
        trace.append(shadow)
        decays.append(1 - update_ema(jnp.zeros(()), jnp.ones(()), jnp.int32(n), decay))
    stored.check(EMA, "shadow", np.stack(trace), size=max(1.0, largest(stored["params"])))
    stored.check(EMA, "effective_decay", np.stack(decays))


def test_adamw(diffusion):
    stored, batches = MDLM.arrays("train5.npz"), MDLM.arrays("loss.npz")
    objective, batch = example(diffusion, batches["valid"] > 0)
    config = OptimizerConfig(
        lr=float(stored["base_lr"]),
        lr_softmask=float(stored["base_tran_head_lr"]),
        warmup=int(stored["warmup_steps"]),
        clip=float(stored["clip"]),
    )
    pattern = stored["use_sm"]
    optimizer = make_optimizer(config, len(pattern), diffusion.model.matrices())
    order = [mdlm.OMEGA[f"tran_head.{name}"] for name in stored["raw_order"].tolist()]
    start = files.load(MDLM.need("mdlm.ckpt", "mdlm.safetensors")).tensors
    temperature = np.float32(start.get("tran_head.raw_temperature", 0.0))  # no parameter of top-k: it stays where it is

    @jax.jit
    def update(state, feedback):
        (loss, _), grads = jax.value_and_grad(objective, has_aux=True)(state.params, batch, feedback, None)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, feedback=feedback)
        params, done = optax.apply_updates(state.params, updates), state.step + 1
        ema = update_ema(state.ema, params, done, diffusion.ema_decay)
        return state.replace(step=done, params=params, ema=ema, opt_state=opt_state), loss, optax.global_norm(grads)

    state = init_state(diffusion.params, optimizer)
    losses, norms, raw = [], [], []
    for feedback in pattern:
        state, loss, norm = update(state, bool(feedback))
        losses.append(loss)
        norms.append(norm)
        raw.append([state.params["softmask"].get(name, temperature) for name in order])
    n = np.arange(len(pattern))
    stored.check(ADAMW, "lr", config.rate(config.lr, len(pattern))(n), size=config.lr)
    stored.check(ADAMW, "tran_lr", config.rate(config.lr_softmask, len(pattern))(n), size=config.lr_softmask)
    stored.check(LOSS, "loss", np.stack(losses))
    stored.check(ADAMW, "grad_norm_preclip", np.stack(norms), size=largest(stored["grad_norm_preclip"]))
    stored.check(ADAMW, "sm_raw", np.asarray(raw))
    live, averaged = (mdlm.from_tree(tree["backbone"], diffusion.model) for tree in (state.params, state.ema))
    for match in stored.matches("final_(backbone.*)"):
        stored.check(ADAMW, match[0], live[match[1]])
    for match in stored.matches("final_ema_(backbone.*)"):
        stored.check(ADAMW, match[0], averaged[match[1]])
    # omega's Adam count moves on soft-masked steps only; -1 stands for a parameter that never had a gradient.
    counts = {
        jax.tree_util.keystr(path): int(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if "softmask" in jax.tree_util.keystr(path) and "count" in jax.tree_util.keystr(path)
    }
    assert len(counts) == 2, counts  # Adam's own and the schedule's, which follows the global step
    names = [mdlm.OMEGA[f"tran_head.{name}"] for name in stored["tran_head_param_order"].tolist()]
    steps = [min(counts.values()) if name in state.params["softmask"] else -1.0 for name in names]
    stored.check(ADAMW, "tran_head_adam_step", np.asarray(steps))
