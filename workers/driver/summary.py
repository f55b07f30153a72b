"""What a run tells at its end: why normalization is needed, that it worked, what was written, what to do next.

Suffix: k = channels of a target.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from statsvc.errors import UnreadableShard
from statsvc.store.arrays import read_chunk
from statsvc.store.reader import Store
from workers.driver.sizes import count_samples
from workers.driver.worklist import Worklist
from workers.unit.job import TeacherJob


def print_summary(worklist: Worklist, store: Store, report: Callable[[str], None]) -> None:
    """One line per teacher and output, then counts, bytes and the next steps."""
    plan, jobs = worklist.plan, worklist.cache_jobs()
    reports = {
        (job.name, output): _report(store, job, output, plan.normalize) for job in jobs for output in job.outputs
    }
    wide = max(len("teacher"), *(len(job.name) for job in jobs))
    after = "" if worklist.is_raw else f"| after {plan.normalize}"
    columns = "" if worklist.is_raw else "| variance of channels MSE share"
    report(f"{'':{wide}}                  as the teacher gives them          {after}")
    report(f"{'teacher':{wide}} output  width     std  std of channels  MSE share {columns}")
    for output in dict.fromkeys(output for _, output in reports):
        rows = {name: found for (name, of), found in reports.items() if of == output}
        normalized = {} if worklist.is_raw else _normalized(store, [job for job in jobs if job.name in rows], output)
        before = sum(found["feature_variance"] for found in rows.values())
        for name, found in rows.items():
            low, high = found["channel_std"]
            report(
                f"{name:{wide}} {output:7} {found['dim']:5} {found['feature_std']:7.3g} {low:7.3g} to {high:<6.3g}"
                f"{found['feature_variance'] / before:9.2%} {normalized.get(name, '')}"
            )
    report("MSE share: a teacher's part of an unweighted MSE loss, for a student that knows nothing yet")
    _print_trust(reports, "views" if plan.views.per_image > 1 else "images", report)
    _print_written(store, jobs, plan.store, report)


def _report(store: Store, job: TeacherJob, output: str, method: str) -> dict[str, Any]:
    """On the plan's method; where features are cached as they are, that may have been refused, and any other serves."""
    reports: dict[str, dict[str, Any]] = store.teacher(job.name).report()[output]
    return reports.get(method) or next(iter(reports.values()))


def _normalized(store: Store, jobs: list[TeacherJob], output: str) -> dict[str, str]:
    """By teacher, how the variances of its cached targets look."""
    variances = {job.name: target_variance(store, job, output) for job in jobs}
    total = sum(float(np.nanmean(variance_k)) for variance_k in variances.values())
    return {
        name: f"| {variance_k.min():8.3f} to {variance_k.max():<8.3f} {variance_k.mean() / total:9.2%}"
        for name, variance_k in variances.items()
    }


def target_variance(store: Store, job: TeacherJob, output: str) -> np.ndarray:
    """[k] float64, ddof 1: variance of each channel over all cached targets, from what every dataset shard recorded."""
    targets = store.teacher(job.name).targets(output, job.cache_set)
    specs, k = targets.specs, targets.k
    weight, sum_k, square_k = 0, np.zeros(k), np.zeros(k)
    for shard, commit in store.ledger.scan("cache", job.name, job.cache_set):
        if commit is None or not commit.rows:
            continue
        mean_k = read_chunk(store.backend, specs["target_mean"], shard, commit)[0].astype(np.float64)
        var_k = read_chunk(store.backend, specs["target_var"], shard, commit)[0].astype(np.float64)
        weight += commit.rows
        sum_k += commit.rows * mean_k
        square_k += commit.rows * (var_k + mean_k**2)
    if not weight:
        return np.full(k, np.nan)
    count = weight * targets.tokens
    variance_k: np.ndarray = (square_k / weight - (sum_k / weight) ** 2) * (count / max(count - 1, 1))
    return variance_k


def _print_trust(reports: dict[tuple[str, str], dict[str, Any]], counted: str, report: Callable[[str], None]) -> None:
    for (name, output), found in reports.items():
        rms = found["expected_rms_error"]
        error = (
            f"unknown: too few {counted}"
            if rms is None
            else f"about {rms:.1%} (worst channel {found['expected_max_error']:.1%})"
        )
        state = "converged" if found["converged"] else "not converged"
        report(f"{name} {output}: {state} on {found['images']} {counted}; error of the target variances {error}")


def _print_written(store: Store, jobs: list[TeacherJob], location: str, report: Callable[[str], None]) -> None:
    total = 0
    for job in jobs:
        status, size, shards = Counter[str](), 0, 0
        for _, commit in store.ledger.scan("cache", job.name, job.cache_set):
            if commit is not None:
                status.update(commit.status or {})
                size += sum(record.bytes for record in commit.objects)
                shards += 1
        total += size
        counted = ", ".join(f"{count} {key}" for key, count in status.items() if key != "absent")
        rows = shards * store.rows_per_shard
        report(
            f"{job.name}: {status.get('ok', 0)} of {rows} rows present ({counted}), {size / 1e6:.1f} MB in "
            f"teachers/{job.name}/cache/{job.cache_set}"
        )
    report(f"wrote {total / 1e6:.1f} MB to {location}; any Zarr client reads it")
    report(f"next: statsvc verify --store {location} checks every byte; statsvc status --store {location} counts")
    output, job = next(iter(jobs[0].outputs)), jobs[0]
    chosen = f', cache_set="{job.cache_set}"' if len(store.teacher(job.name).cache_sets()) > 1 else ""
    opened = f'statsvc.open("{location}").teacher("{job.name}")'
    report(f'      in Python: targets = {opened}.targets("{output}"{chosen})')
    report("                 targets.read(targets.rows()[:1])")


def print_plan(worklist: Worklist, row_bytes: dict[str, int], report: Callable[[str], None]) -> bool:
    """What a run would do, by phase. Whether all dataset shards can be read."""
    plan = worklist.plan
    report(f"index: {len(worklist.new_shards())} new dataset shards of {len(worklist.shards)}")
    report(f"measure and fit: {', '.join(worklist.unfitted()) or 'nothing'}")
    rows, readable = {}, True
    for name in worklist.usable("cache"):
        try:
            samples = worklist.samples(name)
            if samples is None:
                samples = count_samples(worklist.shards[name].location, plan.data.images)
        except UnreadableShard as error:
            report(f"would be quarantined: {error}")
            readable = False
        else:
            rows[name] = samples * plan.views.per_image
    for name in plan.teachers:
        missing = [rows[shard] for shard in worklist.uncached(name) if shard in rows]
        size = sum(missing) * row_bytes[name] / 1e6
        report(
            f"cache: {name}: {len(missing)} dataset shards, {sum(missing)} rows, {size:.1f} MB as {plan.targets.dtype}"
        )
    report("nothing was written")
    return readable
