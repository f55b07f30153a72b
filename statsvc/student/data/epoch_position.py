"""Where an epoch stands, told to the processes that read it: DataLoader workers keep their own copy of a dataset.

The training process says in which epoch and at which batch the next iteration begins, in memory that its workers
share; persistent workers are told like new ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import get_worker_info

from statsvc.errors import PlanError

EPOCH, STEP, TAKEN, BEGAN, FIELDS = 0, 1, 2, 3, 4  # in the shared memory


class Position:
    """Of one iteration in this process, and of the next one in all of them."""

    def __init__(self) -> None:
        self._shared = torch.zeros(FIELDS, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._next: tuple[int, int] | None = None  # epoch and batch, of the iteration in this process
        self._own_step: int | None = None  # where this worker's next iteration begins, if it was told so itself
        self._iterations = 0  # that this process has begun

    @property
    def epoch(self) -> int:
        """Of the next iteration."""
        return int(self._shared[EPOCH])

    @property
    def next(self) -> tuple[int, int]:
        """Epoch and number of the batch that comes next: of the iteration in this process, else of the one to begin.

        Raises PlanError where only workers know.
        """
        if self._next is None and self._shared[BEGAN] and get_worker_info() is None:
            raise PlanError(
                "DataLoader workers give batches ahead of time: say which one was used last, state_dict(batch)"
            )
        return self._next or (self.epoch, int(self._shared[STEP]))

    def set_epoch(self, epoch: int) -> None:
        """The next iteration begins this epoch; where it was broken off, if that is where `resume` put it."""
        if epoch != self.epoch:
            self._put(epoch, 0)
        self._shared[BEGAN], self._next = 0, None

    def resume(self, epoch: int, step: int) -> None:
        """The next iteration, and no other, begins at that batch of the epoch."""
        if get_worker_info() is not None:  # a loader restores its workers one by one
            self._shared[EPOCH], self._own_step = epoch, step
        else:
            self._put(epoch, step)
            self._shared[BEGAN] = 0
        self._next = None

    def begin(self, worker: int) -> tuple[int, int]:
        """Epoch and number of this worker's first batch."""
        self._iterations += 1
        if (info := get_worker_info()) is not None:
            self._shared[BEGAN] = 1
        if self._own_step is not None:
            step, self._own_step = self._own_step, None
        else:
            # The workers of one loader have seeds with one base; persistent ones begin again with the same. So this is
            # the same number for all workers of one iteration, however late they begin, and for no other iteration.
            base = info.seed - info.id if info else 0
            iteration = hash((base, self._iterations)) or 1
            if not self._shared[TAKEN]:
                self._shared[TAKEN] = iteration
            step = (int(self._shared[STEP]) if self._shared[TAKEN] == iteration else 0) + worker
        self._next = self.epoch, step
        return self._next

    def passed(self, epoch: int, step: int) -> None:
        """The batch before this one was given away by this process."""
        self._next = epoch, step

    def _put(self, epoch: int, step: int) -> None:
        self._shared[EPOCH], self._shared[STEP], self._shared[TAKEN] = epoch, step, 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self._shared.is_shared():  # a copy that was not sent to a worker
            self._shared.share_memory_()
