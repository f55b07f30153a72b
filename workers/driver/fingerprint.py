"""What decides the numbers of a teacher: settled on the first run, kept by every later one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from statsvc.digests import canonical_json, sha256
from statsvc.errors import FingerprintMismatch
from statsvc.plan import Plan
from workers.engines.resources import worker_cpus
from workers.teachers.base import Resolved

Fields = dict[str, Any]


def settle(name: str, plan: Plan, resolved: Resolved, stored: dict[str, Fields]) -> Fields:
    """The fields of a teacher's fingerprint; what the plan leaves open is as the store has it, else chosen here.

    Raises FingerprintMismatch, naming the fields, where the store holds this teacher with others.
    """
    before = stored.get(name, {})
    # One batch goes through all teachers on the same threads, so these two are one choice for the whole store.
    shared = next(iter(stored.values()), None) or _defaults(plan)
    precision, batch_size = resolved.plan.precision, plan.engine.batch_size
    if batch_size not in ("auto", shared["batch_size"]) and stored and not before:
        raise FingerprintMismatch(
            f"engine.batch_size: {batch_size} differs from the {shared['batch_size']} that the other teachers of the "
            f"store {plan.store!r} were made with; use that, or another store"
        )
    fields: Fields = {
        "source": resolved.plan.source,
        "weights": resolved.weights,
        "taps": resolved.taps,
        **{key: value for key, value in asdict(resolved.preprocessing).items() if value is not None},
        "precision": precision if precision != "auto" else (before or _defaults(plan))["precision"],
        "views": plan.views.settings(),
        "batch_size": shared["batch_size"] if batch_size == "auto" else batch_size,
        "threads": shared["threads"],
    }
    # Only where it is chosen: teachers that were measured before this could be are still what they were.
    if plan.statistics.tokens_per_image is not None:
        fields["tokens_per_image"] = plan.statistics.tokens_per_image
    fields["mean"], fields["std"] = list(fields["mean"]), list(fields["std"])
    differing = [key for key in (before | fields if before else ()) if before.get(key) != fields.get(key)]
    if differing:
        values = "; ".join(f"{key} is {before.get(key)!r} there and {fields.get(key)!r} here" for key in differing)
        raise FingerprintMismatch(
            f"teachers.{name}: the store {plan.store!r} holds this teacher with other settings: {values}. Use those, "
            "or another store, or add the teacher under another name"
        )
    return fields


def fingerprint(fields: Fields) -> str:
    """64 hex digits."""
    return sha256(canonical_json(fields))


def _defaults(plan: Plan) -> Fields:
    """What neither plan nor store say. Large batches on a GPU; on a CPU they only cost memory."""
    import torch

    cuda = torch.cuda.device_count()
    # A driver may have no GPU, on the head of a cluster whose nodes have them.
    on_gpus = cuda or isinstance(plan.engine.gpus, int)
    return {
        "precision": "bfloat16" if on_gpus else "float32",
        "batch_size": 128 if on_gpus else 16,
        "threads": worker_cpus(plan, cuda),
    }
