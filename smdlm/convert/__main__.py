"""Command line: python -m smdlm.convert import|export KIND SRC DST [flags]

    import  SRC file or Hugging Face directory -> DST/checkpoints, which smdlm.main restores with --workdir=DST
    export  SRC workdir (its newest checkpoint) -> DST .ckpt, .safetensors, or a directory (no suffix)

KIND is mdlm, ar, decoder (a folder of Llama, Qwen2 or Dream), gpt2 (a folder), gguf (a file, or 'smollm' for the one of
the extra of that name; import only) or adapter (a folder of PEFT, beside the workdir --base).

Nothing is written on an error.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from smdlm import command
from smdlm.config import read
from smdlm.convert import adapter, files, folders, mdlm, mdlm_export
from smdlm.convert.workdir import check_papers_operator, new_workdir, save
from smdlm.data.tokenizer import make_tokenizer
from smdlm.files import local_path, plain_output, workdir_of
from smdlm.full_softmask import FullSoftMask
from smdlm.io.checkpoint import checkpointer_of
from smdlm.softmask import SoftMask

SIZES = ("vocab_size", "width", "depth", "heads", "cond")


def import_checkpoint(args: argparse.Namespace) -> list[str]:
    """SRC -> orbax; returns the lines to print. Raises before anything is written, except for a full disk."""
    wanted, workdir = _wanted(args), workdir_of(args.dst)
    with new_workdir(workdir) as checkpointer:
        source = files.load(args.src)
        shadow = files.load(args.ema) if args.ema else None
        made = mdlm.import_source(
            source,
            args.kind,
            shadow=shadow,
            softmask=wanted.softmask,
            weights=args.weights or "both",
            sizes=wanted.sizes,
        )
        params, ema = (jax.tree.map(jnp.asarray, tree) for tree in (made.params, made.ema))
        save(checkpointer, params, ema, made.meta)
    then = f"python -m smdlm.main --config=FILE --workdir={workdir} --mode=sample"
    return [*made.notes, f"wrote {workdir / 'checkpoints'} (step 0): {then}"]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the weights must fit: sizes by DiT field, and the operator whose omega is wanted."""

    sizes: dict[str, int]
    softmask: SoftMask | FullSoftMask | None


def _wanted(args: argparse.Namespace) -> Wanted:
    """Of the flags and of --config; a flag's size comes before that of the config."""
    given = {name: getattr(args, name, None) for name in (*SIZES, "vocab_multiple")}
    given = {name: value for name, value in given.items() if value is not None}
    if args.vocab_multiple is not None and args.vocab_multiple < 1:
        raise files.FileError(f"--vocab_multiple: got {args.vocab_multiple}, wanted at least 1")
    softmask = folders.OPERATORS[args.softmask or "topk"]
    wanted = Wanted(given, softmask)
    if args.config:
        config = _of_config(args.config, args.kind)
        wanted = Wanted(config.sizes | given | {"vocab_multiple": config.sizes["vocab_multiple"]}, config.softmask)
    return dataclasses.replace(wanted, softmask=None) if args.kind == "ar" else wanted


def _of_config(path: Path, kind: str) -> Wanted:
    """What a config file wants; a BPE's vocabulary is not known before it is trained."""
    config = read(command.load_config(path))
    model = config.model
    if not isinstance(model, mdlm.DiT) or model.causal != (kind == "ar"):
        raise files.FileError(f"{path}: got a config of another model, wanted one of an {kind} model: change KIND")
    sizes = {name: getattr(model, name) for name in (*SIZES, "vocab_multiple") if name != "vocab_size"}
    if model.causal:
        del sizes["cond"]
    if config.vocab_size is not None:
        sizes["vocab_size"] = config.vocab_size
    elif not config.data.tokenizer.startswith("bpe"):
        sizes["vocab_size"] = make_tokenizer(config.data.tokenizer).model_vocab_size
    operator = config.softmask.operator
    if operator and operator.matrices():
        raise files.FileError(f"{path}: got a soft mask with matrices, wanted variant 'topk' or 'full'")
    return Wanted(sizes, operator)


def export_checkpoint(args: argparse.Namespace) -> list[str]:
    """orbax -> DST; returns the lines to print. A .ckpt with the raw weights also carries the EMA."""
    form = files.format_of(args.dst)
    if form == "directory" and args.kind == "ar":
        raise files.FileError(f"{args.dst}: got a directory for an ar model, wanted .ckpt or .safetensors")
    command.check_folder("DST", args.dst.parent)
    weights = args.weights or "raw"
    with contextlib.closing(checkpointer_of(workdir_of(args.src))) as checkpointer:
        trees = {which: checkpointer.restore_params(None, which) for which in ("params", "ema")}
    (raw, meta), (ema, _) = trees["params"], trees["ema"]
    check_papers_operator(args.src, meta)
    raw, ema = (
        mdlm_export.export_tree(jax.tree.map(np.asarray, tree), meta, args.kind, args.vocab_size) for tree in (raw, ema)
    )
    source = raw if weights == "raw" else ema
    files.save(args.dst, dataclasses.replace(source, shadow=ema.shadow))
    also = " and the EMA list" if form == "torch" else ""
    return [f"wrote {args.dst}: {len(source.tensors)} tensors ({weights} weights of step {meta['step']}){also}"]


KINDS = {
    "import": {"mdlm": import_checkpoint, "ar": import_checkpoint}
    | dict.fromkeys(("decoder", "gpt2", "gguf"), folders.import_folder)
    | {"adapter": adapter.import_adapter},
    "export": {"mdlm": export_checkpoint, "ar": export_checkpoint}
    | dict.fromkeys(("decoder", "gpt2"), folders.export_folder)
    | {"adapter": adapter.export_adapter},
}
# Flags that mean something to a kind; any other one would be ignored, and is refused.
WEIGHTS = ("weights", "vocab_size")
USED: dict[str, dict[str, tuple[str, ...]]] = {
    "import": dict.fromkeys(("mdlm", "ar"), (*WEIGHTS, "ema", "heads", "vocab_multiple", "softmask", "config"))
    | {"decoder": ("softmask", "dtype"), "gguf": ("softmask", "dtype"), "gpt2": (), "adapter": ("base",)},
    "export": dict.fromkeys(("mdlm", "ar"), WEIGHTS) | dict.fromkeys(("decoder", "gpt2", "adapter"), ("weights",)),
}
FLAGS = ("weights", "vocab_size", "ema", "heads", "vocab_multiple", "softmask", "dtype", "config", "base")


def check_flags(args: argparse.Namespace) -> None:
    """FileError that names every flag without a meaning for the kind."""
    used = USED[args.command][args.kind]
    given = [f"--{name}" for name in FLAGS if getattr(args, name, None) is not None and name not in used]
    if given:
        wanted = ", ".join(f"--{name}" for name in used) or "none"
        raise files.FileError(f"{', '.join(given)}: got it to {args.command} {args.kind}, wanted {wanted}")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m smdlm.convert", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True)
    for name, kinds in KINDS.items():
        sub = commands.add_parser(name)
        sub.set_defaults(ema=None, config=None, base=None)
        sub.add_argument("kind", choices=kinds, metavar="KIND", help=", ".join(kinds))
        sub.add_argument("src", metavar="SRC")
        sub.add_argument("dst", metavar="DST")
        sub.add_argument("--weights", choices=("raw", "ema"), help="import: take only this set; export: default raw")
        sub.add_argument("--vocab_size", type=int, help="ids with the mask, without padding")
        if name == "import":
            sub.add_argument("--ema", help="file with the EMA, if SRC does not hold it")
            sub.add_argument("--heads", type=int, help="if SRC has no rotary buffer")
            sub.add_argument("--vocab_multiple", type=int, help="padding of the vocabulary (default 128)")
            sub.add_argument("--softmask", choices=folders.OPERATORS, help="operator (default topk; none if causal)")
            sub.add_argument(
                "--dtype",
                choices=("float32", "bfloat16", "int8"),
                help="of a decoder's weights (default: its own); int8 for a frozen base",
            )
            sub.add_argument("--base", help="workdir beside which an adapter stands")
            sub.add_argument("--config", help="config file whose sizes and operator the weights must fit")
    return top


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    plain_output()
    jax.config.update("jax_platforms", "cpu")
    with command.told():
        check_flags(args)
        paths = {"src": "SRC", "dst": "DST", "ema": "--ema", "config": "--config", "base": "--base"}
        for name, what in paths.items():
            if getattr(args, name) is not None:
                setattr(args, name, local_path(what, getattr(args, name)))
        print("\n".join(KINDS[args.command][args.kind](args)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
