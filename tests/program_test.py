"""Ctrl-C ends a program by one line, from its first import on and wherever it is heard."""

import subprocess
import sys

import pytest
from conftest import environment

MODULE = """
import gc, os, signal, time, weakref

class Thing:
    def __del__(self):
        if self.says:
            interrupt()

def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(3):  # heard here
        pass

def collected():
    gc.callbacks.append(interrupt)
    gc.collect()

def referred():
    thing = Thing()
    thing.says, heard = False, weakref.ref(thing, interrupt)
    del thing

def deleted():
    thing = Thing()
    thing.says = True
    del thing

def compiled():
    import jax
    jax.jit(interrupt)(1)

PLACE()
time.sleep(30)
print("went on")
"""


@pytest.mark.parametrize("place", ["interrupt", "collected", "referred", "deleted", "compiled"])
def test_ctrl_c_is_one_line(place, tmp_path):
    """While a module is imported, in a callback of the garbage collector or of a weak reference, in `__del__`, where
    Python passes over exceptions, and in a program that jax traces."""
    (tmp_path / "part.py").write_text(MODULE.replace("PLACE", place))
    started = "import sys; sys.argv = ['-m']; sys.orig_argv[-1] = 'smdlm.main'; import smdlm, part"
    variables = {**environment(1), "GLIBC_TUNABLES": ""}  # what is there is left alone
    done = subprocess.run(
        [sys.executable, "-c", started], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped by Ctrl-C\n")


def test_other_errors_are_pythons():
    program = "from smdlm import program; program.end_by_one_line(); 1 / 0"
    done = subprocess.run([sys.executable, "-c", program], env=environment(1), capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("Traceback") and "ZeroDivisionError" in done.stderr
