"""Command line: python -m smdlm.convert import|export KIND SRC DST [flags]

    import  SRC file or Hugging Face directory -> DST/checkpoints, which smdlm.main restores with --workdir=DST
    export  SRC workdir (its newest checkpoint) -> DST .ckpt, .safetensors, or a directory (no suffix)

Nothing is written on an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smdlm import command
from smdlm.config import read
from smdlm.convert import files, mdlm
from smdlm.data.tokenizer import make_tokenizer
from smdlm.full_softmask import FullSoftMask
from smdlm.io.checkpoint import CheckpointDamaged, Checkpointer
from smdlm.optimizer import TrainState
from smdlm.softmask import SoftMask

KINDS = ("mdlm", "ar")
SIZES = ("vocab_size", "width", "depth", "heads", "cond")


def checkpoints(workdir: str | Path) -> Path:
    """WORKDIR/checkpoints, or WORKDIR itself if that is its name."""
    path = Path(workdir)
    return path if path.name == "checkpoints" else path / "checkpoints"


def import_checkpoint(args: argparse.Namespace) -> list[str]:
    """SRC -> orbax; returns the lines to print. Raises before anything is written, except for a full disk."""
    source = files.load(args.src)
    shadow = files.load(args.ema) if args.ema else None
    sizes = {name: getattr(args, name, None) for name in SIZES}
    softmask = {"topk": SoftMask(), "full": FullSoftMask(), "none": None}[args.softmask or "topk"]
    multiple = 128 if args.vocab_multiple is None else args.vocab_multiple
    if multiple < 1:
        raise files.FileError(f"--vocab_multiple: got {multiple}, wanted at least 1")
    if args.config:
        wanted, multiple, softmask = _from_config(args.config, args.kind)
        sizes |= {name: value for name, value in wanted.items() if sizes[name] is None}
    if args.kind == "ar":
        softmask = None
    directory = checkpoints(args.dst)
    checkpointer = Checkpointer(directory)
    try:
        if (step := checkpointer.latest_step()) is not None:
            raise files.FileError(f"got {args.dst}, which holds a checkpoint of step {step}, wanted a new workdir")
        made = mdlm.import_source(
            source,
            args.kind,
            shadow=shadow,
            weights=args.weights or "both",
            softmask=softmask,
            sizes=sizes,
            vocab_multiple=multiple,
        )
        arrays = jax.tree.map(jnp.asarray, (made.params, made.ema))
        checkpointer.save(0, TrainState(jnp.int32(0), *arrays, {}), data={}, meta=made.meta)
        checkpointer.wait()
        if checkpointer.latest_step() != 0:
            raise OSError(f"could not write {directory}: the warning above says why")
    finally:
        checkpointer.close()
    return [
        *made.notes,
        f"wrote {directory} (step 0): python -m smdlm.main --config=FILE --workdir={directory.parent} --mode=sample",
    ]


def _from_config(path: str, kind: str) -> tuple[dict[str, int], int, SoftMask | None]:
    """(wanted sizes, padding, operator) of a config file; a BPE's vocabulary is not known before it is trained."""
    config = read(command.load_config(path))
    model = config.model
    if not isinstance(model, mdlm.DiT) or model.causal != (kind == "ar"):
        raise files.FileError(f"{path}: got a config of another model, wanted one of an {kind} model: change KIND")
    sizes = {name: getattr(model, name) for name in SIZES if name != "vocab_size"}
    if model.causal:
        del sizes["cond"]
    if config.vocab_size is not None:
        sizes["vocab_size"] = config.vocab_size
    elif not config.data.tokenizer.startswith("bpe"):
        sizes["vocab_size"] = make_tokenizer(config.data.tokenizer).model_vocab_size
    return sizes, model.vocab_multiple, config.softmask.operator


def export_checkpoint(args: argparse.Namespace) -> list[str]:
    """orbax -> DST; returns the lines to print. A .ckpt with the raw weights also carries the EMA."""
    kind = files.kind_of(args.dst)
    if kind == "directory" and args.kind == "ar":
        raise files.FileError(f"{args.dst}: got a directory for an ar model, wanted .ckpt or .safetensors")
    weights = args.weights or "raw"
    path = Path(args.src)
    directory = path if any(p.name.isdigit() for p in path.glob("*")) else checkpoints(path)
    checkpointer = Checkpointer(directory)
    try:
        trees = {which: checkpointer.restore_params(None, which) for which in ("params", "ema")}
    finally:
        checkpointer.close()
    (raw, meta), (ema, _) = trees["params"], trees["ema"]
    raw, ema = (
        mdlm.export_tree(jax.tree.map(np.asarray, tree), meta, args.kind, args.vocab_size) for tree in (raw, ema)
    )
    source = raw if weights == "raw" else ema
    files.save(args.dst, dataclasses.replace(source, shadow=ema.shadow))
    also = " and the EMA list" if kind == "torch" else ""
    return [f"wrote {args.dst}: {len(source.tensors)} tensors ({weights} weights of step {meta['step']}){also}"]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m smdlm.convert", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True)
    for name, run in (("import", import_checkpoint), ("export", export_checkpoint)):
        sub = commands.add_parser(name)
        sub.set_defaults(run=run)
        sub.add_argument("kind", choices=KINDS, metavar="KIND", help="mdlm or ar")
        sub.add_argument("src", metavar="SRC")
        sub.add_argument("dst", metavar="DST")
        sub.add_argument("--weights", choices=("raw", "ema"), help="import: take only this set; export: default raw")
        sub.add_argument("--vocab_size", type=int, help="ids with the mask, without padding")
        if name == "import":
            sub.add_argument("--ema", help="file with the EMA, if SRC does not hold it")
            sub.add_argument("--heads", type=int, help="if SRC has no rotary buffer")
            sub.add_argument("--vocab_multiple", type=int, help="padding of the vocabulary (default 128)")
            sub.add_argument("--softmask", choices=("topk", "full", "none"), help="operator (default topk)")
            sub.add_argument("--config", help="config file whose sizes and operator the weights must fit")
    return top


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    try:
        lines: list[Any] = args.run(args)
    except (ValueError, OSError, CheckpointDamaged) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
