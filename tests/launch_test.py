"""The launch scripts: clean for shellcheck, silent in a dry run, and what they call (fakes stand on the PATH)."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smdlm.command import load_config
from smdlm.config import read
from smdlm.tools import finished

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
NUMBERED = sorted(path.name for path in LAUNCH.glob("[0-9]*.sh"))
POD = {"TPU_NAME": "slice", "TPU_ZONE": "zone", "TPU_TYPE": "v5litepod-16", "TPU_VERSION": "image", "MOUNT": "mount it"}
# Notes its arguments. `describe` gives the states of the file one by one; `ssh` fails as often as the file says.
GCLOUD = """
case "$*" in
  *" describe "*)
    state=$(head -n 1 states); sed -i 1d states
    [ "$state" != NONE ] && echo "$state" ;;
  *smdlm.main*)
    failures=$(cat failures); echo $((failures - 1)) > failures
    [ "$failures" -le 0 ] ;;
  *" create "*) [ ! -e no_chips ] ;;
  *) ;;
esac
"""


@pytest.fixture
def launch(tmp_path):
    """launch(script, *arguments, fakes={name: shell}, **environment) -> (done, lines that the fakes noted)."""
    (tmp_path / "bin").mkdir()

    def call(script, *arguments, fakes=None, **environment):
        calls = tmp_path / "calls"
        calls.write_text("")
        for name in ("gcloud", "srun", "sbatch", "scontrol", "python", "git"):
            fake = tmp_path / "bin" / name
            note = f"#!/usr/bin/env bash\ncd {tmp_path}\n"
            note += f"printf '%s\\x1f' {name} \"$@\" >> calls; printf '\\x1e' >> calls\n"
            fake.write_text(note + (fakes or {}).get(name, ""))
            fake.chmod(0o755)
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(
            [LAUNCH / script, *arguments],
            env={"PATH": path, "HOME": str(tmp_path), "POLL": "0", **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done, [call.split("\x1f")[:-1] for call in calls.read_text().split("\x1e")[:-1]]

    return call


def verbs(calls):
    """create, describe, ssh, .. of the calls of gcloud."""
    return [call[4] for call in calls if call[0] == "gcloud"]


def printed(done):
    """The commands that a dry run printed."""
    return [shlex.split(line[2:]) for line in done.stderr.replace("\\\n", "").splitlines() if line.startswith("+ ")]


def test_shellcheck():
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "shellcheck is missing: pip install -e '.[test]'"
    done = subprocess.run([found, "-x", *LAUNCH.glob("*.sh")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["gpu.sh", "job.sh", "slurm.sh", "tpu_pod.sh", *NUMBERED])
def test_a_dry_run_calls_nothing_and_help_explains(launch, script):
    flags = [] if script in NUMBERED else ["--config=configs/owt.py", "--workdir=/s/run"]
    done, calls = launch(script, "--dry-run", *flags, **POD)
    assert done.returncode == 0 and calls == [] and "smdlm.main" in done.stderr
    done, calls = launch(script, "--help")
    assert done.returncode == 0 and calls == [] and script in done.stdout and "shellcheck" not in done.stdout


@pytest.mark.parametrize("script", NUMBERED)
def test_every_command_of_a_table_is_a_valid_experiment(launch, script):
    """Config and fields exist and go together; runs that are sampled were trained, with the same model."""
    done, _ = launch(script, "--dry-run", RUNS="/r")
    commands = [command[3:] for command in printed(done)]
    assert commands
    for flags in commands:
        pairs = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
        config = load_config(ROOT / pairs.pop("config"))
        assert pairs.pop("workdir").startswith("/r/") and pairs.pop("mode", "train") in ("train", "eval", "sample")
        for name, value in pairs.items():
            _, section, field = name.split(".")
            old = config[section].get(field)
            config[section][field] = value == "True" if value in ("True", "False") else type(old or "")(value)
        read(config)


@pytest.mark.parametrize("missing", [*POD, "--workdir"])
def test_what_is_missing_is_named(launch, missing):
    flags = ["--config=configs/owt.py"] + ["--workdir=/s/run"] * (missing != "--workdir")
    done, calls = launch("tpu_pod.sh", *flags, **{name: value for name, value in POD.items() if name != missing})
    assert done.returncode == 2 and calls == []
    assert done.stderr.startswith("error: ") and missing in done.stderr and "wanted" in done.stderr


def pod(launch, tmp_path, states, failures, *flags, **environment):
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    (tmp_path / "failures").write_text(str(failures))
    flags = flags or ("--config=configs/owt.py", "--workdir=/s/run", "--config.sampling.prompt=Return the ")
    return launch("tpu_pod.sh", *flags, fakes={"gcloud": GCLOUD}, **{**POD, **environment})


def test_a_preempted_slice_is_made_anew_and_runs_the_same_command(launch, tmp_path):
    done, calls = pod(launch, tmp_path, ["NONE", "PREEMPTED", "NONE"], 1, SPOT="1")
    assert done.returncode == 0, done.stderr
    life = ["create", "scp", "ssh", "ssh"]  # made, copied to, installed, run
    wanted = ["describe", *life, "describe", "delete", "describe", *life, "ssh", "delete"]
    assert verbs(calls) == wanted
    created, *_ = [call for call in calls if "create" in call]
    assert {"slice", "--zone=zone", "--accelerator-type=v5litepod-16", "--version=image", "--spot"} <= set(created)
    installed, ran, *_ = [call for call in calls if "ssh" in call]
    assert "--worker=all" in installed and "mount it" in installed[-1]
    runs = [call for call in calls if "smdlm.main" in call[-1]]
    assert len(runs) == 2 and runs[0] == runs[1] == ran and "--worker=all" in ran
    remote = shlex.split(ran[-1].removeprefix("--command="))
    assert remote[-4:] == ["--distributed", "--config=configs/owt.py", "--workdir=/s/run",
                           "--config.sampling.prompt=Return the "]  # fmt: skip


def test_a_pod_with_a_bucket_needs_no_mount(launch, tmp_path):
    flags = ("--config=configs/owt.py", "--workdir=gs://bucket/a run")
    done, calls = pod(launch, tmp_path, ["READY"], 0, *flags, MOUNT="")
    assert done.returncode == 0, done.stderr
    installed, ran, looked = [call[-1].removeprefix("--command=") for call in calls if "ssh" in call]
    assert "'smdlm[tpu,gcs]'" in installed and shlex.split(ran)[-1] == "--workdir=gs://bucket/a run"
    assert shlex.split(looked)[-3:] == ["-m", "smdlm.tools.finished", "gs://bucket/a run"]


@pytest.mark.parametrize(
    ("status", "summary", "mode", "wanted"),
    [
        (0, True, "train", 0),
        (0, False, "train", 75),
        (0, False, "eval", 0),
        (2, False, "train", 2),
        (1, True, "train", 1),
    ],
)
def test_a_job_says_by_its_status_whether_to_start_it_again(launch, tmp_path, status, summary, mode, wanted):
    run = tmp_path / "run"
    run.mkdir()
    if summary:
        (run / "summary.json").touch()
    flags = ["--config=configs/owt.py", f"--workdir={run}", f"--mode={mode}"]
    done, calls = launch("job.sh", *flags, fakes={"python": f"exit {status}"})
    assert done.returncode == wanted and calls == [["python", "-m", "smdlm.main", *flags]]


def test_a_job_of_several_processes(launch, tmp_path):
    flags = ["--config=configs/owt.py", "--workdir=gs://bucket/run"]
    done, calls = launch("job.sh", *flags, DISTRIBUTED="1")
    assert done.returncode == 0  # the fake says that the run in the bucket is finished
    looked = ["python", "-m", "smdlm.tools.finished", "gs://bucket/run"]
    assert calls == [["python", "-m", "smdlm.main", *flags, "--distributed"], looked]
    done, calls = launch("job.sh", *flags, COORDINATOR="host:1", NUM_PROCESSES="2", PROCESS_ID="1", DISTRIBUTED="1")
    assert calls[0][5:] == ["--distributed", "--coordinator=host:1", "--num_processes=2", "--process_id=1"]
    gone = 'case "$*" in *finished*) exit 1 ;; esac'
    done, calls = launch("job.sh", flags[0], "--workdir=s3://bucket/run", fakes={"python": gone})
    assert done.returncode == 75 and calls[-1] == [*looked[:-1], "s3://bucket/run"]


def test_whether_a_run_is_finished(tmp_path, capsys):
    assert finished.main([str(tmp_path)]) == 1
    (tmp_path / "summary.json").touch()
    assert finished.main([str(tmp_path)]) == 0
    assert finished.main(["az://bucket/run"]) == 2 and "got the URL az://bucket/run" in capsys.readouterr().err
    assert finished.main([]) == 2


def test_a_command_that_fails_on_a_healthy_slice_is_given_up(launch, tmp_path):
    done, calls = pod(launch, tmp_path, ["READY"] * 3, 9, RETRIES="1")
    assert done.returncode == 2 and "fails on a healthy slice" in done.stderr
    assert verbs(calls) == ["describe", "scp", "ssh", "ssh", "describe", "ssh", "describe"]


def test_a_slice_that_cannot_be_created_is_an_error(launch, tmp_path):
    (tmp_path / "no_chips").touch()
    done, calls = pod(launch, tmp_path, ["NONE"], 0)
    assert done.returncode == 2 and "could not be created" in done.stderr and verbs(calls) == ["describe", "create"]


def test_down_deletes(launch, tmp_path):
    done, calls = pod(launch, tmp_path, [], 0, "down")
    assert done.returncode == 0 and verbs(calls) == ["delete"]


def test_gpu_runs_until_there_is_a_summary(launch, tmp_path):
    run = tmp_path / "run"
    python = f"[ -e stopped ] && mkdir {run} && touch {run}/summary.json; touch stopped; exit 0"
    flags = ["--config=configs/owt.py", f"--workdir={run}"]
    done, calls = launch("gpu.sh", *flags, fakes={"python": python})
    assert done.returncode == 0 and calls == 2 * [["python", "-m", "smdlm.main", *flags]]
    done, calls = launch("gpu.sh", *flags, "--mode=eval", fakes={"python": "exit 3"})
    assert done.returncode == 3 and len(calls) == 1


def test_gpu_on_several_machines(launch, tmp_path):
    flags = ["--config=configs/owt.py", f"--workdir={tmp_path}", "--mode=eval"]
    done, calls = launch("gpu.sh", *flags, COORDINATOR="host:1", NUM_PROCESSES="2", PROCESS_ID="1")
    wanted = ["--distributed", "--coordinator=host:1", "--num_processes=2", "--process_id=1"]
    assert done.returncode == 0 and calls == [["python", "-m", "smdlm.main", *flags, *wanted]]
    done, calls = launch("gpu.sh", *flags, COORDINATOR="host:1")
    assert done.returncode == 2 and calls == [] and "NUM_PROCESSES" in done.stderr


@pytest.mark.parametrize("script", NUMBERED)
def test_numbered_scripts_take_no_flags(launch, script):
    """A misspelt --dry-run starts nothing."""
    done, calls = launch(script, "--dyr-run")
    assert done.returncode == 2 and calls == [] and done.stderr.startswith("error: arguments: got --dyr-run, wanted")


@pytest.mark.parametrize(
    ("script", "flags", "environment", "wanted"),
    [
        ("gpu.sh", ["--workdir=w"], {}, "got no --config"),
        ("gpu.sh", ["--config=c"], {}, "got no --workdir"),
        ("gpu.sh", ["--config=c", "--workdir=w"], {"PYTHON": "/nope"}, "/nope: got no such command"),
        ("slurm.sh", ["--config=c", "--workdir=w"], {"NODES": "x"}, "NODES: got x, wanted a number"),
    ],
)
def test_mistakes_are_one_line(launch, script, flags, environment, wanted):
    done, calls = launch(script, *flags, **environment)
    assert done.returncode != 0 and calls == [] and wanted in done.stderr.splitlines()[-1]


def test_slurm_submits_itself_and_is_requeued_until_there_is_a_summary(launch, tmp_path):
    flags = ["--config=configs/owt.py", f"--workdir={tmp_path}/run"]
    done, calls = launch("slurm.sh", *flags, NODES="2", GPUS="4", ACCOUNT="us")
    assert done.returncode == 0 and [call[0] for call in calls] == ["sbatch"]
    wanted = {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--account=us", "--requeue", "--signal=TERM@120"}
    assert wanted <= set(calls[0]) and calls[0][-3:] == [str(LAUNCH / "slurm.sh"), *flags]
    inside = {"SMDLM_LAUNCH": str(LAUNCH), "SLURM_JOB_ID": "7"}
    done, calls = launch("slurm.sh", *flags, **inside)
    run = ["srun", "--kill-on-bad-exit=1", "python", "-m", "smdlm.main", "--distributed", *flags]
    assert done.returncode == 0 and calls == [run, ["scontrol", "requeue", "7"]]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").touch()
    done, calls = launch("slurm.sh", *flags, **inside)
    assert done.returncode == 0 and calls == [run]
