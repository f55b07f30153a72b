"""Where an epoch stands, told to the processes that read it: DataLoader workers keep their own copy of a dataset.

The training process says in which epoch and at which batch the next iteration begins, in memory that its workers
share; persistent workers are told like new ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import get_worker_info

from statsvc.errors import PlanError

MOST_WORKERS = 4096
EPOCH, STEP, TAKEN = 0, 1, 2  # in the shared memory; from TAKEN on, which workers have taken the step


class Position:
    """Of one iteration in this process, and of the next one in all of them."""

    def __init__(self) -> None:
        self._shared = torch.zeros(TAKEN + MOST_WORKERS, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._next: tuple[int, int] | None = None  # epoch and batch, of the iteration in this process
        self._own_step: int | None = None  # where this worker's next iteration begins, if it was told so itself

    @property
    def epoch(self) -> int:
        """Of the next iteration."""
        return int(self._shared[EPOCH])

    @property
    def next(self) -> tuple[int, int]:
        """Epoch and number of the batch that comes next: of the iteration in this process, else of the one to begin."""
        return self._next or (self.epoch, int(self._shared[STEP]))

    def set_epoch(self, epoch: int) -> None:
        """The next iteration begins this epoch; where it was broken off, if that is where `resume` put it."""
        if epoch < 0:
            raise PlanError(f"an epoch is 0 or more, not {epoch}")
        if epoch != self.epoch:
            self._put(epoch, 0)
        self._next = None

    def resume(self, epoch: int, step: int) -> None:
        """The next iteration, and no other, begins at that batch of the epoch."""
        if get_worker_info() is not None:  # a loader restores its workers one by one
            self._shared[EPOCH], self._own_step = epoch, step
        else:
            self._put(epoch, step)
        self._next = None

    def begin(self, worker: int, workers: int) -> tuple[int, int]:
        """Epoch and number of this worker's first batch."""
        if self._own_step is not None:
            step, self._own_step = self._own_step, None
        else:
            step = int(self._shared[STEP]) + worker
            if self._shared[STEP]:
                self._shared[TAKEN + worker] = 1
                # Each worker marks that it has read the step; who sees all marks takes it away, be it twice.
                if self._shared[TAKEN : TAKEN + workers].all():
                    self._put(self.epoch, 0)
        self._next = self.epoch, step
        return self._next

    def passed(self, epoch: int, step: int) -> None:
        """The batch before this one was given away by this process."""
        self._next = epoch, step

    def _put(self, epoch: int, step: int) -> None:
        self._shared[TAKEN:] = 0
        self._shared[EPOCH], self._shared[STEP] = epoch, step

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self._shared.is_shared():  # a copy that was not sent to a worker
            self._shared.share_memory_()
