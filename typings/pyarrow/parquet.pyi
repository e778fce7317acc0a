"""What this project calls of pyarrow.parquet."""

from collections.abc import Iterator, Mapping
from os import PathLike
from typing import IO, Any, Self

from pyarrow import BufferReader, RecordBatch, Schema, Table

class ParquetFile:
    def __init__(
        self,
        source: BufferReader | str | PathLike[str],
        *,
        read_dictionary: list[str] | None = None,
        thrift_string_size_limit: int | None = None,
        thrift_container_size_limit: int | None = None,
    ) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...
    @property
    def schema_arrow(self) -> Schema: ...
    def iter_batches(
        self, batch_size: int = ..., columns: list[str] | None = None, use_threads: bool = True
    ) -> Iterator[RecordBatch]: ...
    def read(self, columns: list[str] | None = None, use_threads: bool = True) -> Table: ...

class ParquetWriter:
    def __init__(
        self,
        where: IO[bytes],
        schema: Schema,
        *,
        compression: str = ...,
        compression_level: int | None = None,
        version: str = ...,
        data_page_version: str = ...,
        use_dictionary: bool = True,
        write_statistics: bool = True,
    ) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> bool: ...
    def add_key_value_metadata(self, key_value_metadata: Mapping[Any, Any]) -> None: ...
    def write_table(self, table: Table, row_group_size: int | None = None) -> None: ...

def read_schema(where: str | PathLike[str] | BufferReader) -> Schema: ...
def read_table(source: str | PathLike[str] | BufferReader, *, columns: list[str] | None = None) -> Table: ...
def write_table(table: Table, where: str | PathLike[str], *, compression: str = ...) -> None: ...
