"""Released models: a run as a small folder that can travel with the package, and those that do.

FOLDER/weights.safetensors   the averaged weights, in float16 but for omega, which stays in float32
FOLDER/run.json              config, step, sizes, fingerprint of the tokenizer; `results`: what was measured, with its
                             protocols
FOLDER/tokenizer/            as every run keeps it (data/kept.py)
FOLDER/validation.npz        the validation blocks of the results, [N, L] token ids

`python -m smdlm.tools.release RUN FOLDER` writes one, `smdlm.load(FOLDER)` reads it; smdlm/released/NAME is
`smdlm.load("NAME")`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from smdlm import files
from smdlm.data.kept import save_tokenizer
from smdlm.data.vocabulary import Tokenizer

HERE = Path(__file__).parents[1] / "released"
RUN, WEIGHTS, TOKENIZER, VALIDATION = "run.json", "weights.safetensors", "tokenizer", "validation.npz"
SMALL = 64  # elements up to which an array stays in float32: omega would suffer from less, and costs nothing


def names() -> list[str]:
    """Of the models that came with the package."""
    return sorted(path.parent.name for path in HERE.glob(f"*/{RUN}"))


def find(path: Path) -> Path | None:
    """The folder of a released model, given as such or by its name; None for anything else, e.g. a workdir."""
    if path.exists():
        return path if (path / RUN).is_file() else None
    return HERE / path if str(path) in names() else None


def write(folder: Path, weights: Any, about: Mapping[str, Any], tokenizer: Tokenizer, blocks: np.ndarray) -> None:
    """Writes a folder, whole or not at all.

    Args:
      weights: {'backbone', 'softmask'}, nested dicts of arrays. about: what run.json says.
      blocks: [N, L] token ids.

    Raises:
      ValueError: the folder exists. OSError.
    """
    if folder.exists():
        raise ValueError(f"got {folder}, which exists, wanted a new folder: name another one or delete it")
    flat = {name: np.asarray(x) for name, x in traverse_util.flatten_dict(weights, sep="/").items()}
    flat = {name: x.astype(np.float32 if x.size <= SMALL else np.float16) for name, x in flat.items()}
    with files.whole(folder) as temporary:
        temporary.mkdir()
        safetensors.numpy.save_file(flat, temporary / WEIGHTS)
        save_tokenizer(tokenizer, temporary / TOKENIZER)
        np.savez_compressed(temporary / VALIDATION, tokens=blocks.astype(np.uint16 if blocks.max() < 2**16 else int))
        files.write_json(temporary / RUN, about)


def about(folder: Path) -> dict[str, Any]:
    """What run.json says. ValueError, one line, if it is damaged."""
    try:
        found = json.loads((folder / RUN).read_text("utf-8"))
        if not isinstance(found, dict) or (missing := {"config", "step", "tokenizer"} - found.keys()):
            raise ValueError(f"no {', '.join(sorted(missing))}" if isinstance(found, dict) else "no object")
        return found
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / RUN}: got an unreadable file ({files.one_line(error)}), wanted that of a released model: copy "
            "the folder again"
        ) from error


def weights(folder: Path) -> dict[str, np.ndarray]:
    """{path joined by '/': array}, float32. ValueError, one line, if the file is damaged."""
    try:
        return {name: x.astype(np.float32) for name, x in safetensors.numpy.load_file(folder / WEIGHTS).items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{folder / WEIGHTS}: got an unreadable file ({files.one_line(error)}), wanted weights: copy the folder"
        ) from error


def validation_blocks(folder: Path) -> np.ndarray:
    """[N, L] i32, the validation blocks on which the likelihoods of the results were measured."""
    with np.load(folder / VALIDATION) as file:
        return file["tokens"].astype(np.int32)
