"""Code evaluation: HumanEval, HumanEval+, MBPP and MBPP+ under one of three protocols that are never mixed.

A model is any function from prompts to texts (`Generate`). Its answers are written to JSONL first, task by task, then
judged in the sandbox, and the values are computed from the two files, so that a killed run goes on where it was.

WORKDIR/samples/code-PROTOCOL-SET-nfeN.jsonl     {'task', 'sample', 'text', 'program', ..}
WORKDIR/samples/code-PROTOCOL-SET-nfeN.verdicts.jsonl     {'task', 'sample', 'passed', 'status', 'seconds'}
WORKDIR/results/code-PROTOCOL-SET-nfeN.json      the record
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from smdlm.evaluate import sandbox
from smdlm.evaluate.base import NORMAL_95, Value
from smdlm.evaluate.code_protocols import CodeProtocol, Draw, Prompt
from smdlm.evaluate.code_tasks import Task
from smdlm.evaluate.record import Record, write_record
from smdlm.evaluate.samples import Ratio, append, kept
from smdlm.files import sha256

Generate = Callable[[Sequence[Prompt], Draw], Sequence[str]]


@dataclasses.dataclass(frozen=True)
class CodeEvaluation:
    """One model on one set under one protocol.

    Attributes:
      tasks: {name: task}. outside: the tasks of the file outside its test split, of which a protocol may show some.
      model: what is evaluated, as facts for the record; another one does not go on with this one's samples.
      generate: prompts -> texts, without the prompt.
      samples: texts per task. batch: texts of one call.
      isolation: of `sandbox.check`. workers: programs that run at once.
    """

    protocol: CodeProtocol
    set_name: str
    tasks: Mapping[str, Task]
    outside: Mapping[str, Task]
    model: Mapping[str, Any]
    generate: Generate
    samples: int = 1
    batch: int = 8
    seed: int = 0
    isolation: str = "namespaces"
    workers: int = os.cpu_count() or 1

    def __post_init__(self):
        self.protocol.check_set(self.set_name)
        for field in ("samples", "batch", "workers"):
            if getattr(self, field) < 1:
                raise ValueError(f"--{field}: got {getattr(self, field)}, wanted at least 1")

    def run(self, workdir: Path, share: float, k: Sequence[int] = (1,)) -> Record:
        """The record at share * tokens steps, which is also written.

        Raises:
          ValueError: one line; no sandbox, an impossible share or k, samples of something else in the way.
        """
        if wrong := [number for number in k if not 1 <= number <= self.samples]:
            raise ValueError(f"--k: got {wrong[0]} of {self.samples} samples, wanted 1 to {self.samples}: --samples")
        walls = sandbox.isolation(self.isolation)
        steps = self.protocol.steps(self.set_name, share)
        name = f"code-{self.protocol.name}-{self.set_name}-nfe{steps}"
        samples = self._draw(workdir / "samples" / f"{name}.jsonl", steps)
        verdicts = self._judge(workdir / "samples" / f"{name}.verdicts.jsonl", samples)
        facts = self._facts(steps) | {"samples": self.samples}
        about = {
            "model": dict(self.model),
            "sandbox": {"asked": self.isolation, "walls": walls},
            "statuses": dict(collections.Counter(row["status"].split(":")[0] for row in verdicts)),
            "seconds": sum(row["seconds"] for row in verdicts),
            "hashes": {"samples": sha256(workdir / "samples" / f"{name}.jsonl")},
            "nfe": steps,
        }
        values = values_of(self.tasks, samples, verdicts, k)
        record = Record(facts, {"code": {"k": list(k)}}, {"code": values}, about)
        write_record(workdir / "results" / f"{name}.json", record)
        return record

    @property
    def wanted(self) -> list[tuple[str, int]]:
        return [(name, number) for name in self.tasks for number in range(self.samples)]

    def _facts(self, steps: int) -> dict[str, Any]:
        """What must be equal in results that are compared, and in samples of one file."""
        content = _digest(json.dumps([dataclasses.asdict(task) for task in self.tasks.values()]))
        return self.protocol.facts(self.set_name, steps) | {"tasks": len(self.tasks), "content": content}

    def _draw(self, path: Path, steps: int) -> list[dict[str, Any]]:
        """All samples, those that were missing drawn and added batch by batch."""
        made = json.dumps([self._facts(steps), dict(self.model), self.seed], sort_keys=True)
        identity = _digest(made)
        found = kept(path)
        if any(row["made"] != identity for row in found):
            raise ValueError(
                f"{path}: got samples of another model, protocol or seed, wanted those of this one: another --workdir, "
                "or delete the file and its verdicts"
            )
        there = {(row["task"], row["sample"]) for row in found}
        missing = [key for key in self.wanted if key not in there]
        for start in range(0, len(missing), self.batch):
            part = missing[start : start + self.batch]
            numbers = tuple(self.wanted.index(key) for key in part)
            prompts = [self.protocol.prompt(self.set_name, self.tasks[name], self.outside) for name, _ in part]
            texts = self.generate(prompts, self.protocol.draw(self.set_name, steps, self.seed, numbers))
            if len(texts) != len(part):
                raise ValueError(f"generate: got {len(texts)} texts for {len(part)} prompts, wanted one each")
            rows = [self._row(*key, text, identity) for key, text in zip(part, texts, strict=True)]
            append(path, rows)
            found += rows
        rows = {(row["task"], row["sample"]): row for row in found}
        return [rows[key] for key in self.wanted]

    def _row(self, name: str, number: int, text: str, identity: str) -> dict[str, Any]:
        answer = self.protocol.cut(self.set_name, text)
        program = self.protocol.program(self.set_name, self.tasks[name], answer)
        empty = not answer.strip()
        return {
            "task": name,
            "sample": number,
            "text": text,
            "program": program,
            "empty": empty,
            "made": identity,
        }

    def _judge(self, path: Path, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """A verdict for every sample, in their order; those that are there for the same program are not run again."""

        def digest(row: Mapping[str, Any]) -> str:
            return _digest(json.dumps([row["program"], self.isolation]))

        def judge(row: Mapping[str, Any]) -> dict[str, Any]:
            task = self.tasks[row["task"]]
            verdict = sandbox.check(
                row["program"],
                self.protocol.timeout_s,
                tests=self.protocol.tests(self.set_name, task),
                setup=task.setup,
                entry_point=task.entry_point,
                sandbox=self.isolation,
            )
            key = {"task": row["task"], "sample": row["sample"], "program": digest(row)}
            return key | dataclasses.asdict(verdict)

        found = {(row["task"], row["sample"], row["program"]): row for row in kept(path)}
        missing = [row for row in samples if (row["task"], row["sample"], digest(row)) not in found]
        with ThreadPoolExecutor(self.workers) as pool:
            for verdict in pool.map(judge, missing):
                append(path, [verdict])
                found[verdict["task"], verdict["sample"], verdict["program"]] = verdict
        return [found[row["task"], row["sample"], digest(row)] for row in samples]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


# -------------------------------------------------------------------------------------------------------------- values


def values_of(
    tasks: Iterable[str],
    samples: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Mapping[str, Any]],
    k: Sequence[int],
) -> dict[str, Value]:
    """pass@k and the share of empty answers.

    The interval of pass@k is over tasks and samples: how far other tasks of this kind would move it. That of
    pass@k_same_tasks is over samples alone, on these very tasks; there is none from k samples only.
    """
    passed, empty = collections.defaultdict(list), collections.defaultdict(list)
    for sample, verdict in zip(samples, verdicts, strict=True):
        passed[sample["task"]].append(verdict["passed"])
        empty[sample["task"]].append(sample["empty"])
    counts = [(len(passed[name]), sum(passed[name])) for name in tasks]
    values: dict[str, Value] = {}
    for number in k:
        of_tasks = [pass_at_k(n, c, number) for n, c in counts]
        values[f"pass@{number}"] = Ratio.of(of_tasks, None, "share", f"pass@{number}")
        if all(n > number for n, _ in counts):
            error = math.sqrt(sum(jackknife(n, c, number) for n, c in counts)) / len(counts)
            label = f"pass@{number}, interval over samples alone"
            values[f"pass@{number}_same_tasks"] = Value(
                float(np.mean(of_tasks)), float(NORMAL_95 * error), "share", label
            )
    values["empty"] = Ratio.of([np.mean(empty[name]) for name in tasks], None, "share", "empty answers")
    return values


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate, from c right answers of n, that one of k is right: 1 - C(n - c, k) / C(n, k)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def jackknife(n: int, c: int, k: int) -> float:
    """Variance of pass_at_k over the n samples: each is left out once; n > k."""
    without = np.array([pass_at_k(n - 1, c - (i < c), k) for i in range(n)])  # the first c are the right ones
    return float((n - 1) / n * np.sum((without - without.mean()) ** 2))


def replay(protocol: CodeProtocol, set_name: str, tasks: Mapping[str, Task], outside: Mapping[str, Task]) -> Generate:
    """The reference solutions as a model: what a perfect one would answer to the prompts of a protocol."""
    answers = {protocol.prompt(set_name, task, outside): protocol.answer(set_name, task) for task in tasks.values()}
    return lambda prompts, draw: [answers[prompt] for prompt in prompts]
