"""Shard files: all rows of one dataset shard in one file, each a chunk that can be read and checked alone.

    row 0 | crc32c | row 2 | crc32c | ... | index | crc32c of the index        (here row 1 has no chunk)

A row is its bytes as little-endian numbers, all rows of one size. The index is u64 [rows, 2], little-endian: where
the chunk begins and how many bytes it has, checksum included; twice 2**64 - 1 for a row without a chunk. It comes last,
so a shard streams to disk in O(1) memory. Any Zarr client reads these files; this is the fast way for the one layout.

Source: Zarr v3, codec `sharding_indexed` 1.0, with chunk = one row, index_location "end" and the codecs
`bytes` (little) + `crc32c` for chunks and index alike.

Shape suffixes: R = rows of the shard, N = rows in one call, X = bytes of one row, B = bytes in the file.
"""

import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from io import UnsupportedOperation
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from statsvc.digests import CRC_NBYTES, SEALED, combine, crc32c, crc32c_hex
from statsvc.errors import AbsentRow, DamagedObject, WrongRows

NO_CHUNK = 2**64 - 1
IOV_MAX = os.sysconf("SC_IOV_MAX")
BATCH_NBYTES = 8 << 20  # per system call: few enough that what the checksum has read is still in the cache
FLUSH_NBYTES = 8 << 20  # how often the kernel is asked to start writing to disk

Rows = Sequence[int] | NDArray[np.integer[Any]]
Buffer = bytes | bytearray | memoryview | mmap.mmap


def index_nbytes(rows: int) -> int:
    """Size of the index with its checksum: the last bytes of a shard file."""
    return 16 * rows + CRC_NBYTES


def decode_index(
    tail_B: NDArray[np.uint8], file_nbytes: int, rows: int, row_nbytes: int, name: str
) -> NDArray[np.int64]:
    """Where each row begins in a file of `file_nbytes` that ends with `tail_B`: [rows] int64, -1 for an absent row.

    Raises DamagedObject when the tail is too short for the index, or the index fails its checksum or points to
    anything but rows inside the file.
    """
    if len(tail_B) < index_nbytes(rows):
        raise _damaged(name, f"{len(tail_B)} bytes, fewer than the index of {rows} rows ({index_nbytes(rows)})")
    index_B = tail_B[-index_nbytes(rows) :]
    verify_seal(index_B[:-CRC_NBYTES], index_B[-CRC_NBYTES:], name, "the index")
    entry_R2 = index_B[:-CRC_NBYTES].copy().view("<u8").reshape(rows, 2)
    chunk_nbytes = row_nbytes + CRC_NBYTES
    absent_R = (entry_R2 == NO_CHUNK).all(axis=1)
    last_offset = file_nbytes - index_nbytes(rows) - chunk_nbytes
    good_R = absent_R | ((entry_R2[:, 1] == chunk_nbytes) & (entry_R2[:, 0] <= last_offset))
    if not good_R.all():
        offset, nbytes = entry_R2[good_R.argmin()].tolist()
        found = f"the index puts row {good_R.argmin()} at {offset} with {nbytes} bytes"
        raise _damaged(name, f"{found}, not at 0 to {last_offset} with {chunk_nbytes}")
    return entry_R2[:, 0].astype(np.int64)  # the mark of an absent row becomes -1


class ShardWriter:
    """Writes one shard from the beginning of a file that the caller opened, empty, and will fsync and rename.

    A file without a descriptor, such as an upload to object storage, is written in order. OSError passes through; to a
    file with one, the same rows may then be appended again.

    content_crc32c  after finish(): crc32c of the stored checksums of the rows, in order, and of the index entries.
                    It differs when a row differs; the crc32c of the whole file does not (see statsvc.digests).
    """

    def __init__(self, file: int | BinaryIO, rows: int, row_nbytes: int) -> None:
        if rows < 1 or row_nbytes < 1:
            raise WrongRows(f"a shard has at least one row of at least one byte, not {rows} of {row_nbytes}")
        self._fd: int | None
        if isinstance(file, int):
            self._fd = file
        else:
            self._stream, self._fd = file, _descriptor(file)
        self._entry_R2 = np.full((rows, 2), NO_CHUNK, "<u8")
        self._row_nbytes = row_nbytes
        self._end = self._flushed = 0
        self._last_row = -1
        self._finished = False
        self.content_crc32c = 0
        if self._fd is not None:
            # Measured: 20% less time than a file that grows. Where it cannot be had, the file grows.
            with suppress(OSError):
                os.posix_fallocate(self._fd, 0, rows * (row_nbytes + CRC_NBYTES) + index_nbytes(rows))

    def append(self, rows_N: Rows, data_N: NDArray[Any]) -> None:
        """Writes data_N[j], C-contiguous little-endian numbers of row_nbytes together, as row rows_N[j].

        Batches of any size are efficient, and never copied. Raises WrongRows unless the rows are inside the shard and
        ascending, over all calls, and the data has their size.
        """
        row_N = self._checked_rows(rows_N)
        data_NX = self._checked_data(data_N, len(row_N))
        step = max(1, min(IOV_MAX // 2, BATCH_NBYTES // self._row_nbytes))
        for start in range(0, len(row_N), step):
            batch_N, batch_NX = row_N[start : start + step], data_NX[start : start + step]
            crcs = [crc32c(data_X).to_bytes(CRC_NBYTES, "little") for data_X in batch_NX]
            chunk_nbytes = self._row_nbytes + CRC_NBYTES
            offset_N = self._end + chunk_nbytes * np.arange(len(batch_N))
            self._write([memoryview(part) for pair in zip(batch_NX, crcs, strict=True) for part in pair])
            self._entry_R2[batch_N, 0], self._entry_R2[batch_N, 1] = offset_N, chunk_nbytes
            self._last_row = int(batch_N[-1])
            self.content_crc32c = crc32c(b"".join(crcs), self.content_crc32c)

    def finish(self) -> tuple[int, int]:
        """Writes the index; returns the size of the file and its crc32c."""
        self._refuse_if_finished()
        index = self._entry_R2.tobytes()
        sealed_index = index + crc32c(index).to_bytes(CRC_NBYTES, "little")
        self._write([memoryview(sealed_index)])
        if self._fd is not None:
            os.ftruncate(self._fd, self._end)  # the room that was kept for missing rows
        self._finished = True
        self.content_crc32c = crc32c(index, self.content_crc32c)
        # A row with its checksum has the crc32c SEALED, whatever the row, so only their number matters here.
        append_row = combine(self._row_nbytes + CRC_NBYTES)
        crc = 0
        for _ in range(np.count_nonzero(self._entry_R2[:, 0] != NO_CHUNK)):
            crc = append_row(crc, SEALED)
        return self._end, crc32c(sealed_index, crc)

    def _refuse_if_finished(self) -> None:
        if self._finished:
            raise WrongRows("finish() has written the index of this shard; more rows need a new file and writer")

    def _checked_rows(self, rows_N: Rows) -> NDArray[np.int64]:
        self._refuse_if_finished()
        rows, row_N = len(self._entry_R2), row_numbers(rows_N)
        before_N = np.concatenate([[self._last_row], row_N[:-1]])[: len(row_N)]
        good_N = (row_N > before_N) & (row_N < rows)
        if not good_N.all():
            row, before = row_N[good_N.argmin()], before_N[good_N.argmin()]
            came = f"row {row} came after row {before}" if before >= 0 else f"row {row} came first"
            raise WrongRows(f"{came}, but a shard takes rows 0 to {rows - 1}, ascending, each once: sort them")
        return row_N

    def _checked_data(self, data_N: NDArray[Any], count: int) -> NDArray[np.uint8]:
        """The bytes of the rows, [count, row_nbytes], in the caller's memory."""
        row_nbytes = self._row_nbytes
        given = f"{data_N.dtype.str} {list(data_N.shape)} with strides {data_N.strides}"
        if data_N.shape[:1] != (count,) or data_N.nbytes != count * row_nbytes:
            raise WrongRows(f"{count} rows need {row_nbytes} bytes each, not {given}: give one entry per row")
        if not data_N.flags.c_contiguous or data_N.dtype.hasobject or data_N.dtype != data_N.dtype.newbyteorder("<"):
            raise WrongRows(f"rows are little-endian numbers, C-contiguous, not {given}: use np.ascontiguousarray")
        return data_N.reshape(-1).view(np.uint8).reshape(count, row_nbytes)

    def _write(self, parts: list[memoryview]) -> None:
        """Writes all parts after what was written before; counts them only when all of them are."""
        if self._fd is None:
            data = b"".join(parts)  # at most BATCH_NBYTES, and fewer calls
            self._stream.write(data)
            self._end += len(data)
            return
        end = self._end
        while parts:
            written = os.pwritev(self._fd, parts, end)
            end += written
            whole = 0
            while whole < len(parts) and written >= len(parts[whole]):
                written -= len(parts[whole])
                whole += 1
            parts = parts[whole:]
            if written:  # the call stopped inside a part, as it may: on a signal, or after 2 GiB
                parts[0] = parts[0][written:]
        self._end = end
        full_pages = (end - self._flushed) // mmap.PAGESIZE * mmap.PAGESIZE
        if full_pages >= FLUSH_NBYTES:
            # On Linux this makes the disk start on dirty pages, so that fsync finds little left to do. Measured: a
            # shard with its fsync takes 40 ms instead of 65, and at least 95% of it stays in the page cache.
            with suppress(OSError):
                os.posix_fadvise(self._fd, self._flushed, full_pages, os.POSIX_FADV_DONTNEED)
            self._flushed += full_pages


class ShardFile:
    """The rows of a shard in any buffer, without copies. The buffer must not change while it is read.

    The checksum of a row is verified when the row is first touched, once in the life of this object: it costs as much
    as copying the row, and a reader of few rows should not pay for all.

    present_R  [rows] bool: whether the row is there

    Raises DamagedObject for an index that is cut, fails its checksum or points outside; `name` is for messages.
    """

    def __init__(self, buffer: Buffer, rows: int, row_nbytes: int, name: str = "shard") -> None:
        self.name = name
        self._file_B = np.frombuffer(buffer, np.uint8)
        self._file_B.flags.writeable = False
        self._offset_R = decode_index(self._file_B, len(self._file_B), rows, row_nbytes, name)
        self._row_nbytes = row_nbytes
        self.present_R = self._offset_R >= 0
        self._verified_R = np.zeros(rows, np.bool_)

    @property
    def content_crc32c(self) -> int:
        """As ShardWriter.content_crc32c, from the stored checksums: the rows themselves are not read."""
        end_P = self._offset_R[self.present_R] + self._row_nbytes
        stored_P4 = self._file_B[end_P[:, None] + np.arange(CRC_NBYTES)]
        return crc32c(self._file_B[-index_nbytes(len(self.present_R)) : -CRC_NBYTES], crc32c(stored_P4))

    def row(self, row: int) -> NDArray[np.uint8]:
        """[row_nbytes] uint8 in the buffer itself, read-only. Raises AbsentRow or DamagedObject."""
        rows = len(self.present_R)
        begin = self._offset_R.item(row) if 0 <= row < rows else -1
        if begin < 0:
            raise AbsentRow(f"{self.name} has no row {row}: present_R says which of 0 to {rows - 1} it has")
        chunk_B = self._file_B[begin : begin + self._row_nbytes + CRC_NBYTES]
        if not self._verified_R[row]:
            verify_seal(chunk_B[:-CRC_NBYTES], chunk_B[-CRC_NBYTES:], self.name, f"row {row}")
            self._verified_R[row] = True
        return chunk_B[:-CRC_NBYTES]

    def read(self, rows_N: Rows, out_NX: NDArray[np.uint8]) -> None:
        """Copies rows, in any order, to out_NX, [len(rows_N), row_nbytes] uint8.

        Raises AbsentRow or DamagedObject; out_NX may then be filled up to that row.
        """
        row_N = row_numbers(rows_N)
        expected = (len(row_N), self._row_nbytes)
        if out_NX.shape != expected or out_NX.dtype != np.uint8:
            raise WrongRows(f"{len(row_N)} rows need uint8 {list(expected)}, not {out_NX.dtype} {list(out_NX.shape)}")
        inside_N = (row_N >= 0) & (row_N < len(self.present_R))
        if len(row_N) > 1 and inside_N.all() and self._verified_R[row_N].all():  # verified, and so present
            offset_N = self._offset_R[row_N]
            step_N = np.diff(offset_N)
            if (step_N == step_N[0]).all():  # evenly spaced rows are one strided array
                out_NX[...] = np.ndarray(expected, np.uint8, self._file_B, offset_N.item(0), (step_N.item(0), 1))
                return
        for out_X, row in zip(out_NX, row_N.tolist(), strict=True):
            out_X[...] = self.row(row)  # copied while what was verified is still in the cache

    def verify_all(self) -> None:
        """Touches every present row. Raises DamagedObject at the first that fails its checksum."""
        for row in np.flatnonzero(self.present_R).tolist():
            self.row(row)


def _descriptor(file: BinaryIO) -> int | None:
    try:
        return file.fileno()
    except UnsupportedOperation:
        return None


def row_numbers(rows_N: Rows) -> NDArray[np.int64]:
    """The rows as one array. Raises WrongRows for what would have to be rounded, or is no list."""
    row_N = np.asarray(rows_N)
    if row_N.ndim != 1 or (row_N.size and row_N.dtype.kind not in "iu"):
        raise WrongRows(f"rows are a list of integers, not {row_N.dtype} {list(row_N.shape)}")
    return row_N.astype(np.int64)


def verify_seal(data_B: NDArray[np.uint8], seal_4: NDArray[np.uint8], name: str, what: str) -> None:
    """Raises DamagedObject unless the seal is the crc32c of the data."""
    stored = int.from_bytes(seal_4.tobytes(), "little")
    computed = crc32c(data_B)
    if stored != computed:
        values = f"stored {crc32c_hex(stored)}, computed {crc32c_hex(computed)}"
        raise _damaged(name, f"{what} fails its checksum: {values}")


def _damaged(name: str, what: str) -> DamagedObject:
    return DamagedObject(f"{name}: {what}; `statsvc verify --repair` removes it, and the next run restores it")
