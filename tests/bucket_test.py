"""Workdirs and prepared data in gs:// and s3://, against emulators of both over HTTP; locks also on a disk."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import pytest
from absl import logging
from checkpoint_test import abstract, assert_same, make_state
from conftest import ROOT, environment
from data_helpers import config_of, stream_of, write_documents
from main_test import command

from smdlm import buckets, files
from smdlm.command import check_folder, is_users
from smdlm.data import prepare
from smdlm.data.text import load
from smdlm.io.checkpoint import MANIFEST, CheckpointDamaged, Checkpointer
from smdlm.io.writer import Writer, read_metrics

SCHEMES = ("gs", "s3")
# Not imported here: gcsfs reads its variables when it is imported.
if not all(map(importlib.util.find_spec, ("gcsfs", "gcp_storage_emulator", "s3fs", "moto", "flask_cors"))):
    pytest.skip("pip install -e '.[test]'", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def emulators():
    """Processes of their own; until the end of this file gcsfs, tensorstore and s3fs go there."""
    started = {name: _start(f"{name}_emulator.py") for name in ("gcs", "s3")}
    google, amazon = (f"http://localhost:{port}" for _, port in started.values())
    variables = {
        "STORAGE_EMULATOR_HOST": google,  # gcsfs
        "TENSORSTORE_GCS_HTTP_URL": google,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "AWS_ENDPOINT_URL": amazon,
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        for process, port in started.values():
            while socket.socket().connect_ex(("localhost", port)):
                assert process.poll() is None, "an emulator did not start"
                time.sleep(0.05)
        yield
    for process, _ in started.values():
        process.kill()
        process.wait()


def _start(program):
    """(process, port)."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    call = [sys.executable, str(ROOT / "tests" / program), str(port)]
    return subprocess.Popen(call, stderr=subprocess.DEVNULL), port


@pytest.fixture(params=SCHEMES)
def folder(request):
    """A folder of its own in the bucket of each cloud, or on a disk."""
    if request.param == "disk":
        return request.getfixturevalue("tmp_path") / "run"
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return files.path_of("--workdir", f"{request.param}://bucket/{name}")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """() -> the folders of this process and its children for steps that are copied."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # it is read once
    return lambda: [path.name for path in tmp_path.glob("smdlm_steps_*")]


@pytest.fixture
def warned(monkeypatch):
    lines = []

    def warning(message, *args):
        if "orbax" not in sys._getframe(1).f_code.co_filename:  # `io.checkpoint` keeps its lines from people
            lines.append(message % args)

    monkeypatch.setattr(logging, "warning", warning)
    return lines


# Paths and files


def test_files_of_a_bucket(folder, tmp_path):
    assert str(folder)[2:].startswith("://bucket/test-files") and files.as_path(folder) is folder
    assert not folder.exists() and files.tree(folder) == []
    files.write(folder / "a" / "b.txt", "one")
    files.write_json(folder / "c.json", {"x": 1})
    files.write(folder / "a" / "b.txt", b"two!")
    assert (folder / "a" / "b.txt").read_text("utf-8") == "two!" and files.size(folder / "a" / "b.txt") == 4
    assert files.tree(folder) == ["a/b.txt", "c.json"]
    (tmp_path / "b.txt").write_text("two!")
    assert files.sha256(folder / "a" / "b.txt") == files.sha256(tmp_path / "b.txt")
    with pytest.raises(ValueError):
        files.write_json(folder / "c.json", {"x": float("nan")})
    assert json.loads((folder / "c.json").read_text()) == {"x": 1}
    files.copy_folder(tmp_path, folder / "copied")
    assert files.tree(folder / "copied") == ["b.txt"]
    (folder / "c.json").unlink(missing_ok=True)
    (folder / "c.json").unlink(missing_ok=True)
    files.remove_tree(folder / "a")
    files.remove_tree(folder / "nothing")
    assert files.tree(folder) == ["copied/b.txt"]


def test_what_another_process_wrote_is_seen(folder):
    """File systems of fsspec keep listings, for ever by default."""
    assert [p.name for p in folder.glob("*")] == [] and not (folder / "late.txt").exists()
    code = "import sys; from smdlm import files; files.write(files.path_of('x', sys.argv[1]) / 'late.txt', 'x')"
    subprocess.run([sys.executable, "-c", code, str(folder)], env=environment(1), check=True, timeout=60)
    assert (folder / "late.txt").exists() and [p.name for p in folder.iterdir()] == ["late.txt"]


@pytest.mark.parametrize("text", ["gs://", "gs:/bucket/x", "gs:///x", "s3:/bucket/x"])
def test_other_spellings_of_a_bucket_are_refused(text):
    with pytest.raises(ValueError, match=f"--workdir: got {text}, wanted {text[:2]}://BUCKET/FOLDER"):
        files.path_of("--workdir", text)


@pytest.mark.parametrize("scheme, package, extra", [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")])
def test_without_its_package(monkeypatch, scheme, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    wanted = f"--workdir: got {scheme}://b/x without {package} .*pip install 'smdlm\\[{extra}\\]'"
    with pytest.raises(ValueError, match=wanted):
        files.path_of("--workdir", f"{scheme}://b/x")


# The lock

HOLD = "import sys, time; from smdlm import buckets, files\nbuckets.RENEW = float(sys.argv[2])\n"
HOLD += "with files.owned(files.path_of('x', sys.argv[1]), '--workdir'):\n    print('mine', flush=True); time.sleep(60)"


@pytest.fixture
def holder(folder):
    """hold(renew) -> a process that holds the lock of the folder."""
    started = []

    def hold(renew):
        call = [sys.executable, "-c", HOLD, str(folder), str(renew)]
        started.append(subprocess.Popen(call, env=environment(1), stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "mine\n"
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("folder", ["disk", *SCHEMES], indirect=True)
def test_a_folder_has_one_writer_and_a_dead_one_of_this_host_does_not_count(folder, holder, monkeypatch):
    """The second ends at once and names the first; kill -9 frees the folder; nothing is left behind."""
    monkeypatch.setattr(buckets, "RENEW", 0.3)
    monkeypatch.setattr(buckets, "STALE", 20.0)
    first = holder(0.1)
    with pytest.raises(ValueError, match=f"which process {first.pid} on .* is writing, wanted a folder of its own"):
        with files.owned(folder, "--workdir"):
            pass
    first.send_signal(signal.SIGKILL)
    first.wait()
    with files.owned(folder, "--workdir"):
        files.write(folder / "result", "")
    assert files.tree(folder) == ["result"]
    with files.owned(folder / "empty", "--workdir"):
        pass
    assert not (folder / "empty").exists()


def test_an_owner_of_another_host_is_dead_without_a_sign_of_life(folder, monkeypatch):
    monkeypatch.setattr(buckets, "RENEW", 0.1)
    monkeypatch.setattr(buckets, "STALE", 0.3)
    files.write_json(folder / files.LOCK, {"pid": 1, "host": "elsewhere", "id": "x", "beat": 7})
    with files.owned(folder, "--workdir"):
        assert buckets._read(folder / files.LOCK)["pid"] == os.getpid()
        deadline = time.monotonic() + 30
        while buckets._read(folder / files.LOCK)["beat"] == 0:  # signs of life
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert not (folder / files.LOCK).exists()


# What a run writes


def test_metrics_samples_summary_and_curves(folder, warned):
    writer = Writer(folder, total_steps=4, start_step=0)
    for step in (1, 2, 3):
        writer.scalars(step, {"train/loss": float(step), "train/omega_s": 0.1})
    writer.samples("step_3", [{"text": "naïve"}])
    writer.curves({}, {"omega_s": "scale"})
    writer.summary({"steps": 3})
    writer.close()
    again = Writer(folder, total_steps=4, start_step=2)  # the third was written by a run that was killed
    again.scalars(3, {"train/loss": 30.0})
    Writer(folder, total_steps=4).scalars(3, {"val/x": 2.0})
    rows = [(row["step"], row.get("train/loss")) for row in read_metrics(folder / "metrics.jsonl")]
    assert rows == [(1, 1.0), (2, 2.0), (3, 30.0), (3, None)] and warned == []
    wanted = ["loss.png", "metrics.jsonl", "omega.png", "samples/step_3.jsonl", "samples/step_3.txt", "summary.json"]
    assert files.tree(folder) == wanted


def unreachable(*_):
    raise OSError("the network is down")


@pytest.mark.slow
def test_checkpoints_come_back_bit_for_bit_and_damage_is_seen(folder, warned, monkeypatch):
    saver = Checkpointer(folder, keep=2)
    for step in (1, 2, 3):
        saver.save(step, make_state(step), data={"next_index": step}, meta={"width": 16})
    saver.close()
    assert warned == [] and sorted(p.name for p in folder.iterdir()) == ["2", "3"]
    reader = Checkpointer(folder, keep=2)
    state, data, meta = reader.restore(abstract(make_state()))
    assert_same(state, make_state(3))
    assert (data, meta) == ({"next_index": 3}, {"width": 16, "step": 3})
    with monkeypatch.context() as patch:  # a network that is down is no damage, for which an older step would be taken
        patch.setattr("smdlm.io.checkpoint._digests", unreachable)
        with pytest.raises(OSError, match="the network is down"):
            Checkpointer(folder, keep=2).restore(abstract(make_state()))
    listed = json.loads((folder / "3" / MANIFEST).read_text())
    there = set(files.tree(folder / "3")) - {MANIFEST, "commit_success.txt", "_CHECKPOINT_METADATA"}
    assert {name for name in there if not name.endswith("/")} == set(listed)
    big = max(listed, key=lambda name: listed[name]["bytes"] if "/d/" in name else 0)
    content = bytearray((folder / "3" / big).read_bytes())
    content[len(content) // 2] ^= 1
    files.write(folder / "3" / big, bytes(content))
    assert_same(Checkpointer(folder).restore_params(None, "params", step=2)[0], make_state(2).params)
    runner = Checkpointer(folder, keep=2)
    assert_same(runner.restore(abstract(make_state()))[0], make_state(2))
    (line,) = warned
    assert "step 3 is damaged" in line and "another sha256" in line
    runner.save(3, make_state(33), data={}, meta={})
    runner.close()
    assert_same(Checkpointer(folder).restore(abstract(make_state()))[0], make_state(33))


KILLED = """
import os, signal, sys
from checkpoint_test import *
from orbax.checkpoint._src.path import atomicity
from smdlm import buckets

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

runner = Checkpointer(sys.argv[1], keep=2)
runner.save(1, make_state(1), data={"next_index": 1}, meta={})
runner.wait()
upload, moment = buckets.upload, sys.argv[2]
if moment == "before the last object":
    atomicity.on_commit_callback = kill
if moment == "between two objects":
    buckets.upload = lambda file, url: kill() if file.name == "manifest.json" else upload(file, url)
runner.save(2, make_state(2, width=20_000), data={}, meta={})
if moment == "after save returned":
    kill()
runner.wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder, moment",
    [("gs", "after save returned"), ("gs", "before the last object"), ("s3", "between two objects")],
    indirect=["folder"],
)
def test_kill_in_a_save_leaves_the_checkpoint_before(folder, temporary, warned, moment):
    """Nothing is renamed: the killed save lies under its final name, and does not count."""
    call = [sys.executable, "-c", KILLED, str(folder), moment]
    done = subprocess.run(call, env=environment(1), capture_output=True, text=True, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    left = sorted(p.name for p in folder.iterdir())
    assert left in (["1"], ["1", "2"]) and (left == ["1", "2"] or moment == "after save returned")
    if left == ["1", "2"]:
        assert not (folder / "2" / "commit_success.txt").exists()
    if moment == "before the last object":
        assert (folder / "2" / MANIFEST).exists()
    assert len(temporary()) == (str(folder)[:2] == "s3")
    runner = Checkpointer(folder, keep=2)
    assert all(f"_{os.getpid()}_" in name for name in temporary())
    assert runner.latest_step() == 1
    state, data, _ = runner.restore(abstract(make_state()))
    assert_same(state, make_state(1))
    assert data == {"next_index": 1}
    runner.save(2, make_state(22), data={}, meta={})
    runner.close()
    assert temporary() == []
    reader = Checkpointer(folder)
    assert reader.all_steps() == [1, 2]
    assert_same(reader.restore(abstract(make_state()))[0], make_state(22))


@pytest.mark.parametrize("folder", ["s3"], indirect=True)
def test_an_upload_that_fails_is_no_checkpoint(folder, temporary, warned, monkeypatch):
    def upload(file, url):
        if file.name == MANIFEST:
            raise OSError("no network")
        really(file, url)

    really, runner = buckets.upload, Checkpointer(folder)
    monkeypatch.setattr(buckets, "upload", upload)
    runner.save(1, make_state(1), data={}, meta={})
    runner.wait()
    (line,) = warned
    assert "step 1 failed: OSError: no network; there is no good checkpoint yet" in line
    assert files.tree(folder) == [] and runner.latest_step() is None
    monkeypatch.setattr(buckets, "upload", really)
    runner.save(1, make_state(1), data={}, meta={})
    runner.close()
    reader = Checkpointer(folder)
    weights, _ = reader.restore_params(None)
    assert_same(weights, make_state(1).ema)
    (folder / "1" / "ema" / "_METADATA").unlink()
    with pytest.raises(CheckpointDamaged, match="FileNotFoundError"):
        reader.read_meta() and reader.restore_params(None)
    (folder / "1" / "commit_success.txt").unlink()
    assert reader.latest_step() is None
    reader.close()
    assert temporary() == [] and len(warned) == 1


def test_several_processes_cannot_share_s3(temporary, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="got s3://bucket/checkpoints with 2 processes, wanted one: .*in gs://"):
        Checkpointer("s3://bucket/checkpoints")
    assert temporary() == []


# Prepared data


def test_prepared_data_is_copied_once_and_checked(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = config_of(write_documents(tmp_path / "documents"), val_fraction=0.2, tokenizer="bpe:260")
    prepare.prepare(config, prepare.Output(tmp_path / "out", 10 * 16 * 2 / 2**20))
    spec = config_of(f"prepared:{folder}", tokenizer="bpe:260")
    with pytest.raises(ValueError, match="data: got no ..://bucket/.*manifest.json .*wanted prepared data: run python"):
        load(spec)
    files.copy_folder(tmp_path / "out", folder)
    shard = folder / "train-00001.array_record"
    content = shard.read_bytes()
    files.write(shard, content[:-1] + b"x")
    with pytest.raises(ValueError, match="got another checksum for ..://bucket/.*train-00001.array_record"):
        load(spec)
    files.write(shard, content)
    got, wanted = load(spec), load(config_of(f"prepared:{tmp_path}/out", tokenizer="bpe:260"))
    assert got.content_hash == wanted.content_hash and got.tokenizer.fingerprint == wanted.tokenizer.fingerprint
    for one, other in ((got.train, wanted.train), (got.val, wanted.val)):
        np.testing.assert_array_equal(stream_of(one), stream_of(other))
    assert "copying" in capsys.readouterr().out
    load(spec)
    assert "copying" not in capsys.readouterr().out


# Whole runs


@pytest.mark.long
def test_a_run_in_a_bucket_is_the_run_on_a_disk(folder, tmp_path):
    """Killed in the middle and continued; sampled, loaded and begun at from there."""

    def call(workdir, *flags):
        found = command(tmp_path / "run", *flags)
        found[4] = f"--workdir={workdir}"
        return subprocess.Popen(
            found, cwd=ROOT, env=environment(1), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def finish(process):
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        return out

    finish(call(tmp_path / "run"))
    killed, deadline = call(folder / "run"), time.monotonic() + 200
    while not any(step.name >= "8" for step in (folder / "run" / "checkpoints").glob("[0-9]*")):
        assert killed.poll() is None and time.monotonic() < deadline
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (folder / "run" / "summary.json").exists()
    out = finish(call(folder / "run"))
    assert f"workdir  {folder}/run, continuing at step" in out
    there = {name.split("/")[0] for name in files.tree(folder / "run")}
    assert {"checkpoints", "loss.png", "metrics.jsonl", "omega.png", "samples", "summary.json", "tokenizer"} == there
    rows = [
        [(row["step"], row["train/loss"]) for row in read_metrics(path / "metrics.jsonl") if "train/loss" in row]
        for path in (folder / "run", tmp_path / "run")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 20
    assert "holds a finished run" in finish(call(folder / "run"))
    assert "sample_1.txt" in finish(call(folder / "run", "--mode=sample"))
    out = finish(call(tmp_path / "next", f"--config.train.init_from={folder}/run", "--config.train.steps=4"))
    assert f"starting from step 40 of {folder}/run/checkpoints" in out
    code = "import sys, smdlm; print(len(smdlm.load(sys.argv[1]).sample(count=2, steps=2)))"
    loaded = subprocess.run([sys.executable, "-c", code, f"{folder}/run"], env=environment(1), capture_output=True)
    assert loaded.stdout == b"2\n", loaded.stderr[-2000:]
    refused = call(folder / "run", "--mode=generate")
    _, err = refused.communicate()
    assert refused.returncode == 2 and "--mode=generate, wanted a copy on this machine" in err


def test_errors_of_a_cloud_s_libraries_are_for_the_user():
    from botocore.exceptions import NoCredentialsError
    from gcsfs.retry import HttpError

    assert is_users(NoCredentialsError()) and is_users(HttpError({"message": "forbidden"}))
    assert not is_users(RuntimeError())


@pytest.mark.parametrize("scheme, login", [("gs", "gcloud auth"), ("s3", "aws configure")])
def test_a_bucket_that_is_not_there_is_one_line(scheme, login):
    """Before anything is read or compiled; it is not made either."""
    missing = files.path_of("--workdir", f"{scheme}://no-such-bucket/run")
    for _ in range(2):
        with pytest.raises(ValueError, match=f"--workdir: got {missing} .*, wanted a folder of a bucket.*{login}") as e:
            check_folder("--workdir", missing)
        assert "\n" not in str(e.value)
        assert Checkpointer(missing).latest_step() is None
