"""Where batches are put together: fresh memory or buffers that are used again, in shared memory or not.

A DataLoader worker hands its batch over by sending where it lies: one piece of shared memory for the whole batch, into
which rows were read in the first place. Nothing is copied on the way.

A buffer is used again when nothing in the training process refers to the batch's arrays, or to views of them, any more.

Suffix: X = bytes of a batch.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

from statsvc.errors import PlanError

Shape = tuple[int, ...]
PINNED = 4  # buffers at least: a copy to a device may still run when its batch is dropped
ALIGNMENT = 4096  # of every array of a batch: what a device copies fastest


class Slab:
    """One piece of memory for all arrays of a batch, taken in order; its last byte tells whether they are in use."""

    def __init__(self, memory_X: torch.Tensor) -> None:
        self.memory_X, self._taken = memory_X, 0

    @staticmethod
    def size(arrays: list[tuple[Shape, torch.dtype]]) -> int:
        """Bytes that these arrays take."""
        return sum(_room(shape, dtype) for shape, dtype in arrays)

    @property
    def in_use(self) -> bool:
        return bool(self.memory_X[-1])

    def take(self, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        """The next array, uninitialized."""
        begin, self._taken = self._taken, self._taken + _room(shape, dtype)
        return _array(self.memory_X, begin, shape, dtype)

    def begin(self) -> Slab:
        """Take from the beginning, for a batch that will be in use."""
        self.memory_X[-1], self._taken = 1, 0
        return self


def lend(content: dict[str, Any], memory_X: torch.Tensor) -> dict[str, Any]:
    """Mark the slab as free once all arrays in `content` that lie in it are gone."""
    arrays = [array for array in _arrays(content) if _lies_in(array, memory_X)]
    left = len(arrays)

    def gone() -> None:
        nonlocal left
        left -= 1
        if not left:
            memory_X[-1] = 0

    for array in arrays:
        weakref.finalize(array, gone).atexit = False
    return content


class Ring(NamedTuple):
    """Whose buffers are used again: of which dataset, of which of its workers, and which of that one's rings."""

    dataset: str
    worker: int
    name: str


class Batch(dict[str, Any]):
    """A batch whose arrays lie in one slab of shared memory; it arrives in another process as a plain dict.

    ring  to which the slab belongs; None: it is not used again
    """

    def __init__(self, content: dict[str, Any], slab: Slab, ring: Ring | None) -> None:
        super().__init__(content)
        self.slab, self.ring = slab, ring

    def __copy__(self) -> Batch:  # DataLoader's default_convert copies mappings
        return Batch(dict(self), self.slab, self.ring)

    def __reduce__(self) -> tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]:
        memory_X = self.slab.memory_X

        def located(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: located(each) for name, each in value.items()}
            if isinstance(value, torch.Tensor) and _lies_in(value, memory_X):
                return _Located(value.data_ptr() - memory_X.data_ptr(), tuple(value.shape), value.dtype)
            return value

        return _rebuilt, (located(dict(self)), memory_X, self.ring)


class _Located(tuple[int, Shape, torch.dtype]):
    """Where an array lies in its slab."""

    __slots__ = ()

    def __new__(cls, *where: Any) -> _Located:
        return super().__new__(cls, where)

    def __reduce__(self) -> tuple[type[_Located], tuple[Any, ...]]:
        return _Located, tuple(self)


# What worker processes use again stays mapped here: to map it anew for every batch costs as much as to read it.
_mapped: dict[tuple[str, int], tuple[str, list[torch.Tensor]]] = {}


def forget(dataset: str) -> None:
    """Let go of what the workers of a dataset shared with this process."""
    for key in [key for key in _mapped if key[0] == dataset]:
        del _mapped[key]


def _rebuilt(content: dict[str, Any], memory_X: torch.Tensor, ring: Ring | None) -> dict[str, Any]:
    if ring is not None:
        name, known = _mapped.get((ring.dataset, ring.worker), ("", []))
        if name != ring.name:
            name, known = ring.name, []
            _mapped[ring.dataset, ring.worker] = name, known
        if all(kept_X.data_ptr() != memory_X.data_ptr() for kept_X in known):
            known.append(memory_X)

    def found(value: Any) -> Any:
        if isinstance(value, _Located):
            return _array(memory_X, *value)
        if isinstance(value, dict):
            return {name: found(each) for name, each in value.items()}
        return value

    result: dict[str, Any] = found(content)
    return result if ring is None else lend(result, memory_X)


def slabs(nbytes: int, *, reuse: bool) -> Iterator[Slab]:
    """Slabs without end; with `reuse`, those that are no longer in use again, and new ones while all are.

    In a DataLoader worker they lie in shared memory; else, those that are reused are pinned where there is a CUDA
    device, and PINNED of them are used in turn. Raises PlanError where there is no memory for them.
    """
    ring: deque[Slab] = deque()
    pinned = reuse and torch.cuda.is_available() and get_worker_info() is None
    while True:
        free = next((slab for slab in ring if not slab.in_use), None)
        if free is None or (pinned and len(ring) < PINNED):
            try:
                free = Slab(_memory(nbytes + 1, pinned=pinned))
            except RuntimeError as error:
                raise PlanError(
                    f"no memory for another batch of {nbytes} bytes ({error}); in a container give it more shared "
                    "memory (docker run --shm-size), or take smaller batches"
                ) from error
        else:
            ring.remove(free)
        if reuse:
            ring.append(free)
        yield free.begin()


def _memory(nbytes: int, *, pinned: bool) -> torch.Tensor:
    if get_worker_info() is not None:
        storage = torch.UntypedStorage._new_shared(nbytes)  # type: ignore[no-untyped-call]
        return torch.empty(0, dtype=torch.uint8).set_(storage)
    if pinned:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    # numpy asks for huge pages, torch does not. Measured: batches of 34 MB are then read two to three times as fast.
    return torch.from_numpy(np.empty(nbytes, np.uint8))


def _room(shape: Shape, dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def _array(memory_X: torch.Tensor, begin: int, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    # Not a view of the slab: views that others take of it then keep this array alive, and with it the slab in use.
    strides = torch.empty(shape, dtype=dtype, device="meta").stride()
    return torch.empty(0, dtype=dtype).set_(memory_X.untyped_storage(), begin // dtype.itemsize, shape, strides)


def _arrays(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _arrays(each)


def _lies_in(array: torch.Tensor, memory_X: torch.Tensor) -> bool:
    begin = memory_X.data_ptr()
    return begin <= array.data_ptr() < begin + memory_X.numel() and array.is_contiguous()
