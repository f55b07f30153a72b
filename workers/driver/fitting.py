"""The fits of one teacher: its pilot's moments into a transform for every method and output, and a report on each.

Suffix: D = channels of a teacher.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from statsvc.errors import CannotFit
from statsvc.numerics.moments import Moments
from statsvc.numerics.normalizations import METHODS, fit
from statsvc.numerics.transform import Transform
from statsvc.plan import Plan, Whitening
from statsvc.store.copies import write_twice
from statsvc.store.paths import fit_path, report_path, transform_path
from statsvc.store.reader import Store, Teacher
from statsvc.store.sealed import seal
from workers.driver.pilot import Confidence, Pilot, confidence
from workers.driver.store_state import Fits


def fit_teacher(
    store: Store,
    name: str,
    pilot: Pilot,
    options: dict[str, Any] | None = None,
    near: dict[str, str] | None = None,
    kept: Fits | None = None,
) -> None:
    """Publish transforms and reports, then the fit commit that points to them.

    A method that must refuse is entered with its reason and never fails the run.

    options  what the plan says on fitting (see fit_options); None: the defaults
    near     by output, the digest of the phi-s transform that the new one is to be near
    kept     fits that stay: made again on another machine, they would differ in their last bits
    """
    teacher = store.teacher(name)
    fits: Fits = {}
    for output in teacher.outputs:
        moments = teacher.pilot_moments(output, pilot.shards)
        about = _about(teacher, output, moments, pilot)
        fits[output] = dict((kept or {}).get(output, {}))
        for method in METHODS:
            if method in fits[output]:
                continue
            close_to = (near or {}).get(output) if method == "phi-s" else None
            try:
                transform = fit(
                    moments,
                    method,
                    **of_method(options, method),
                    near=store.transform(close_to) if close_to else None,
                    output=output,
                    fingerprint=teacher.fingerprint,
                )
            except CannotFit as error:
                fits[output][method] = {"refused": str(error)}
                continue
            trust = confidence(pilot.halves[name, output], method, of_method(options, method))
            write_twice(store.backend, transform_path(transform.digest), transform.to_bytes())
            report = {
                **about,
                "method": method,
                "digest": transform.digest,
                "alpha": transform.alpha,
                "rank": transform.rank,
                "rotation": transform.rotation,
                "hadamard": transform.hadamard,
                "target_variance": _target_variance(transform, moments),
                "options": options,
                "near": close_to,
                **_trust(trust),
            }
            write_twice(store.backend, report_path(transform.digest), seal(report))
            fits[output][method] = transform.digest
    write_twice(store.backend, fit_path(name), seal(fits))


DEFAULT_OPTIONS = {"rank": None, **Whitening().model_dump()}


def fit_options(plan: Plan) -> dict[str, Any]:
    """What a plan says on fitting, beside the statistics; kept with the pilot, so that a repair fits alike."""
    return {"rank": plan.targets.rank, **plan.whitening.model_dump()}


def of_method(options: dict[str, Any] | None, method: str) -> dict[str, Any]:
    """The options that a method takes: only phi-s knows a rank."""
    return {name: value for name, value in (options or {}).items() if name != "rank" or method == "phi-s"}


def _about(teacher: Teacher, output: str, moments: Moments[np.ndarray], pilot: Pilot) -> dict[str, Any]:
    """What the features themselves are like: why a normalization is needed."""
    variance_D = np.diagonal(moments.covariance())
    return {
        "teacher": teacher.name,
        "output": output,
        "fingerprint": teacher.fingerprint,
        "pilot": pilot.shards,
        "images": pilot.images,
        "count": moments.count,
        "dim": len(variance_D),
        "feature_mean": float(moments.mean.mean()),
        "feature_std": float(np.sqrt(variance_D.mean() + moments.mean.var())),
        "feature_variance": float(variance_D.mean()),
        "channel_mean": [float(moments.mean.min()), float(moments.mean.max())],
        "channel_std": [float(np.sqrt(variance_D.min())), float(np.sqrt(variance_D.max()))],
    }


def _target_variance(transform: Transform, moments: Moments[np.ndarray]) -> list[float]:
    """Least and largest variance of a channel of the targets on the pilot; below 1 where an eigenvalue was raised."""
    with threadpool_limits(1):  # or the report would have other bytes on another machine
        variance_k = np.einsum("kd,kd->k", transform.matrix @ moments.covariance(), transform.matrix)
    return [float(variance_k.min()), float(variance_k.max())]


def _trust(found: Confidence | None) -> dict[str, Any]:
    """How far the fit can be trusted: the expected error of the output variances."""
    if found is None:
        return {"converged": False, "expected_rms_error": None, "expected_max_error": None}
    return {"converged": found.enough, "expected_rms_error": found.rms, "expected_max_error": found.worst}
