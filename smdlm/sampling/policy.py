"""What a policy of the sampler is: the protocol, and one step of the schedule. The policies are in policies.py.

Shapes: B examples, L positions, T steps.
"""

from __future__ import annotations

from typing import Any, Protocol

import flax.struct
import jax

from smdlm.readout import Draw


class Times(flax.struct.PyTreeNode):
    """One step of the schedule: from t to s < t, both f32; stacked [T] it is the `xs` of the sampler's scan."""

    t: jax.Array
    s: jax.Array


class Policy(Protocol):
    """init(masked [B, L] bool, at the start) -> carry (a pytree of [B, ...] arrays, or ()); one step as below."""

    def init(self, masked: jax.Array) -> Any: ...

    def __call__(
        self, u: jax.Array, canvas: jax.Array, masked: jax.Array, draw: Draw, times: Times, carry: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        """(commit [B, L] bool, remask [B, L] bool, carry).

        u: [B, L] uniforms in [0, 1), fine near 0 (loop.uniforms). canvas: [B, L] i32. masked: [B, L] bool.
        draw: statistics of the prediction at every masked position (draw.feedback). Its ids and log_prob are None
          unless the policy is `Drawing`.
        """
        ...


class Drawing:
    """Base of the policies that look at the candidate of every masked position, `draw.ids` and `draw.log_prob`.

    A draw costs several times what the statistics do; for all other policies only what they commit is drawn.
    """


class Revising:
    """Base of the policies that also look at what they committed.

    `draw` then holds statistics for every position but the prompt's, and `draw.canvas_prob`, the
    probability of the token on the canvas, measured with the token visible. A step returns (commit, remask, edit,
    carry): edit [B, L] i32 is the token to write over a committed one, -1 where it stays; a re-masked position is not
    edited.
    """


class Lasting:
    """Base of the policies whose carry goes on from block to block, where others begin anew; of no positions: [B].

    Block by block decoding alone asks for it (`passes.Pass.enter`).
    """
