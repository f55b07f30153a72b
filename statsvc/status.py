"""What a store holds, counted from its commits."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from statsvc.layout import RUN
from statsvc.ledger import Commit
from statsvc.store import Store, Teacher


def describe(store: Store) -> dict[str, Any]:
    """The contents of `statsvc status --json`."""
    index = [commit for shard in store.ledger.shards("index") if (commit := store.ledger.read("index", shard))]
    try:
        quarantine = json.loads(store.backend.read(RUN)).get("quarantine", {})
    except (FileNotFoundError, ValueError):
        quarantine = {}
    return {
        "rows_per_shard": store.rows_per_shard,
        "views_per_image": store.views_per_image,
        "dataset_shards": len(index),
        "samples": sum(commit.samples or 0 for commit in index),
        "problems": _failures(index),
        "teachers": {name: _teacher(store, store.teacher(name)) for name in store.teachers()},
        "quarantined": [
            {"phase": phase, "dataset_shard": name, "reason": reason}
            for phase, shards in quarantine.items()
            for name, reason in shards.items()
        ],
    }


def print_status(found: dict[str, Any], echo: Callable[[str], Any]) -> None:
    """The same for people."""
    views = f", {found['views_per_image']} views of each" if found["views_per_image"] > 1 else ""
    echo(f"{found['dataset_shards']} dataset shards indexed, {found['samples']} samples{views}")
    for name, teacher in found["teachers"].items():
        shapes = ", ".join(f"{output} {shape['tokens']}x{shape['dim']}" for output, shape in teacher["outputs"].items())
        echo(f"teacher {name}: {shapes}")
        echo(f"  measured {teacher['measured']} dataset shards; fitted: {', '.join(teacher['fitted']) or 'not yet'}")
        for output, methods in teacher["fits"].items():
            for method, fit in methods.items():
                if isinstance(fit, dict):
                    echo(f"  refused for {output}: {fit['refused']}")
                elif method == "phi-s":
                    echo(f"  phi-s of {output}: {fit}")
        for cache_set, cached in teacher["cached"].items():
            counts = ", ".join(f"{count} {status}" for status, count in cached["status"].items())
            echo(
                f"  cached {cached['dataset_shards']} dataset shards in {cache_set}: {counts}; {cached['bytes']} bytes"
            )
            for failure in cached["failed"]:
                echo(f"    {_line(failure)}")
    for problem in found["problems"]:
        echo(_line(problem))
    for held in found["quarantined"]:
        echo(f"quarantined in the {held['phase']} phase: {held['dataset_shard']}: {held['reason']}")


def _line(failure: dict[str, Any]) -> str:
    return f"{failure['dataset_shard']} {failure['key']} (position {failure['position']}): {failure['reason']}"


def _teacher(store: Store, teacher: Teacher) -> dict[str, Any]:
    cached = {}
    for cache_set in teacher.cache_sets():
        shards = store.ledger.shards("cache", teacher.name, cache_set)
        commits = [c for shard in shards if (c := store.ledger.read("cache", shard, teacher.name, cache_set))]
        status: Counter[str] = Counter()
        for commit in commits:
            status.update(commit.status or {})
        names = {shard: c.name for shard in shards if (c := store.ledger.read("index", shard))}
        cached[cache_set] = {
            "dataset_shards": len(commits),
            "status": dict(status),
            "bytes": sum(record.bytes for commit in commits for record in commit.objects),
            "failed": _failures(commits, names),
        }
    made = [{m for m, fit in methods.items() if isinstance(fit, str)} for methods in teacher.fits().values()]
    return {
        "fingerprint": teacher.fingerprint,
        "outputs": {name: {"tokens": shape.tokens, "dim": shape.dim} for name, shape in teacher.outputs.items()},
        "measured": len(store.ledger.shards("measure", teacher.name)),
        "fitted": sorted(set.intersection(*made)) if made else [],
        "fits": teacher.fits(),
        "cached": cached,
    }


def _failures(commits: list[Commit], names: dict[int, str | None] | None = None) -> list[dict[str, Any]]:
    return [
        {"dataset_shard": commit.name or (names or {}).get(commit.shard), **failure._asdict()}
        for commit in commits
        for failure in commit.failed
    ]
