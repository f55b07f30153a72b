"""What leaves a store as one file: a transform as safetensors, npz or ONNX, the targets of an output as npy.

Suffixes: N = rows, T = tokens, D = channels of the teacher, k = channels of a target.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from statsvc.errors import AbsentRow, DiskFull, NotFound, PlanError
from statsvc.numerics.transform import Transform
from statsvc.numerics.transform_files import ENCODE
from statsvc.storage.atomic_file import AtomicFile
from statsvc.store.paths import is_raw, transform_path
from statsvc.store.reader import Store, Targets, Teacher, open_store

BLOCK_NBYTES = 32 << 20  # of float32 features that are in memory at once
# What can be chosen of each format; the first dtype is what is written when none is asked for.
DTYPES = {
    "safetensors": ("float64", "float32"),
    "npz": ("float64", "float32"),
    "onnx": ("float32",),
    "npy": ("float32", "float16"),
}
OPTIONS = {
    "safetensors": {"method", "digest"},
    "npz": {"method", "digest"},
    "onnx": {"method", "digest", "inverse"},
    "npy": {"method", "space", "cache_set", "rows"},
}
SPELLED = {"cache_set": "--set"}


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What to export; None stands for what the user left open.

    rows  "0,5,9", "0:1000" or both; a range means those of its rows that have a target
    """

    teacher: str
    output: str | None = None
    format: str | None = None
    dtype: str | None = None
    method: str | None = None
    digest: str | None = None
    inverse: bool = False
    space: str | None = None
    cache_set: str | None = None
    rows: str | None = None

    def settled(self, file: Path) -> tuple[str, str]:
        """Format and dtype. Raises PlanError for options of another format."""
        chosen = self.format or file.suffix.removeprefix(".").lower()
        if chosen not in DTYPES:
            raise PlanError(f"{file}: its suffix names no format; use .{', .'.join(DTYPES)}, or --format")
        for option in sorted(set.union(*OPTIONS.values()) - OPTIONS[chosen]):
            if getattr(self, option):
                fits = ", ".join(name for name, options in OPTIONS.items() if option in options)
                raise PlanError(f"{SPELLED.get(option, f'--{option}')} is for {fits}, not for {chosen}; leave it out")
        if self.dtype not in (None, *DTYPES[chosen]):
            raise PlanError(f"--dtype {self.dtype}: {chosen} is written as {' or '.join(DTYPES[chosen])}")
        return chosen, self.dtype or DTYPES[chosen][0]


def export(location: str, request: ExportRequest, file: Path, *, force: bool = False) -> str:
    """Write one file, and say what it holds. Raises PlanError for all that is not there or not allowed."""
    chosen, dtype = request.settled(file)
    _check_target(file, force)
    if chosen == "npy":
        _check_target(rows_file(file), force)
    store = open_store(location)
    try:
        teacher = store.teacher(request.teacher)
        if chosen == "npy":
            return _export_targets(_chosen_targets(teacher, request), request, file, dtype)
        transform = _chosen_transform(store, teacher, request)
    except NotFound as error:  # here it is an argument that names what is not there
        raise PlanError(str(error)) from error
    data = ENCODE[chosen](transform, dtype, request.inverse)
    with _writing(file) as (out,):
        out.write(data)
    return (
        f"wrote the {'inverse of the ' if request.inverse else ''}{transform.method} transform of {request.teacher} "
        f"{transform.output}, {len(transform.mean)} to {transform.rank} channels, digest {transform.digest}, "
        f"to {file}: {len(data)} bytes"
    )


def _chosen_transform(store: Store, teacher: Teacher, request: ExportRequest) -> Transform:
    if request.digest is None:
        return teacher.transform(request.method or "phi-s", request.output or "patches")
    if request.method is not None:
        raise PlanError("--method and --digest both choose the transform; give one of them")
    if not re.fullmatch(r"[0-9a-f]{64}", request.digest):
        raise PlanError(f"--digest {request.digest!r}: a digest has 64 hex digits; `statsvc status --json` lists them")
    if store.backend.size(transform_path(request.digest)) is None:
        raise PlanError(
            f"--digest {request.digest}: no such transform in this store; `statsvc status --json` lists them"
        )
    transform = store.transform(request.digest)
    if transform.fingerprint != teacher.fingerprint:
        raise PlanError(f"--digest {request.digest}: not of teacher {teacher.name}; name the teacher it was fitted to")
    if request.output not in (None, transform.output):
        raise PlanError(
            f"--digest {request.digest}: of {transform.output}, not of {request.output}; leave --output out"
        )
    return transform


# --- targets ---


def rows_file(file: Path) -> Path:
    """Beside the targets: int64 [N], the row of the store that each of them is."""
    return file.with_name(f"{file.name}.rows.npy")


def _chosen_targets(teacher: Teacher, request: ExportRequest) -> Targets:
    sets = teacher.cache_sets()
    if request.cache_set not in sets and (request.cache_set is not None or len(sets) != 1):
        there = ", ".join(sets) or "none yet: the cache phase comes last"
        raise PlanError(f"--set chooses one of the cache sets of {teacher.name}; there are {there}")
    chosen = request.cache_set or sets[0]
    if request.method is not None and not (is_raw(chosen) and request.space == "normalized"):
        raise PlanError(
            f"--method {request.method}: it chooses how raw features are normalized, with --space normalized; the "
            f"cache set {chosen} in this space needs no choice: leave it out"
        )
    return teacher.targets(request.output or "patches", chosen, request.method)


def _export_targets(targets: Targets, request: ExportRequest, file: Path, dtype: str) -> str:
    space, row_N = request.space or "teacher", chosen_rows(targets, request.rows)
    if not len(row_N):
        raise PlanError(
            f"no row of {request.teacher} to export{f' in --rows {request.rows}' if request.rows else ' yet'}"
        )
    try:
        tokens, channels = _write_targets(targets, row_N, file, space, dtype)
    except AbsentRow as error:
        if request.rows is None:
            raise
        raise PlanError(f"--rows: {error}; a range such as 0:1000 takes those that have a target") from error
    return (
        f"wrote {targets.output} of {request.teacher} in the {space} space, {len(row_N)} rows of {tokens} tokens x "
        f"{channels} channels as {dtype}, to {file}, and their row numbers to {rows_file(file)}"
    )


def chosen_rows(targets: Targets, asked: str | None) -> np.ndarray:
    """int64 [N]: rows as asked for, in that order; of a range those that have a target. None: all that have one."""
    if asked is None:
        return targets.rows()
    chosen, existing_R = [np.zeros(0, np.int64)], None
    for part in asked.split(","):
        found = re.fullmatch(r"\s*(\d{1,18})\s*|\s*(\d{0,18}):(\d{0,18})\s*", part)
        if found is None:
            raise PlanError(f"--rows {asked!r}: give row numbers and ranges, such as 0,5,9 or 0:1000")
        row, begin, end = found.groups()
        if row is not None:
            chosen.append(np.array([int(row)]))
            continue
        existing_R = targets.rows() if existing_R is None else existing_R
        first, last = np.searchsorted(existing_R, [int(begin or 0), int(end or 10**18)])
        chosen.append(existing_R[first:last])
    return np.concatenate(chosen)


def _write_targets(targets: Targets, row_N: np.ndarray, file: Path, space: str, dtype: str) -> tuple[int, int]:
    """In blocks of rows. Written, not mapped: a disk that fills up is then an error and not the end of the process."""
    from rich.console import Console
    from rich.progress import track

    tokens, channels = targets.read(row_N[:1], space).shape[1:]
    nbytes = len(row_N) * (tokens * channels * np.dtype(dtype).itemsize + row_N.itemsize)
    if (free := shutil.disk_usage(file.parent).free) < nbytes:
        raise DiskFull(
            f"{nbytes / 1e9:.2f} GB are needed, and {free / 1e9:.2f} GB are free for {file}; free some space"
        )
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": (len(row_N), tokens, channels),
    }
    step = max(1, BLOCK_NBYTES // (tokens * channels * 4))
    console = Console(stderr=True)
    with _writing(rows_file(file), file) as (numbers, out):
        np.save(numbers, row_N)
        np.lib.format.write_array_header_1_0(out, header)
        for begin in track(range(0, len(row_N), step), "export", console=console, disable=not console.is_terminal):
            block_NTk = targets.read(row_N[begin : begin + step], space)
            with np.errstate(over="ignore"):  # refused below
                stored_NTk = block_NTk.astype(dtype, copy=False)
            if not np.isfinite(stored_NTk).all():
                last = row_N[min(begin + step, len(row_N)) - 1]
                raise PlanError(f"--dtype {dtype}: rows {row_N[begin]} to {last} hold numbers beyond it; use float32")
            out.write(np.ascontiguousarray(stored_NTk).data)
    return tokens, channels


# --- files ---


def _check_target(file: Path, force: bool) -> None:
    if file.is_dir():
        raise PlanError(f"{file} is a folder; name a file in it")
    if file.exists() and not force:
        raise PlanError(f"{file} is there already; --force replaces it")
    if not file.parent.is_dir():
        raise PlanError(f"{file}: there is no folder {file.parent}; make it first")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise PlanError(f"{file}: user {os.getuid()} may not write in {file.parent}; choose another location")


@contextmanager
def _writing(*files: Path) -> Iterator[tuple[BinaryIO, ...]]:
    """Files that appear whole, in this order, when the block ends; none of them when it fails.

    An old last one goes before a new other one comes: it never stands beside what is not its own.
    """
    with ExitStack() as undo:
        try:
            written = []
            for file in files:
                written.append(AtomicFile(file))
                undo.callback(written[-1].discard)
            yield tuple(new.file for new in written)
            for file, new in zip(files, written, strict=True):
                if file != files[-1]:
                    files[-1].unlink(missing_ok=True)
                new.publish()
                undo.callback(file.unlink, missing_ok=True)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise DiskFull(
                f"the disk is full: {files[-1]} was not written; free some space, or choose another location"
            ) from error
        undo.pop_all()
