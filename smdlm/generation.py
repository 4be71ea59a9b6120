"""--mode=generate: a file of prompts to a file of answers, with what they took and what a cache changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
from absl import flags

from smdlm import experiment, startup
from smdlm.build import assemble
from smdlm.config import Config
from smdlm.data.kept import tokenizer_of_run
from smdlm.data.readers import printable, read_records
from smdlm.data.vocabulary import Tokenizer
from smdlm.files import local_path, one_line
from smdlm.io.checkpoint import Checkpointer
from smdlm.io.writer import Writer, unused_name
from smdlm.sampling.generate import Prompt, parse
from smdlm.sampling.verify import verify


def define_flags() -> None:
    flags.DEFINE_string("prompts", None, "generate: FILE.jsonl of prompts (see smdlm/sampling/generate.py, `parse`).")
    flags.DEFINE_bool("verify_cache", False, "generate: decode once more without the cache, and say what differs.")


def run(config: Config, workdir: Path, checkpointer: Checkpointer) -> None:
    """Answers the prompts of --prompts with the newest checkpoint, into WORKDIR/samples. Mistakes are found first."""
    given = flags.FLAGS
    tokenizer = tokenizer_of_run(workdir, config.data.tokenizer)
    prompts = read_prompts(given.prompts, tokenizer, config.sampling.seed)
    made = assemble(config, tokenizer, config.mesh.make(), None)
    generator = experiment.make_generator(made)
    generator.batches(prompts)
    startup.meet(workdir, checkpoint=checkpointer.latest_step(), prompts=[prompt.ids.tolist() for prompt in prompts])
    with jax.set_mesh(made.mesh):
        params, step = experiment.restore(made, checkpointer, config.sampling.omega)
        generated = generator(params, prompts)
        verified = verify(generator, params, prompts).summary() if given.verify_cache else {}
        experiment.write_viewer(made, params, prompts[0])
    if jax.process_index() == 0:
        name = unused_name(workdir / "samples", f"step_{step:08d}_generate")
        writer = Writer(workdir, total_steps=step)
        writer.samples(name, experiment.answer_records(made, generated))
        weights = experiment.described_weights(config.sampling.omega)
        print(f"checkpoint of step {step} in {checkpointer.directory}, {weights}: samples/{name}.txt, .jsonl")
        for i, answer in enumerate(generated.answers):
            print(f"\n--- answer {i + 1} ({answer.forwards} forwards, {answer.finish})\n{answer.text.strip()}")
        print()
        for what, value in (generated.summary() | verified).items():
            print(f"{what.replace('_', ' '):28}{value:,.4g}")
        print("(tokens are new ones, without prompts, padding and what follows an end; seconds include compiling)")


def read_prompts(file: str | None, tokenizer: Tokenizer, seed: int) -> list[Prompt]:
    """The prompts of a JSONL file; without a seed of its own each has `seed` plus its number, from 0.

    Raises:
      ValueError: one line, with the number of the line in the file; no UTF-8, no JSON, no prompt.
    """
    if not file:
        raise ValueError("--prompts: got nothing, wanted a file of prompts: --prompts=FILE.jsonl")
    path = local_path("--prompts", file)
    prompts: list[Prompt] = []
    for number, line in read_records(path, "--prompts"):
        where = f"{printable(path)}:{number}"
        prompts.append(parse(_object(line, where), tokenizer, (seed + len(prompts)) % 2**32, where))
    if not prompts:
        raise ValueError(f"--prompts: got nothing in {printable(path)}, wanted at least one line")
    return prompts


def _object(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: got {one_line(error)}, wanted UTF-8 and a JSON object on each line") from error
