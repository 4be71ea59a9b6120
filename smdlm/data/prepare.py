"""Tokenises a corpus once into ArrayRecord shards of raw uint16/uint32 blocks.

    python -m smdlm.data.prepare --recipe=owt --source='parquet:openwebtext/*.parquet' --out=data/owt
    python -m smdlm.data.prepare --source='jsonl:docs/*.jsonl.gz' --tokenizer=gpt2 --seq_len=1024 --out=DIR
    python -m smdlm.data.prepare --verify --out=DIR

A killed run is continued by the same command: finished shards stay, and the result is the same file for file.
Validation comes first, then training, so that a limit on the output (--max-gb) never costs the validation split.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smdlm import files
from smdlm.data.config import FRAMINGS, DataConfig, spec_of
from smdlm.data.packing import MANIFEST, TOKENIZER_FILE, Packer, block_dtype, read_manifest, too_short
from smdlm.data.readers import printable
from smdlm.data.shards import Shard, Tally
from smdlm.data.sources import SOURCES, make_source, own_fields, spelled
from smdlm.data.split import Account, with_splits
from smdlm.data.tokenizer import SPECS, bpe_tokenizer, make_tokenizer
from smdlm.data.vocabulary import Tokenizer, grouped

PROGRESS = "progress.json"
RECORD_OVERHEAD = 96  # bytes that ArrayRecord adds to a record (its chunk header), rounded up
SHARD_OVERHEAD = 2**18  # and to a file (its index and the padding at its end), rounded up
VAL_SHARE_OF_LIMIT = 0.1  # of --max-gb, at most
# The settings of the literature, as flags: OpenWebText as the MDLM reference has it, text8, and LM1B.
RECIPES: dict[str, dict[str, Any]] = {
    "owt": {"tokenizer": "gpt2", "seq_len": 1024, "framing": "bos_eos", "val_documents": 100_000},
    "text8": {"tokenizer": "bytes", "seq_len": 256, "framing": "stream"},
    "lm1b": {"source": "tfds:lm1b", "val_split": "test", "rules": "lm1b", "seq_len": 128, "framing": "bos_eos"},
}
OWT_DOCUMENTS = 8_013_769  # of the public copy


@dataclass(frozen=True)
class Output:
    """Where and how much to write: sizes in MiB per shard and in GB (1e9 bytes) over all shards, 0 for no limit."""

    folder: Path
    shard_mb: float = 128.0
    max_gb: float = 0.0

    def __post_init__(self):
        if printable(self.folder) != str(self.folder):
            raise ValueError(f"--out: got {printable(self.folder)}, wanted a name in UTF-8: ArrayRecord takes no other")
        if not self.shard_mb > 0:
            raise ValueError(f"--shard-mb: got {self.shard_mb}, wanted more than 0 (MiB)")
        if not self.max_gb >= 0:
            raise ValueError(f"--max-gb: got {self.max_gb}, wanted 0 (no limit) or more (GB)")


def prepare(config: DataConfig, output: Output) -> dict:
    """Writes what is missing of the shards, then the manifest; returns the manifest.

    Raises:
      ValueError: bad source (see `smdlm.data.text.load`), or the folder holds a preparation with other settings.
    """
    settings = _settings(config, output)
    output.folder.mkdir(parents=True, exist_ok=True)
    progress = _read_progress(output.folder, settings)
    tokenizer = _tokenizer(config, output.folder)
    if (output.folder / MANIFEST).exists():
        (output.folder / PROGRESS).unlink(missing_ok=True)
        print(f"{output.folder} is already prepared", flush=True)
        return read_manifest(output.folder, config.prepare_command())
    job = _Job(config, output, tokenizer, progress)
    try:
        for split in ("val", "train"):
            job.write_split(split)
    except Exception:  # a damaged document: the shards before it stay
        if job.shard:
            job.shard.discard()
        raise
    for line in job.account.warnings(tokenizer):
        print(f"warning: {line}", file=sys.stderr)
    shards = {split: progress["splits"][split]["shards"] for split in ("train", "val")}
    blocks = {split: sum(shard["blocks"] for shard in shards[split]) for split in shards}
    checksums = "".join(shard["sha256"] for split in shards for shard in shards[split])
    manifest = {
        "settings": settings | {"fingerprint": tokenizer.fingerprint},
        "dtype": block_dtype(tokenizer).name,
        "vocab_size": tokenizer.vocab_size,
        "mask_id": tokenizer.mask_id,
        "blocks": blocks,
        "tokens": {split: count * config.seq_len for split, count in blocks.items()},
        "documents": {split: progress["splits"][split]["read"] for split in shards},
        "content_hash": hashlib.sha256(checksums.encode()).hexdigest(),
        "splits": shards,
    }
    files.write_json(output.folder / MANIFEST, manifest)
    (output.folder / PROGRESS).unlink()
    return manifest


def verify(folder: Path) -> None:
    """ValueError that lists every shard whose checksum is not the manifest's."""
    manifest = read_manifest(folder, "python -m smdlm.data.prepare")
    shards = [shard for split in manifest["splits"].values() for shard in split]
    wrong = [shard["file"] for shard in shards if files.sha256(folder / shard["file"]) != shard["sha256"]]
    if wrong:
        raise ValueError(f"data: got other checksums for {', '.join(wrong)}, wanted those of {folder / MANIFEST}")


class _Job:
    """One preparation: the loop over documents of a split, and the place in it where the next shard begins."""

    def __init__(self, config: DataConfig, output: Output, tokenizer: Tokenizer, progress: dict):
        self.config, self.tokenizer, self.progress, self.account = config, tokenizer, progress, Account()
        self.folder, self.max_bytes = output.folder, output.max_gb * 1e9
        self.shard: Shard | None = None  # the one that is being written
        self.dtype = block_dtype(tokenizer)
        self.block_bytes = config.seq_len * self.dtype.itemsize
        self.blocks_per_shard = max(int(output.shard_mb * 2**20) // self.block_bytes, 1)

    def write_split(self, split: str) -> None:
        """Writes the shards of a split that `progress` does not list; each starts where the one before it ended."""
        state = self.progress["splits"][split]
        if state["done"]:
            return
        packer = Packer(self.tokenizer, self.config.seq_len, self.config.framing)
        wanted, began, written = self._room(split), time.time(), 0
        tally = before = Tally(**state["read"])  # `before`: without the document that a shard ends in
        if wanted < 1 and not state["shards"]:
            raise ValueError(f"--max-gb: got {self.max_bytes / 1e9:g}, too little for one block of the {split} split")
        # Where the stream goes on: document (its number in the source) and offset (in its tokens with their EOS).
        for index, text, tokens in self._stream(split, state["document"], packer):
            before, tally = tally, tally.add(text)
            skipped = state["offset"] if index == state["document"] else 0
            done = skipped - len(packer.waiting)  # offset in this document of the first token of the next block
            for block in packer.add(tokens[skipped:]):
                if wanted < 1:
                    break
                self.shard = self.shard or Shard(self.folder, f"{split}-{len(state['shards']):05d}.array_record")
                self.shard.write(block.astype(self.dtype).tobytes())
                done += packer.payload
                wanted -= 1
                if self.shard.blocks == self.blocks_per_shard or wanted < 1:
                    shard, self.shard = self.shard, None
                    state |= {"document": index, "offset": done, "shards": [*state["shards"], shard.close()]}
                    state["read"] = dataclasses.asdict(before)
                    files.write_json(self.folder / PROGRESS, self.progress)
                    written += shard.blocks
                    rate = written * self.config.seq_len / max(time.time() - began, 1e-9)
                    print(f"{shard.name}: {shard.blocks:,} blocks, {rate:,.0f} tokens/s", flush=True)
                    wanted = self._room(split)
            if wanted < 1:
                break
        if shard := self.shard:
            self.shard = None
            state["shards"] = [*state["shards"], shard.close()]
            print(f"{shard.name}: {shard.blocks:,} blocks", flush=True)
        if not state["shards"]:
            nothing = not self.account.read and self.account.first
            raise ValueError(nothing) if nothing else too_short(split, len(packer.waiting), self.config.seq_len)
        state |= {"done": True, "read": dataclasses.asdict(tally)}
        files.write_json(self.folder / PROGRESS, self.progress)

    def _room(self, split: str) -> float:
        """Blocks that the next shard may hold under --max-gb."""
        if not self.max_bytes:
            return float("inf")
        shards = self.progress["splits"]
        used = sum(shard["bytes"] for state in shards.values() for shard in state["shards"])
        limit = self.max_bytes * (VAL_SHARE_OF_LIMIT if split == "val" else 1)
        return (limit - used - SHARD_OVERHEAD) // (self.block_bytes + RECORD_OVERHEAD)

    def _stream(self, split: str, first: int, packer: Packer) -> Iterator[tuple[int, str, np.ndarray]]:
        """(number in the source, text, tokens with EOS) of the documents of a split from number `first` on."""
        for group in grouped(self._texts(split, first), lambda item: len(item[1]), 2**20):
            encoded = self.account.encode(self.tokenizer, [text for _, text in group])
            for (index, text), tokens in zip(group, encoded, strict=True):
                yield index, text, packer.document(tokens)

    def _texts(self, split: str, first: int) -> Iterator[tuple[int, str]]:
        for index, (owner, document) in enumerate(with_splits(self.config)):
            if owner == split and index >= first and (text := self.account.text(document)):
                yield index, text


def _settings(config: DataConfig, output: Output) -> dict:
    """Everything that decides what is written: a run goes on only where all of it is the same."""
    settings = dataclasses.asdict(config)
    for key in ("source", "batch_size", "seed"):  # the last two belong to reading
        del settings[key]
    beside = {field.name: getattr(config.source, field.name) for field in own_fields(type(config.source))}
    settings = {"source": spec_of(config.source), **settings, **beside}
    return settings | {"documents": config.source.identity(), "shard_mb": output.shard_mb, "max_gb": output.max_gb}


def _tokenizer(config: DataConfig, folder: Path) -> Tokenizer:
    if not config.tokenizer.startswith("bpe:"):
        return make_tokenizer(config.tokenizer)
    account = Account()  # of its own: the same documents are counted when they are written
    train = (account.text(document) for split, document in with_splits(config) if split == "train")
    return bpe_tokenizer(int(config.tokenizer[4:]), (text for text in train if text), folder / TOKENIZER_FILE)


def _read_progress(folder: Path, settings: dict) -> dict:
    """The progress of a run with the same settings, or that of a new one."""
    for name in (MANIFEST, PROGRESS):
        if (folder / name).exists():
            try:
                progress = json.loads((folder / name).read_text("utf-8"))
                there = progress["settings"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"--out: got an unreadable {folder / name} ({error!r}): delete the folder") from error
            differing = [key for key in settings if there.get(key) != settings[key]]
            other = [f"{key} {settings[key]!r} (there: {there.get(key)!r})" for key in differing]
            begun = any(split["shards"] if isinstance(split, dict) else split for split in progress["splits"].values())
            if other and not begun:
                break  # it failed before anything was written: nothing of it is lost
            if other:
                raise ValueError(
                    f"--out: got {folder} that holds another preparation: {', '.join(other)}; wanted the same "
                    "settings to go on with, or another --out"
                )
            return progress
    start = {"document": 0, "offset": 0, "shards": [], "read": dataclasses.asdict(Tally()), "done": False}
    progress = {"settings": settings, "splits": {"val": dict(start), "train": dict(start)}}
    files.write_json(folder / PROGRESS, progress)
    return progress


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m smdlm.data.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder of the shards")
    parser.add_argument("--verify", action="store_true", help="only check the checksums of what --out holds")
    parser.add_argument("--recipe", choices=RECIPES, help="settings of the literature for what is not given here")
    parser.add_argument("--source", help=spelled(SOURCES))
    parser.add_argument("--tokenizer", help=f"{SPECS}; gpt2 if not given")
    parser.add_argument(*_spellings("seq_len"), type=int, help="tokens in a block, 1024 if not given")
    parser.add_argument("--framing", choices=FRAMINGS, help="stream, or bos_eos as in the MDLM reference")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument(*_spellings("val_fraction"), type=float, help="share of the documents")
    held_out.add_argument(*_spellings("val_documents"), type=int, help="the last N documents")
    for name, kinds in _source_flags().items():
        parser.add_argument(*_spellings(name), help=f"of {', '.join(kinds)}; as config.data.{name}")
    parser.add_argument(*_spellings("shard_mb"), type=float, default=Output.shard_mb, help="MiB per shard")
    parser.add_argument(*_spellings("max_gb"), type=float, default=Output.max_gb, help="GB of output, 0: no limit")
    return parser


def _spellings(name: str) -> tuple[str, ...]:
    """'--seq-len' and '--seq_len'; one where they are the same."""
    return tuple(dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}")))


def _source_flags() -> dict[str, list[str]]:
    """{field: kinds of source that have it}."""
    found: dict[str, list[str]] = {}
    for kind, cls in SOURCES.items():
        for field in own_fields(cls):
            found.setdefault(field.name, []).append(kind)
    return found


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status, 2 with one line on stderr for bad input."""
    files.plain_output()
    values = vars(_parser().parse_args(argv))
    try:
        out = files.local_path("--out", values.pop("out"))
        output = Output(out, values.pop("shard_mb"), values.pop("max_gb"))
        if values.pop("verify"):
            verify(out)
            print(f"{out}: all checksums match")
            return 0
        recipe = values.pop("recipe")
        config = _config(recipe, {name: value for name, value in values.items() if value is not None})
        with files.owned(out, "--out"):
            manifest = prepare(config, output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    print("\n".join(_report(manifest)))
    count = sum(split["documents"] for split in manifest["documents"].values())
    if recipe == "owt" and count != OWT_DOCUMENTS:
        print(f"warning: {count:,} documents; the public copy of OpenWebText has {OWT_DOCUMENTS:,}", file=sys.stderr)
    print(f"{out}: use it with data.source='prepared:{out}'")
    return 0


def _config(recipe: str | None, given: dict[str, Any]) -> DataConfig:
    """What the flags say, for the rest what the recipe says. ValueError, one line."""
    if recipe == "lm1b" and "tokenizer" not in given:
        raise ValueError("--tokenizer: got nothing for --recipe=lm1b, wanted hf:DIR, a folder of bert-base-uncased")
    if "val_fraction" in given:
        given["val_documents"] = 0
    values = {"tokenizer": "gpt2", "seq_len": 1024, **RECIPES.get(recipe, {}), **given}
    own = {name: values.pop(name) for name in _source_flags() if name in values}
    source = make_source(values.pop("source", ""), own)
    return DataConfig(source=source, batch_size=1, **values)


def _report(manifest: dict) -> Iterator[str]:
    """Documents, characters, tokens and hash of each split and of both."""
    read = {split: Tally(**counted) for split, counted in manifest["documents"].items()}
    tokens = dict(manifest["tokens"])
    read["both"], tokens["both"] = sum(read.values(), Tally()), sum(tokens.values())
    for split, tally in read.items():
        yield (
            f"{split:6}{tally.documents:>12,} documents {tally.characters:>16,} characters {tokens[split]:>15,} tokens"
            f"  sum of sha256 {tally.digest}"
        )
    yield f"shards sha256 {manifest['content_hash']}"


if __name__ == "__main__":
    sys.exit(main())
