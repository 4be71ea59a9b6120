"""Arrays that a checkpoint writes part by part, so that a model larger than memory can be converted.

Orbax would copy all arrays before it writes the first. A `Streamed` leaf is read while it is written, one part in
memory at a time and one leaf after the other; on disk it is like any other array.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore


@dataclasses.dataclass(frozen=True)
class Streamed:
    """An array whose `parts` yields its slices along axis 0 if it is `stacked`, else itself."""

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    parts: Callable[[], Iterator[np.ndarray]]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def whole(self) -> np.ndarray:
        parts = self.parts()
        return np.stack(list(parts)) if self.stacked else next(parts)


class _Writer(ocp.type_handlers.NumpyHandler):
    """Writes `Streamed` leaves; they are read as NumPy's."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def _background_serialize(self, values: Any, infos: Any, args: Any = None) -> None:
        for value, info, arg in zip(values, infos, args, strict=True):  # orbax would write all at the same time
            await super()._background_serialize([value], [info], [arg])

    async def _open_and_write(self, value: Streamed, tspec: dict[str, Any], ts_context: Any) -> None:
        if value.stacked:  # a part is a chunk: one that is only a share of a chunk would wait for the others
            tspec["metadata"]["chunks"] = [1, *value.shape[1:]]
        array = await tensorstore.open(tensorstore.Spec(tspec), create=True, open=True, context=ts_context)
        for number, part in enumerate(value.parts()):
            await (array[number] if value.stacked else array).write(part)


def handler() -> ocp.StandardCheckpointHandler:
    """Orbax's, which also takes `Streamed` leaves; both attributes that this needs are private ones of orbax."""
    made = ocp.StandardCheckpointHandler()
    made._supported_types = (*made._supported_types, Streamed)
    if not ocp.type_handlers.has_type_handler(Streamed):
        ocp.type_handlers.register_type_handler(Streamed, _Writer(), override=True)
    return made
