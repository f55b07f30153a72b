"""Rows of a feature shard that cannot be mapped into memory: fetched in as few ranges as possible, each row checked.

Shape suffixes: R = rows of the shard, N = rows in one call, U = different rows among them, X = bytes of one row.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from statsvc.backends import Backend
from statsvc.checksum import CRC_NBYTES, crc32c, crc32c_hex
from statsvc.errors import AbsentRow, DamagedObject, WrongRows
from statsvc.ledger import ObjectRecord
from statsvc.shardfile import NO_CHUNK, Rows, decode_index, index_nbytes, row_numbers, verify_seal

# Rows are checked and copied out of so much memory while it is in the processor's cache. Measured with rows of 256 KiB
# from a service on the same machine: 24 ms for 100 MB; 44 ms when blocks of 16 MiB are fetched first, then checked.
SCRATCH_NBYTES = 512 << 10
GAP_NBYTES = 64 << 10  # between two rows: reading on is cheaper than asking again


class RemoteShard:
    """As ShardFile, of an object behind a backend that can only fetch. Several threads may read at once.

    A row is checked whenever it is read. That it is the committed shard, and not a sound one of other rows, is for
    the backend to know; `verify_all` sees for itself.

    present_R  [rows] bool: whether the row is there

    Raises DamagedObject and FileNotFoundError.
    """

    def __init__(self, backend: Backend, record: ObjectRecord, rows: int, row_nbytes: int) -> None:
        self.name = record.path
        self._backend, self._record, self._row_nbytes = backend, record, row_nbytes
        tail_B = np.empty(min(index_nbytes(rows), record.bytes), np.uint8)
        with backend.fetch(record, record.bytes - len(tail_B), record.bytes) as fill:
            fill(tail_B.data)
        self._offset_R = decode_index(tail_B, record.bytes, rows, row_nbytes, self.name)
        self.present_R = self._offset_R >= 0

    def read(self, rows_N: Rows, out_NX: NDArray[np.uint8]) -> None:
        """Copies rows, in any order, to out_NX, [len(rows_N), row_nbytes] uint8.

        Raises AbsentRow or DamagedObject; part of out_NX may then be filled.
        """
        row_N = row_numbers(rows_N)
        expected = (len(row_N), self._row_nbytes)
        if out_NX.shape != expected or out_NX.dtype != np.uint8:
            raise WrongRows(f"{len(row_N)} rows need uint8 {list(expected)}, not {out_NX.dtype} {list(out_NX.shape)}")
        rows = len(self.present_R)
        absent_N = (row_N < 0) | (row_N >= rows) | ~self.present_R[row_N.clip(0, rows - 1)]
        if absent_N.any():
            row = row_N[absent_N.argmax()]
            raise AbsentRow(f"{self.name} has no row {row}: present_R says which of 0 to {rows - 1} it has")
        row_U, first_U, u_N = np.unique(row_N, return_index=True, return_inverse=True)
        for u, chunk_B in self._chunks(row_U):
            out_NX[first_U[u]] = chunk_B[:-CRC_NBYTES]
        for again in np.flatnonzero(first_U[u_N] != np.arange(len(row_N))).tolist():
            out_NX[again] = out_NX[first_U[u_N[again]]]

    def verify_all(self) -> None:
        """Reads every present row. Raises DamagedObject at the first that fails, or if they are not those committed."""
        row_P = np.flatnonzero(self.present_R)
        crc_P4 = np.empty((len(row_P), CRC_NBYTES), np.uint8)
        for p, chunk_B in self._chunks(row_P):
            crc_P4[p] = chunk_B[-CRC_NBYTES:]
        entry_R2 = np.full((len(self.present_R), 2), NO_CHUNK, "<u8")
        entry_R2[row_P, 0], entry_R2[row_P, 1] = self._offset_R[row_P], self._row_nbytes + CRC_NBYTES
        content = crc32c_hex(crc32c(entry_R2, crc32c(crc_P4)))
        if content != self._record.content_crc32c:
            raise DamagedObject(
                f"{self.name}: a shard with other rows: contents {content}; {self._record.content_crc32c} due; "
                "`statsvc verify --repair` removes the damage, the next run restores it"
            )

    def _chunks(self, row_U: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """u and row_U[u] with its checksum, which is right, in the order of the file. The next overwrites it."""
        chunk_nbytes = self._row_nbytes + CRC_NBYTES
        order_U = np.argsort(self._offset_R[row_U], kind="stable")
        begin_U = self._offset_R[row_U][order_U]
        end_U = begin_U + chunk_nbytes
        scratch_B = np.empty(min(max(SCRATCH_NBYTES, chunk_nbytes + GAP_NBYTES), self._record.bytes), np.uint8)
        far_U = (begin_U[1:] > end_U[:-1] + GAP_NBYTES) | (begin_U[1:] < end_U[:-1])
        ranges = [0, *(np.flatnonzero(far_U) + 1).tolist(), len(row_U)]
        for first, last in pairwise(ranges if len(row_U) else ()):
            position = int(begin_U[first])
            with self._backend.fetch(self._record, position, int(end_U[last - 1])) as fill:
                while first < last:
                    through = first + int(np.searchsorted(end_U[first:last], position + len(scratch_B), "right"))
                    block_B = scratch_B[: end_U[through - 1] - position]
                    fill(block_B.data)
                    for u in range(first, through):
                        begin = int(begin_U[u]) - position
                        chunk_B = block_B[begin : begin + chunk_nbytes]
                        verify_seal(chunk_B, self.name, f"row {row_U[order_U[u]]}")
                        yield int(order_U[u]), chunk_B
                    position, first = int(end_U[through - 1]), through
