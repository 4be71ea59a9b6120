"""What the command lines have in common: mistakes are found before anything is computed, and are one line. No jax."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from smdlm import buckets, program
from smdlm.files import is_url, local_path, one_line, plain_output, write

# What absl, ml_collections and a config file raise for a user's mistake.
MISTAKES = (flags.Error, ValueError, KeyError, AttributeError, TypeError, OSError, ImportError)
MODES = {  # of smdlm.main
    "train": "train, evaluate and sample; the same command continues an unfinished run (the default)",
    "eval": "validation likelihood of the workdir's EMA weights",
    "sample": "samples of the workdir's EMA weights",
    "show": "every field of the config, and where its value is from",
    "generate": "answers to a file of prompts (--prompts)",
    "score": "samples measured under a named protocol (--protocol, --scorer)",
    "zeroshot": "likelihood of other texts (--sets)",
    "compare": "two or more workdirs beside each other: --mode=compare A B",
    "study": "binary against soft-masked where the truth is known (docs/lab.md)",
}
HELP = """
Soft-masked diffusion language models.

usage: python -m smdlm.main --config=FILE [--mode=MODE] [--config.SECTION.FIELD=VALUE ...]

modes
{modes}

flags
  --config=FILE                  the experiment, e.g. configs/tiny.py; its docstring says what to expect
  --config.SECTION.FIELD=VALUE   any field of it; --mode=show lists them, a wrong one is told before anything runs
  --workdir=DIR                  where everything goes (also gs:// or s3://BUCKET/DIR), runs/NAME OF CONFIG if not given
  --overwrite                    delete the workdir's run and start anew
  --distributed                  one of several processes, each started with this command
  --helpfull                     all flags, also those of the libraries

fields that matter most
  --config.data.source=SPEC           text:GLOB, jsonl:GLOB, parquet:GLOB, hf:DIR, chat:FILES, prepared:DIR, ..
  --config.data.tokenizer=SPEC        bytes, bpe:SIZE, gpt2, gpt2:DIR, hf:DIR
  --config.train.steps=N              updates
  --config.train.profile=100:105      an xprof trace of these updates; train.wandb=PROJECT for Weights & Biases
  --config.optimizer.lr=X             peak learning rate
  --config.softmask.p_sm=X            chance of a soft-masked step; 0 trains a binary model (MDLM)
  --config.mesh.fsdp=N                devices over which parameters are split
  --config.sampling.policy=NAME       mdlm, remdm_cap, max_prob, entropy, first_hitting, ..
  --config.sampling.steps=N           forward passes of a sample (NFE)
  --config.sampling.prompt=TEXT       text at the start of each sample
  --config.sampling.viewer=FILE       .html or .svg that plays a sample being written

examples
  python -m smdlm.main --config=configs/tiny.py
  python -m smdlm.main --config=configs/tiny.py --mode=sample --config.sampling.viewer=run.html
  python -m smdlm.main --config=configs/tiny.py --config.softmask.p_sm=0.0 --workdir=runs/binary

exit status
  0    done, or stopped by a signal with everything saved: the same command continues
  2    a mistake in the command, its data or its files: one line that says what was got and wanted
  130  ended at once by Ctrl-C, in training by the second one: the first saves and stops, with status 0
  1    a fault of the program, with a traceback
"""


def help_text() -> str:
    """What `python -m smdlm.main --help` prints."""
    return HELP.strip().format(modes="\n".join(f"  {mode:10} {what}" for mode, what in MODES.items()))


def run(
    main: Callable[..., None],
    define_flags: Callable[[], None],
    check_flags: Callable[[], None] = lambda: None,
    help_text: str = "",
) -> None:
    """The program behind a command line; does not return.

    help_text is printed for --help; without it absl lists the flags.

    define_flags defines its absl flags, check_flags looks at them. A mistake in a flag, and what `main` raises of
    ValueError, OSError, ImportError, ArithmeticError and RuntimeError of our own, is one line and exit status 2.
    `main` is given the arguments that are no flags, which only modes without an experiment have.
    """

    def parse(argv: Sequence[str]) -> Sequence[str]:
        if help_text and {"-h", "-help", "--help"} & set(argv[1:]):
            print(help_text)
            sys.exit(0)
        argv = [_at_home(arg) for arg in argv]
        try:
            if not (takes_results := reads_results(argv)):
                check_config_given(argv)
            flags.FLAGS.set_gnu_getopt(True)  # flags may stand behind arguments
            rest = flags.FLAGS(argv)
            if len(rest) > 1 and not takes_results:
                raise ValueError(f"arguments: got {rest[1:]}, wanted only --flags")
            check_flags()
            return rest
        except MISTAKES as error:
            fail(error)
            raise

    def guarded(argv: Sequence[str]) -> None:
        with told():
            main(*argv[1:])

    plain_output()
    program.end_by_one_line()
    define_flags()
    app.run(guarded, flags_parser=parse)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Ends a program by one line, exit status 2, where a user's mistake ends what it does."""
    try:
        yield
    except Exception as error:
        if not is_users(error):
            raise
        fail(error)


def _at_home(argument: str) -> str:
    """--config=~/x.py with the home folder in it: shells leave a '~' behind '=' as it is."""
    flag, _, value = argument.partition("=")
    return f"{flag}={Path(value).expanduser()}" if flag in ("--config", "-config") and value[:2] == "~/" else argument


def is_users(error: BaseException) -> bool:
    """Whether its text is meant for the user: not for a fault of ours, which deserves its traceback."""
    origin = type(error).__module__.split(".")[0]
    return origin in ("smdlm", *buckets.LIBRARIES) or isinstance(error, (ValueError, OSError, ImportError, MemoryError))


def fail(error: BaseException) -> None:
    """One line (a mismatch lists its leaves below it), exit status 2."""
    print(f"error: {message(error)}", file=sys.stderr)
    distributed = sys.modules.get("jax") and sys.modules["jax"].distributed.is_initialized()
    if distributed:  # the usual exit would wait for the other processes, which may be waiting for this one
        program.leave(2)
    sys.exit(2)


# The ends of absl's texts for a value of the wrong type, and what is wanted then.
WRONG_TYPES = {
    r"invalid literal for int\(\) with base 10: .*": "int",
    r"could not convert string to float: .*": "float",
    r"\('Non-boolean argument to boolean flag', .*\)": "true or false",
    r"value should be one of <(.*)>": "one of {}",
    r"-?\d+ is not (an? .*)": "{}",
    r"Failed to parse .* as a ConfigDict: .*": "--config.SECTION.FIELD=VALUE",
}


def message(error: BaseException) -> str:
    """The error's text; of a KeyError, whose text is the repr of it, on one line; absl's in the words of ours."""
    if isinstance(error, KeyError) and error.args:
        return " ".join(str(error.args[0]).split())
    if isinstance(error, flags.IllegalFlagValueError):
        for end, wanted in WRONG_TYPES.items():
            if found := re.fullmatch(rf"flag --([\w.]+)=(.*?): {end}", str(error), re.DOTALL):
                name, value, *choices = found.groups()
                name = name if name.startswith("config.") else f"--{name}"
                return f"{name}: got {value!r}, wanted {wanted.format(*(c.replace('|', ', ') for c in choices))}"
    return str(error)


# ------------------------------------------------------------------------------------------------------------ configs


def define_config() -> None:
    """--config=FILE and --config.section.field=value.

    Any documented field may be given, also one that the file leaves at its default: `config.read` refuses what it does
    not know.
    """
    config_flags.DEFINE_config_file(
        "config", None, "Experiment, e.g. configs/tiny.py.", lock_config=False, accept_new_attributes=True
    )
    flags.FLAGS["config"].parser = _FileParser()


class _FileParser(flags.ArgumentParser):
    """Reads --config=FILE as `load_config` does, with room for the sections that only the command line gives."""

    def parse(self, path: str) -> ConfigDict:
        """The file's config. flags.Error, because absl puts words of its own before the text of a ValueError."""
        try:
            config = load_config(path)
        except (OSError, ValueError) as error:
            raise flags.Error(str(error)) from error
        given = (re.match(r"--?(?:no)?config\.(\w+)\.", argument) for argument in sys.argv)
        for section in [match[1] for match in given if match]:
            if section not in config:
                config[section] = ConfigDict()
        return config


def define_processes() -> None:
    """What startup.join_if needs to know where the cluster does not tell it."""
    flags.DEFINE_bool("distributed", False, "One of several processes, each started with this command.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where the cluster does not tell.")
    flags.DEFINE_integer("num_processes", None, "Where the cluster does not tell.")
    flags.DEFINE_integer("process_id", None, "0 .. num_processes - 1, where the cluster does not tell.")


def read_config() -> Any:
    """--config as `smdlm.config.Config`."""
    from smdlm.config import read

    return read(flags.FLAGS.config, config_flags.get_override_values(flags.FLAGS["config"]))


def config_file() -> str:
    """Of --config."""
    return config_flags.get_config_filename(flags.FLAGS["config"])


def config_name() -> str:
    """'tiny' of --config=configs/tiny.py."""
    return Path(config_file()).stem


def config_values(arguments: Sequence[str]) -> dict[str, Any]:
    """{'section.field': value} of --config.SECTION.FIELD=VALUE, for commands that need no --config=FILE.

    Raises:
      ValueError: one line; an argument that is none.
    """
    for argument in arguments:
        if not re.fullmatch(r"--config\.\w+\.\w+=.*", argument, re.DOTALL):
            raise ValueError(f"arguments: got {argument}, wanted --config.SECTION.FIELD=VALUE, or a flag of --help")
    values, words = flags.FlagValues(), ["", *arguments]
    config = ConfigDict({argument.split(".")[1]: {} for argument in arguments})
    config_flags.DEFINE_config_dict(
        "config", config, flag_values=values, lock_config=False, accept_new_attributes=True, sys_argv=words
    )
    values(words)
    return config_flags.get_override_values(values["config"])


def again(*changes: str) -> str:
    """This command with other flags, to be pasted into a shell: of a flag given before only the change is left."""
    names = {change.partition("=")[0] for change in changes} | {"--overwrite", "--mode"}
    kept, skip = [], False
    for arg in sys.argv[1:]:
        name, given, _ = arg.partition("=")
        name = f"--{name.lstrip('-')}"
        if not skip and name not in names:
            kept.append(arg)
        # The value of a dropped `--flag VALUE` goes with it; --overwrite has none.
        skip = not skip and name in names - {"--overwrite"} and not given
    return shlex.join(["python", "-m", "smdlm.main", *kept, *changes])


def load_config(path: str | os.PathLike) -> ConfigDict:
    """The ConfigDict of a file.

    Raises:
      FileNotFoundError, ValueError: one line; whatever the file does wrong.
    """
    path = local_path("--config", path)
    spec = importlib.util.spec_from_file_location("config", path)
    if spec is None or not path.exists():
        missing = "" if path.exists() else f", which is not there (from {Path.cwd()})"
        raise FileNotFoundError(f"--config: got {path}{missing}, wanted a Python file, e.g. configs/tiny.py")
    _let_import_neighbours(path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # whatever the file does
        raise ValueError(f"--config: got {path} ({one_line(error)}), wanted a Python file with get_config()") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"--config: got {path}, whose get_config() returns {type(config).__name__}, wanted an "
            "ml_collections.ConfigDict"
        )
    return config


def reads_results(argv: Sequence[str]) -> bool:
    """Whether it is --mode=compare A B: no experiment, no --config, and arguments that are no flags."""
    return given_as("mode", argv)[-1:] == ["compare"]


def given_as(flag: str, argv: Sequence[str]) -> list[str]:
    """The values of --flag=VALUE and --flag VALUE, before absl has parsed anything."""
    names = [text.partition("=") for text in argv]
    pairs = zip(names, [*argv[1:], ""], strict=True)
    return [value or following for (name, _, value), following in pairs if name in (f"--{flag}", f"-{flag}")]


def check_config_given(argv: Sequence[str]) -> None:
    """ValueError without --config=FILE; what is wrong with the file is told when the flag is read."""
    if not given_as("config", argv) and not any(flag.startswith("--help") for flag in argv):
        raise ValueError("--config: got nothing, wanted a Python file, e.g. --config=configs/tiny.py")


def _let_import_neighbours(file: Path) -> None:
    """A file CHECKOUT/configs/x.py may say `from configs import y`, wherever the program runs."""
    folder = file.resolve().parent
    if folder.name == "configs":
        sys.path.insert(0, str(folder.parent))
        sys.modules.pop("configs", None)  # one of another folder


# -------------------------------------------------------------------------------------------------------------- paths


def check_folder(flag: str, folder: Path) -> None:
    """ValueError, before hours of work, if nothing can be written there; makes no folder."""
    if is_url(folder):
        _check_bucket(flag, folder)
        return
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise ValueError(f"{flag}: got {folder} ({error.strerror}), wanted a folder that can be written") from error


def _check_bucket(flag: str, folder: Path) -> None:
    try:
        write(folder / ".writable", b"")
        (folder / ".writable").unlink(missing_ok=True)
    except Exception as error:  # the libraries of buckets have families of their own
        raise ValueError(
            f"{flag}: got {folder} ({one_line(error)}), wanted a folder of a bucket that can be written: see that the "
            f"bucket exists, and {buckets.cloud_of(str(folder)).login}"
        ) from error


def check_file(flag: str, file: Path) -> None:
    """The same for a file to be written, whose folder must be there."""
    if file.is_dir() or not file.parent.is_dir():
        raise ValueError(f"{flag}: got {file}, wanted a file in a folder that is there")
    check_folder(flag, file.parent)
