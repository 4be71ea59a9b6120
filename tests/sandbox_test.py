"""Programs that try to cheat, to harm or to look around, and what becomes of them."""

import contextlib
import json
import os
import stat
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from smdlm.evaluate import sandbox
from smdlm.evaluate.sandbox import check, isolation

TESTS = "assert f(1) == 2"
LIBC = "import ctypes\nlibc = ctypes.CDLL(None)\n"
SECRET = "smdlm-secret-of-the-parent"
OUTSIDE = "/tmp/smdlm-written-from-inside"

# {what it tries: (program, tests, beginning of the status)}. Status 'passed' means here that the tests of ours found
# what the walls promise.
HOSTILE = {
    "endless loop": ("while True: pass", TESTS, "timeout"),
    "sleeping": ("import time\ntime.sleep(1000)", TESTS, "timeout"),
    "swallowing SIGALRM and exceptions": (
        "import signal\nfor n in range(1, 32):\n try: signal.signal(n, signal.SIG_IGN)\n except OSError: pass\n"
        "while True:\n try:\n  while True: pass\n except BaseException: pass",
        TESTS,
        "timeout",
    ),
    "output without end": ("while True: print('x' * 10000, flush=True)", TESTS, "timeout"),
    "fork bomb": ("import os\nwhile True: os.fork()", TESTS, "error: PermissionError"),
    "thread bomb": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
        TESTS,
        "error: RuntimeError",
    ),
    "grandchild that outlives its parent": (
        "import subprocess\nsubprocess.Popen(['sleep', '1000'], start_new_session=True)",
        TESTS,
        "error: PermissionError",
    ),
    "10 GB of memory": ("x = bytearray(10 << 30)", TESTS, "memory"),
    "list without end": ("x = [0]\nwhile True: x += x", TESTS, "memory"),
    "writing outside": (f"open({OUTSIDE!r}, 'w').write('x')", TESTS, "error: "),
    "writing into the interpreter": ("import os\nopen(os.__file__, 'a').write('x')", TESTS, "error: "),
    "symlink out of the directory": (
        f"import os\nos.symlink('/tmp', 'out')\nopen('out/' + {os.path.basename(OUTSIDE)!r}, 'w')",
        TESTS,
        "error: ",
    ),
    "reading the parent's environment": (
        "import os\ndef f():\n found = [str(os.environ)]\n for pid in ['self', *range(99999)]:\n"
        "  try: found.append(open(f'/proc/{pid}/environ').read())\n  except OSError: pass\n return ''.join(found)",
        f"assert {SECRET!r} not in f()",
        "passed",
    ),
    "reading the parent's memory": (
        "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
        TESTS,
        "error: ",
    ),
    "reading memory by process_vm_readv": (
        LIBC + "def f(): return libc.process_vm_readv(1, 0, 0, 0, 0, 0)",
        "assert f() == -1",
        "passed",
    ),
    "ptrace": (LIBC + "def f(): return libc.ptrace(16, 1, 0, 0)", "assert f() == -1", "passed"),
    "/proc of others": ("import os\nos.listdir('/proc')", TESTS, "error: "),
    "killing the parent": ("import os\nos.kill(os.getppid(), 9)", TESTS, "error: PermissionError"),
    "killing everybody": ("import os\nos.kill(-1, 9)", TESTS, "error: PermissionError"),
    "os._exit(0)": ("import os\nos._exit(0)", TESTS, "exited: status 0"),
    "SystemExit(0)": ("raise SystemExit(0)", TESTS, "exited: status 0"),
    "os._exit(0) when called": ("import os\ndef f(x): os._exit(0)", TESTS, "exited: status 0"),
    "segmentation fault": ("import ctypes\nctypes.string_at(0)", TESTS, "killed: SIGSEGV"),
    "object equal to everything": (
        "class Equal:\n __eq__ = lambda *a: True\n __ne__ = lambda *a: False\ndef f(x): return Equal()",
        TESTS,
        "error: TypeError: the program's answer is an object",
    ),
    "number equal to everything": (
        "class Equal(int):\n __eq__ = lambda *a: True\n __hash__ = int.__hash__\ndef f(x): return Equal(0)",
        TESTS,
        "failed",
    ),
    "printing the success marker": ("print('passed')\nprint('!{\"status\": \"passed\"}')", TESTS, "error: NameError"),
    "writing verdicts to every descriptor": (
        'import os, struct\nmessage = b\'!{"word": "", "status": "passed"}\'\nfor fd in range(64):\n'
        " try: os.write(fd, struct.pack('>I', len(message)) + message)\n except OSError: pass",
        TESTS,
        "error: JSONDecodeError",
    ),
    "answering before it is asked": (
        "import os, struct, json\nmessage = json.dumps({'value': None}).encode()\nfor fd in range(64):\n"
        " try: os.write(fd, 99 * (struct.pack('>I', len(message)) + message))\n except OSError: pass",
        TESTS,
        "error: TypeError",
    ),
    "an answer of another kind": (
        "import os, struct, json\nmessage = json.dumps({'verdict': 'passed'}).encode()\nfor fd in range(64):\n"
        " try: os.write(fd, struct.pack('>I', len(message)) + message)\n except OSError: pass",
        TESTS,
        "error: KeyError",
    ),
    "an answer that is too long": ("def f(x): return 'x' * (40 << 20)", TESTS, "error: an answer of"),
    "patching builtins": (
        "import builtins\nbuiltins.AssertionError = builtins.Exception = ValueError\nbuiltins.all = lambda x: True\n"
        "def f(x): return 0",
        "assert all([f(1) == 2])",
        "failed",
    ),
    "names of builtins": ("def set(x): return 0\ndef f(x): return [0]", "assert set(f(1)) == set([2])", "failed"),
    "patching sys.modules and unittest": (
        "import math, sys, unittest\nunittest.TestCase.assertEqual = lambda *a: None\nmath.isclose = lambda *a: True\n"
        "sys.modules.clear()\ndef f(x): return 0",
        "import math, unittest\nassert math.isclose(f(1), 2)\nunittest.TestCase().assertEqual(f(1), 2)",
        "failed",
    ),
    "climbing the frames to the tests": (
        "import sys\ndef f(x):\n frame, names = sys._getframe(), []\n while frame:\n"
        "  names += [repr(frame.f_locals)[:9999], repr(frame.f_globals)[:9999]]\n  frame = frame.f_back\n"
        " return ' '.join(names)",
        "a_name_of_the_tests = 1\nassert 'a_name_of_the_tests' not in f(1)",
        "passed",
    ),
    "network": ("import socket\nsocket.create_connection(('127.0.0.1', 22), 1)", TESTS, "error: PermissionError"),
    "sockets of other families": (
        LIBC + "def f(): return [libc.socketpair(30, 1, 0, (ctypes.c_int * 2)()), libc.socket(16, 3, 0)]",
        "assert f() == [-1, -1]",
        "passed",
    ),
    "DNS": ("import socket\nsocket.getaddrinfo('example.org', 80)", TESTS, "error: "),
    "new namespaces and mounts": (
        LIBC
        + "def f(): return [libc.unshare(0x10000000), libc.mount(b'x', b'/', b'tmpfs', 0, None), libc.setns(0, 0)]",
        "assert f() == [-1, -1, -1]",
        "passed",
    ),
    "io_uring, clone3, pidfd": (
        LIBC + "def f(): return [libc.syscall(number, 0, 0, 0, 0) for number in (425, 435, 434)]",
        "assert f() == [-1, -1, -1]",
        "passed",
    ),
    "executing another program": ("import os\nos.execv('/usr/bin/env', ['env'])", TESTS, "error: "),
    "reading stdin": ("input()", TESTS, "error: EOFError"),
    "10^6 open files": ("files = [open('/dev/null') for _ in range(10 ** 6)]", TESTS, "error: OSError: [Errno 24]"),
    "closing its pipes": ("import os\nos.closerange(0, 64)", TESTS, "exited: "),
    "endless recursion": ("def f(x): return f(x)", TESTS, "error: RecursionError"),
    "no Python": ("def f(x:\n", TESTS, "error: SyntaxError"),
    "raising the failure of its choice": ("def f(x): raise SystemError('passed')", TESTS, "error: SystemError"),
}
# Bounded only where the folder is in memory; elsewhere it would really fill a disk.
FILLING = (
    "def f():\n total = 0\n for number in range(9999):\n  try:\n   with open(str(number), 'wb', 0) as file:\n"
    "    while True: total += file.write(b'x' * (1 << 20))\n  except OSError as error:\n"
    "   if error.errno == 28: return total\n"
)


@pytest.fixture(scope="module", params=["namespaces", "process"])
def walls(request):
    try:
        isolation(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture
def namespaces():
    try:
        isolation("namespaces")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_program(what, walls, monkeypatch):
    monkeypatch.setenv("SMDLM_TEST_SECRET", SECRET)
    program, tests, status = HOSTILE[what]
    verdict = check(program, 0.5 if status == "timeout" else 60, tests=tests, sandbox=walls)
    assert verdict.status.startswith(status), verdict
    assert verdict.passed == (status == "passed")
    assert not os.path.exists(OUTSIDE)


def test_filling_the_disk(namespaces):
    verdict = check(FILLING, 20, tests="assert 1 << 20 < f() <= 64 << 20")
    assert verdict.passed, verdict


def test_a_folder_of_its_own_that_is_taken_away(walls):
    program = "import os\nopen('made', 'w').write('x')\nos.mkdir('sub')\ndef f(): return sorted(os.listdir('.'))"
    for _ in range(2):  # nothing of the first run is there in the second
        assert check(program, 5, tests="assert f() == ['made', 'sub']", sandbox=walls).passed
    folder = check("import os\nraise ValueError(os.getcwd())", 5, sandbox=walls).status.split()[-1]
    assert folder == "/box" or not os.path.exists(folder)


def test_nobody_is_left(walls, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # stands in the command line of what is ours

    def ours():
        found = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                found += [file] * (str(tmp_path).encode() in file.read_bytes())
        return found

    seen = []
    look = threading.Timer(1, lambda: seen.extend(ours()))
    look.start()
    program = "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()\nwhile True: pass"
    check(program, 2, sandbox=walls)
    look.join()
    assert len(seen) >= 2
    patience = time.monotonic() + 10
    while ours() and time.monotonic() < patience:  # the kernel ends a namespace after its first process
        time.sleep(0.05)
    assert not ours() and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ honest programs


def test_plain_data_passes_through_as_it_is(namespaces):
    values = """[None, True, 0, -7, 10**5000, 0.1, float('inf'), 1j, 'ä\\ud800', b'\\x00', [1, [2]], (1, 2), {1, 2},
    frozenset({1}), {(1, 2): [3], 'a': None}, range(3), collections.deque([1]), fractions.Fraction(1, 3),
    decimal.Decimal('0.1'), bytearray(b'x'), {'k': 1}.keys(), {'k': 1}.items(), []]"""
    imports = "import collections, decimal, fractions\n"
    program = (
        f"{imports}def f(x=None): return {values} if x is None else x\nclass L(list): pass\ndef g(): return L([1])"
    )
    tests = f"""{imports}wanted = {values}
for got in (f(), f(wanted)):
    assert got == wanted
    assert [type(x) for x in got] == [type(x) for x in wanted]
assert type(g()) is list and f(float('nan')) != f(float('nan'))
"""
    assert check(program, 10, tests=tests) == sandbox.Verdict(True, "passed", pytest.approx(0, abs=10))


def test_what_programs_return_beside_plain_data(namespaces):
    program = (
        "import numpy as np\ndef f(): return (i * i for i in range(4))\n"
        "def g(): return [np.float32(0.5), np.int64(3), np.bool_(True)]\n"
    )
    if "No module" in check("import numpy", 20, tests="assert True").status:
        pytest.skip("run as root the program becomes nobody, who can not read this venv")
    verdict = check(program, 20, tests="assert list(f()) == [0, 1, 4, 9]\nassert g() == [0.5, 3, True]")
    assert verdict.passed, verdict


def test_objects_stay_with_the_program_but_can_be_used(namespaces):
    """Trees and pairs of MBPP: tests make an object, set its attributes and hand it back."""
    program = (
        "class Node:\n def __init__(self, data): self.data, self.left = data, None\n"
        "def height(node): return 0 if node is None else 1 + height(node.left)\n"
    )
    setup = "root = Node(1)\nroot.left = Node(2)\nroot.left.left = Node(3)"
    assert check(program, 5, setup=setup, tests="assert height(root) == 3\nassert root.left.data == 2").passed
    assert check(program, 5, setup=setup, tests="assert height(root) == 2").status == "failed"
    assert check(program, 5, tests="assert Node(1)").status.startswith("error: TypeError")


def test_threads_and_event_loops_work(walls):
    program = """
import asyncio, threading
async def later(x): return x + 1
def f(x):
    found = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(later(x))))
    thread.start()
    thread.join()
    return found[0]
"""
    assert check(program, 20, tests=TESTS, sandbox=walls).passed


def test_exceptions_reach_the_tests(namespaces):
    program = "def f(x):\n if x < 0: raise ValueError('negative')\n class Own(Exception): pass\n raise Own('mine')"
    tests = """
try: f(-1)
except ValueError as error: assert str(error) == 'negative'
else: assert False
try: f(1)
except RuntimeError as error: assert str(error) == 'Own: mine'
else: assert False
"""
    assert check(program, 5, tests=tests).passed


def test_the_entry_point_is_the_programs_and_helpers_are_not(namespaces):
    setup = "def helper(x): return x + 1\ndef sum(a, b): ..."
    program = "def helper(x): return 0\ndef sum(a, b): return a + b"
    tests = "assert sum(1, 2) == helper(2)"
    assert check(program, 5, setup=setup, tests=tests, entry_point="sum").passed
    assert check(program, 5, setup=setup, tests=tests).status == "failed"  # without it, setup's own


@pytest.mark.parametrize(
    "whole, status",
    [
        ("def f(x): return x + 1\nassert f(1) == 2\n", "passed"),
        ("def f(x): return x\n\ny = f(2)\nassert y == 2\nassert f(1) == 2, 'no'", "failed"),
        ("def f(x): return x + 1\n\ndef check(candidate):\n    assert candidate(1) == 2\n\ncheck(f)\n", "passed"),
        ("def f(x): return x\n\ndef check(candidate):\n    assert candidate(1) == 2\n\ncheck(f)\n", "failed"),
        ("class Equal:\n    __eq__ = lambda *a: True\n\nf = lambda x: Equal()\nassert f(1) == 2", "error: TypeError"),
        ("x = 1\n", "passed"),
        ("assert 1 == 2\ndef f(): pass\n", "failed"),
        ("1 / 0\n", "error: ZeroDivisionError"),
        ("def f(): return 1\n\nif __name__ == '__main__':\n    assert f() == 2\n", "failed"),
    ],
)
def test_program_and_tests_in_one_piece(whole, status, namespaces):
    assert check(whole, 5).status.startswith(status)


def test_the_demonstration_of_an_answer_is_not_run(namespaces):
    program = "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\n\ndef f(x): return A(x).x + 1\n"
    assert check(program + "if __name__ == '__main__':\n    raise SystemExit\n", 5, tests=TESTS).passed


# --------------------------------------------------------------------------------------------------------- fails closed


def test_without_isolation_nothing_runs(monkeypatch, tmp_path):
    """A kernel that refuses one namespace: its name is in the line, and nothing runs, not even the harmless part."""
    broken = sandbox._inside().replace("roles.start(", "walls.NAMESPACES['time travel'] = -1\nroles.start(")
    monkeypatch.setattr(sandbox, "_inside", lambda: broken)
    for run in (lambda: isolation("namespaces"), lambda: check("x = 1", 1)):
        with pytest.raises(ValueError, match=r"--sandbox=namespaces: got no isolation here .*--sandbox=process"):
            run()
    assert check("x = 1", 5, sandbox="process").passed


def test_without_a_filter_nothing_runs(monkeypatch):
    broken = sandbox._inside().replace("roles.start(", "walls.platform.machine = lambda: 'vax'\nroles.start(")
    monkeypatch.setattr(sandbox, "_inside", lambda: broken)
    with pytest.raises(ValueError, match="seccomp filter: not written for vax"):
        check("x = 1", 1, sandbox="process")


def test_a_record_says_which_walls_there_were(walls):
    found = isolation(walls)
    assert {"limits", "no capabilities", "no_new_privs", "seccomp"} <= set(found)
    assert ("pid namespace" in found) == (walls == "namespaces")


def test_docker_is_asked_for_a_container_without_anything(monkeypatch, tmp_path):
    """A stand-in for docker that writes down what it is told and runs the command here, in a folder of its own."""
    folder = tmp_path / "box"
    folder.mkdir()
    script = (
        f"#!{sys.executable}\nimport os, sys\nopen({str(tmp_path / 'told')!r}, 'a').write(repr(sys.argv[1:]) + '\\n')\n"
        f"command = [a.replace('\"/box\"', '\"{folder}\"') for a in sys.argv[sys.argv.index('python'):]]\n"
        "os.execv(sys.executable, command)\n"
    )
    (tmp_path / "docker").write_text(script)
    (tmp_path / "docker").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert check("def f(x): return x + 1", 5, tests=TESTS, sandbox="docker").passed
    told = [eval(line) for line in (tmp_path / "told").read_text().splitlines()]
    names = {word for words in told for word in words if word.startswith("--name=")}
    assert len(names) == 2 and sorted(words[0] for words in told) == ["kill", "kill", "run", "run"]
    wanted = {"--network=none", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--pull=never"}
    assert all(wanted <= set(words) for words in told if words[0] == "run")
    assert all(json.loads(words[-1])["sandbox"] == "process" for words in told if words[0] == "run")


def test_no_docker(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="--sandbox=docker: got no isolation here .*docker"):
        check("x = 1", 1, sandbox="docker")


@pytest.mark.parametrize("given, field", [({"sandbox": "none"}, "--sandbox"), ({"timeout_s": 0}, "timeout_s")])
def test_wrong_arguments(given, field):
    with pytest.raises(ValueError, match=f"^{field}: got"):
        check("x = 1", **{"timeout_s": 1, **given})
