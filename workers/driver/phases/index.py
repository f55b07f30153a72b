"""The index phase: the number of every dataset shard, the shape of the store, and what describes its teachers."""

from __future__ import annotations

from dataclasses import asdict

from statsvc.dataset.shards import ShardReader, ShardSummary
from statsvc.errors import UnreadableShard
from statsvc.store.arrays import declare_arrays, declare_group
from statsvc.store.commits import Ledger
from statsvc.store.layout import FORMAT, sample_arrays
from statsvc.store.paths import teacher_group
from statsvc.store.sealed import with_checksum
from workers.driver.fingerprint import fingerprint
from workers.driver.phases.base import Run
from workers.engines.base import ATTEMPTS
from workers.unit.index import index_shard


def index(run: Run) -> None:
    """Number the new dataset shards; index those that have to be read now, the others when they are read anyway."""
    plan, worklist, per_image = run.plan, run.worklist, run.plan.views.per_image
    summaries = _read_headers(run, worklist.unread_shards())
    rows = _rows_per_shard(run, summaries)
    if worklist.state.root is None:
        views = plan.views.settings()
        about = {"format": FORMAT, "rows_per_shard": rows, "views": views, "images": list(plan.data.images)}
        declare_group(run.backend, "", with_checksum(about))
    kept = rows // per_image
    for name in [name for name, summary in summaries.items() if summary.samples > kept]:
        run.quarantine("index", name, f"holds {summaries.pop(name).samples} samples, this store keeps {kept}")
    numbers = worklist.number([*worklist.numbers, *summaries])
    declare_arrays(run.backend, sample_arrays(rows).values(), max(numbers.values(), default=-1) + 1)
    ledger = Ledger(run.backend)
    for name, summary in summaries.items():
        index_shard(numbers[name], name, summary, rows, per_image, run.backend, ledger)
        run.check()
    if summaries:
        run.keep_index()
    _describe_teachers(run)
    run.reread()
    run.declare_arrays()


def _read_headers(run: Run, names: list[str]) -> dict[str, ShardSummary]:
    """What dataset shards hold, without those that cannot be read."""
    summaries: dict[str, ShardSummary] = {}
    if names:
        with run.show.phase("index", len(names), "dataset shards") as bar:
            for name in names:
                summary = _scan(run, name)
                if summary is not None:
                    summaries[name] = summary
                bar.advance(1)
                run.check()
    return summaries


def _scan(run: Run, name: str) -> ShardSummary | None:
    """Read a dataset shard for its index; None once it is given up."""
    for attempt in range(1, ATTEMPTS + 1):
        reader = ShardReader(run.request.shards[name].location, run.plan.data.images, keep_images=False)
        try:
            for _ in reader:
                pass
            return reader.summary
        except UnreadableShard as error:
            if attempt == ATTEMPTS:
                run.quarantine("index", name, str(error))
    return None


def _rows_per_shard(run: Run, summaries: dict[str, ShardSummary]) -> int:
    """Of the store, else as the plan says, else of the largest dataset shard. Raises UnreadableShard where all fail."""
    plan, root = run.plan, run.worklist.state.root
    if root is not None:
        return root.rows_per_shard
    told = (run.worklist.told.get(name, 0) for name in run.worklist.new_shards())
    samples = plan.data.rows_per_shard or max((*told, *(found.samples for found in summaries.values())), default=0)
    if not samples:
        raise UnreadableShard(
            f"none of the {len(run.request.shards)} dataset shards of the plan holds a sample that could be read; "
            "check data.shards, and after mending them use `statsvc run --retry`"
        )
    return samples * plan.views.per_image


def _describe_teachers(run: Run) -> None:
    """Metadata of the new teachers. Appending dataset shards is no reason to rewrite that of the others."""
    for name, outputs in run.ready.outputs.items():
        if name in run.worklist.state.teachers:
            continue
        resolved, settings = run.request.teachers[name], run.worklist.settings[name]
        about = {
            "fingerprint": fingerprint(settings),
            "settings": settings,
            "outputs": {output: shape.describe() for output, shape in outputs.items()},
            "preprocessing": asdict(resolved.preprocessing) | resolved.about,
            "environment": run.ready.environment,
        }
        declare_group(run.backend, "teachers", {})
        declare_group(run.backend, teacher_group(name), with_checksum(about))
