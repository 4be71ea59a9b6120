"""Small corpora and configs shared by the tests of the data package."""

import numpy as np

from smdlm.data.config import DataConfig, Prepared
from smdlm.data.sources import SOURCES, make_source, own_fields

OWN = {field.name for cls in SOURCES.values() for field in own_fields(cls)}


def config_of(spec, **changes):
    """A DataConfig of a source spelled as in a config, with the source's own fields among the changes."""
    own = {name: value for name, value in changes.items() if name in OWN}
    kind, _, target = spec.partition(":")
    source = Prepared(target) if kind == "prepared" else make_source(spec, own)
    common = {name: value for name, value in changes.items() if name not in OWN}
    return DataConfig(source, **({"tokenizer": "bytes", "seq_len": 16, "batch_size": 4} | common))


def write_documents(folder, count=60, name="d{:03d}.txt"):
    """Documents of 20 to 79 bytes, each of one letter: blocks show where a document starts and ends."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / name.format(i)).write_text(chr(ord("a") + i % 26) * (20 + i * 37 % 60), "utf-8")
    return f"text:{folder}/*.txt"


def stream_of(blocks):
    return np.concatenate([blocks[i] for i in range(len(blocks))])
