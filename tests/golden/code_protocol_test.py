"""The prompts and the sanitiser of the soft-masking paper's code evaluation, on stored examples."""

import ast
import json

import pytest

from golden.dream import DREAM
from smdlm.evaluate.code_protocols import CODE_PROTOCOLS
from smdlm.evaluate.code_tasks import Task, sanitize

IBM = CODE_PROTOCOLS["ibm"]


@pytest.fixture(scope="module")
def stored():
    return json.loads(DREAM.need("evalproto.json").read_text("utf-8"))


def set_of(name):
    return "mbpp" if name.startswith("MBPP") else "humaneval"


def task_of(example):
    """The task behind a stored prompt: the set holds no file of tasks."""
    asserts = ()
    if set_of(example["task"]) == "mbpp":
        question, asserts = example["user"].split(" Your code should pass these tests:\n\n")
        prompt, asserts = question.split("here is your task: ", 1)[1], tuple(asserts.split("\n"))
        name = ""
    else:
        prompt = example["user"].split("```", 1)[1]
        name = [node.name for node in ast.parse(prompt).body if isinstance(node, ast.FunctionDef)][-1]
    return Task(example["task"], prompt, name, asserts, tests="", setup="", solution="")


def test_prompts(stored):
    for example in stored["prompts"]:
        prompt = IBM.prompt(set_of(example["task"]), task_of(example), {})
        assert prompt.user == example["user"], example["task"]
        assert prompt.prefix == example["prefix"], example["task"]
        assert prompt.text == example["context"], example["task"]


def test_answers_become_programs(stored):
    tasks = {example["task"]: task_of(example) for example in stored["prompts"]}
    for example in stored["sanitize"]:
        name = example["task"]
        answer = IBM.cut(set_of(name), example["response"])
        assert answer == example["after_until"]
        assert IBM.program(set_of(name), tasks[name], answer) == example["prediction"]


def test_sanitiser(stored):
    for example in stored["sanitize_raw"]:
        assert sanitize(example["text"], example["entry_point"], lines=100) == example["out"]
