"""One rank of a training job, in a process of its own that imports no more than it needs."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed
from torch.utils.data import DataLoader

from statsvc.student import TargetDataset


def train(rank: int, port: int, location: str, results: Any) -> None:
    """Put the rows of this rank into `results`."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    dataset = TargetDataset(location, batch_size=4, teachers=["wide"])  # rank and world size are those of the group
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(5, 1))
    rows = []
    for batch in DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork"):
        model(batch["targets"]["wide"]["patches"]).mean().backward()  # hangs unless ranks have as many batches
        rows += batch["rows"][~batch["padding"]].tolist()
    results[rank] = rows
    torch.distributed.destroy_process_group()
