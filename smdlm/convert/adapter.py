"""Adapters on the command line: PEFT's folders <-> workdirs whose checkpoints hold adapters and omega beside a base."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smdlm import command
from smdlm.config import AdapterConfig, read
from smdlm.convert import decoder, peft
from smdlm.convert.files import FileError
from smdlm.convert.table import ConversionError
from smdlm.convert.workdir import check_papers_operator, new_workdir, save
from smdlm.feedback.gates import EntropyGate
from smdlm.files import local_path, workdir_of
from smdlm.identity import check_same_base, weights_hash
from smdlm.io.checkpoint import checkpointer_of
from smdlm.models.base import Frozen
from smdlm.models.decoder import Decoder
from smdlm.models.lora import LoRA


def load_base(workdir: Path, flag: str) -> tuple[Decoder, Any, dict[str, Any]]:
    """(model, its weights, meta) of the newest checkpoint of a workdir. FileError if it is none of a decoder."""
    with contextlib.closing(checkpointer_of(workdir)) as checkpointer:
        if checkpointer.latest_step() is None:
            raise FileError(f"{flag}: got no checkpoint in {workdir}, wanted the base: convert import decoder first")
        params, meta = checkpointer.restore_params(None, "params")
    try:
        return decoder.model_of(meta.get("model") or {}), params["backbone"], meta
    except ConversionError:
        raise FileError(f"{flag}: got a checkpoint of another model in {workdir}, wanted that of a decoder") from None


def import_adapter(args: argparse.Namespace) -> list[str]:
    """The folder SRC -> a workdir DST beside --base; returns the lines to print."""
    if args.base is None:
        raise FileError("--base: got nothing, wanted the workdir of the base beside which the adapter was trained")
    workdir, base = workdir_of(args.dst), workdir_of(args.base)
    with new_workdir(workdir) as checkpointer:
        model, weights, meta = load_base(base, "--base")
        lora, adapters = peft.load(args.src, model)
        base_hash = weights_hash(weights)
        peft.check_base(args.src, model, base, base_hash)
        gate = peft.load_gate(args.src)
        params = {"backbone": jax.tree.map(jnp.asarray, adapters), "softmask": raw_omega(gate[0]) if gate else {}}
        kind = AdapterConfig("dora" if lora.dora else "lora", ",".join(lora.targets), lora.rank, lora.alpha)
        about = {"workdir": str(base), "hash": base_hash, "adapter": kind.described}
        kept = {name: meta[name] for name in ("model", "mask_id", "tokenizer") if name in meta}
        kept["convert"] = {"kind": "adapter", "k": gate[1] if gate else 1}
        save(checkpointer, params, params, {**kept, "base": about})
    mask = f"omega of {peft.GATE}, softmask.k {gate[1]}" if gate else "no omega (binary)"
    fields = " ".join(f"--config.adapter.{name}={getattr(kind, name)}" for name in ("kind", "targets", "rank", "alpha"))
    return [f"{kind.kind} of rank {lora.rank}, {mask}", f"wrote {checkpointer.directory} (step 0): {fields}"]


def raw_omega(gate: Mapping[str, float]) -> dict[str, Any]:
    """Raw parameters whose readable values are these; `values` adds the 1e-6 that are taken off here."""
    try:
        return dict(EntropyGate(gate["omega_s"], gate["omega_b"] + 1e-6, gate["omega_a"] - 1e-6).init())
    except ValueError as error:
        raise FileError(f"{peft.GATE}: got impossible numbers ({error})") from None


def export_adapter(args: argparse.Namespace) -> list[str]:
    """The newest adapters of the workdir SRC -> the folder DST, as PEFT loads it; returns the lines to print."""
    if args.dst.exists():
        raise FileError(f"got {args.dst}, which exists, wanted a new folder: name another one or delete it")
    command.check_folder("DST", args.dst.parent)
    with contextlib.closing(checkpointer_of(workdir_of(args.src))) as checkpointer:
        which = {"raw": "params", "ema": "ema"}[args.weights or "raw"]
        params, meta = checkpointer.restore_params(None, which)
    if "base" not in meta or meta["base"]["adapter"]["kind"] not in ("lora", "dora"):
        raise FileError(f"got {args.src} without adapters, wanted a run with adapter.kind lora or dora")
    gate, k = gate_of(params.get("softmask", {}), meta, args.src)
    base = meta["base"]
    peft.save(args.dst, adapted(meta), params["backbone"], gate, k, str(base["workdir"]), base["hash"])
    return [f"wrote {args.dst}: adapters of step {meta['step']} ({which}), base {meta['base']['workdir']}"]


def gate_of(omega: Mapping[str, Any], meta: Mapping[str, Any], src: object) -> tuple[dict[str, Any], int]:
    """({omega_s, omega_a, omega_b} in f32, k) of a checkpoint's raw omega; {} for a binary model.

    Raises:
      FileError: a soft mask that the public code does not have.
    """
    if odd := set(omega) - set(EntropyGate().init()):
        raise FileError(f"got {src} with {', '.join(sorted(odd))}, wanted the gate 'entropy' of variant 'topk'")
    if not omega:
        return {}, 1
    check_papers_operator(src, meta)
    k = read(meta["config"]).softmask.k if "config" in meta else meta["convert"]["k"]
    return {name: np.float32(value) for name, value in EntropyGate().values(omega).items()}, k


def adapted(meta: Mapping[str, Any]) -> Frozen:
    """The model of a checkpoint's meta with what was trained beside it."""
    fields = {**meta["base"]["adapter"]}
    if "targets" in fields:
        fields["targets"] = ",".join(fields["targets"])
    return AdapterConfig(**fields).around(decoder.model_of(meta["model"]))


def merged(meta: Mapping[str, Any], adapters: Any) -> tuple[Any, dict[str, Any]]:
    """(the weights of a run's base with its adapters, if it has any, merged into them; meta of the base).

    Raises:
      ValueError: the base is another one by now.
    """
    base, about = workdir_of(local_path("base", meta["base"]["workdir"])), meta["base"]
    _, weights, of_base = load_base(base, "base")
    check_same_base(about, {**about, "hash": weights_hash(weights)})
    made = adapted(meta)
    return made.merge(weights, adapters) if isinstance(made, LoRA) else weights, of_base
