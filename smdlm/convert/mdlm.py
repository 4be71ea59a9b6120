"""MDLM's DiT and its AR baseline: names and layouts of the PyTorch code <-> our parameter trees, both directions.

A torch Linear weight (out, in) is our kernel [*in, *out] transposed and reshaped: (3 * heads * head, D) of attn_qkv has
rows (three, head, dim), so it becomes [D, 3, H, E]. Blocks are stacked along a leading axis. Our vocabulary axis may be
padded; the padding is zero here (the readout excludes it) and does not exist there.

The tables are bijective: every name of the one side stands for one slice of one leaf of the other. What our trees
have no place for (`raw_temperature` under top-k, the rotary buffer's bits, counters) travels in `meta["convert"]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from smdlm.convert.files import Source
from smdlm.full_softmask import FullSoftMask
from smdlm.models.dit import DiT
from smdlm.softmask import SoftMask

Tensors = Mapping[str, np.ndarray]

ROTARY = "backbone.rotary_emb.inv_freq"
OMEGA = {
    "tran_head.raw_scale": "raw_scale",
    "tran_head.raw_centre_neg": "raw_centre",
    "tran_head.raw_steep": "raw_steepness",
    "tran_head.raw_temperature": "raw_temperature",
}
FLOATS = ("float32", "float16", "bfloat16")


class ConversionError(ValueError):
    """The weights do not fit; one line, and below it every tensor that is missing, superfluous or misshapen."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One tensor of the reference and its place in our tree: `target`, or layer `layer` of it."""

    source: str
    target: str
    shape: tuple[int, ...]
    layer: int | None = None
    vocab: bool = False  # axis 0 is the vocabulary

    @property
    def matrix(self) -> bool:
        return self.target.endswith("kernel")


def table(config: DiT) -> list[Leaf]:
    """All tensors in the reference's order, which is also that of its unnamed EMA list."""
    width, cond, vocab = config.width, config.cond, config.vocab_size
    leaves = [Leaf("vocab_embed.embedding", "embed", (vocab, width), vocab=True)]
    if not config.causal:
        leaves += _linear("sigma_map.mlp.0", "sigma_map/in", (cond, 256))
        leaves += _linear("sigma_map.mlp.2", "sigma_map/out", (cond, cond))
    for i in range(config.depth):
        block = [
            Leaf("norm1.weight", "norm1/scale", (width,)),
            Leaf("attn_qkv.weight", "qkv/kernel", (3 * width, width)),
            Leaf("attn_out.weight", "attention_out/kernel", (width, width)),
            Leaf("norm2.weight", "norm2/scale", (width,)),
            *_linear("mlp.0", "mlp_in", (4 * width, width)),
            *_linear("mlp.2", "mlp_out", (width, 4 * width)),
        ]
        if not config.causal:
            block += _linear("adaLN_modulation", "adaln", (6 * width, cond))
        leaves += [
            dataclasses.replace(b, source=f"blocks.{i}.{b.source}", target=f"blocks/{b.target}", layer=i) for b in block
        ]
    leaves.append(Leaf("output_layer.norm_final.weight", "final/norm/scale", (width,)))
    leaves += [dataclasses.replace(b, vocab=True) for b in _linear("output_layer.linear", "head", (vocab, width))]
    if not config.causal:
        leaves += _linear("output_layer.adaLN_modulation", "final/adaln", (2 * width, cond))
    return [dataclasses.replace(leaf, source=f"backbone.{leaf.source}") for leaf in leaves]


def _linear(source: str, target: str, shape: tuple[int, int]) -> list[Leaf]:
    return [Leaf(f"{source}.weight", f"{target}/kernel", shape), Leaf(f"{source}.bias", f"{target}/bias", shape[:1])]


def to_tree(tensors: Tensors, config: DiT) -> dict[str, Any]:
    """Reference names -> our backbone tree, f32 arrays. tensors must fit `table(config)`."""
    shapes = nn.meta.unbox(jax.eval_shape(config.init, jax.random.key(0)))
    out = {name: np.zeros(x.shape, np.float32) for name, x in traverse_util.flatten_dict(shapes, sep="/").items()}
    for leaf in table(config):
        value = np.asarray(tensors[leaf.source]).astype(np.float32)
        if leaf.vocab:
            value = np.pad(value, [(0, config.padded_vocab - len(value))] + [(0, 0)] * (value.ndim - 1))
        slot = out[leaf.target] if leaf.layer is None else out[leaf.target][leaf.layer]
        slot[...] = (value.T if leaf.matrix else value).reshape(slot.shape)
    return traverse_util.unflatten_dict(out, sep="/")


def from_tree(tree: Mapping[str, Any], config: DiT) -> dict[str, np.ndarray]:
    """Our backbone tree (parameters, or gradients) -> reference names, in `table` order."""
    flat = {name: np.asarray(x) for name, x in traverse_util.flatten_dict(tree, sep="/").items()}
    out = {}
    for leaf in table(config):
        value = flat[leaf.target] if leaf.layer is None else flat[leaf.target][leaf.layer]
        if leaf.matrix:
            value = value.reshape(leaf.shape[1], -1).T
        out[leaf.source] = np.require(value[: leaf.shape[0]].reshape(leaf.shape), requirements="C")
    return out


def rotary_frequencies(head_width: int) -> np.ndarray:
    """The reference's buffer inv_freq [head_width / 2]; rounded where torch's f32 arithmetic rounds."""
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    return np.float32(1) / np.power(10000.0, exponents.astype(np.float64)).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------- import


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
    weights: str = "both",
    softmask: SoftMask | None = None,
    sizes: Mapping[str, int] | None = None,
    vocab_multiple: int = 128,
) -> Converted:
    """Weights of a file -> our trees.

    Args:
      source: the checkpoint. kind: 'mdlm' or 'ar'.
      shadow: a second file that holds the EMA (a list, or named tensors); instead of the one in `source`.
      weights: 'both' (params are the raw weights, ema the EMA if there is one, else the raw ones), 'raw' or 'ema' (that
        set for both).
      softmask: operator whose omega is wanted; None for a binary model. Initialised anew only where the file has no
        soft-mask head at all. What it has no place for is kept in the meta.
      sizes: wanted sizes by DiT field; 'heads' is needed if the file has no rotary buffer.
      vocab_multiple: padding of our tables.

    Raises:
      ConversionError: what does not fit, all at once.
    """
    sizes = {name: value for name, value in (sizes or {}).items() if value is not None}
    if weights not in ("both", "raw", "ema"):
        raise ConversionError(f"weights: got {weights!r}, wanted 'both', 'raw' or 'ema'")
    if not source.tensors:
        raise ConversionError(
            f"{source.name}: got no state_dict, wanted weights by name (an EMA list goes into --ema=FILE)"
        )
    config = infer(source, kind, sizes, vocab_multiple)
    leaves = table(config)
    expected = {leaf.source: leaf.shape for leaf in leaves}
    head = {name: value for name, value in source.tensors.items() if name.startswith("tran_head.")}
    backbone = {n: v for n, v in source.tensors.items() if n != ROTARY and n not in head}

    problems = [
        f"  {name}: got {getattr(config, name)}, wanted {value}"
        for name, value in sizes.items()
        if getattr(config, name) != value
    ]
    problems += _differences("", backbone, expected)
    if head and kind == "mdlm":  # raw_temperature is no parameter of the top-k operator, so older files may lack it
        optional = {} if isinstance(softmask, FullSoftMask) else {"tran_head.raw_temperature"}
        problems += _differences("", head, {name: () for name in OMEGA if name in head or name not in optional})
    elif head:
        problems += [f"  {name}: got it, wanted nothing (an AR model has no soft mask)" for name in head]
    problems += _rotary_problems(source.tensors.get(ROTARY), config)
    averaged, other = _shadow(source if shadow is None else shadow, shadow is not None, list(expected))
    if averaged is not None:
        problems += _differences("ema: ", averaged, expected)
    problems += other
    if weights == "ema" and averaged is None:
        problems.append("  ema: got none in the file, wanted it because of --weights=ema")
    if problems:
        raise ConversionError(
            f"{source.name}: got weights with {len(problems)} differences, wanted those of an {kind} model of "
            f"{describe(config)}: use the checkpoint's own KIND, sizes and config\n" + "\n".join(problems)
        )

    fresh = {} if softmask is None else {k: np.asarray(v, np.float32) for k, v in softmask.init().items()}
    given = {OMEGA[name]: np.asarray(value, np.float32) for name, value in head.items()}
    omega = {name: given.get(name, value) for name, value in fresh.items()}
    new = sorted(set(fresh) - set(given))
    raw = to_tree(backbone, config)
    ema = raw if averaged is None or weights == "raw" else to_tree(averaged, config)
    if weights == "ema":
        raw = ema
    types = {n: v.dtype.name for n, v in source.tensors.items() if v.dtype != np.float32}
    rotary = source.tensors.get(ROTARY)
    meta = {
        "model": dataclasses.asdict(config),
        "mask_id": config.vocab_size - 1,
        "convert": {
            "kind": kind,
            "source": source.name,
            "weights": weights,
            "ema": (source if shadow is None else shadow).ema if averaged is not None else None,
            "new": [f"softmask/{name}" for name in new],
            "unused": {n: float(v) for n, v in head.items() if OMEGA[n] not in omega},
            "rotary": None if rotary is None else [float(x) for x in rotary],
            "types": types,
            "progress": source.progress,
            "config": source.config,
        },
    }
    notes = [
        describe(config),
        f"ema: {'from the file' if averaged is not None and weights != 'raw' else 'the raw weights'}",
    ]
    if new:
        notes.append(f"newly initialised (no soft-mask head in the file): {', '.join(meta['convert']['new'])}")
    if meta["convert"]["unused"]:
        notes.append(f"kept in the meta, not in the parameters: {', '.join(meta['convert']['unused'])}")
    # The reference averages the backbone alone: its evaluation runs the EMA with the live omega.
    return Converted({"backbone": raw, "softmask": omega}, {"backbone": ema, "softmask": omega}, config, meta, notes)


def describe(config: DiT) -> str:
    return (
        f"width {config.width}, depth {config.depth}, heads {config.heads}, vocabulary {config.vocab_size} "
        f"in {config.padded_vocab} rows" + ("" if config.causal else f", cond {config.cond}")
    )


def infer(source: Source, kind: str, sizes: Mapping[str, int], vocab_multiple: int) -> DiT:
    """Sizes from the shapes; heads from the rotary buffer, config.json or `sizes`. Raises ConversionError."""
    tensors, given = source.tensors, source.config or {}
    causal = kind == "ar"

    def shape(*names: str) -> tuple[int, ...]:
        """Of the first tensor that is there; two axes, unless the name is a bias."""
        for name in names:
            if name in tensors and tensors[name].ndim == (1 if name.endswith("bias") else 2):
                return tensors[name].shape
        raise ConversionError(
            f"{source.name}: got no {names[0]}, wanted it in an {kind.upper()} checkpoint: is KIND right? "
            f"(the file has {', '.join(list(tensors)[:4])}, ...)"
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
    try:
        return DiT(
            vocab, width, depth, heads, cond, given.get("dropout", 0.1), causal=causal, vocab_multiple=vocab_multiple
        )
    except (ValueError, TypeError) as error:
        raise ConversionError(f"{source.name}: got sizes that fit no {kind} model ({error})") from None


def _differences(label: str, got: Tensors, wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """One line for each missing, superfluous, misshapen or mistyped tensor."""
    lines = []
    for name in [*wanted, *(n for n in got if n not in wanted)]:
        g = f"{got[name].dtype.name}{list(got[name].shape)}" if name in got else "nothing"
        w = f"float32{list(wanted[name])}" if name in wanted else "nothing"
        fits = name in got and name in wanted and got[name].shape == wanted[name] and got[name].dtype.name in FLOATS
        if not fits:
            lines.append(f"  {label}{name}: got {g}, wanted {w}")
    return lines


def _rotary_problems(got: np.ndarray | None, config: DiT) -> list[str]:
    wanted = rotary_frequencies(config.width // config.heads)
    if got is None or (got.shape == wanted.shape and np.allclose(got.astype(np.float32), wanted, rtol=1e-2, atol=0)):
        return []
    return [f"  {ROTARY}: got {got.ravel()[:3]}... {got.shape}, wanted {wanted[:3]}... {wanted.shape} (base 10000)"]


def _shadow(source: Source, separate: bool, names: Iterable[str]) -> tuple[Tensors | None, list[str]]:
    """(EMA by name, problems): the list is in registration order and has no soft-mask head; or None."""
    names = list(names)
    if source.shadow is None:
        if not separate:
            return None, []
        return {n: v for n, v in source.tensors.items() if n != ROTARY and not n.startswith("tran_head.")}, []
    if len(source.shadow) != len(names):
        return None, [
            f"  ema: got {len(source.shadow)} shadow_params, wanted {len(names)} in the order of the state_dict"
        ]
    return dict(zip(names, source.shadow, strict=True)), []


# ---------------------------------------------------------------------------------------------------------- export


def export_tree(params: Mapping[str, Any], meta: Mapping[str, Any], kind: str, vocab_size: int | None = None) -> Source:
    """Our weights -> state_dict with the rotary buffer and, if there is an omega, the soft-mask head.

    meta: of the checkpoint; `convert` of an import restores the bits that our trees do not hold. vocab_size: wanted if
    the meta has no model sizes. The result's `shadow` is that of these weights: the caller replaces it.
    """
    convert = meta.get("convert", {})
    config = model_config(params["backbone"], meta, kind, vocab_size)
    tensors: dict[str, np.ndarray] = {}
    for name, value in from_tree(params["backbone"], config).items():
        if name.startswith("backbone.blocks.0.") and ROTARY not in tensors:
            kept = convert.get("rotary")
            frequencies = rotary_frequencies(config.width // config.heads)
            tensors[ROTARY] = frequencies if kept is None else np.asarray(kept, np.float32)
        tensors[name] = value
    shadow = [tensors[leaf.source] for leaf in table(config)]
    omega = {f"tran_head.{k.split('.')[1]}": np.float32(v) for k, v in convert.get("unused", {}).items()}
    omega |= {name: params["softmask"][ours] for name, ours in OMEGA.items() if ours in params.get("softmask", {})}
    if omega and params.get("softmask"):
        # The reference always has a temperature, whichever operator runs.
        omega.setdefault("tran_head.raw_temperature", FullSoftMask().init()["raw_temperature"])
    tensors |= {name: np.asarray(omega[name], np.float32) for name in OMEGA if name in omega}
    for name in tensors.keys() & convert.get("types", {}).keys():  # back to half precision where that loses nothing
        half = tensors[name].astype(jnp.dtype(convert["types"][name]))
        if np.array_equal(half.astype(np.float32), tensors[name]):
            tensors[name] = half
    hugging_face = {
        "architectures": ["MDLM"],
        "model_type": "mdlm",
        "vocab_size": config.vocab_size,
        "model_length": meta.get("config", {}).get("data", {}).get("seq_len", 1024),
        "hidden_dim": config.width,
        "cond_dim": config.cond,
        "n_blocks": config.depth,
        "n_heads": config.heads,
        "dropout": config.dropout,
        "time_conditioning": False,
        "return_dict": False,
    }
    step = meta.get("step", 0)
    ema = convert.get("ema") or {"decay": 0.9999, "num_updates": step}
    done = {"current": {"completed": step}, "total": {"completed": step}}
    none = {"current": {"completed": 0}, "total": {"completed": 0}}
    loops = {"epoch_progress": none, "epoch_loop.batch_progress": done}
    loops["epoch_loop.state_dict"] = {"_batches_that_stepped": step}
    progress = {"epoch": 0, "global_step": step, "pytorch-lightning_version": "2.2.1", "loops": {"fit_loop": loops}}
    progress |= convert.get("progress", {})
    return Source(kind, tensors, shadow, ema, progress, convert.get("config") or hugging_face)


def model_config(backbone: Mapping[str, Any], meta: Mapping[str, Any], kind: str, vocab_size: int | None) -> DiT:
    """Sizes of a tree of ours. ConversionError: another KIND, or the vocabulary without padding is not known."""
    causal = "sigma_map" not in backbone
    if causal != (kind == "ar"):
        raise ConversionError(f"got a checkpoint of an {'ar' if causal else 'mdlm'} model, wanted {kind}: change KIND")
    rows, width = backbone["embed"].shape
    depth, _, _, heads, _ = backbone["blocks"]["qkv"]["kernel"].shape
    cond = 128 if causal else backbone["sigma_map"]["out"]["kernel"].shape[0]
    known = meta.get("model", {}).get("vocab_size")
    if known and vocab_size not in (None, known):
        raise ConversionError(f"--vocab_size: got {vocab_size}, wanted {known}, the checkpoint's own: leave it out")
    vocab = known or vocab_size
    if not vocab or not 0 < vocab <= rows:
        raise ConversionError(
            f"got vocabulary {vocab} for tables of {rows} rows, wanted its size without padding (with the mask): "
            "pass --vocab_size=N"
        )
    dropout = meta.get("model", meta.get("config", {}).get("model", {})).get("dropout", 0.1)
    return DiT(vocab, width, depth, heads, cond, dropout, causal=causal, vocab_multiple=rows)
