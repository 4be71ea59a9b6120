"""The command line end to end, as a user meets it: train, rerun, eval, sample, kill -9, bad fields."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smdlm import command as command_lib

ROOT = Path(__file__).parent.parent
KEYS = {
    "val_bits_per_byte_one_pass", "val_bits_per_byte_two_pass", "tokens_per_s", "omega_s", "omega_a", "omega_b",
    "steps", "wall_s",
}  # fmt: skip


def command(workdir, *extra):
    corpus = workdir.parent / "corpus"
    if not corpus.exists():
        corpus.mkdir()
        for i in range(12):
            (corpus / f"{i}.txt").write_text(f"Document {i} says hello, and then {i * i} more things. " * 8)
    small = "model.width=16 model.depth=2 model.heads=2 model.cond=8 data.seq_len=16 data.batch_size=8 eval.blocks=8"
    small += " eval.batch_size=4 sampling.steps=4 sampling.count=2 train.steps=40 train.log_every=2 train.save_every=4"
    flags = [f"--config.{pair}" for pair in small.split()]
    return [
        sys.executable, "-m", "smdlm.main", "--config=configs/tiny.py", f"--workdir={workdir}",
        f"--config.data.source=text:{corpus}/*.txt", "--config.data.tokenizer=bytes", *flags, *extra,
    ]  # fmt: skip


def call(workdir, *extra, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run(
        command(workdir, *extra), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def curve(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["train/loss"], row["train/omega_s"]) for row in rows if "train/loss" in row]


# A stand-in for the package, which writes what it is told into the workdir.
WANDB = """
import json

class Settings(dict):
    pass

class init:
    def __init__(self, **given):
        self.file, self.summary = open(given["dir"] + "/stub.jsonl", "w"), {}
        self.log({"project": given["project"], "seed": given["config"]["train"]["seed"]}, 0)

    def log(self, values, step):
        print(json.dumps({"step": step, **values}), file=self.file)

    def finish(self):
        self.log(self.summary, -1)
        self.file.close()
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir, stub = tmp_path_factory.mktemp("main") / "run", tmp_path_factory.mktemp("stub")
    (stub / "wandb.py").write_text(WANDB)
    flags = ("--config.train.profile=4:6", "--config.train.wandb=project")
    done = call(workdir, *flags, PYTHONPATH=os.pathsep.join([str(stub), str(ROOT)]))
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_a_run_leaves_what_the_readme_says(finished):
    workdir, stdout = finished
    summary = json.loads((workdir / "summary.json").read_text())
    assert KEYS <= set(summary) and summary["steps"] == 40
    assert all(isinstance(summary[key], float | int) for key in KEYS)
    assert "two passes (feedback)" in stdout and "--- sample 1" in stdout
    assert "share (blank)" in stdout and summary["values"]["blank"]["unit"] == "share (blank)"  # eval.samples
    model, data, devices, work, folder, *rest = stdout.splitlines()
    parameters = f"{summary['parameters']:,} parameters, soft-masked (p_sm 0.8, k 3)"
    assert model == f"model    {parameters}" and data.startswith("data     ") and "blocks of 16 tokens" in data
    assert devices == "devices  1 x cpu (data 1, fsdp 1, tensor 1)" and folder == f"workdir  {workdir}, a new run"
    assert work.startswith("work     40 updates of 128 tokens, ") and work.endswith("FLOPs in all")
    assert sum("updates left" in line for line in rest) == 1  # how long, said once
    steps = rest[rest.index("next") + 1 :]
    assert len(steps) == 3 and all(str(workdir) in line for line in steps) and "--mode=eval" in steps[1]
    for line in steps[:2]:  # they can be pasted
        assert shlex.split(line)[:5] == ["python", *command(workdir)[1:4], f"--config.data.source={source(workdir)}"]
    assert "goodput" in stdout and "MFU" not in stdout  # nobody knows the peak of a CPU
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    told = [json.loads(line) for line in (workdir / "stub.jsonl").read_text().splitlines()]
    assert told[0] == {"step": 0, "project": "project", "seed": 0} and told[-1]["steps"] == 40
    assert [row["step"] for row in told[1:-1] if "train/loss" in row] == list(range(2, 41, 2))
    for name in ("loss.png", "omega.png", "samples/step_00000040.txt", "checkpoints/40/manifest.json"):
        assert (workdir / name).stat().st_size > 0


def source(workdir):
    return f"text:{workdir.parent}/corpus/*.txt"


def test_the_same_command_again_prints_the_summary(finished):
    workdir, stdout = finished
    begin = time.time()
    again = call(workdir)
    samples = stdout[stdout.index("--- sample 1") : stdout.index("\nnext\n")]  # what follows repeats the flags of each
    assert "holds a finished run" in again.stdout and samples in again.stdout
    assert (workdir / "summary.json").stat().st_mtime < begin


def test_eval_and_sample(finished):
    workdir, stdout = finished
    row = next(line for line in stdout.splitlines() if line.startswith("two passes"))
    assert row in call(workdir, "--mode=eval").stdout, "another number for the same weights and masks"
    page = workdir.parent / "out.html"
    flags = ("--config.sampling.prompt=Doc", f"--config.sampling.viewer={page}")
    sampled = call(workdir, "--mode=sample", *flags).stdout
    assert "4 steps, seed 0" in page.read_text("utf-8") and str(page) in sampled
    assert sampled.split("--- sample 1")[1].split("\n")[1].startswith("Doc")


def test_help_is_a_page_and_show_names_what_differs(tmp_path):
    done = call(tmp_path / "run", "--help")
    assert done.returncode == 0 and done.stdout.startswith("Soft-masked diffusion") and not done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 60 and max(map(len, lines)) <= 120
    for mode in command_lib.MODES:
        assert sum(line.startswith(f"  {mode} ") for line in lines) == 1, mode
    # adapter is a section that the file does not have
    done = call(tmp_path / "run", "--mode=show", "--config.sampling.policy=entropy", "--config.adapter.rank=4")
    assert done.returncode == 0 and not (tmp_path / "run").exists()
    rows = [line.split(maxsplit=3) for line in done.stdout.splitlines()]
    assert ["*", "width", "16", "<- command line; the file has 128"] in rows
    assert ["*", "policy", "'entropy'", "<- command line; the file has 'remdm_cap'"] in rows
    assert ["*", "source", f"'{source(tmp_path / 'run')}'", "<- command line; the file has 'stdlib:prose'"] in rows
    assert ["*", "rank", "4", "<- command line; the file has 16"] in rows
    assert ["name", "'dit'", "(default)"] in rows and ["scale", "0.12"] in rows
    assert done.stdout.startswith(f"{sum(row[:1] == ['*'] for row in rows)} fields other than in the file")


def test_generate(finished, tmp_path):
    """A file of prompts to a file of answers; what a cache changes; a mistake leaves nothing behind."""
    workdir, _ = finished
    prompts, answers = tmp_path / "prompts.jsonl", workdir / "samples/step_00000040_generate_1.jsonl"
    prompts.write_text('{"prompt": "Doc", "id": 7}\n{"prompt": "a[MASK]b", "seed": 3}\n')
    flags = ["--mode=generate", f"--prompts={prompts}", "--config.sampling.policy=max_prob"]
    fields = ["new_tokens=4", "bucket=8", "block=2", "cache=dual", "batch_size=2"]
    done = call(workdir, *flags, *(f"--config.generate.{field}" for field in fields), "--verify_cache")
    assert done.returncode == 0, done.stderr
    for words in ("--- answer 2 (1 forwards, length)", "tokens per forward", "flops saved", "largest logit difference"):
        assert words in done.stdout
    first, second = map(json.loads, answers.read_text("utf-8").splitlines())
    assert (first["prompt"], first["id"], first["seed"]) == ("Doc", 7, 0) and len(first["ids"]) <= 4
    assert (second["seed"], len(second["ids"]), second["text"][0], second["text"][-1]) == (3, 1, "a", "b")
    assert first["settings"]["cache"] == "dual" and first["settings"]["policy"]["name"] == "MaxProbability"
    prompts.write_text('{"prompt": "Doc"}\n{"prompt": ""}\n')
    wrong = call(workdir, *flags)
    assert wrong.returncode == 2 and wrong.stderr.splitlines()[-1].endswith("at least one character")
    assert len(list((workdir / "samples").glob("*generate*"))) == 2


@pytest.mark.slow
def test_kill_and_rerun_continues_bit_for_bit(finished, tmp_path):
    workdir = tmp_path / "killed"
    (tmp_path / "corpus").symlink_to(finished[0].parent / "corpus")
    process = subprocess.Popen(command(workdir), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 200
    while time.time() < deadline and process.poll() is None:
        if any(p.name.isdigit() and 8 <= int(p.name) for p in workdir.glob("checkpoints/*")):
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (workdir / "summary.json").exists(), "the run was over before it could be killed"
    done = call(workdir)
    assert done.returncode == 0, done.stderr
    assert curve(workdir) == curve(finished[0])


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.train.stepz=3", "stepz"),
        ("--config.train.steps=many", "many"),
        ("--config.sampling.top_p=1.5", "got 1.5"),
        ("--config.data.source=text:/nowhere/*.txt", "/nowhere"),
        ("--config.data.seq_len=1000000", "1000000"),
        ("--mode=evaluate", "evaluate"),
        ("--config.trian.steps=3", "trian"),
        ("--config=configs/nowhere.py", "configs/nowhere.py"),
        ("--workdir=/proc/nowhere/run", "/proc/nowhere/run"),
        ("--workdir=README.md/run", "README.md/run"),
        ("--config.sampling.viewer=/proc/nowhere/run.html", "sampling.viewer: got /proc/nowhere"),
        ("--config.sampling.viewer=run.gif", "got 'run.gif', wanted a file that ends in .html or .svg"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flag, message):
    done = call(tmp_path / "run", flag)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_any_folder_terminal_and_precision(tmp_path, finished):
    """ar_tiny.py imports its neighbour, in a folder with a `configs` of its own; stdout is ASCII; x64 is on."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").touch()
    (tmp_path / "corpus").symlink_to(finished[0].parent / "corpus")
    flags = [*command(tmp_path / "run"), "--config.train.steps=4"]
    flags[3] = f"--config={ROOT}/configs/ar_tiny.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "JAX_ENABLE_X64": "1"}
    done = subprocess.run(flags, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "+- " in done.stdout and done.stderr.count("JAX_ENABLE_X64 is set and is ignored") == 1
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_finished_run_does_not_answer_for_another_config(finished):
    done = call(finished[0], "--config.optimizer.lr=0.1", "--config.train.keep=1")
    assert done.returncode == 2 and "another optimizer.lr (0.004, now 0.1), wanted the same" in done.stderr


def test_a_policy_given_by_the_user_starts_from_its_own_defaults(finished):
    """tiny.py has an eta for its own policy."""
    done = call(finished[0], "--mode=sample", "--config.sampling.policy=entropy")
    assert done.returncode == 0, done.stderr
    done = call(finished[0], "--mode=sample", "--config.sampling.policy=entropy", "--config.sampling.eta=0.1")
    assert done.returncode == 2 and "got eta" in done.stderr


def test_another_model_lists_every_leaf(finished):
    workdir, _ = finished
    done = call(workdir, "--mode=eval", "--config.model.width=24")
    assert done.returncode == 2 and "ema/backbone/embed: got float32[258,16], wanted float32[258,24]" in done.stderr
