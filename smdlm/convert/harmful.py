"""Names that a pickle of weights has no business with. Nothing a pickle names is ever run here (see unpickle.py): the
refusal tells the user what the file would do to a reader that does run it, and what was handed to it."""

from __future__ import annotations

# Module without the underscores around it -> its harmful names, or "*" for all of it. Modules with harmless types that
# options and settings hold (io.BytesIO, types.SimpleNamespace, signal.Signals, ...) are listed by name.
HARMFUL = {
    "builtins": "eval exec execfile compile open file input raw_input __import__ __build_class__ breakpoint apply "
    "globals locals vars setattr delattr exit quit",
    "types": "CodeType FunctionType LambdaType",
    "io": "open open_code FileIO",
    "sys": "*",
    "os": "*",
    "socket": "socket create_connection create_server socketpair fromfd SocketType",
    "signal": "signal alarm setitimer pthread_kill raise_signal siginterrupt set_wakeup_fd",
    "shutil": "rmtree move copy copy2 copyfile copytree copymode chown make_archive unpack_archive "
    "register_unpack_format",
    "pickle": "load loads Unpickler",
    "copyreg": "add_extension remove_extension pickle constructor",
    "threading": "Thread Timer settrace setprofile",
    "thread": "start_new_thread start_new interrupt_main",
    "multiprocessing": "Process Pool process pool util popen_fork popen_spawn_posix connection forkserver spawn",
    "multiprocessing.context": "Process SpawnProcess ForkProcess ForkServerProcess",
    "asyncio": "run subprocess create_subprocess_exec create_subprocess_shell unix_events base_events",
    "urllib": "request urlopen urlretrieve",
    "http": "client server",
    "requests": "get post put patch delete head request api",
    "tempfile": "mkstemp mkdtemp mktemp TemporaryFile NamedTemporaryFile TemporaryDirectory",
    "uuid": "_popen _get_command_stdout",
    "logging.config": "*",
    "inspect": "getattr_static currentframe stack",
    "distutils": "file_util spawn",
    "torch": "load hub",
    "torch.serialization": "load _load _legacy_load",
    "torch.jit": "load",
    "torch.utils": "cpp_extension collect_env bottleneck",
    "torch.ops": "load_library",
    "numpy": "f2py",
    "pandas": "read_pickle eval",
    "joblib": "load numpy_pickle",
} | dict.fromkeys(
    "subprocess posixsubprocess pty importlib runpy ctypes code codeop marshal webbrowser popen2 commands pdb bdb "
    "cProfile profile trace timeit zipimport pkgutil pip ensurepip venv site atexit gc ftplib smtplib telnetlib xmlrpc "
    "socketserver httplib urllib2 aiohttp doctest idlelib lib2to3 dill cloudpickle shelve".split(),
    "*",
)
HARMFUL |= {"posix": "*", "nt": "*", "builtin": HARMFUL["builtins"]}
# What is harmless in modules that are listed as a whole.
HARMLESS = frozenset(
    f"{module}.{name}"
    for module in ("os", "posix", "nt")
    for name in "PathLike stat_result terminal_size statvfs_result times_result uname_result path getcwd getpid getenv "
    "cpu_count fspath fsencode fsdecode".split()
) | {"sys.getsizeof", "sys.intern"}
# Attributes by which a walk leaves an innocent class for everything that is loaded.
WALKS = frozenset(
    "__globals__ __builtins__ __subclasses__ __bases__ __base__ __mro__ __class__ __code__ __closure__ __dict__ "
    "__getattribute__ __loader__ __spec__".split()
)


def is_harmful(module: str, name: str) -> bool:
    """Whether module.name can only do harm. The name may be dotted: ('logging', 'os.system') is os.system."""
    first, walk = module.split("."), name.split(".")
    if not WALKS.isdisjoint(walk):
        return True
    return any(_listed(path) for path in ([*first, *walk], *(walk[i:] for i in range(len(walk) - 1))))


def _listed(path: list[str]) -> bool:
    path = [path[0].strip("_"), *path[1:]]
    for end in range(1, len(path)):
        names = HARMFUL.get(".".join(path[:end]))
        if names == "*":
            return ".".join(path[: end + 1]) not in HARMLESS
        if names is not None and not {path[end], ".".join(path[end:])}.isdisjoint(names.split()):
            return True
    return False
