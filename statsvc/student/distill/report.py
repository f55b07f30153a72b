"""The report of a student as a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from statsvc.progress import table

HEADER = (
    "teacher", "output", "MSE", "unexplained", "cosine", "error variance: least", "largest", "range",
    "normalized: least", "largest", "range",
)  # fmt: skip


def report_lines(report: dict[str, Any]) -> Iterator[str]:
    """MSE in each teacher's own space, and how far variances of errors range over channels, there and normalized."""
    on = report["measured_on"]
    which = "held out" if on["held_out"] else "TRAINED ON"
    yield f"on {on['rows']} rows that were {which}, in each teacher's own space:"
    teachers = report["teachers"].items()
    rows = [HEADER, *(_cells(name, output, found) for name, each in teachers for output, found in each.items())]
    yield from (f"  {line}" for line in table(rows, left=(0, 1)))
    for name, each in report["channels"].items():
        for output, channels in each.items():
            if channels["kept"] < channels["of"]:
                yield (
                    f"{name} {output}: against what the {channels['kept']} channels of its targets keep of "
                    f"{channels['of']}; what they leave out is not in these figures"
                )
    yield "unexplained: MSE as a part of the features' variance; a student that always says the mean has 1"


def _cells(name: str, output: str, found: dict[str, Any]) -> tuple[str, ...]:
    variances = [
        found["error_variance"][space][key] for space in ("original", "normalized") for key in ("min", "max", "range")
    ]
    part = found["unexplained"]
    return (
        name, output, f"{found['mse']:.4g}", "" if part is None else f"{part:.3f}", f"{found['cosine']:.3f}",
        *(f"{variance:.3g}" for variance in variances),
    )  # fmt: skip
