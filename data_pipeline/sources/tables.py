"""Parquet files and Hugging Face datasets as shards: rows from memory-mapped Arrow files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.atomic import atomic_file
from data_pipeline.records import BadRow, DataError
from data_pipeline.sources.formats import Place, Row, Shard, open_binary
from data_pipeline.sources.paths import MAGIC

if TYPE_CHECKING:
    from hashlib import _Hash

    from datasets import Dataset

BATCH = 256  # rows decoded at once


@dataclass(frozen=True)
class Parquet(Shard):
    """A Parquet file, whose wanted columns are copied once, uncompressed, to a memory-mapped Arrow file.

    Without the copy, a shuffled order would decompress a whole row group for each row.
    """

    wanted: tuple[str, ...]
    copy_dir: str

    def columns(self) -> list[str]:
        try:
            with open_binary(self.address) as file:
                return list(pq.read_schema(file).names)
        except pa.ArrowException as error:
            raise DataError(f"{self.address}: not a Parquet file ({str(error).splitlines()[0]})") from error

    def scan(self, digest: _Hash) -> Iterator[tuple[Place, Row | BadRow]]:
        with open_binary(self.address) as file:
            hashlib.file_digest(file, lambda: digest)  # type: ignore[arg-type]  # typeshed wants a named class
        table = _arrow_copy(self)
        number = 0
        for index in range(table.num_record_batches):
            batch = table.get_batch(index)
            for start, row in enumerate(self._rows(batch, number)):
                number += 1
                yield Place(number, index, start), row

    def read_many(self, places: Sequence[Place]) -> list[Row | BadRow]:
        copy = _arrow_copy(self)
        rows = [copy.get_batch(place.offset).slice(place.length, 1) for place in places]
        return [self._rows(row, place.number - 1)[0] for row, place in zip(rows, places, strict=True)]

    def _rows(self, batch: pa.RecordBatch, before: int) -> Sequence[Row | BadRow]:
        try:
            return cast(list[Row], batch.to_pylist())
        except UnicodeDecodeError as error:
            if batch.num_rows == 1:
                return [BadRow(f"{self.address}:{before + 1}", f"not UTF-8 ({error.reason})")]
            return [self._rows(batch.slice(row, 1), before + row)[0] for row in range(batch.num_rows)]

    def copy(self) -> Path:
        """The Arrow copy, made if it does not exist; other processes may be making it at the same time."""
        key = hashlib.sha256("\0".join((self.address, self.identity, *self.wanted)).encode()).hexdigest()[:32]
        path = Path(self.copy_dir, f"{key}.arrow")
        if not path.exists():
            try:
                with atomic_file(path) as temporary:
                    self._write_arrow(temporary)
            except pa.ArrowException as error:
                raise DataError(f"{self.address}: cannot be read ({str(error).splitlines()[0]})") from error
        return path

    def _write_arrow(self, path: Path) -> None:
        with open_binary(self.address) as file:
            # both options, otherwise a row group's whole column is read at once
            table = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
            # dictionary-encoded columns (pandas' categoricals) change dictionaries between batches
            schema = pa.schema(
                field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
                for field in (table.schema_arrow.field(name) for name in self.wanted)
            )
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                for batch in table.iter_batches(BATCH, columns=list(self.wanted)):
                    writer.write_batch(batch.select(list(self.wanted)).cast(schema))


@lru_cache(maxsize=256)
def _arrow_copy(shard: Parquet) -> pa.ipc.RecordBatchFileReader:
    return pa.ipc.open_file(pa.memory_map(str(shard.copy())), options=pa.ipc.IpcReadOptions(use_threads=False))


@dataclass(frozen=True)
class HubSplit(Shard):
    """One split of a Hugging Face dataset, memory-mapped by `datasets`."""

    path: str
    config: str | None
    split: str
    wanted: tuple[str, ...]

    def columns(self) -> list[str]:
        return _hub_split(self).column_names

    def scan(self, digest: _Hash) -> Iterator[tuple[Place, Row | BadRow]]:
        dataset = _hub_columns(self)
        for start in range(0, len(dataset), BATCH):
            columns = dataset[start : start + BATCH]
            for index, values in enumerate(zip(*columns.values(), strict=True), start):
                digest.update(repr(values).encode(errors="backslashreplace"))
                yield Place(index + 1, index, 0), dict(zip(columns, values, strict=True))

    def read_many(self, places: Sequence[Place]) -> list[Row | BadRow]:
        columns = _hub_columns(self)[[place.offset for place in places]]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def load_hub(path: str, config: str | None, split: str) -> Dataset:
    """The split, from the hub, its local cache or a local folder (of files, or written by `save_to_disk`).

    Raises DataError.
    """
    import datasets

    try:
        if Path(path, "state.json").exists() or Path(path, "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(path)
            return loaded if isinstance(loaded, datasets.Dataset) else loaded[split]
        if Path(path).is_dir() and (found := MAGIC.search(path)):
            raise DataError(f"{path}: datasets reads {found[0]!r} in a folder's name as a pattern; rename the folder")
        return cast("Dataset", datasets.load_dataset(path, config, split=split))
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path}: split {split!r} cannot be loaded ({' '.join(str(error).split())})") from error


@lru_cache(maxsize=256)
def _hub_columns(shard: HubSplit) -> Dataset:
    return _hub_split(shard).select_columns(list(shard.wanted))


@lru_cache(maxsize=256)
def _hub_split(shard: HubSplit) -> Dataset:
    return load_hub(shard.path, shard.config, shard.split)
