"""Arrays of a store, outwards and inwards: metadata described by zarr-python, chunks by our own code."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from statsvc.digests import CRC_NBYTES, crc32c, crc32c_hex, little_endian
from statsvc.errors import DamagedObject
from statsvc.storage.backend import Backend, ObjectRecord
from statsvc.store.commits import Commit
from statsvc.store.copies import publish, write_twice
from statsvc.store.layout import ArraySpec, group_metadata
from statsvc.store.paths import groups, is_stored_twice, metadata_path
from statsvc.store.remote_shard import RemoteShard
from statsvc.store.shard_file import ShardFile

T = TypeVar("T")


def declare_group(backend: Backend, path: str, attributes: dict[str, Any]) -> None:
    """Publish a group's zarr.json; \"\" is the root. That of the root and of a teacher is stored twice."""
    path, data = metadata_path(path), group_metadata(attributes)
    write = write_twice if is_stored_twice(path) else publish
    write(backend, path, data)


def declare_arrays(backend: Backend, specs: Iterable[ArraySpec], shards: int) -> None:
    """Publish the zarr.json of arrays for so many dataset shards, and those of groups above them that have none."""
    for spec in specs:
        for group in groups(spec.path):
            if backend.size(metadata_path(group)) is None:
                declare_group(backend, group, {})
        publish(backend, metadata_path(spec.path), spec.metadata(shards))


def write_chunk(backend: Backend, spec: ArraySpec, shard: int, array: np.ndarray) -> ObjectRecord:
    """Publish one dataset shard's part [rows, *shape] of an array that is not sharded."""
    if array.shape != (spec.rows, *spec.shape):
        raise ValueError(f"{spec.path}: a chunk has shape {(spec.rows, *spec.shape)}; got {array.shape}")
    data = little_endian(array.astype(spec.dtype, copy=False)).tobytes()
    content = crc32c(data)
    data += content.to_bytes(4, "little")
    backend.write(spec.object(shard), data)
    return ObjectRecord(spec.object(shard), len(data), crc32c_hex(crc32c(data)), crc32c_hex(content))


def read_chunk(backend: Backend, spec: ArraySpec, shard: int, commit: Commit) -> np.ndarray:
    """[rows, *shape]: one dataset shard's part of an array, checked against its commit. Raises DamagedObject."""
    record = _record(spec, shard, commit)
    due = spec.rows * spec.row_nbytes + CRC_NBYTES
    if record.bytes != due:
        raise _damaged(record.path, f"{record.bytes} bytes do not hold {spec.rows} rows of {spec.row_nbytes}")
    data_B = np.empty(due, np.uint8)

    def fetch() -> None:
        try:
            with backend.fetch(record, 0, due) as fill:
                fill(data_B.data)
        except FileNotFoundError as error:
            raise _damaged(record.path, "missing") from error
        content = crc32c_hex(crc32c(data_B[:-CRC_NBYTES]))
        if content != record.content_crc32c or int(content, 16).to_bytes(4, "little") != data_B[-CRC_NBYTES:].tobytes():
            raise _damaged(record.path, f"crc32c {content}; {record.content_crc32c} due")

    _or_again(backend, record, fetch)
    return data_B[:-CRC_NBYTES].view(np.dtype(spec.dtype).newbyteorder("<")).reshape(spec.rows, *spec.shape)


def open_feature_shard(backend: Backend, spec: ArraySpec, shard: int, commit: Commit) -> ShardFile | RemoteShard:
    """A feature shard that is the one committed, by the checksums stored in it or by the backend's word.

    Its rows are checked as they are read. Raises DamagedObject.
    """
    record = _record(spec, shard, commit)

    def opened() -> ShardFile | RemoteShard:
        try:
            buffer = backend.view(record.path, record)
            if buffer is None:
                return RemoteShard(backend, record, spec.rows, spec.row_nbytes)
        except FileNotFoundError as error:
            raise _damaged(record.path, "missing") from error
        return _MappedShard(backend, record, buffer, spec)

    return _or_again(backend, record, opened)


class _MappedShard(ShardFile):
    """A mapped shard that is the one committed. Where it is a copy, a row of it may turn out to be damaged."""

    def __init__(self, backend: Backend, record: ObjectRecord, buffer: memoryview, spec: ArraySpec) -> None:
        if len(buffer) != record.bytes:
            raise _damaged(record.path, f"{len(buffer)} bytes; {record.bytes} due")
        super().__init__(buffer, spec.rows, spec.row_nbytes, record.path)
        content = crc32c_hex(self.content_crc32c)
        if content != record.content_crc32c:
            raise _damaged(record.path, f"a shard with other rows: contents {content}; {record.content_crc32c} due")
        self._backend, self._record, self._spec = backend, record, spec

    def row(self, row: int) -> NDArray[np.uint8]:
        try:
            return super().row(row)
        except DamagedObject:
            if not self._backend.forget(self._record):
                raise
            buffer = self._backend.view(self._record.path, self._record)
            if buffer is None:
                raise
            _MappedShard.__init__(self, self._backend, self._record, buffer, self._spec)
            return super().row(row)


def _or_again(backend: Backend, record: ObjectRecord, read: Callable[[], T]) -> T:
    """What `read` returns. Damage of a copy is no damage: the object is read once more without it."""
    try:
        return read()
    except DamagedObject:
        if not backend.forget(record):
            raise
        return read()


def _record(spec: ArraySpec, shard: int, commit: Commit) -> Any:
    path = spec.object(shard)
    for record in commit.objects:
        if record.path == path:
            return record
    raise DamagedObject(f"{commit.path} does not vouch for {path}; run `statsvc verify`")


def _damaged(path: str, what: str) -> DamagedObject:
    return DamagedObject(f"{path}: {what}; `statsvc verify --repair` removes the damage, the next run restores it")
