"""What the command lines have in common: mistakes are found before anything is computed, and are one line. No jax."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

# What absl, ml_collections and a config file raise for a user's mistake.
MISTAKES = (flags.Error, ValueError, KeyError, AttributeError, TypeError, OSError, ImportError)


def define_config() -> flags.FlagHolder:
    """--config=FILE and --config.section.field=value.

    Any documented field may be given, also one that the file leaves at its default: `build.read` refuses what it does
    not know.
    """
    return config_flags.DEFINE_config_file(
        "config", None, "Experiment, e.g. configs/tiny.py.", lock_config=False, accept_new_attributes=True
    )


def check_config_file(argv: Sequence[str]) -> None:
    """ValueError without a config file that exists; before ml_collections fails with a text that does not name it."""
    names = [flag.partition("=") for flag in argv]
    given = [value or following for (name, _, value), following in zip(names, [*argv[1:], ""], strict=True)
             if name in ("--config", "-config")]  # fmt: skip
    if any(name.startswith("--help") for name, _, _ in names):
        return
    if not given or not Path(given[-1].partition(":")[0]).is_file():
        got = given[-1] if given else "nothing"
        raise ValueError(f"--config: got {got}, wanted a Python file, e.g. --config=configs/tiny.py")


def check_folder(flag: str, folder: Path) -> None:
    """ValueError, before hours of work, if nothing can be written there; makes no folder."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise ValueError(f"{flag}: got {folder} ({error.strerror}), wanted a folder that can be written") from error


def check_file(flag: str, file: Path) -> None:
    """The same for a file to be written, whose folder must be there."""
    if file.is_dir() or not file.parent.is_dir():
        raise ValueError(f"{flag}: got {file}, wanted a file in a folder that is there")
    check_folder(flag, file.parent)


def message(error: BaseException) -> str:
    """The error's text; of a KeyError, whose text is the repr of it, on one line."""
    return " ".join(str(error.args[0]).split()) if isinstance(error, KeyError) and error.args else str(error)
