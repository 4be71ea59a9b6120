"""The policies that follow the model's confidence: their rules on small tables, and the limits they must satisfy."""

import jax.numpy as jnp
import numpy as np
import pytest

from smdlm.readout import Draw
from smdlm.sampling.adaptive import Edit, EntropyBound, Factor, Threshold, TokenToMask
from smdlm.softmask import Feedback


def draw_of(entropy=None, best_prob=None, best=None, canvas_prob=None):
    """A draw of one row with the given statistics."""
    length = len(next(x for x in (entropy, best_prob, canvas_prob) if x is not None))

    def row(values, default):
        return jnp.asarray([default] * length if values is None else values)[None]

    feedback = Feedback(row(best, 0)[..., None], row(best_prob, 0.5)[..., None], -row(entropy, 1.0), None)
    return Draw(None, None, feedback, row(canvas_prob, 0.0))


def step(policy, draw, masked=None, canvas=None, carry=None):
    """(commit, remask, edit or None, carry) of the one row, as lists."""
    length = draw.feedback.neg_entropy.shape[1]
    masked = jnp.ones((1, length), bool) if masked is None else jnp.asarray(masked, bool)[None]
    canvas = jnp.zeros((1, length), jnp.int32) if canvas is None else jnp.asarray(canvas, jnp.int32)[None]
    carry = policy.init(jnp.ones_like(masked)) if carry is None else carry
    moves = policy(jnp.full(masked.shape, 0.5), canvas, masked, draw, None, carry)
    commit, remask = (np.flatnonzero(x[0]).tolist() for x in moves[:2])
    return commit, remask, moves[2][0].tolist() if len(moves) == 4 else None, moves[-1]


def test_entropy_bound_is_the_longest_prefix():
    entropy = [0.9, 0.05, 0.02, 0.04, 0.5]
    for bound, wanted in ((0.0, [2]), (0.03, [2, 3]), (0.06, [1, 2, 3]), (0.15, [1, 2, 3, 4]), (9.0, [0, 1, 2, 3, 4])):
        ordered, chosen = sorted(entropy), []
        for i in range(1, 6):  # the rule of the source: sum less largest
            if sum(ordered[:i]) - max(ordered[:i]) <= bound:
                chosen = sorted(entropy.index(x) for x in ordered[:i])
        assert chosen == wanted
        assert step(EntropyBound(bound), draw_of(entropy))[0] == wanted


def test_entropy_bound_of_zero_commits_one_token_per_step():
    draw, masked, order = draw_of([0.3, 0.1, 0.4, 0.2]), np.ones(4, bool), []
    for _ in range(4):
        commit = step(EntropyBound(0.0), draw, masked)[0]
        masked[commit] = False
        order.append(commit)
    assert order == [[1], [3], [0], [2]]
    assert step(EntropyBound(0.0), draw, masked)[0] == []


def test_positions_that_are_known_do_not_count():
    masked = [True, False, True, True]
    assert step(EntropyBound(0.1), draw_of([0.05, 0.0, 0.06, 0.9]), masked)[0] == [0, 2]
    assert step(Factor(1.0), draw_of(best_prob=[0.9, 1.0, 0.8, 0.3]), masked)[0] == [0, 2]
    assert step(Threshold(0.8), draw_of(best_prob=[0.1, 1.0, 0.2, 0.15]), masked)[0] == [2]


def test_factor():
    """(n + 1) (1 - c_n) <= f: .2 * 2, .3 * 3, .5 * 4; the first always."""
    draw = draw_of(best_prob=[0.5, 0.8, 0.7])
    for factor, wanted in ((0.0, [1]), (0.91, [1, 2]), (2.0, [0, 1, 2])):
        assert step(Factor(factor), draw)[0] == wanted
    assert step(Factor(1.9), draw_of(best_prob=[0.5, 0.8, 0.7, 0.5]))[0] == [1, 2]


def test_threshold_and_its_decay():
    draw = draw_of(best_prob=[0.95, 0.85, 0.7, 0.99])
    assert step(Threshold(0.9), draw)[0] == [0, 3]
    assert step(Threshold(1.0), draw)[0] == [3]  # the surest always
    assert step(Threshold(0.0), draw)[0] == [0, 1, 2, 3]
    policy, carry, found = Threshold(0.8, start=1.0, decay=0.08), None, []
    for _ in range(4):
        commit, _, _, carry = step(policy, draw, carry=carry)
        found.append(commit)
    assert found == [[3], [0, 3], [0, 1, 3], [0, 1, 3]]  # 1, .92, .84, and .8 instead of .76


CANVAS, BEST = [1, 2, 3, 4, 5, 6], [1, 9, 3, 9, 9, 9]
COMMITTED = [False] * 5 + [True]  # the last position is masked
DRAW = draw_of(best_prob=[0.9, 0.8, 0.7, 0.6, 0.95, 0.3], best=BEST, canvas_prob=[0.9, 0.1, 0.7, 0.2, 0.05, 0.0])


def test_remasking_takes_the_least_probable_within_its_limits():
    def remasked(carry=None, **fields):
        return step(TokenToMask(**fields), DRAW, COMMITTED, CANVAS, carry)[1]

    assert remasked(doubt=0.3, ratio=1.0) == [1, 3, 4]
    assert remasked(doubt=0.15, ratio=1.0) == [1, 4]
    assert remasked(doubt=0.3, ratio=0.34) == [1, 4]  # two of six, the least probable
    assert remasked(doubt=0.3, ratio=0.0) == remasked(doubt=0.0, ratio=1.0) == remasked(cap=0, ratio=1.0) == []
    assert remasked(detector="better", doubt=0.7, ratio=1.0) == [1, 4]
    again, free = jnp.asarray([[0, 1, 0, 0, 0, 0]]), jnp.asarray([[True, True, True, True, False, True]])
    assert remasked((again, free), doubt=0.3, ratio=1.0) == [3]  # 1 was masked again before, 4 is a prompt's
    assert remasked((again, free), doubt=0.3, ratio=1.0, cap=2) == [1, 3]
    carry = step(TokenToMask(doubt=0.3, ratio=1.0), DRAW, COMMITTED, CANVAS)[3]
    assert carry[0].tolist() == [[0, 1, 0, 1, 1, 0]]


def test_editing_replaces_what_another_token_beats():
    def edited(carry=None, **fields):
        return step(Edit(**fields), DRAW, COMMITTED, CANVAS, carry)[2]

    assert edited(edit_threshold=0.7) == [-1, 9, -1, -1, 9, -1]
    assert edited(edit_threshold=0.0) == [-1, 9, -1, 9, 9, -1]
    assert edited(edit_threshold=1.0) == [-1] * 6
    before = jnp.full((1, 6), 0.85)
    assert edited(before, edit_threshold=0.0, rising=True) == [-1, -1, -1, -1, 9, -1]
    assert edited(before, edit_threshold=0.0) == [-1, 9, -1, 9, 9, -1]
    carry = step(Edit(edit_threshold=0.7), DRAW, COMMITTED, CANVAS, before)[3]
    np.testing.assert_allclose(carry, [[0.85, 0.8, 0.85, 0.85, 0.95, 0.3]])


@pytest.mark.parametrize(
    "make",
    [
        lambda: EntropyBound(-0.1),
        lambda: Factor(-1.0),
        lambda: Threshold(1.1),
        lambda: Threshold(start=2.0),
        lambda: Threshold(decay=-1.0),
        lambda: TokenToMask(doubt=1.5),
        lambda: TokenToMask(detector="core"),
        lambda: TokenToMask(cap=-1),
        lambda: TokenToMask(ratio=2.0),
        lambda: Edit(edit_threshold=-1.0),
    ],
)
def test_values_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="sampling.*: got .*, wanted"):
        make()
