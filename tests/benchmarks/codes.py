"""What is left of features after transform, codec and back; and how fast codes are made and read.

SNR in decibels in the teacher's own space, pooled over channels; the channel that keeps least is told as well, because
the noise of rotated codes is the same in all channels, and some teachers have very quiet ones.

Suffixes: N = feature vectors, B = rows, T = tokens, k = channels of a target, D = channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import statsvc
from statsvc.numerics.codec import codec
from tests.benchmarks.rows import Goal, Row, Table
from tests.benchmarks.timing import alternate, warm_up
from tests.support.features import teacher_features

Floats = NDArray[np.float32]
Code = Callable[[Floats], Floats]  # features to features, through a code

# Widths: SAM's neck, SigLIP-SO400M, DFN CLIP-H/14; and what a row of that width should keep in int8, per token.
TEACHERS = {"sam": ("SAM", 256, 43.7), "siglip": ("SigLIP", 1152, 43.7), "dfn-clip": ("DFN CLIP ViT-H", 1280, 42.3)}
COUNT = 8_192
HEAVY = 4  # degrees of freedom of Student's t: tokens whose lengths differ by tens
REPEATS = 7
INT4_DUE = 18.9  # what 15 even steps keep of Gaussian numbers, at best


def tables() -> list[Table]:
    return [*signal_to_noise(), throughput()]


def stepped(x: Floats, levels: int, axis: int | None) -> Floats:
    """Rounded to `levels` steps on each side of zero, with one scale for all along `axis`."""
    scale = np.abs(x).max(axis=axis, keepdims=axis is not None) / levels
    rounded: Floats = (np.round(x / scale) * scale).astype(np.float32)
    return rounded


def through(transform: statsvc.Transform, dtype: str) -> Code:
    def code(x_ND: Floats) -> Floats:
        y_BTk = transform.apply(x_ND)[None]
        restored: Floats = transform.invert(codec(dtype).decode(codec(dtype).encode(y_BTk), transform.rank)[0])
        return restored

    return code


def codes(transform: statsvc.Transform) -> dict[tuple[str, str], Code]:
    """By name and bytes per token."""
    return {
        ("int8, raw features, one scale", "D"): lambda x_ND: stepped(x_ND, 127, None),
        ("int8, raw features, scale per channel", "D"): lambda x_ND: stepped(x_ND, 127, 0),
        ("int8, PHI-S, one scale", "D"): lambda x_ND: transform.invert(stepped(transform.apply(x_ND), 127, None)),
        ("**int8, PHI-S, scale per token**", "D + 4"): through(transform, "int8"),
        ("int4, raw features, scale per channel", "D/2"): lambda x_ND: stepped(x_ND, 7, 0),
        ("**int4, PHI-S, scale per token**", "D/2 + 4"): through(transform, "int4"),
        ("float16, raw features", "2 D"): lambda x_ND: x_ND.astype(np.float16).astype(np.float32),
        ("**float16, PHI-S**", "2 D"): through(transform, "float16"),
    }


def decibels(x_ND: Floats, restored_ND: Floats) -> tuple[float, float]:
    """Pooled, and of the channel that keeps least."""
    signal_D = ((x_ND - x_ND.mean(axis=0, dtype=np.float64)) ** 2).sum(axis=0)
    noise_D = ((x_ND.astype(np.float64) - restored_ND) ** 2).sum(axis=0)
    return float(10 * np.log10(signal_D.sum() / noise_D.sum())), float(10 * np.log10(signal_D / noise_D).min())


def heavy_tailed(x_ND: Floats) -> Floats:
    """The same mean and directions; lengths as of Student's t."""
    rng, mean_D = np.random.default_rng(1), x_ND.mean(axis=0)
    length_N1 = np.sqrt((HEAVY - 2) / rng.chisquare(HEAVY, (len(x_ND), 1)))
    stretched_ND: Floats = (mean_D + (x_ND - mean_D) * length_N1).astype(np.float32)
    return stretched_ND


def signal_to_noise() -> list[Table]:
    found: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for name, (_, dim, _) in TEACHERS.items():
        normal_ND = teacher_features(name, COUNT, dim)
        for x_ND in (normal_ND, heavy_tailed(normal_ND)):
            transform = statsvc.fit(statsvc.Moments.of(x_ND), "phi-s")
            for code, coded in codes(transform).items():
                found.setdefault(code, {}).setdefault(name, []).append(decibels(x_ND, coded(x_ND)))
    header = ("code", *(f"{label}, D={dim}" for label, dim, _ in TEACHERS.values()), "bytes per token")

    def lines(part: int) -> tuple[tuple[str, ...], ...]:
        return tuple(
            (code, *(f"{normal[part]:.1f} ({heavy[part]:.1f})" for normal, heavy in each.values()), nbytes)
            for (code, nbytes), each in found.items()
        )

    by_name = {code.strip("*"): each for (code, _), each in found.items()}
    judged = []
    for name, (label, _, due) in TEACHERS.items():
        for bits, goal in (("int8", due), ("int4", INT4_DUE)):
            for tails in (0, 1):
                rotated = by_name[f"{bits}, PHI-S, scale per token"][name][tails][0]
                plain = by_name[f"{bits}, raw features, scale per channel"][name][tails][0]
                what = f"{bits}, PHI-S, scale per token, {label}" + (", heavy tails" if tails else "")
                against = "raw features, scale per channel"
                judged.append(Row(what, rotated, "dB", plain, against, "decibels", Goal(goal, of="ours")))
    about = "Means and deviations of real teachers' channels, Gaussian; in brackets heavy tails"
    return [
        Table(f"Codes: SNR in dB in the teacher's space. {about}", (), "", header, lines(0)),
        Table("The same of the channel that keeps least", (), "", header, lines(1)),
        Table("Codes: SNR at equal bytes", tuple(judged)),
    ]


def throughput() -> Table:
    """Workers encode torch tensors, readers decode numpy arrays; beside a copy of as many float32 numbers."""
    y_BTk = torch.randn(16, 256, 1024)
    plain_BTk, out_BTk = y_BTk.numpy(), np.empty(y_BTk.shape, np.float32)
    cases: dict[str, Callable[[], Any]] = {"copy": lambda: np.copyto(out_BTk, plain_BTk)}
    for dtype in ("int8", "int4", "float16"):
        stored = codec(dtype).encode(plain_BTk)
        cases[f"encode {dtype}"] = partial(codec(dtype).encode, y_BTk)
        cases[f"decode {dtype}"] = partial(codec(dtype).decode, stored, plain_BTk.shape[-1])
    rate = {case: plain_BTk.nbytes / each / 1e9 for case, each in alternate(cases, REPEATS, warm_up).items()}
    rows = (Row(case, rate[case], "GB/s", rate["copy"], "memory copy") for case in cases if case != "copy")
    return Table(f"Codecs: GB of float32 targets a second, {torch.get_num_threads()} threads", tuple(rows))
