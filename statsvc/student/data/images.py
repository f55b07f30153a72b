"""The student's images: the dataset's own, by row, in the very view that the teachers saw.

Suffixes: N = rows, P = positions, S = side of the image in pixels, 3 = red, green, blue.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cachetools import LRUCache
from numpy.typing import NDArray

from statsvc.dataset.decode import Resize, Undecodable, decode, render
from statsvc.dataset.expand import expand
from statsvc.dataset.folder import FolderShard, files_of
from statsvc.dataset.keys import key_hash
from statsvc.dataset.shards import ShardReader
from statsvc.dataset.source import Location, show_location
from statsvc.dataset.urls import is_url
from statsvc.errors import NotFound, PlanError, ShardChanged
from statsvc.numerics.views import View
from statsvc.plan import Data
from statsvc.store.reader import Store

Span = tuple[int, int]
Triple = tuple[float, float, float]
Fetch = Callable[[str, int, str], memoryview]  # by URL, bytes and checksum of a tar
KEPT_SAMPLES = 400_000  # whose keys and places are kept in memory; other dataset shards are read through again
State = tuple[int, int, int]  # inode, bytes and time of the last change of a file


@dataclass(frozen=True, slots=True)
class IndexedShard:
    """Where each sample's image lies in a dataset shard that holds what the store's index says.

    read  gives the bytes of a span of the tar
    """

    keys: list[str]
    spans: list[Span | None]
    read: Callable[[Span], bytes]

    def image(self, position: int) -> bytes:
        """The encoded image of a sample. Raises ShardChanged where the file is no longer the one that was read."""
        span = self.spans[position]
        if span is None:
            raise ShardChanged(f"{self.keys[position]!r} has no image that can be used, and had one for the teachers")
        return self.read(span)


@dataclass(frozen=True, slots=True)
class Pixels:
    """What the student wants to see. mean and std are of pixels in [0, 1]; both None: uint8 as they are.

    Raises PlanError.
    """

    resize: Resize
    mean: Triple | None
    std: Triple | None

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise PlanError("image_mean and image_std are given both, or both None for uint8")
        for name, values in (("image_mean", self.mean), ("image_std", self.std)):
            if values is not None and not _is_triple(values, positive=name == "image_std"):
                rule = "three positive numbers" if name == "image_std" else "three numbers"
                raise PlanError(f"{name}={values!r}: give {rule}, for red, green and blue in [0, 1]")

    def shape(self, rows: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of so many images."""
        return (rows, 3, self.resize.size, self.resize.size), torch.uint8 if self.mean is None else torch.float32

    def normalize_(self, image_N3SS: torch.Tensor) -> None:
        """In place, from 0 to 255."""
        if self.mean is not None and self.std is not None:
            mean_311, std_311 = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
            image_N3SS.div_(255).sub_(mean_311).div_(std_311)


class Images:
    """Of all dataset shards that `data` names.

    fetch  brings the tar at a URL to this machine

    Raises PlanError for what `data` names and cannot be found.
    """

    def __init__(self, store: Store, data: Data, fetch: Fetch, pixels: Pixels) -> None:
        self.pixels = pixels
        self._store, self._fetch, self._kind = store, fetch, store.views.get("kind", "center")
        self._extensions = data.images
        self._locations: dict[str, Location] = {shard.name: shard.location for shard in expand(data)}
        # One with more samples than that is kept alone.
        self._indexed: LRUCache[int, IndexedShard] = LRUCache(
            KEPT_SAMPLES, getsizeof=lambda shard: min(len(shard.keys), KEPT_SAMPLES)
        )

    def check(self, shards: list[int]) -> None:
        """Raises NotFound where a dataset shard of the store is named nowhere."""
        for shard in shards:
            if self._name(shard) not in self._locations:
                raise NotFound(
                    f"the store's dataset shard {shard} ({self._name(shard)}) is not among the {len(self._locations)} "
                    "that shards=... names; name it too, or leave it out with only=..."
                )

    def keys(self, shard: int) -> list[str]:
        """The key of every sample, by position."""
        return self.indexed(shard).keys

    def read(self, shard: int, row_N: NDArray[np.int64], views_N5: NDArray[np.float32], out_N3SS: torch.Tensor) -> None:
        """Fill in the views of rows of one dataset shard. Raises ShardChanged where one is no image any more."""
        indexed = self.indexed(shard)
        for row, view_5, out_3SS in zip(row_N.tolist(), views_N5, out_N3SS, strict=True):
            position = row // self._store.views_per_image
            try:
                pixels_SS3 = self._render(indexed.image(position), view_5)
            except Undecodable as error:
                raise ShardChanged(
                    f"dataset shard {shard} ({self._name(shard)}), position {position}, {indexed.keys[position]!r}: "
                    f"the image was decoded for the teachers and now cannot be: {error}; use the same Pillow"
                ) from error
            out_3SS.numpy()[...] = pixels_SS3.transpose(2, 0, 1)
        self.pixels.normalize_(out_N3SS)

    def _render(self, image: bytes, view_5: NDArray[np.float32]) -> NDArray[np.uint8]:
        return render(decode(image), View.from_row(view_5, self._kind), self.pixels.resize)

    def indexed(self, shard: int) -> IndexedShard:
        """A dataset shard, read through once. Raises ShardChanged unless it is the one that was indexed."""
        if shard not in self._indexed:
            self._indexed[shard] = self._read_through(shard)
        return self._indexed[shard]

    def _read_through(self, shard: int) -> IndexedShard:
        commit = self._store.ledger.read("index", shard)
        if commit is None or commit.name is None:
            raise NotFound(f"dataset shard {shard} is not indexed")
        named = self._locations[commit.name]
        location: Location = named
        read: Callable[[Span], bytes]
        try:
            if isinstance(named, FolderShard):
                read = partial(_of_folder, {span: (path, _state(path)) for span, path in files_of(named)})
            elif is_url(str(named)):
                location = self._fetch(str(named), commit.size or 0, commit.etag or "")
                read = partial(_of_copy, location)
            else:
                path = Path(str(named))
                read = partial(_of_file, path, _state(path))
        except FileNotFoundError as error:
            raise ShardChanged(
                f"dataset shard {shard} ({commit.name}) is gone: there is no {error.filename}; restore it, or say "
                "where it lies now with shards=..."
            ) from error
        reader = ShardReader(location, self._extensions, keep_images=False)
        keys, spans = [], []
        for sample in reader:
            keys.append(sample.key)
            spans.append(sample.span)
        self._check_keys(shard, keys)
        if (reader.summary.size, reader.summary.etag) != (commit.size, commit.etag):
            raise ShardChanged(
                f"dataset shard {shard} ({commit.name}) at {show_location(named)} has the samples that were indexed "
                f"and other bytes: {reader.summary.size} with {reader.summary.etag}, then {commit.size} with "
                f"{commit.etag}; use the dataset that the teachers saw"
            )
        return IndexedShard(keys, spans, read)

    def _check_keys(self, shard: int, keys: list[str]) -> None:
        """Raises ShardChanged at the first sample that is not the one the teachers saw there."""
        views = self._store.views_per_image
        due_P16 = self._store.key_hashes(shard)[::views]
        found_P16 = np.zeros_like(due_P16)
        count = min(len(keys), len(due_P16))
        found_P16[:count] = np.frombuffer(b"".join(map(key_hash, keys[:count])), np.uint8).reshape(-1, 16)
        wrong_P = (found_P16 != due_P16).any(axis=1)
        if not wrong_P.any() and len(keys) <= len(due_P16):
            return
        position = int(wrong_P.argmax()) if wrong_P.any() else len(due_P16)
        what = f"dataset shard {shard} ({self._name(shard)}), position {position}"
        if position >= len(keys):
            raise ShardChanged(f"{what}: the dataset shard ends there; the store has a sample with another key")
        raise ShardChanged(
            f"{what}: the key found is {keys[position]!r}, not the one whose targets stand there; in the store that "
            f"key stands {self._where(keys[position])}; use the dataset that the teachers saw"
        )

    def _where(self, key: str) -> str:
        """Where in the store a key's hash stands."""
        wanted_16 = np.frombuffer(key_hash(key), np.uint8)
        for shard in self._store.ledger.shards("index"):
            found = np.flatnonzero((self._store.key_hashes(shard) == wanted_16).all(axis=1))
            if len(found):
                position = int(found[0]) // self._store.views_per_image
                return f"at position {position} of dataset shard {shard} ({self._name(shard)})"
        return "nowhere"

    def _name(self, shard: int) -> str:
        commit = self._store.ledger.read("index", shard)
        return (commit.name if commit else None) or str(shard)


def _is_triple(values: Any, *, positive: bool) -> bool:
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        return False
    return found.shape == (3,) and bool(np.isfinite(found).all() and (not positive or (found > 0).all()))


def _of_copy(tar: memoryview, span: Span) -> bytes:
    return bytes(tar[span[0] : span[0] + span[1]])


def _of_folder(files: dict[Span, tuple[Path, State]], span: Span) -> bytes:
    return _of_file(*files[span], (0, span[1]))


def _of_file(path: Path, state: State, span: Span) -> bytes:
    try:
        with path.open("rb", buffering=0) as file:
            if _state(file.fileno()) == state:
                return os.pread(file.fileno(), span[1], span[0])
    except FileNotFoundError:
        pass
    raise ShardChanged(f"{path} was replaced or removed while it was read; leave it alone and run again")


def _state(file: int | Path) -> State:
    found = os.stat(file)  # noqa: PTH116 - also of what is open
    return found.st_ino, found.st_size, found.st_mtime_ns
