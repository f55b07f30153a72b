"""One process, or several that `torchrun` started and that train one student together: each its part of every batch."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed

from statsvc.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ONE_REQUEST_SECONDS = 2.0


@dataclass
class Processes:
    """Rank and number of the processes, and the device of this one.

    stopping  whether this process was asked to stop; the others learn of it by `any`
    """

    rank: int
    world_size: int
    device: torch.device
    stopping: bool = field(default=False, init=False)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def total(self, sums: Iterable[torch.Tensor]) -> None:
        """Add up tensors over all processes, in place."""
        if self.world_size > 1:
            for tensor in sums:
                shared = tensor.to(self.device)
                distributed.all_reduce(shared)
                tensor.copy_(shared)

    def mean_and_any(self, value: torch.Tensor, flag: bool) -> tuple[float, bool]:
        """The mean of a scalar, and whether the flag is set anywhere: one exchange for what every step must know."""
        both = torch.stack([value.detach().float(), torch.tensor(float(flag), device=self.device)])
        if self.world_size > 1:
            distributed.all_reduce(both)
        mean, count = (both / torch.tensor([self.world_size, 1.0], device=self.device)).tolist()
        return mean, count > 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world_size > 1:
            distributed.barrier()


@contextmanager
def processes() -> Iterator[Processes]:
    """Those of torchrun, or this one; the first Ctrl-C or SIGTERM asks them to stop, the second stops at once."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    found = Processes(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), device)
    if device.type == "cuda":
        torch.cuda.set_device(device)

    first = 0.0

    def on_signal(*_: Any) -> None:
        nonlocal first
        # torchrun passes on a SIGTERM that a scheduler has sent to every process already: that is one request.
        if found.stopping and time.monotonic() > first + ONE_REQUEST_SECONDS:
            raise Interrupted("interrupted at once; the same command goes on from the last checkpoint, if there is one")
        first = first if found.stopping else time.monotonic()
        found.stopping = True

    before = {number: signal.signal(number, on_signal) for number in SIGNALS}
    try:
        if found.world_size > 1:
            cuda = device.type == "cuda"
            distributed.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if found.world_size > 1 and distributed.is_initialized():
            distributed.destroy_process_group()


def deaf(_: int) -> None:
    """For processes of a DataLoader: a Ctrl-C reaches them too, and whether to go on is their parent's to decide."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def reading_processes(asked: int | str, device: torch.device) -> int:
    """How many processes each rank reads with, by default half of the cores that are its own, and no more than 8.

    A student that is trained on these very cores would rather have them: then a quarter of them read.
    """
    if isinstance(asked, int):
        return asked
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, cores // 4) if device.type == "cpu" else max(1, min(8, cores // 2))
