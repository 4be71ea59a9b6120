"""What a person reads of a run that is not a result: its config, what it is about to do, what to do next. Text only."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from smdlm import command
from smdlm.build import Experiment
from smdlm.config import CHOICES, SECTIONS, Config
from smdlm.files import is_url
from smdlm.identity import flat
from smdlm.io import report


def settings(config: Config, file: Config, in_file: Mapping[str, Any]) -> str:
    """Every field with its value; one that the command line changed is marked and shown with the file's value.

    file: the config without the command line. in_file: its sections as the file gives them; what is not there is the
    default of the field's class.
    """
    now, before = _as_written(config), _as_written(file)
    lines, section = [], ""
    for name, value in now.items():
        if name.partition(".")[0] != section:
            section = name.partition(".")[0]
            lines += ["", section]
        field = name.partition(".")[2]
        if value != before.get(name, value) or name not in before:
            said = f"the file has {before[name]!r}" if name in before else "of a class that the command line names"
            origin = f"<- command line; {said}"
        else:
            origin = "" if field in in_file.get(section, {}) else "(default)"
        mark = "*" if origin.startswith("<-") else " "
        lines.append(f"{mark} {field:18} {value!r:24} {origin}".rstrip())
    changes = sum(line.startswith("*") for line in lines)
    head = f"{changes or 'no'} field{'' if changes == 1 else 's'} other than in the file"
    return "\n".join([head, *lines])


def _as_written(config: Config) -> dict[str, Any]:
    """{'section.field': value} in the order of a config, where a field that names a class has the class's name."""
    found: dict[str, Any] = {}
    fields = flat(config)
    del fields["readout.k"]  # softmask.k, see config.read
    for section, choices in CHOICES.items():
        for field, choice in choices.items():
            chosen = config.model if section == "model" else getattr(getattr(config, section), field)
            objects = chosen if choice.several else (chosen,)
            names = [name for one in objects for name, cls in choice.table.items() if cls is type(one)]
            found[f"{section}.{field}"] = ",".join(names)
            for one in objects if choice.several else ():
                fields |= {f"{section}.{f.name}": getattr(one, f.name) for f in dataclasses.fields(one)}
            if choice.target:  # 'stdlib:docstrings': the class's first field stands behind the colon
                target = dataclasses.fields(chosen)[0].name
                found[f"{section}.{field}"] += f":{fields.pop(f'{section}.{target}')}"
    found |= {name: value for name, value in fields.items() if name not in found}
    return dict(sorted(found.items(), key=lambda item: list(SECTIONS).index(item[0].partition(".")[0])))


def training_flops(experiment: Experiment) -> float:
    """Of the matrix products of one update, on average over the coin: a lower estimate without recomputation.

    Forward and backward of the loss are three forwards; a soft-masked step has one forward more. About half of the
    positions of a diffusion model are read out, all of an AR model's.
    """
    config, denoiser = experiment.config, experiment.denoiser
    tokens = config.data.batch_size * config.data.seq_len
    first = experiment.objective.p_step * (3 if config.softmask.through else 1)
    return (3 + first) * tokens * denoiser.flops(config.data.seq_len, 1.0 if denoiser.model.causal else 0.5)


def opening(experiment: Experiment, workdir: Path, step: int | None) -> str:
    """The first lines of a training run. step: of the checkpoint from which it continues."""
    config, mesh = experiment.config, experiment.mesh
    parameters = sum(x.size for x in jax.tree.leaves(experiment.abstract_params()[0]))
    kind = f"soft-masked (p_sm {config.softmask.p_sm:g}, k {config.softmask.k})" if config.softmask.p_sm else "binary"
    data, tokens = config.data, config.data.batch_size * config.data.seq_len
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    flops = training_flops(experiment)
    epochs = config.updates * data.batch_size / max(len(experiment.data.train), 1)
    rows = {
        "model": f"{parameters:,} parameters, {'AR' if experiment.denoiser.model.causal else kind}",
        "data": f"{len(experiment.data.train):,} blocks of {data.seq_len} tokens to train on, "
        f"{len(experiment.data.val):,} to validate; {experiment.denoiser.vocab_size:,} token ids",
        "devices": f"{mesh.size} x {jax.devices()[0].device_kind} ({axes})",
        "work": f"{config.updates:,} updates of {tokens:,} tokens, {epochs:.3g} epochs; {amount(flops)}FLOPs each, "
        f"{amount(flops * config.updates)}FLOPs in all",
        "workdir": f"{workdir}, {'a new run' if step is None else f'continuing at step {step}'}",
    }
    return "\n".join(f"{name:9}{value}" for name, value in rows.items())


def amount(x: float) -> str:
    """3.2 T, 120 G: three digits and a unit's prefix."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if x >= factor:
            return f"{x / factor:.3g} {prefix}"
    return f"{x:.3g} "


def ending(summary: Mapping[str, Any], workdir: Path, causal: bool) -> str:
    """The last lines of a training run: its summary, and commands for its workdir."""
    name = f"--workdir={workdir}"
    page = "run.html" if is_url(workdir) else workdir / "run.html"
    changes = [] if causal else [f"--config.sampling.viewer={page}"]
    lines = [command.again(name, "--mode=sample", "--config.sampling.prompt=Return the ", *changes)]
    lines.append(command.again(name, "--mode=eval"))
    lines.append(
        shlex.join(["python", "-c", f"import smdlm; print(smdlm.load({json.dumps(str(workdir))}).sample()[0])"])
    )
    return "\n".join([report.summary(summary, workdir), "", "next", *(f"  {line}" for line in lines)])
