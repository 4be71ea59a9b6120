"""A tokenizer kept with a run, so that what it trained can be sampled and scored without its corpus.

FOLDER/tokenizer.json         the backend; not for bytes
FOLDER/tokenizer_config.json  its special tokens under the names of Hugging Face, and under 'smdlm' what else is needed
"""

import hashlib
import json
from pathlib import Path

from smdlm.data.backend import Backend, plain
from smdlm.data.tokenizer import bpe_tokenizer, check_spec, make_tokenizer
from smdlm.data.vocabulary import Tokenizer, wrap
from smdlm.files import write, write_json

BACKEND, CONFIG = "tokenizer.json", "tokenizer_config.json"


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a tokenizer into a folder, the file that makes it complete last. OSError."""
    backend, ours = tokenizer.backend, {"spec": tokenizer.name, "fingerprint": tokenizer.fingerprint}
    config: dict = {"smdlm": ours}
    if tokenizer.chat_template:
        config["chat_template"] = tokenizer.chat_template
    if backend:
        text = backend.tokenizer.to_str(pretty=True)
        write(folder / BACKEND, text)
        ours["sha256"] = hashlib.sha256(text.encode("utf-8")).hexdigest()
        names = {"eos_token": backend.eos, "bos_token": backend.bos, "mask_token": backend.mask}
        config |= {name: token for name, token in names.items() if token}
        config["additional_special_tokens"] = list(backend.special)
    write_json(folder / CONFIG, config)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `save_tokenizer` wrote: the same ids, texts and fingerprint. ValueError if it is damaged."""
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text("utf-8"))
        ours = config["smdlm"]
        if ours["spec"] == "bytes":
            tokenizer = make_tokenizer("bytes")
        else:
            text = (folder / BACKEND).read_bytes()
            if hashlib.sha256(text).hexdigest() != ours["sha256"]:
                raise ValueError(f"another checksum of {BACKEND}")
            special = tuple(config["additional_special_tokens"])
            names = Backend(
                plain(text.decode("utf-8")), config["eos_token"], config["bos_token"], config.get("mask_token"), special
            )
            tokenizer = wrap(ours["spec"], names, config.get("chat_template", ""))
        if tokenizer.fingerprint != ours["fingerprint"]:
            raise ValueError("another fingerprint")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"tokenizer: got an unreadable {file} ({type(error).__name__}: {error}), wanted the tokenizer of a run: "
            "copy it from the run, or train on"
        ) from error
    return tokenizer


def _released(folder: Path) -> bool:
    """Whether it holds what a conversion found beside the weights, and nothing that a run has kept."""
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "smdlm" not in config


def tokenizer_of_run(workdir: Path, spec: str) -> Tokenizer:
    """The tokenizer of a run without its corpus.

    From WORKDIR/tokenizer; for an older run that has none, from the BPE it trained, or anew from `spec` (of
    config.data.tokenizer) where that needs no corpus.

    Raises:
      ValueError: one line; it is damaged, or a BPE is not there.
    """
    check_spec(spec)
    folder = workdir / "tokenizer"
    kind, _, size = spec.partition(":")
    if folder.exists() and not (kind == "hf" and _released(folder)):
        tokenizer = load_tokenizer(folder)
        # A folder of another's vocabulary may have moved; bytes and sizes are what they are called.
        if tokenizer.name != spec and "hf" not in (kind, tokenizer.name.partition(":")[0]):
            raise ValueError(f"data.tokenizer: got {spec!r}, wanted {tokenizer.name!r}, that of the run in {workdir}")
        return tokenizer
    if kind != "bpe":
        return make_tokenizer(spec)
    trained = sorted(workdir.glob(f"bpe-{size}-*.json"))
    if len(trained) != 1:
        raise ValueError(
            f"tokenizer: got {len(trained)} files bpe-{size}-*.json in {workdir}, wanted {folder} or one such file"
        )
    return bpe_tokenizer(int(size), (), trained[0])
