"""Two processes on one machine (gloo) train, are told to stop, are killed; one finishes with the curve of one alone.

The processes stand for hosts that share a file system. Every wait has a limit, and what outlives a test is killed.
"""

import json
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, environment

LIMIT = 240  # seconds for any one wait
STEPS = 400
CONFIG = f"""
from configs import tiny

def get_config():
    config = tiny.get_config()
    config.model.update(width=16, depth=2, heads=2, cond=8, dropout=0.1, vocab_multiple=4, products="dtype")
    config.data = dict(source="text:FOLDER/corpus/*.txt", tokenizer="bpe:260", seq_len=16, batch_size=8)
    config.eval = dict(blocks=8, batch_size=4, chain=0)
    config.sampling.update(steps=4, count=2)
    config.train.update(steps={STEPS}, log_every=5, save_every=20)
    # Rounding must not grow over hundreds of steps: no Muon, and a large eps (see partition_test.py).
    config.optimizer = dict(name="adamw", lr=4e-3, lr_softmask=0.02, eps=0.1, warmup=5)
    return config
"""
TWO = {"mesh.data": 2, "mesh.fsdp": 2}  # of two processes with two devices each


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "corpus").mkdir()
    for i in range(12):
        (folder / "corpus" / f"{i}.txt").write_text(f"Document {i} says hello, and then {i * i} more things. " * 8)
    (folder / "config.py").write_text(CONFIG.replace("FOLDER", str(folder)))
    return folder


@pytest.fixture(scope="module")
def start():
    """start(workdir, processes, {field: value}, *flags) -> Popens; all are killed in the end."""
    running = []

    def begin(workdir, processes, fields=(), *flags):
        config = workdir.parent / "config.py"
        command = [sys.executable, "-m", "smdlm.main", f"--config={config}", f"--workdir={workdir}", *flags]
        command += [f"--config.{name}={value}" for name, value in dict(fields).items()]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            command += ["--distributed", f"--coordinator=localhost:{port}", f"--num_processes={processes}"]
        group = [
            subprocess.Popen(
                [*command, *([f"--process_id={i}"] if processes > 1 else [])],
                **{"cwd": ROOT, "env": environment(min(processes, 2)), "text": True},
                **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
            )
            for i in range(processes)
        ]
        running.extend(group)
        return group

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def ends(group, status=0):
    """[(stdout, stderr)] of processes that end by themselves with this status; Gloo's own lines, which its threads may
    write into each other, are left out."""
    output = [process.communicate(timeout=LIMIT) for process in group]
    output = [
        ("".join(line for line in out.splitlines(True) if "peer ranks" not in line and "[Gloo]" not in line), err)
        for out, err in output
    ]
    assert [process.returncode for process in group] == [status] * len(group), output
    return output


def rows(workdir):
    """{step: loss} of metrics.jsonl."""
    with open(workdir / "metrics.jsonl") as file:
        found = [json.loads(line) for line in file if line.endswith("\n")]
    found = [(row["step"], row["train/loss"]) for row in found if "train/loss" in row]
    assert len(dict(found)) == len(found), "two processes wrote"
    return dict(found)


def saved(workdir):
    steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, default=0)


def wait_for(reached, group):
    deadline = time.time() + LIMIT
    while not reached():
        assert time.time() < deadline and all(process.poll() is None for process in group), ends(group)
        time.sleep(0.01)


@pytest.fixture(scope="module")
def straight(folder, start):
    """The workdir of a run of one process without interruption."""
    ends(start(folder / "straight", 1))
    losses = rows(folder / "straight")
    assert len(losses) == STEPS / 5 and np.ptp(list(losses.values())) > 0.1
    return folder / "straight"


@pytest.mark.slow
def test_stopped_killed_and_finished_by_one_process(folder, straight, start):
    """SIGTERM to the second of two processes ends both at one step; then SIGKILL to both; then one process goes on."""
    workdir = folder / "interrupted"
    group = start(workdir, 2, TWO)
    wait_for(lambda: saved(workdir) >= 20, group)
    group[1].send_signal(signal.SIGTERM)
    output = ends(group)
    stopped = saved(workdir)
    assert stopped < STEPS and all(f"stopped by a signal at step {stopped}" in stderr for _, stderr in output)
    assert output[1][0] == "", "only process 0 reports"

    group = start(workdir, 2, TWO)
    wait_for(lambda: saved(workdir) > stopped, group)
    for process in group:
        process.kill()
        process.wait()
    killed = saved(workdir)
    assert killed < STEPS, "the run was over before it could be killed"

    ends(start(workdir, 1))
    got, wanted = rows(workdir), rows(straight)
    assert list(got) == list(wanted)
    np.testing.assert_allclose(list(got.values()), list(wanted.values()), rtol=1e-5)
    # The same data in the same order: a BPE trained by two processes at once, and no block more or less.
    metas = [json.loads((w / f"checkpoints/{STEPS}/meta/metadata").read_text()) for w in (workdir, straight)]
    assert metas[0]["content_hash"] == metas[1]["content_hash"] and metas[0]["tokenizer"] == metas[1]["tokenizer"]
    assert not list(workdir.glob("*.tmp"))


@pytest.mark.slow
def test_two_processes_evaluate_and_sample_like_one(straight, start):
    """On parameters that are split over both, with a batch that both share."""
    fields = {"mesh.data": 1, "mesh.fsdp": 4}
    (alone, _), *_ = ends(start(straight, 1, {}, "--mode=eval"))
    (stdout, _), (silent, _) = ends(start(straight, 2, fields, "--mode=eval"))
    numbers = lambda text: [float(found) for found in re.findall(r"-?\d+\.\d+", text[text.index("one pass") :])]
    assert len(numbers(alone)) == 16 and silent == ""  # two likelihoods in three units and the gain in two, with ±
    np.testing.assert_allclose(numbers(stdout), numbers(alone), rtol=1e-3, atol=1.1e-3)
    (alone, _), *_ = ends(start(straight, 1, {}, "--mode=sample"))
    (stdout, stderr), (silent, _) = ends(start(straight, 2, fields, "--mode=sample"))
    texts = lambda stdout: stdout[stdout.index("--- sample 1") :]
    assert texts(stdout) == texts(alone) and silent == "" and "got 2 rows for 4 parts of the mesh" in stderr


@pytest.mark.slow
def test_processes_that_do_not_fit_together_are_refused(folder, start):
    """One line, soon, and on both: another config, and folders that are not shared."""
    group = start(folder / "a", 2, {"train.seed": 1})
    group[0].kill()  # its place is taken by one with another seed
    port = next(arg for arg in group[1].args if arg.startswith("--coordinator"))
    group[1].kill()
    first = [arg for arg in group[0].args if not arg.startswith("--coordinator")] + [port]
    second = [arg.replace("train.seed=1", "train.seed=2").replace("process_id=0", "process_id=1") for arg in first]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment(1)}
    group = [subprocess.Popen(args, **pipes) for args in (first, second)]
    try:
        _, stderr = group[0].communicate(timeout=LIMIT)
        assert group[0].returncode == 2 and "error: --distributed: got another config" in stderr
    finally:
        for process in group:
            process.kill()
            process.communicate()


def test_a_group_without_a_coordinator_is_one_line(folder, start):
    ((_, stderr),) = ends(start(folder / "a", 1, {}, "--distributed", "--num_processes=2", "--process_id=0"), 2)
    assert stderr.count("error: --distributed: got coordinator None") == 1 and "wanted --coordinator" in stderr
    ((_, stderr),) = ends(start(folder / "a", 1, {}, "--distributed", "--coordinator=host"), 2)
    assert stderr.count("error: --coordinator: got host, wanted HOST:PORT") == 1
    ((_, stderr),) = ends(start(folder / "a", 1, {}, "--num_processes=2"), 2)
    assert "wanted --distributed beside it" in stderr
