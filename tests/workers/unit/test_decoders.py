"""Decoder processes, with real processes. Axes: H = rows, W = columns, 3 = red, green, blue."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from statsvc.dataset.decode import Resize, decode_views
from statsvc.errors import EngineError, PlanError
from tests.support.waiting import wait_for
from workers.unit.decoders import ENVIRONMENT, Decoders

RESIZES = (Resize(8, "bicubic"), Resize(4, "nearest"), Resize(8, "bicubic"))


def picture(seed: int, side: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


# One that takes a while, so that the results could overtake it.
SLOW = picture(0, side=1500)


def children() -> list[psutil.Process]:
    """Our decoder processes; multiprocessing has a helper of its own beside them."""
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    with Decoders(2) as pool:
        yield pool


def test_results_are_those_of_one_process_in_the_order_of_the_jobs(decoders: Decoders) -> None:
    images = [SLOW, *(picture(seed) for seed in range(60)), b"", SLOW[:1000], picture(99)]
    results = list(decoders.map(enumerate(images), RESIZES))
    assert [tag for tag, _ in results] == list(range(len(images)))
    for (_, result), image in zip(results, images, strict=True):
        expected = decode_views(image, RESIZES)
        if isinstance(expected, str):
            assert result == expected
            continue
        assert not isinstance(result, str)
        assert [found.view for found in result] == [found.view for found in expected]
        for view_HW3, expected_HW3 in zip(result[0].arrays_HW3, expected[0].arrays_HW3, strict=True):
            np.testing.assert_array_equal(view_HW3, expected_HW3)
        assert result[0].arrays_HW3[0] is result[0].arrays_HW3[2]


def test_jobs_are_pulled_only_as_far_as_the_window_and_no_further_when_closed(decoders: Decoders) -> None:
    pulled: list[int] = []

    def jobs() -> Iterator[tuple[int, bytes]]:
        for number in range(1000):
            pulled.append(number)
            yield number, picture(0)

    results = decoders.map(jobs(), RESIZES)
    assert pulled == []
    for number in range(10):
        assert next(results)[0] == number
        assert len(pulled) == decoders.window + number
    results.close()  # type: ignore[attr-defined]
    assert len(pulled) == decoders.window + 9
    assert [tag for tag, _ in decoders.map([("next", picture(1))], RESIZES)] == ["next"]


def test_closing_early_cancels_what_has_not_begun(decoders: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    futures: list[Future[Any]] = []
    submit = ThreadPoolExecutor.submit

    def recording(*arguments: Any) -> Future[Any]:
        futures.append(submit(*arguments))
        return futures[-1]

    monkeypatch.setattr(ThreadPoolExecutor, "submit", recording)
    results = decoders.map(enumerate([SLOW] * 1000), RESIZES)
    next(results)
    results.close()  # type: ignore[attr-defined]
    # Two are being decoded, and by now a few may be done.
    assert sum(future.cancelled() for future in futures) >= decoders.window - 10


def test_no_jobs_give_no_results(decoders: Decoders) -> None:
    assert list(decoders.map([], RESIZES)) == []


def test_an_error_of_the_jobs_comes_through_unchanged(decoders: Decoders) -> None:
    def jobs() -> Iterator[tuple[int, bytes]]:
        yield 0, picture(0)
        raise OSError("the shard is gone")

    with pytest.raises(OSError, match="the shard is gone"):
        list(decoders.map(jobs(), RESIZES))


@pytest.mark.parametrize("size", [8, 1024], ids=["while it decodes", "while it writes"])
def test_a_killed_decoder_is_an_engine_error_that_says_what_to_do(size: int) -> None:
    before = children()

    def jobs() -> Iterator[tuple[int, bytes]]:
        # Decoding the small picture takes no time beside sending the large result.
        for number in range(1000):
            if number == 50:
                next(child for child in children() if child not in before).kill()
            yield number, SLOW if size == 8 else picture(0)

    with Decoders(2) as pool, pytest.raises(EngineError, match=r"exit code -9.*fewer engine\.decoders"):
        list(pool.map(jobs(), (Resize(size, "nearest"),)))


def test_decoders_end_with_the_block(decoders: Decoders) -> None:
    list(decoders.map([(0, picture(0))], RESIZES))
    before = children()
    with Decoders(1) as pool:
        list(pool.map([(0, picture(0))], RESIZES))
        assert len(children()) == len(before) + 1
    assert children() == before


def test_decoders_have_one_thread_and_their_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    before, environment = children(), dict(os.environ)
    with Decoders(1) as pool:
        list(pool.map([(0, picture(0))], RESIZES))
        (decoder,) = (child for child in children() if child not in before)
        assert decoder.num_threads() == 1
        assert ENVIRONMENT.items() <= decoder.environ().items()
        assert dict(os.environ) == environment


def test_ctrl_c_does_not_end_decoders(decoders: Decoders) -> None:
    list(decoders.map([(0, picture(0))], RESIZES))
    for child in children():
        child.send_signal(signal.SIGINT)
    assert len(list(decoders.map(((seed, picture(seed)) for seed in range(20)), RESIZES))) == 20


def ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # in a container nobody may collect it
    except psutil.NoSuchProcess:
        return True


PARENT = """
import io, sys
from PIL import Image
from tests.workers.unit.test_decoders import RESIZES, Decoders, children, picture
if __name__ == "__main__":
    with Decoders(2) as pool:
        list(pool.map(((seed, picture(seed)) for seed in range(50)), RESIZES))
        print(*(child.pid for child in children()), flush=True)
        sys.stdin.read()
"""


def test_decoders_die_when_their_parent_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=-1, stdout=-1, text=True) as parent:
        assert parent.stdout is not None
        orphans = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(orphans) == 2
    wait_for(lambda: all(map(ended, orphans)), "the decoders to end")
    assert all(map(ended, orphans))


def test_a_pool_needs_a_process() -> None:
    with pytest.raises(PlanError, match="at least 1 process, not 0"):
        Decoders(0)
