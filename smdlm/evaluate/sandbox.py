"""Runs a program of a model against tests, where it can neither do harm nor say itself that it has passed.

`check` starts two processes that share nothing but the pipes to this one: the program's, and that of the tests
(`box/roles.py`), both inside walls (`box/walls.py`). A program is judged by the plain data that its functions return.

Without the walls that were asked for nothing runs: `namespaces` needs a kernel that lets users make them, `docker` a
daemon and the image of this Python, and `process`, which has no view of the machine of its own, must be asked for by
name.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import math
import os
import secrets
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

SANDBOXES = ("namespaces", "docker", "process")
MEMORY = 1 << 30  # bytes of address space
MESSAGE = 32 << 20  # bytes of one answer
START_S = 60  # a process that is not up by then never will be
IMAGE = f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a program.

    Attributes:
      passed: all tests ran to their end and held.
      status: 'passed', 'failed' (an assertion), 'error: ..' (an exception), 'timeout', 'memory', 'exited: ..' or
        'killed: ..' (its process, before the tests were through).
      seconds: from the moment when both processes were up.
    """

    passed: bool
    status: str
    seconds: float


def check(
    program: str,
    timeout_s: float,
    *,
    tests: str | None = None,
    setup: str = "",
    entry_point: str = "",
    sandbox: str = "namespaces",
) -> Verdict:
    """Runs a program and its tests.

    Args:
      timeout_s: seconds for both together.
      tests: code that raises unless the program is right. It sees its own names, builtins, and what the program
        defines; functions take and return copies of plain data. None: the end of the program is its tests
        (`roles.split`), for programs that nobody but the author of the tests has written the end of.
      setup: trusted code that the tests need, run before them: imports, helpers.
      entry_point: the function under test, which is the program's even where setup or builtins have the name, too.

    Raises:
      ValueError: one line; these walls cannot be had here, and why.
    """
    _known(sandbox)
    if not timeout_s > 0:
        raise ValueError(f"timeout_s: got {timeout_s}, wanted seconds, more than 0")
    job = {"program": program, "tests": tests, "setup": setup, "entry_point": entry_point}
    with _Peer("candidate", sandbox, timeout_s) as candidate, _Peer("checker", sandbox, timeout_s) as checker:
        candidate.come_up()
        checker.come_up()
        start = time.monotonic()
        status = _pass_on(candidate, checker, job, start + timeout_s)
        seconds = time.monotonic() - start
    return Verdict(status == "passed", status, seconds)


def isolation(sandbox: str) -> list[str]:
    """Names of the walls that programs have here, for a record. ValueError, one line, where they cannot be had."""
    _known(sandbox)
    with _Peer("candidate", sandbox, START_S) as peer:
        return peer.come_up()


def _known(sandbox: str) -> None:
    if sandbox not in SANDBOXES:
        raise ValueError(f"--sandbox: got {sandbox!r}, wanted one of {', '.join(SANDBOXES)}")


def _pass_on(candidate: _Peer, checker: _Peer, job: dict[str, Any], deadline: float) -> str:
    """Carries questions and answers between the two, unread, until the checker has a verdict; its status."""
    word = secrets.token_hex(16)
    try:
        checker.write(json.dumps({**job, "word": word}).encode(), deadline)
        while message := checker.read(deadline):
            if message[:1] == b"!":
                verdict = json.loads(message[1:])
                return verdict["status"] if verdict["word"] == word else "error: a verdict that is not the checker's"
            candidate.write(message[1:], deadline)
            answer = candidate.read(deadline)
            if not answer:
                return candidate.ended()
            checker.write(answer, deadline)
        return f"error: the tests' own process: {checker.ended()}"
    except TimeoutError:
        return "timeout"
    except OverflowError as error:
        return f"error: {error}"
    except BrokenPipeError:
        return candidate.ended()


class _Peer:
    """One of the two processes behind its walls, in a process group of its own, ended with the `with`."""

    def __init__(self, role: str, sandbox: str, timeout_s: float):
        self.role, self.sandbox, self.timeout_s = role, sandbox, timeout_s

    def __enter__(self) -> _Peer:
        self.folder = tempfile.TemporaryDirectory(prefix="smdlm-box-", ignore_cleanup_errors=True)
        self.container = f"smdlm-{secrets.token_hex(8)}"
        docker = self.sandbox == "docker"
        given = {
            "role": self.role,
            "sandbox": "process" if docker else self.sandbox,
            "folder": "/box" if docker else self.folder.name,
            "cpu_s": math.ceil(self.timeout_s) + 2,  # more than the deadline, which is the one that is meant
            "memory": MEMORY,
        }
        home = self.folder.name if self.sandbox == "process" else "/box"
        environment = ENVIRONMENT | {"HOME": home, "TMPDIR": home}
        start = self._docker(environment) if docker else [sys.executable]
        try:
            self.process = subprocess.Popen(
                [*start, "-I", "-c", _inside(), json.dumps(given)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,  # said before the walls are up; a program has none
                bufsize=0,
                env=None if docker else environment,  # docker's command needs ours, the container has its own
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            self.folder.cleanup()
            raise self._refused(str(error)) from error
        for pipe in (self.process.stdin, self.process.stdout):
            os.set_blocking(pipe.fileno(), False)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.sandbox == "docker":
            subprocess.run(["docker", "kill", self.container], capture_output=True)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()
        self.folder.cleanup()

    def _docker(self, environment: Mapping[str, str]) -> list[str]:
        words = f"docker run --rm -i --pull=never --name={self.container} --network=none --read-only --cap-drop=ALL"
        words += f" --security-opt=no-new-privileges --user=65534:65534 --memory={MEMORY} --memory-swap={MEMORY}"
        words += f" --pids-limit=64 --tmpfs=/box:rw,size=64m,mode=1777 {IMAGE} python"
        command = words.split()
        variables = [f"--env={name}={value}" for name, value in environment.items()]
        return [*command[:2], *variables, *command[2:]]

    def come_up(self) -> list[str]:
        """Waits for the walls, by name. ValueError without them."""
        try:
            said = self.read(time.monotonic() + START_S)
        except TimeoutError:
            raise self._refused(f"no sign of life in {START_S} s") from None
        found = json.loads(said) if said else {"refused": f"{self.ended()} {self._last_words()}".strip()}
        if "refused" in found:
            raise self._refused(found["refused"])
        return [*["docker"] * (self.sandbox == "docker"), *found["walls"]]

    def _last_words(self) -> str:
        """What docker or Python wrote before there were walls, on one line."""
        os.set_blocking(self.process.stderr.fileno(), False)
        return " ".join((self.process.stderr.read() or b"").decode(errors="replace").split())[:200]

    def _refused(self, reason: str) -> ValueError:
        others = [name for name in SANDBOXES if name != self.sandbox]
        return ValueError(
            f"--sandbox={self.sandbox}: got no isolation here ({reason}), wanted all of it: another machine, "
            f"{' or '.join(f'--sandbox={name}' for name in others)} (process: the weakest)"
        )

    def ended(self) -> str:
        """How the process ended, once its pipe is closed. It is not waited for: its group must keep its number."""
        patience = time.monotonic() + 5
        while not (found := os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
            if time.monotonic() > patience:
                return "exited: its pipe only"
            time.sleep(0.002)
        code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        number = -code if code < 0 else code - 128
        if number in set(signal.Signals):
            return f"killed: {signal.Signals(number).name}"
        return f"exited: status {code}"

    def write(self, content: bytes, deadline: float) -> None:
        """One message. TimeoutError at the deadline (time.monotonic), BrokenPipeError if nobody reads."""
        rest = memoryview(struct.pack(">I", len(content)) + content)
        while rest:
            self._wait(self.process.stdin.fileno(), select.POLLOUT, deadline)
            rest = rest[os.write(self.process.stdin.fileno(), rest[:65536]) :]

    def read(self, deadline: float) -> bytes:
        """One message, b'' if the process has ended. TimeoutError at the deadline, OverflowError: too long."""
        size = int.from_bytes(self._read(4, deadline), "big")
        if size > MESSAGE:
            raise OverflowError(f"an answer of {size} bytes, wanted at most {MESSAGE}")
        return self._read(size, deadline)

    def _read(self, size: int, deadline: float) -> bytes:
        parts, missing = [], size
        while missing:
            self._wait(self.process.stdout.fileno(), select.POLLIN, deadline)
            part = os.read(self.process.stdout.fileno(), min(missing, 1 << 20))
            if not part:
                return b""
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        if time.monotonic() >= deadline or not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError


def _inside() -> str:
    """The text of the program of the new process."""
    folder = importlib.resources.files("smdlm.evaluate.box")
    modules = {name: (folder / f"{name}.py").read_text("utf-8") for name in ("walls", "roles")}
    return (
        "import json, sys, types\n"
        f"walls, roles = types.ModuleType('walls'), types.ModuleType('roles')\n"
        f"exec({modules['walls']!r}, walls.__dict__)\n"
        f"exec({modules['roles']!r}, roles.__dict__)\n"
        "roles.start(**json.loads(sys.argv[1]), put_up=walls.put_up)\n"
    )
