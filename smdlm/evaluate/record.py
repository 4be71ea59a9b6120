"""Results as files: WORKDIR/results/NAME.json, and NAME.npz beside it with the terms of its values by sample."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from smdlm import files
from smdlm.evaluate.base import Value
from smdlm.evaluate.samples import Ratio

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Record:
    """What was measured, and under which conditions.

    Attributes:
      protocol: how the samples were drawn or the text was cut; equal in all that may be compared.
      metrics: {metric: its facts}.
      values: {metric: {name: value}}.
      about: all else that explains the numbers: config, hashes of checkpoint, data and samples, nominal NFE, forwards
        really run, FLOPs, wall time, seed.
    """

    protocol: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, Any]]
    values: Mapping[str, Mapping[str, Value]]
    about: Mapping[str, Any]

    def value(self, name: str) -> Value | None:
        return next((values[name] for values in self.values.values() if name in values), None)

    def conditions(self, names: list[str]) -> dict[str, Any]:
        """What the named values depend on, by 'field' of the protocol and 'metric.field'."""
        found = {field: value for field, value in self.protocol.items() if field != "name"}
        for metric, values in self.values.items():
            if set(names) & set(values):
                found |= {f"{metric}.{field}": value for field, value in self.metrics[metric].items()}
        return found


def write_record(path: Path, record: Record) -> None:
    """Writes the terms first, then the record, each whole or not at all: a record that is there is complete.

    Raises:
      ValueError: a value is NaN or infinite. OSError.
    """
    terms, rows = {}, []
    for metric, values in record.values.items():
        for name, value in values.items():
            row = value.plain()
            if isinstance(value, Ratio):
                terms[name] = np.stack([value.amounts, value.sizes])
                row["exp"] = value.exp
            rows.append({"name": name, "metric": metric, **row})
    whole = {
        "format": FORMAT,
        "protocol": record.protocol,
        "metrics": record.metrics,
        "values": rows,
        **record.about,
    }
    text = json.dumps(whole, allow_nan=False)  # refused before anything is written
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **terms)
    files.write(path.with_suffix(".npz"), buffer.getvalue())
    files.write_json(path, json.loads(text))


def read_record(path: Path) -> Record:
    """What `write_record` wrote. ValueError, one line, if it is damaged or of another format."""
    try:
        whole = json.loads(path.read_text("utf-8"))
        if whole["format"] != FORMAT:
            raise ValueError(f"format {whole['format']}")
        with np.load(path.with_suffix(".npz")) as file:
            terms = {name: file[name] for name in file.files}
        values: dict[str, dict[str, Value]] = {metric: {} for metric in whole["metrics"]}
        for row in whole["values"]:
            plain = [row[f.name] for f in dataclasses.fields(Value)]
            name = row["name"]
            value = Ratio(*plain, *terms[name], row["exp"]) if name in terms else Value(*plain)
            values[row["metric"]][name] = value
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: got an unreadable result ({files.one_line(error)}), wanted one of format {FORMAT} with its .npz"
        ) from error
    about = {name: whole[name] for name in whole.keys() - {"format", "protocol", "metrics", "values"}}
    return Record(whole["protocol"], whole["metrics"], values, about)
