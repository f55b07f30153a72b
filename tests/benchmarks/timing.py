"""Times that can be compared: all cases in one run, taking turns, medians."""

import random
import statistics
import time
from collections.abc import Callable, Mapping

Case = Callable[[], object]


def alternate(
    cases: Mapping[str, Case], repeats: int, before: Callable[[Case], object] = lambda _: None
) -> dict[str, float]:
    """Median seconds of every case; `before` is given the case untimed before it runs."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    shuffle = random.Random(0)
    for repeat in range(repeats + 1):
        for name in shuffle.sample(list(cases), len(cases)):
            before(cases[name])
            start = time.perf_counter()
            cases[name]()
            if repeat:  # the first round fills caches
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def warm_up(case: Case) -> None:
    """For `before`: measured, what zarr-python leaves in the processor's caches costs its successor 3 us a row."""
    case()
