"""Which CPUs and GPUs each worker uses."""

from __future__ import annotations

import os

from statsvc.plan import Plan


def worker_cpus(plan: Plan, sharing: int) -> int:
    """CPUs for each worker, where so many share this machine."""
    if plan.engine.cpus_per_worker is not None:
        return plan.engine.cpus_per_worker
    return min(4, cores()) if plan.engine.kind == "ray" else max(1, cores() // max(1, sharing))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices() -> list[str]:
    """What computes on this machine: every visible GPU, else the CPU."""
    import torch

    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


def decoder_processes(plan: Plan, devices: int) -> int:
    """Decoder processes of each worker, where so many workers share this machine."""
    wanted = plan.engine.decoders
    return max(1, worker_cpus(plan, devices) - 1) if wanted == "auto" else wanted
