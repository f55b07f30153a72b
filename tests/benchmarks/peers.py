"""How other software writes and reads the same rows: one class per peer, one line in a visible table.

Each is used in the fastest way that was found for rows of one size in local files, uncompressed.

Shape suffixes: R = rows of the shard, T = tokens, C = channels.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

ReadRow = Callable[[int], NDArray[Any]]


class Peer(Protocol):
    package: str

    def write(self, folder: Path, data_RTC: NDArray[Any], shard_rows: int | None = None) -> None:
        """All rows into a folder that does not exist yet, in files of so many rows where that can be; None: in one."""

    def rows(self, folder: Path) -> ReadRow | None:
        """Opens; then one row at a time, in any order. None where the format has no such way."""

    def read_all(self, folder: Path, out_RTC: NDArray[Any]) -> Callable[[], None]:
        """Opens; then all rows, in order, into `out_RTC`."""


class Zarr:
    package = "zarr"

    def write(self, folder: Path, data_RTC: NDArray[Any], shard_rows: int | None = None) -> None:  # noqa: ARG002
        create_zarr(folder, data_RTC)[:] = data_RTC

    def rows(self, folder: Path) -> ReadRow:
        array = self._open(folder)
        return lambda row: array[row]

    def read_all(self, folder: Path, out_RTC: NDArray[Any]) -> Callable[[], None]:
        array = self._open(folder)
        return lambda: np.copyto(out_RTC, array[:])

    def _open(self, folder: Path) -> Any:
        return importlib.import_module("zarr").open_array(folder, mode="r")


class TensorStore:
    package = "tensorstore"

    def write(self, folder: Path, data_RTC: NDArray[Any], shard_rows: int | None = None) -> None:  # noqa: ARG002
        create_zarr(folder, data_RTC)  # the metadata; the chunks are its own
        self._open(folder).write(data_RTC).result()

    def rows(self, folder: Path) -> ReadRow:
        array = self._open(folder)
        return lambda row: array[row].read().result()

    def read_all(self, folder: Path, out_RTC: NDArray[Any]) -> Callable[[], None]:
        array = self._open(folder)
        return lambda: np.copyto(out_RTC, array.read().result())

    def _open(self, folder: Path) -> Any:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
        return importlib.import_module("tensorstore").open(spec).result()


class _RowByRow:
    def rows(self, folder: Path) -> ReadRow | None:
        raise NotImplementedError

    def read_all(self, folder: Path, out_RTC: NDArray[Any]) -> Callable[[], None]:
        row = self.rows(folder)
        assert row

        def read() -> None:
            for i in range(len(out_RTC)):
                out_RTC[i] = row(i)

        return read


class Mosaic(_RowByRow):
    """MDS; LocalDataset reads it faster than StreamingDataset, which also asks what to fetch next."""

    package = "mosaicml-streaming"

    def __init__(self) -> None:
        # Imported before there are stand-ins: transformers looks for torchvision too, and may be there really.
        for name in ("feature_extraction_utils", "tokenization_utils_base", "models.auto.tokenization_auto"):
            importlib.import_module(f"transformers.{name}")
        # Only its image data sets use torchvision, of which there is no build without CUDA beside this torch.
        stand_in("torchvision")
        stand_in("torchvision.datasets", VisionDataset=object)
        stand_in("torchvision.transforms")
        stand_in("torchvision.transforms.functional", to_tensor=None)
        self._library = importlib.import_module("streaming")

    def write(self, folder: Path, data_RTC: NDArray[Any], shard_rows: int | None = None) -> None:
        row_RTC = data_RTC[0]
        column = f"ndarray:{row_RTC.dtype}:{','.join(map(str, row_RTC.shape))}"
        whole = row_RTC.nbytes * (shard_rows or len(data_RTC)) + (1 << 20)
        with self._library.MDSWriter(out=str(folder), columns={"x": column}, size_limit=whole) as writer:
            for row_TC in data_RTC:
                writer.write({"x": row_TC})

    def rows(self, folder: Path) -> ReadRow:
        rows = self._library.LocalDataset(str(folder))
        return lambda row: rows[row]["x"]


class LitData(_RowByRow):
    package = "litdata"

    def __init__(self) -> None:
        self._library = importlib.import_module("litdata")
        # Every opening asks the package index for a newer version of it.
        vars(importlib.import_module("litdata.streaming.dataset"))["_check_version_and_prompt_upgrade"] = str

    def write(self, folder: Path, data_RTC: NDArray[Any], shard_rows: int | None = None) -> None:
        cache = importlib.import_module("litdata.streaming.cache").Cache(
            str(folder), chunk_size=shard_rows or len(data_RTC)
        )
        for row, row_TC in enumerate(data_RTC):
            cache._add_item(row, {"x": row_TC})  # as its own `optimize` does, without the processes
        cache.done()
        cache.merge()

    def rows(self, folder: Path) -> ReadRow:
        # By default it decodes many rows for each: measured, 60 times slower in random order and 5 times in order.
        rows = self._library.StreamingDataset(str(folder), batch_decode=0)
        return lambda row: rows[row]["x"]


class Safetensors(_RowByRow):
    package = "safetensors"

    def write(self, folder: Path, data_RTC: NDArray[Any], shard_rows: int | None = None) -> None:  # noqa: ARG002
        folder.mkdir()
        tensors = {str(row): row_TC for row, row_TC in enumerate(data_RTC)}
        importlib.import_module("safetensors.numpy").save_file(tensors, folder / "shard.safetensors")

    def rows(self, folder: Path) -> ReadRow:
        opened = importlib.import_module("safetensors").safe_open(folder / "shard.safetensors", "np")
        return lambda row: opened.get_tensor(str(row))


class WebDataset(_RowByRow):
    package = "webdataset"

    def write(self, folder: Path, data_RTC: NDArray[Any], shard_rows: int | None = None) -> None:
        folder.mkdir()
        library, step = importlib.import_module("webdataset"), shard_rows or len(data_RTC)
        for begin in range(0, len(data_RTC), step):
            with library.TarWriter(str(folder / f"{begin // step:06d}.tar")) as writer:
                for row, row_TC in enumerate(data_RTC[begin : begin + step], begin):
                    writer.write({"__key__": f"{row:06d}", "npy": row_TC})

    def rows(self, folder: Path) -> None:  # noqa: ARG002 - a tar is read from its beginning
        return None

    def read_all(self, folder: Path, out_RTC: NDArray[Any]) -> Callable[[], None]:
        library = importlib.import_module("webdataset")

        def read() -> None:
            rows = library.WebDataset(str(folder / "000000.tar"), shardshuffle=False).decode()
            for i, sample in enumerate(rows):
                out_RTC[i] = sample["npy"]

        return read


PEERS: dict[str, Callable[[], Peer]] = {
    "zarr-python": Zarr,
    "tensorstore": TensorStore,
    "MosaicML Streaming": Mosaic,
    "litData": LitData,
    "safetensors": Safetensors,
    "webdataset": WebDataset,
}


def stand_in(name: str, **attributes: Any) -> None:
    """An empty module under that name, unless the real one can be had."""
    try:
        importlib.import_module(name)
    except ImportError:
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        sys.modules[name] = module


def create_zarr(path: Path, data_RTC: NDArray[Any]) -> Any:
    """An array as our store declares them: one shard, one chunk per row, checksums, no compression."""
    zarr, codecs = importlib.import_module("zarr"), importlib.import_module("zarr.codecs")
    return zarr.create_array(
        store=str(path),
        shape=data_RTC.shape,
        chunks=(1, *data_RTC.shape[1:]),
        shards=data_RTC.shape,
        dtype=data_RTC.dtype,
        serializer=codecs.BytesCodec(),
        compressors=[codecs.Crc32cCodec()],
        filters=None,
    )


def working_peers(folder: Path, data_RTC: NDArray[Any]) -> tuple[dict[str, Peer], dict[str, str]]:
    """Those that write the rows and give the same ones back; and why the others do not."""
    found: dict[str, Peer] = {}
    missing: dict[str, str] = {}
    for name, make in PEERS.items():
        place, out_RTC = folder / "trial", np.zeros_like(data_RTC)
        try:
            peer = make()
            peer.write(place, data_RTC)
            peer.read_all(place, out_RTC)()
            row, last = peer.rows(place), len(data_RTC) - 1
            if not np.array_equal(out_RTC, data_RTC) or (row and not np.array_equal(row(last), data_RTC[last])):
                raise ValueError("it gives back other numbers")
            found[name] = peer
        except Exception as error:  # whatever foreign code comes across, the others are measured
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        shutil.rmtree(place, ignore_errors=True)
    return found, missing
