"""What a store holds, counted from its commits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from statsvc.store.commits import Commit
from statsvc.store.index import Index, read_index
from statsvc.store.reader import Store, Teacher
from statsvc.store.records import read_run


def describe(store: Store) -> dict[str, Any]:
    """The contents of `statsvc status --json`."""
    index = read_index(store.backend, store.ledger)
    with_problems = [shard for shard, entry in index.items() if entry.failed]
    quarantine = read_run(store.backend).quarantine
    return {
        "rows_per_shard": store.rows_per_shard,
        "views_per_image": store.views_per_image,
        "dataset_shards": len(index),
        "samples": sum(entry.samples for entry in index.values()),
        "problems": [
            found
            for _, commit in store.ledger.scan("index", shards=with_problems)
            if commit
            for found in _failures(commit, commit.name)
        ],
        "teachers": {name: _teacher(store, store.teacher(name), index) for name in store.teachers()},
        "quarantined": [
            {"phase": phase, "dataset_shard": name, "reason": reason}
            for phase, shards in quarantine.items()
            for name, reason in shards.items()
        ],
    }


def print_status(found: dict[str, Any], report: Callable[[str], None]) -> None:
    """The same for people."""
    views = f", {found['views_per_image']} views of each" if found["views_per_image"] > 1 else ""
    report(f"{found['dataset_shards']} dataset shards indexed, {found['samples']} samples{views}")
    for name, teacher in found["teachers"].items():
        shapes = ", ".join(f"{output} {shape['tokens']}x{shape['dim']}" for output, shape in teacher["outputs"].items())
        report(f"teacher {name}: {shapes}")
        report(f"  measured {teacher['measured']} dataset shards; fitted: {', '.join(teacher['fitted']) or 'not yet'}")
        for output, methods in teacher["fits"].items():
            for method, fit in methods.items():
                if isinstance(fit, dict):
                    report(f"  refused for {output}: {fit['refused']}")
                elif method == "phi-s":
                    report(f"  phi-s of {output}: {fit}")
        for cache_set, cached in teacher["cached"].items():
            counts = ", ".join(f"{count} {status}" for status, count in cached["status"].items())
            report(
                f"  cached {cached['dataset_shards']} dataset shards in {cache_set}: {counts}; {cached['bytes']} bytes"
            )
            for failure in cached["failed"]:
                report(f"    {_line(failure)}")
    for problem in found["problems"]:
        report(_line(problem))
    for held in found["quarantined"]:
        report(f"quarantined in the {held['phase']} phase: {held['dataset_shard']}: {held['reason']}")


def _line(failure: dict[str, Any]) -> str:
    return f"{failure['dataset_shard']} {failure['key']} (position {failure['position']}): {failure['reason']}"


def _teacher(store: Store, teacher: Teacher, index: Index) -> dict[str, Any]:
    cached = {}
    for cache_set in teacher.cache_sets():
        shards, nbytes, status, failed = 0, 0, Counter[str](), list[dict[str, Any]]()
        for shard, commit in store.ledger.scan("cache", teacher.name, cache_set):
            if commit is not None:
                shards += 1
                nbytes += sum(record.bytes for record in commit.objects)
                status.update(commit.status or {})
                failed += _failures(commit, index[shard].name if shard in index else None)
        cached[cache_set] = {"dataset_shards": shards, "status": dict(status), "bytes": nbytes, "failed": failed}
    made = [{m for m, fit in methods.items() if isinstance(fit, str)} for methods in teacher.fits().values()]
    return {
        "fingerprint": teacher.fingerprint,
        "outputs": {name: {"tokens": shape.tokens, "dim": shape.dim} for name, shape in teacher.outputs.items()},
        "measured": len(store.ledger.shards("measure", teacher.name)),
        "fitted": sorted(set.intersection(*made)) if made else [],
        "fits": teacher.fits(),
        "cached": cached,
    }


def _failures(commit: Commit, name: str | None) -> list[dict[str, Any]]:
    return [{"dataset_shard": name, **failure._asdict()} for failure in commit.failed]
