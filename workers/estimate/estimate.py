"""`statsvc estimate`: what a plan would take, before anything is spent. Reads only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from statsvc.dataset.keys import key_hash
from statsvc.dataset.shards import ShardReader
from statsvc.dataset.urls import is_url
from statsvc.digests import CRC_NBYTES
from statsvc.errors import UnreadableShard
from statsvc.numerics.codec import CODECS
from statsvc.plan import Plan
from statsvc.store.layout import Output, moments_arrays
from workers.driver.checks import check_loaded
from workers.driver.pilot import pilot_order
from workers.driver.request import Request
from workers.driver.sizes import count_samples, told_samples
from workers.driver.worklist import Worklist
from workers.engines.resources import cores, decoder_processes, devices
from workers.estimate.noise import Noise
from workers.estimate.trial import Image, OutputTrial, Trial, computing, run_trial
from workers.unit.decoders import Decoders
from workers.unit.loaded_teacher import LoadedTeacher


@dataclass(frozen=True, slots=True)
class Work:
    """Samples of each usable dataset shard, None where only reading it all would tell; the pilot's at most."""

    samples: dict[str, int | None]
    pilot: list[str]
    warnings: list[str]

    def count(self, names: list[str]) -> int | None:
        """Samples of these dataset shards together, if they are known."""
        known = [count for name in names if (count := self.samples[name]) is not None]
        return sum(known) if len(known) == len(names) else None


def estimate(plan: Plan, images: int, report: Callable[[str], None]) -> dict[str, Any]:
    """The contents of `statsvc estimate --json`. Raises PlanError for all that `run` would refuse.

    images  how many the trial takes at most
    """
    request = Request.read(plan)
    worklist = request.worklist()
    work = plan_work(worklist)
    encoded = _trial_images(worklist, work, images)
    report(f"loading {', '.join(plan.teachers)}; a trial with {len(encoded)} images")
    settings = next(iter(worklist.settings.values()))
    found = devices()
    processes = decoder_processes(plan, len(found))
    with computing(settings["threads"]):
        device = torch.device(found[0])
        teachers = {
            name: LoadedTeacher(name, resolved, device, worklist.settings[name]["precision"])
            for name, resolved in request.teachers.items()
        }
        outputs = {name: teacher.outputs for name, teacher in teachers.items()}
        check_loaded(plan, worklist.state, outputs)
        with Decoders(processes) as pool:
            trial = run_trial(plan, teachers, encoded, pool, settings["batch_size"])
    if not trial.images:
        raise UnreadableShard(f"none of the first {len(encoded)} images of the plan can be decoded; check data.shards")
    return _document(worklist, work, outputs, trial, found, processes, request.backend.free_bytes())


def plan_work(worklist: Worklist) -> Work:
    """How much there is to do, without reading anything remote to its end."""
    plan, warnings = worklist.plan, [f"{name} {reason}" for name, reason in worklist.changed.items()]
    told = worklist.told
    if plan.data.rows_per_shard is not None:  # which is the most that a run reckons with; here, what is known counts
        told = told_samples(worklist.shards[name] for name in worklist.new_shards())
    samples: dict[str, int | None] = {}
    for name in worklist.usable("cache"):
        location = worklist.shards[name].location
        samples[name] = told.get(name, worklist.samples(name))
        if samples[name] is None and not (isinstance(location, str) and is_url(location)):
            try:
                samples[name] = count_samples(location, plan.data.images)
            except UnreadableShard as error:
                warnings.append(f"would be quarantined: {error}")
                del samples[name]
    if unknown := sum(count is None for count in samples.values()):
        warnings.append(
            f"the samples of {unknown} remote dataset shards are unknown: set data.rows_per_shard, or put a sizes.json "
            "beside them"
        )
    order = pilot_order(list(samples), plan.views.seed)
    return Work(samples, order[: _pilot_length([samples[name] for name in order], _limit(plan))], warnings)


def _limit(plan: Plan) -> float:
    """Images that are measured at most: in the statistics, each view counts as one."""
    wanted = plan.statistics.images or plan.statistics.max_images
    return math.inf if wanted == "all" else wanted / plan.views.per_image


def _pilot_length(counts: list[int | None], limit: float) -> int:
    """Dataset shards that are measured at most: whole ones, so the last of them goes beyond the limit."""
    reached = accumulate(count or 0 for count in counts)
    return next((number for number, total in enumerate(reached, 1) if total >= limit), len(counts))


def _trial_images(worklist: Worklist, work: Work, wanted: int) -> list[Image]:
    """Encoded images with the hashes of their keys, in the order of the pilot."""
    found: list[Image] = []
    for name in pilot_order(list(work.samples), worklist.plan.views.seed):
        try:
            for sample in ShardReader(worklist.shards[name].location, worklist.plan.data.images):
                if sample.image is not None:
                    found.append((key_hash(sample.key), sample.image))
                if len(found) == wanted:
                    return found
        except UnreadableShard as error:
            if not any(str(error) in warning for warning in work.warnings):
                work.warnings.append(f"would be quarantined: {error}")
    if not found:
        raise UnreadableShard("no dataset shard of the plan holds an image that can be read; check data.shards")
    return found


def _document(
    worklist: Worklist, work: Work, shapes: dict[str, dict[str, Output]], trial: Trial, machine: list[str],
    processes: int, free: int | None,
) -> dict[str, Any]:  # fmt: skip
    plan, names = worklist.plan, list(work.samples)
    images, measured = work.count(names), work.count(work.pilot)
    rows = None if images is None else images * plan.views.per_image
    seconds = _seconds_per_image(trial, machine, processes, plan.views.per_image)
    # With raw features the pilot is measured and cached in one pass.
    cached = images - measured if worklist.is_raw and images is not None and measured is not None else images
    teachers = {
        name: {
            "images_per_second": trial.teachers[name].images_per_second,
            "unusable_images": trial.teachers[name].unusable,
            "outputs": {
                output: _output(plan, shape, trial.teachers[name].outputs[output], rows, len(work.pilot))
                for output, shape in outputs.items()
            },
        }
        for name, outputs in shapes.items()
    }
    needed = _needed_bytes(worklist, work, teachers)
    warnings = [*work.warnings, *_doubts(plan, trial, shapes)]
    if needed is not None and free is not None and needed > free:
        warnings.append(
            f"{needed / 1e9:.2f} GB are still to be written, and {free / 1e9:.2f} GB are free at {plan.store!r}"
        )
    return {
        "dataset_shards": len(names),
        "images": images,
        "views_per_image": plan.views.per_image,
        "rows": rows,
        "trial": {"images": trial.images, "undecodable_images": trial.undecodable},
        "device": {"kind": torch.device(machine[0]).type, "count": len(machine)},
        "decoding": {"images_per_second": trial.images_per_second, "processes": processes},
        "teachers": teachers,
        "normalize": plan.normalize,
        "space": plan.targets.space,
        "dtype": plan.targets.dtype,
        "measure": {"dataset_shards": len(work.pilot), "images": measured, "hours": _hours(measured, seconds)},
        "cache": {"images": cached, "hours": _hours(cached, seconds)},
        "store": {"needed_bytes": needed, "free_bytes": free},
        "warnings": warnings,
    }


def _output(plan: Plan, shape: Output, found: OutputTrial, rows: int | None, pilot: int) -> dict[str, Any]:
    """One output of one teacher; moments_bytes are those of the pilot."""
    k = plan.targets.rank or shape.dim
    moments = sum(spec.row_nbytes + CRC_NBYTES for spec in moments_arrays("", "", shape.dim).values())
    dtypes = {}
    for dtype, codec in CODECS.items():
        size = codec.row_nbytes(shape.tokens, k)
        noise = found.noise.get(dtype)
        dtypes[dtype] = {"row_bytes": size, "bytes": None if rows is None else rows * size, **_noise(noise)}
    return {
        "tokens": shape.tokens,
        "dim": shape.dim,
        "k": k,
        "moments_bytes": pilot * moments,
        "fitted_tokens": found.fitted,
        "rough": found.fitted < 2 * shape.dim,
        "refused": found.refused,
        "dtypes": dtypes,
    }


def _noise(noise: Noise | None) -> dict[str, Any]:
    """null for a ratio of compared tokens: nothing at all was lost of them."""
    return {
        "snr_normalized_db": noise and noise.normalized,
        "snr_teacher_db": noise and noise.teacher,
        "channels_under_10_db": noise and noise.channels,
        "compared_tokens": noise.tokens if noise else 0,
        "images_beyond_range": noise.images if noise else 0,
    }


def _seconds_per_image(trial: Trial, machine: list[str], processes: int, per_image: int) -> float:
    """All views of it. GPUs and decoders work beside each other, and the slower one counts; on a CPU they share the
    cores.
    """
    forward = per_image * sum(1 / teacher.images_per_second for teacher in trial.teachers.values())
    decoding = 1 / trial.images_per_second
    if machine != ["cpu"]:
        return max(forward, decoding) / len(machine)
    return forward + decoding * min(processes, cores()) / cores()


def _hours(images: int | None, seconds: float) -> float | None:
    return None if images is None else images * seconds / 3600


def _needed_bytes(worklist: Worklist, work: Work, teachers: dict[str, Any]) -> int | None:
    """Bytes of targets and moments that the store does not hold yet."""
    needed = 0
    for name, teacher in teachers.items():
        images = work.count([shard for shard in worklist.uncached(name) if shard in work.samples])
        if images is None:
            return None
        rows = images * worklist.plan.views.per_image
        for output in teacher["outputs"].values():
            needed += rows * output["dtypes"][worklist.plan.targets.dtype]["row_bytes"]
            needed += 0 if worklist.is_fitted(name) else output["moments_bytes"]
    return needed


def _doubts(plan: Plan, trial: Trial, shapes: dict[str, dict[str, Output]]) -> Iterator[str]:
    """What keeps the figures from being believed."""
    if trial.undecodable:
        yield f"{trial.undecodable} of {trial.images + trial.undecodable} images could not be decoded"
    for name, teacher in trial.teachers.items():
        if teacher.unusable:
            yield f"{name}: gave features that are not finite, or of another shape, for {teacher.unusable} images"
        for output, found in teacher.outputs.items():
            dim, noise = shapes[name][output].dim, found.noise.get(plan.targets.dtype)
            if found.refused:
                yield f"{name} {output}: no figures on noise: {found.refused}"
            elif found.fitted < 2 * dim:
                yield (
                    f"{name} {output}: the figures on noise are rough, {found.fitted} tokens tell little of {dim} "
                    "channels; take more --images"
                )
            if noise and noise.images:
                yield f"{name} {output}: {noise.images} images lie beyond the range of {plan.targets.dtype}"
