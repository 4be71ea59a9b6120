"""MDLM's DiT and its AR baseline: names and layouts of the PyTorch code <-> our parameter trees, both directions.

(3 * heads * head, D) of attn_qkv has rows (three, head, dim), so it becomes [D, 3, H, E]. What our trees have no place
for (`raw_temperature` under top-k, the rotary buffer's bits, counters) travels in `meta["convert"]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from smdlm.convert import table as tables
from smdlm.convert.files import Source
from smdlm.convert.table import ConversionError, Leaf, Tensors, Unwrapped, differences, linear, unwrap
from smdlm.convert.unpickle import shown
from smdlm.full_softmask import FullSoftMask
from smdlm.models.dit import DiT
from smdlm.softmask import SoftMask

ROTARY = "backbone.rotary_emb.inv_freq"
OMEGA = {
    "tran_head.raw_scale": "raw_scale",
    "tran_head.raw_centre_neg": "raw_centre",
    "tran_head.raw_steep": "raw_steepness",
    "tran_head.raw_temperature": "raw_temperature",
}
HEAD = "tran_head."
WEIGHTS = ("both", "raw", "ema")


def table(config: DiT) -> list[Leaf]:
    """All tensors in the reference's order, which is also that of its unnamed EMA list."""
    width, cond, vocab = config.width, config.cond, config.vocab_size
    leaves = [Leaf("vocab_embed.embedding", "embed", (vocab, width), vocab=True)]
    if not config.causal:
        leaves += linear("sigma_map.mlp.0", "sigma_map/in", (cond, 256))
        leaves += linear("sigma_map.mlp.2", "sigma_map/out", (cond, cond))
    for i in range(config.depth):
        block = [
            Leaf("norm1.weight", "norm1/scale", (width,)),
            Leaf("attn_qkv.weight", "qkv/kernel", (3 * width, width)),
            Leaf("attn_out.weight", "attention_out/kernel", (width, width)),
            Leaf("norm2.weight", "norm2/scale", (width,)),
            *linear("mlp.0", "mlp_in", (4 * width, width)),
            *linear("mlp.2", "mlp_out", (width, 4 * width)),
        ]
        if not config.causal:
            block += linear("adaLN_modulation", "adaln", (6 * width, cond))
        leaves += [
            dataclasses.replace(b, source=f"blocks.{i}.{b.source}", target=f"blocks/{b.target}", layer=i) for b in block
        ]
    leaves.append(Leaf("output_layer.norm_final.weight", "final/norm/scale", (width,)))
    leaves += [dataclasses.replace(b, vocab=True) for b in linear("output_layer.linear", "head", (vocab, width))]
    if not config.causal:
        leaves += linear("output_layer.adaLN_modulation", "final/adaln", (2 * width, cond))
    return [dataclasses.replace(leaf, source=f"backbone.{leaf.source}") for leaf in leaves]


def to_tree(tensors: Tensors, config: DiT) -> dict[str, Any]:
    """Reference names -> our backbone tree, f32 arrays. tensors must fit `table(config)`."""
    shapes = nn.meta.unbox(jax.eval_shape(config.init, jax.random.key(0)))
    return tables.to_tree(tensors, table(config), shapes, config.padded_vocab)


def from_tree(tree: Mapping[str, Any], config: DiT) -> dict[str, np.ndarray]:
    """Our backbone tree (parameters, or gradients) -> reference names, in `table` order."""
    return tables.from_tree(tree, table(config))


def rotary_frequencies(head_width: int) -> np.ndarray:
    """The reference's buffer inv_freq [head_width / 2]; rounded where torch's f32 arithmetic rounds."""
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    return np.float32(1) / np.power(10000.0, exponents.astype(np.float64)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Converted:
    """What an import makes: two sets of weights {'backbone', 'softmask'}, sizes, meta, and lines to tell the user."""

    params: dict[str, Any]
    ema: dict[str, Any]
    config: DiT
    meta: dict[str, Any]
    notes: list[str]


def import_source(
    source: Source,
    kind: str,
    *,
    shadow: Source | None = None,
    softmask: SoftMask | None = None,
    weights: str = "both",
    sizes: Mapping[str, int] | None = None,
) -> Converted:
    """Weights of a file -> our trees.

    Args:
      source: the checkpoint. kind: 'mdlm' or 'ar'.
      shadow: a second file that holds the EMA (a list, or named tensors); instead of the one in `source`.
      softmask: operator whose omega is wanted; None for a binary model. Initialised anew only where the file has no
        soft-mask head at all. What it has no place for is kept in the meta.
      weights: 'both' (params are the raw weights, ema the EMA if there is one, else the raw ones), 'raw' or 'ema' (that
        set for both).
      sizes: wanted sizes by DiT field; 'heads' is needed if the file has no rotary buffer.

    Raises:
      ConversionError: what does not fit, all at once.
    """
    if weights not in WEIGHTS:
        raise ConversionError(f"weights: got {weights!r}, wanted one of {', '.join(WEIGHTS)}")
    second = source if shadow is None else shadow
    own = unwrap(source.tensors, source.name)
    config = infer(source, own, kind, sizes or {})
    averaged, wrong_ema, ema_note = _averaged(second, config, shadow is not None)
    if weights == "ema" and averaged is None:
        wrong_ema.append("  ema: got none in the file, wanted it because of --weights=ema")
    problems = _wrong_sizes(config, sizes or {}) + _misfits(own, config, softmask) + wrong_ema
    problems += [f"  {name}: got NaN or inf in it, wanted finite numbers" for name in _non_finite(own.tensors)]
    if problems:
        raise ConversionError(
            f"{source.name}: got weights with {len(problems)} differences, wanted those of an {kind} model of "
            f"{describe(config)}: use the checkpoint's own KIND, sizes and config\n" + "\n".join(problems)
        )

    raw = to_tree(own.tensors, config)
    ema = raw if averaged is None or weights == "raw" else to_tree(averaged, config)
    omega, new, unused = _omega(own.tensors, softmask)
    convert = {
        "kind": kind,
        "source": source.name,
        "weights": weights,
        "ema": None if averaged is None else second.ema,
        "new": [f"softmask/{name}" for name in new],
        "unused": unused,
        "rotary": [float(x) for x in own.tensors[ROTARY]] if ROTARY in own.tensors else None,
        "types": {n: v.dtype.name for n, v in own.tensors.items() if v.dtype != np.float32},
        "progress": source.progress,
        "config": source.config,
    }
    return Converted(
        # The reference averages the backbone alone: its evaluation runs the EMA with the live omega.
        params={"backbone": ema if weights == "ema" else raw, "softmask": omega},
        ema={"backbone": ema, "softmask": omega},
        config=config,
        meta={"model": dataclasses.asdict(config), "mask_id": config.vocab_size - 1, "convert": convert},
        notes=[describe(config), *filter(None, (own.note, ema_note)), *_origins(convert)],
    )


def _origins(convert: Mapping[str, Any]) -> list[str]:
    """Where the EMA and omega are from, a line each."""
    averaged = convert["ema"] is not None and convert["weights"] != "raw"
    lines = [f"ema: {'from the file' if averaged else 'the raw weights'}"]
    if convert["new"]:
        lines.append(f"newly initialised (no soft-mask head in the file): {', '.join(convert['new'])}")
    if convert["unused"]:
        lines.append(f"kept in the meta, not in the parameters: {', '.join(convert['unused'])}")
    return lines


def _wrong_sizes(config: DiT, sizes: Mapping[str, int]) -> list[str]:
    pairs = {name: (getattr(config, name), value) for name, value in sizes.items()}
    return [f"  {name}: got {got}, wanted {wanted}" for name, (got, wanted) in pairs.items() if got != wanted]


def _is_backbone(name: str) -> bool:
    return name != ROTARY and not name.startswith(HEAD)


def _misfits(own: Unwrapped, config: DiT, softmask: SoftMask | None) -> list[str]:
    """A line for everything in which the file's weights differ from those of a model of these sizes."""
    backbone = {name: value for name, value in own.tensors.items() if _is_backbone(name)}
    head = {name: value for name, value in own.tensors.items() if name.startswith(HEAD)}
    lines = differences("", backbone, {leaf.source: leaf.shape for leaf in table(config)}, own.origin)
    if head and not config.causal:
        # raw_temperature is no parameter of the top-k operator, so older files may lack it.
        optional = {} if isinstance(softmask, FullSoftMask) else {"tran_head.raw_temperature"}
        wanted = {name: () for name in OMEGA if name in head or name not in optional}
        lines += differences("", head, wanted, own.origin)
    elif head:
        lines += [f"  {shown(own.origin[n])}: got it, wanted nothing (an AR model has no soft mask)" for n in head]
    got, wanted = own.tensors.get(ROTARY), rotary_frequencies(config.width // config.heads)
    same = got is not None and got.shape == wanted.shape
    if got is not None and not (same and np.allclose(got.astype(np.float32), wanted, rtol=1e-2, atol=0)):
        got = f"{got.ravel()[:3]}... {got.shape}"
        lines.append(f"  {own.origin[ROTARY]}: got {got}, wanted {wanted[:3]}... {wanted.shape} (base 10000)")
    return lines


def _averaged(source: Source, config: DiT, separate: bool) -> tuple[Tensors | None, list[str], str]:
    """(EMA by name or None, what does not fit, note). The list is in registration order and has no soft-mask head."""
    expected = {leaf.source: leaf.shape for leaf in table(config)}
    if source.shadow is not None:
        if len(source.shadow) != len(expected):
            got = f"got {len(source.shadow)} shadow_params"
            return None, [f"  ema: {got}, wanted {len(expected)} in the order of the state_dict"], ""
        averaged = dict(zip(expected, source.shadow, strict=True))
        return averaged, differences("ema: ", averaged, expected, {}), ""
    if not separate:
        return None, [], ""
    named = unwrap(source.tensors, source.name)
    averaged = {name: value for name, value in named.tensors.items() if _is_backbone(name)}
    note = f"ema: {named.note}" if named.note else ""
    return averaged, differences("ema: ", averaged, expected, named.origin), note


def _omega(tensors: Tensors, softmask: SoftMask | None) -> tuple[dict[str, Any], list[str], dict[str, float]]:
    """(omega of the operator, names of it that the file lacks, the file's values for which it has no place)."""
    fresh = {} if softmask is None else {k: np.asarray(v, np.float32) for k, v in softmask.init().items()}
    given = {ours: np.asarray(tensors[name], np.float32) for name, ours in OMEGA.items() if name in tensors}
    omega = {name: given.get(name, value) for name, value in fresh.items()}
    unused = {n: float(v) for n, v in tensors.items() if n in OMEGA and OMEGA[n] not in omega}
    return omega, sorted(set(fresh) - set(given)), unused


def _non_finite(tensors: Tensors) -> list[str]:
    return [name for name, value in tensors.items() if not np.isfinite(value.astype(np.float32)).all()]


def describe(config: DiT) -> str:
    return (
        f"width {config.width}, depth {config.depth}, heads {config.heads}, vocabulary {config.vocab_size} "
        f"in {config.padded_vocab} rows" + ("" if config.causal else f", cond {config.cond}")
    )


def infer(source: Source, own: Unwrapped, kind: str, sizes: Mapping[str, int]) -> DiT:
    """Sizes from the shapes; heads from the rotary buffer, config.json or `sizes`. Raises ConversionError."""
    if not source.tensors:
        raise ConversionError(
            f"{source.name}: got no state_dict, wanted weights by name (an EMA list goes into --ema=FILE)"
        )
    tensors, given = own.tensors, source.config or {}
    causal = kind == "ar"

    def shape(*names: str) -> tuple[int, ...]:
        """Of the first tensor that is there; two axes, unless the name is a bias."""
        for name in names:
            if name in tensors and tensors[name].ndim == (1 if name.endswith("bias") else 2):
                return tensors[name].shape
        raise ConversionError(
            f"{source.name}: got no {names[0]}, wanted it in an {kind.upper()} checkpoint: is KIND right? "
            f"(the file has {', '.join(map(shown, list(source.tensors)[:4]))}, ...)"
        )

    vocab, width = shape("backbone.vocab_embed.embedding", "backbone.output_layer.linear.weight")
    cond = 128
    if not causal:
        cond = shape(*(f"backbone.sigma_map.mlp.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")))[0]
    prefix = "backbone.blocks."
    numbers = {name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)}
    depth = sum(n.isdigit() for n in numbers)
    if given.get("time_conditioning"):
        raise ConversionError(
            f"{source.name}/config.json: got time_conditioning true, wanted false (as in MDLM's releases)"
        )
    heads = sizes.get("heads", given.get("n_heads"))
    if ROTARY in tensors and tensors[ROTARY].size:
        heads = width // (2 * tensors[ROTARY].size)
    if heads is None:
        raise ConversionError(
            f"{source.name}: got no {ROTARY}, wanted it or a config.json: the number of heads is not in the weights, "
            "pass --heads=N"
        )
    multiple = sizes.get("vocab_multiple", DiT.vocab_multiple)
    try:
        return DiT(vocab, width, depth, heads, cond, given.get("dropout", 0.1), causal=causal, vocab_multiple=multiple)
    except (ValueError, TypeError) as error:
        raise ConversionError(f"{source.name}: got sizes that fit no {kind} model ({error})") from None
