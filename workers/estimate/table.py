"""An estimate as people read it: a table on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console

from statsvc.progress import table

HEADINGS = ("teacher", "output", "tokens x k", "dtype", "a row", "in all", "SNR", "teacher's", "< 10 dB")


def print_estimate(told: dict[str, Any], console: Console | None = None) -> None:
    """What `estimate` found; the plan's own dtype is marked."""
    console = console or Console(highlight=False, emoji=False)

    def line(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    for text in _above(told):
        line(text)
    if console.is_terminal:
        for text in table([HEADINGS, *_rows(told)], left=(0, 1, 3)):
            line(text)
        line("SNR in dB, normalized and in the teacher's space; < 10 dB: channels whose own SNR is under that")
    else:
        for teacher, output, shape, dtype, row, total, normalized, space, channels in _rows(told):
            line(
                f"{teacher} {output} {shape} {dtype}: {row} a row, {total} in all, SNR in dB {normalized} "
                f"normalized and {space} in the teacher's space, {channels} channels under 10 dB"
            )
    for text in _below(told):
        line(text)


def _above(told: dict[str, Any]) -> Iterator[str]:
    device, decoding = told["device"], told["decoding"]
    views = told["views_per_image"]
    rows = f"{views} views of each, {_number(told['rows'])} rows" if views > 1 else "as many rows"
    yield f"{_number(told['images'])} images in {told['dataset_shards']} dataset shards; {rows} of each teacher"
    yield (
        f"trial with {told['trial']['images']} images on {device['count']} x {device['kind']}: decoding "
        f"{decoding['images_per_second']:.1f} images/s in {decoding['processes']} processes"
    )
    for name, teacher in told["teachers"].items():
        yield f"  {name}: {teacher['images_per_second']:.1f} {'views' if views > 1 else 'images'}/s on one of them"


def _rows(told: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, teacher in told["teachers"].items():
        for output, about in teacher["outputs"].items():
            for dtype, figures in about["dtypes"].items():
                compared = figures["compared_tokens"]
                yield (
                    name,
                    output,
                    f"{about['tokens']} x {about['k']}",
                    f"{dtype}*" if dtype == told["dtype"] else dtype,
                    _size(figures["row_bytes"]),
                    _size(figures["bytes"]),
                    _decibels(figures["snr_normalized_db"], compared),
                    _decibels(figures["snr_teacher_db"], compared),
                    f"{figures['channels_under_10_db']} of {about['dim']}" if compared else "?",
                )


def _below(told: dict[str, Any]) -> Iterator[str]:
    measure, cache, store = told["measure"], told["cache"], told["store"]
    moments = sum(o["moments_bytes"] for teacher in told["teachers"].values() for o in teacher["outputs"].values())
    yield (
        f"measure: {_number(measure['images'])} images at most, {_duration(measure['hours'])}; "
        f"moments {_size(moments)} at most"
    )
    yield f"cache: {_number(cache['images'])} images, {_duration(cache['hours'])} as {told['dtype']} (*)"
    yield f"store: {_size(store['needed_bytes'])} still to be written, {_size(store['free_bytes'])} free"
    for warning in told["warnings"]:
        yield f"warning: {warning}"
    yield "nothing was written"


def _number(count: int | None) -> str:
    return "unknown" if count is None else str(count)


def _size(nbytes: int | None) -> str:
    if nbytes is None:
        return "unknown"
    value, units = float(nbytes), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{nbytes} B" if units[0] == "B" else f"{value:.3g} {units[0]}"


def _duration(hours: float | None) -> str:
    if hours is None:
        return "unknown"
    seconds = hours * 3600
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if hours < 2 else f"{hours:.1f} h"


def _decibels(value: float | None, compared: int) -> str:
    return ("exact" if value is None else f"{value:.1f}") if compared else "?"
