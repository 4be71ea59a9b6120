"""The walls of the sandbox, put up by the process that is about to run a program, around itself.

`namespaces`: new user, network, mount, pid, ipc and uts namespaces; a root of its own, which holds the interpreter and
the system's libraries, read-only, and one small folder in memory that may be written. `process`: nothing of that; the
same view of the files by Landlock where the kernel has it, else what the user may. In both: resource limits, no
capability, no new privileges, and a seccomp filter without which nothing runs. A program keeps threads, files and
arithmetic; it has no network, no second process and no signal to send.

Whatever the kernel does not allow is an OSError that names it; only Landlock may be missing, and is then not reported.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
NOBODY = 65534
BOX = "/box"  # the folder of the program, inside its own root
PROCESSES, OPEN_FILES, FILE_BYTES, FOLDER_BYTES = 32, 64, 16 << 20, 64 << 20

# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>
NAMESPACES = {"user": 0x10000000, "net": 0x40000000, "mount": 0x20000, "pid": 0x20000000, "ipc": 0x8000000}
NAMESPACES |= {"uts": 0x4000000}
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH, CLONE_THREAD = 2, 0x10000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38

# What a program that computes never needs, by number on x86-64 and on arm64 (None: does not exist there). The kernel's
# own attack surface (mounts, modules, tracing, keys), other processes (fork, exec, signals, their memory), the network,
# and memory that no limit counts (shared segments, memory files).
REFUSED = {
    "socket": (41, 198), "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "setsid": (112, 157), "setpgid": (109, 154), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272), "unshare": (272, 97),
    "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "personality": (135, 92), "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142),
    "sethostname": (170, 161), "setdomainname": (171, 162), "init_module": (175, 105), "delete_module": (176, 106),
    "finit_module": (313, 273), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "syslog": (103, 116),
    "acct": (163, 89), "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "quotactl": (179, 60), "memfd_create": (319, 279), "shmget": (29, 194),
    "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "iopl": (172, None),
    "ioperm": (173, None),
}  # fmt: skip
CLONE, SOCKETPAIR = (56, 220), (53, 199)  # allowed for threads, and for local pairs
NEWER = 424  # calls of 2019 and later (clone3, io_uring, pidfd, new mounts): "not known", to which the C library adapts


def put_up(sandbox: str, folder: str, cpu_s: int, memory: int) -> list[str]:
    """What now holds, by name. Returns in the process that is walled in; raises OSError where something failed.

    Args:
      sandbox: 'namespaces' or 'process'.
      folder: an empty one; of 'process' the folder of the program, else the place to mount its root on.
      cpu_s, memory: limits, in seconds and bytes of address space.
    """
    _die_with_parent()
    root, apart = os.geteuid() == 0 and _knows_nobody(), sandbox == "namespaces"
    if apart:
        _unshare(root)
        _in_child()  # the first child is process 1 of its namespace: when it ends, the kernel ends all others
        _new_root(folder)
        _in_child()
    os.chdir(BOX if apart else folder)
    _limit(cpu_s, memory, count_processes=apart)
    _drop_privileges(becomes_nobody=root and apart)
    views = [f"{name} namespace" for name in NAMESPACES] if apart else ["landlock"] * _landlock(folder)
    _filter_calls()
    return [*views, "limits", "no capabilities", "no_new_privs", "seccomp"]


def _die_with_parent() -> None:
    _call("prctl(PR_SET_PDEATHSIG)", LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def _knows_nobody() -> bool:
    """Whether there is a user to become: the root of a container may be the only one in it."""
    with open("/proc/self/uid_map") as file:
        ranges = [[int(number) for number in line.split()] for line in file]
    return any(first <= NOBODY < first + count for first, _, count in ranges)


def _call(what: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _unshare(root: bool) -> None:
    """New namespaces; the user is 0 in his own. Of root also nobody is known there, whom the program becomes."""
    uid, gid = os.getuid(), os.getgid()
    writer, ready = _id_writer(os.getpid()) if root else (None, None)
    for name, flag in NAMESPACES.items():
        _call(f"unshare({name} namespace)", LIBC.unshare(flag))
    if writer is None:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            _write(f"/proc/self/{name}", text)
        return
    os.write(ready, b"go")
    os.close(ready)
    if os.waitpid(writer, 0)[1]:
        raise PermissionError("writing uid_map of the user namespace: not permitted")


def _id_writer(pid: int) -> tuple[int, int]:
    """(child that stays outside and names the users of process `pid`, descriptor on which it waits for a word).

    Only somebody outside may name more than one user.
    """
    wait, ready = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ready)
        failed = os.read(wait, 2) != b"go"
        try:
            for name in ("uid_map", "gid_map"):
                _write(f"/proc/{pid}/{name}", f"0 0 1\n{NOBODY} {NOBODY} 1\n")
        except OSError:
            failed = True
        os._exit(failed)
    os.close(wait)
    return child, ready


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _in_child() -> None:
    """Goes on in a child; the parent waits for it and ends as it did."""
    child = os.fork()
    if child == 0:
        return _die_with_parent()
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


# -------------------------------------------------------------------------------------------------------------- files


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    _call(f"mount({target})", LIBC.mount(*texts, ctypes.c_ulong(flags), options.encode()))


def _new_root(folder: str) -> None:
    """A root in memory with the interpreter and the libraries, read-only, and BOX; the old one is out of reach."""
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in _needed():
        target = folder + path
        if os.path.islink(path) and path.count("/") == 1:  # /lib -> usr/lib
            os.symlink(os.readlink(path), target)
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            _write(target, "")
        _mount(path, target, None, MS_BIND | MS_REC)
        if not path.startswith("/dev/"):
            _mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.mkdir(folder + BOX)
    _mount("tmpfs", folder + BOX, "tmpfs", MS_NOSUID | MS_NODEV, f"size={FOLDER_BYTES},nr_inodes=4096,mode=777")
    _mount(None, folder, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(folder)
    _call("pivot_root", LIBC.pivot_root(b".", b"."))
    _call("umount2(old root)", LIBC.umount2(b".", MNT_DETACH))
    os.chdir("/")


def _needed() -> list[str]:
    """Paths that Python reads, none inside another; no /proc, no /etc but the linker's cache, no home."""
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    system = {"/usr", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/dev/null", "/dev/urandom"}
    paths = sorted(path for path in prefixes | system if os.path.exists(path))
    return [path for path in paths if not any(path.startswith(other + "/") for other in paths)]


def _landlock(folder: str) -> bool:
    """Lets this process read what `_needed` names and change `folder`, nothing else; whether the kernel can do that."""
    create, add, restrict = 444, 445, 446  # system calls, the same numbers everywhere
    version = LIBC.syscall(create, None, 0, 1)
    if version < 1:
        return False
    read, read_file = 0b1101, 0b101  # execute, read file, list folder
    everything = (1 << 13) - 1 | (1 << 14 if version >= 3 else 0)  # 14: truncate
    rules = _call("landlock", LIBC.syscall(create, struct.pack("Q", everything), 8, 0))
    for path in [*_needed(), folder]:
        place = os.open(path, os.O_PATH)
        allowed = everything if path == folder else read if os.path.isdir(path) else read_file
        allowed |= 2 if path == "/dev/null" else 0  # write
        _call(f"landlock({path})", LIBC.syscall(add, rules, 1, struct.pack("=Qi", allowed, place), 0))
        os.close(place)
    _call("landlock", LIBC.syscall(restrict, rules, 0))
    os.close(rules)
    return True


# ------------------------------------------------------------------------------------------------------------- limits


def _limit(cpu_s: int, memory: int, count_processes: bool) -> None:
    """Where the user has no namespace of his own his processes are not counted: they would be all he has anywhere."""
    limits = {"CPU": cpu_s, "AS": memory, "FSIZE": FILE_BYTES, "NOFILE": OPEN_FILES, "CORE": 0, "MEMLOCK": 0}
    for name, most in (limits | ({"NPROC": PROCESSES} if count_processes else {})).items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def _drop_privileges(becomes_nobody: bool) -> None:
    """No capability, none to be had again, no group, and nobody's eyes on this process's memory."""
    if os.geteuid() == 0:
        for capability in range(64):
            LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # those that the kernel does not know fail
    if becomes_nobody:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _call("capset", LIBC.capset(header, nothing))
    _call("prctl(PR_SET_DUMPABLE)", LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
    _die_with_parent()  # forgotten when the user changed
    _call("prctl(PR_SET_NO_NEW_PRIVS)", LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def _filter_calls() -> None:
    """The seccomp filter: REFUSED and new processes are 'not permitted', NEWER is 'not known', the rest is allowed."""
    machines = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
    if platform.machine() not in machines:
        raise OSError(f"seccomp filter: not written for {platform.machine()}")
    architecture, column = machines[platform.machine()]
    load, equal, at_least, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF: one instruction is (code, yes, no, k)
    kill, allow, not_permitted, not_known = 0x80000000, 0x7FFF0000, 0x50001, 0x50026
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, NEWER), (give, 0, 0, not_known)]  # 32-bit calls on x86-64 have higher numbers, too
    for numbers in REFUSED.values():
        if numbers[column] is not None:
            program += [(equal, 0, 1, numbers[column]), (give, 0, 0, not_permitted)]
    program += [(equal, 0, 4, SOCKETPAIR[column]), (load, 0, 0, 16), (equal, 1, 0, 1)]  # 16: the first argument
    program += [(give, 0, 0, not_permitted), (give, 0, 0, allow)]
    program += [(equal, 0, 3, CLONE[column]), (load, 0, 0, 16), (bits, 1, 0, CLONE_THREAD)]
    program += [(give, 0, 0, not_permitted), (give, 0, 0, allow)]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filled = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    _call("seccomp filter", LIBC.prctl(PR_SET_SECCOMP, 2, filled, 0, 0))
