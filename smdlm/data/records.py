"""Rows of Parquet and Arrow files, a group of them in memory at a time: the one reader of both, by pyarrow."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from smdlm.data.readers import printable, pyarrow_for
from smdlm.files import one_line

SUFFIXES = (".parquet", ".arrow")


class Rows:
    """Neighbouring rows of a file, read at the first look at one of them."""

    def __init__(self, path: Path, count: int, load: Callable[[], Any]):
        self._path, self._count, self._load = path, count, load

    def __len__(self) -> int:
        return self._count

    @functools.cached_property
    def _table(self) -> Any:
        return _named(self._path, self._load)

    def row(self, index: int) -> dict[str, Any]:
        """ValueError, with the file's name, where the row cannot be read or holds text that is not UTF-8."""
        return _named(self._path, lambda: {name: self._table[name][index].as_py() for name in self._table.column_names})


def groups(path: Path, column: str = "") -> Iterator[Rows]:
    """The rows of a file, group by group; of one column, where it is named.

    Raises:
      ValueError: one line; no such column, a damaged file, pyarrow is missing.
    """
    read = _parquet if path.suffix == ".parquet" else _arrow
    found = read(path, column)
    while (rows := _named(path, lambda: next(found, None))) is not None:
        yield rows


def _parquet(path: Path, column: str) -> Iterator[Rows]:
    pyarrow_for(path)
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        _check_column(path, file.schema_arrow.names, column)
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    for number, count in enumerate(counts):
        yield Rows(path, count, functools.partial(_row_group, path, number, [column] if column else None))


def _row_group(path: Path, number: int, columns: list[str] | None) -> Any:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        return file.read_row_group(number, columns)


def _arrow(path: Path, column: str) -> Iterator[Rows]:
    """Of the streaming format, which Hugging Face writes, or of the file format; memory-mapped."""
    pyarrow = pyarrow_for(path)
    from pyarrow import ipc

    with pyarrow.memory_map(str(path)) as file:
        whole = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = ipc.open_file(file) if whole else ipc.open_stream(file)
        _check_column(path, reader.schema.names, column)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if whole else reader
        for batch in batches:
            table = pyarrow.Table.from_batches([batch])
            table = table.select([column]) if column else table
            yield Rows(path, table.num_rows, functools.partial(_given, table))


def _given(table: Any) -> Any:
    return table


def _check_column(path: Path, names: list[str], column: str) -> None:
    if column and column not in names:
        raise ValueError(
            f"data: got columns {', '.join(map(repr, names))} in {printable(path)}, wanted text in {column!r}: set "
            "data.field"
        )


def _named(path: Path, read: Callable[[], Any]) -> Any:
    """read(); what pyarrow raises, and text that is not UTF-8, becomes one ValueError with the file's name."""
    pyarrow = pyarrow_for(path)
    try:
        return read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data: got text in {printable(path)} that is not UTF-8 ({error.reason}): convert it"
        ) from error
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        raise ValueError(
            f"data: got an unreadable {printable(path)} ({one_line(error)}), wanted Parquet or Arrow: copy it again"
        ) from error
