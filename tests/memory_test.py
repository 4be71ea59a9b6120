"""How programs use the memory of their host: huge pages for large blocks, and nothing kept of what compiling took."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smdlm import memory

ROOT = Path(__file__).parents[1]
SHOW = "import os, sys; print(os.environ.get('GLIBC_TUNABLES'), sys.flags.utf8_mode, *sys.argv[1:])"
TRIM = """
import ctypes
from types import SimpleNamespace
import jax
from smdlm import memory

memory.SLOW, ctypes.CDLL = float("{slow}"), lambda _: SimpleNamespace(malloc_trim=lambda pad: print("trimmed", pad))
memory.return_after_compiling()
memory.return_after_compiling()
double = jax.jit(lambda x: 2 * x)
one = jax.numpy.ones(3)
print("compiles")
for _ in range(2):
    print("result", double(one).tolist())
"""

glibc = pytest.mark.skipif(not memory._glibc(), reason="needs glibc")


def run(tmp_path, *words, **environment):
    """What a Python program prints in a folder with `smdlm.show` and `other.show`, which imports smdlm."""
    for package in ("smdlm", "other"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "show.py").write_text(SHOW)
    for file in ("__init__.py", "memory.py", "program.py"):
        shutil.copy(ROOT / "smdlm" / file, tmp_path / "smdlm")
    (tmp_path / "other" / "__init__.py").write_text("import smdlm")
    inherited = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment = {**inherited, "PYTHONPATH": str(tmp_path), **environment}
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stderr == "", done
    return done.stdout


@glibc
@pytest.mark.parametrize("module", [["-m", "smdlm.show"], ["-msmdlm.show"], ["-Bmsmdlm.show"]])
def test_a_program_runs_with_huge_pages_and_all_that_it_was_given(tmp_path, module):
    stdout = run(tmp_path, "-X", "utf8", *module, "--mode=train", "two words", "-m")
    assert stdout == "glibc.malloc.hugetlb=1 1 --mode=train two words -m\n"


def test_settings_that_are_there_stay(tmp_path):
    assert run(tmp_path, "-m", "smdlm.show", GLIBC_TUNABLES="glibc.malloc.check=0") == "glibc.malloc.check=0 0\n"


@pytest.mark.parametrize("program", [["-c", f"import smdlm; {SHOW}"], ["-m", "other.show"]])
def test_another_program_that_imports_the_package_is_left_alone(tmp_path, program):
    assert run(tmp_path, *program, "-m", "smdlm.main") == "None 0 -m smdlm.main\n"


@glibc
@pytest.mark.parametrize("slow", ["-inf", "inf"])
def test_memory_is_given_back_once_after_each_long_compilation(slow):
    program = [sys.executable, "-c", TRIM.format(slow=slow)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done
    given_back = [] if slow == "inf" else ["trimmed 0"]
    assert done.stdout.split("compiles\n")[1].splitlines() == [*given_back, *["result [2.0, 2.0, 2.0]"] * 2]
