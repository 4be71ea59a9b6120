"""The folder of compiled programs: found again by the next process, and never the end of a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import logging, sys
from pathlib import Path
import jax
from smdlm import startup

startup.keep_compiled(Path(sys.argv[1]))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
logger = logging.getLogger("jax._src.compiler")
logger.setLevel(logging.DEBUG)
logger.propagate = False
logger.addHandler(logging.StreamHandler(sys.stdout))
print("result", jax.jit(lambda x: x @ x + 1)(jax.numpy.eye(3)).sum())
"""


def run(folder, **environment):
    """(stdout, stderr) of a process that compiles one small program."""
    inherited = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder],
        **{"cwd": ROOT, "env": {**inherited, **environment}, "capture_output": True, "text": True, "timeout": 120},
    )
    assert done.returncode == 0 and "result 12.0" in done.stdout, done
    return done.stdout.lower(), done.stderr


def test_a_second_process_compiles_nothing_and_says_nothing(tmp_path):
    folder = tmp_path / "deep" / "compiled"
    first, errors = run(folder)
    assert "cache miss for 'jit__lambda'" in first and "cache hit for 'jit__lambda'" not in first and errors == ""
    second, errors = run(folder)
    assert "cache hit for 'jit__lambda'" in second and "cache miss" not in second and errors == ""
    # $SMDLM_CACHE comes before the folder.
    elsewhere, _ = run(folder, SMDLM_CACHE=str(tmp_path / "other"))
    assert "cache miss for 'jit__lambda'" in elsewhere and list((tmp_path / "other").iterdir())


def test_half_a_file_costs_a_compilation(tmp_path):
    """What a process that was killed, or is still writing, leaves."""
    run(tmp_path)
    files = [path for path in tmp_path.iterdir() if path.name.startswith("jit__lambda")]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    stdout, _ = run(tmp_path)
    assert files and "cache hit for 'jit__lambda'" not in stdout


@pytest.mark.parametrize("broken", ["file", "below a file"])
def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path, broken):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" if broken == "file" else tmp_path / "file" / "compiled"
    _, stderr = run(folder)
    assert stderr.count("compiled programs are not kept") == 1 and len(stderr.splitlines()) == 1
