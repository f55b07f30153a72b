"""What a forked child must not share with its parent."""

from __future__ import annotations

import os
import pickle
import threading

from statsvc.storage.per_process import PerProcess
from tests.support.waiting import in_threads


def test_a_forked_child_makes_a_value_of_its_own() -> None:
    value = PerProcess[str]()
    assert value.get(lambda: "of the parent") == "of the parent"
    child = os.fork()
    if child == 0:
        os._exit(0 if value.get(lambda: "of the child") == "of the child" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert value.get(lambda: "another") == "of the parent"


def test_threads_share_the_value_that_was_made_first() -> None:
    barrier, found = threading.Barrier(4), list[object]()

    def make() -> object:
        barrier.wait(10)  # all of them make one
        return object()

    value = PerProcess[object]()
    in_threads(4, lambda _: found.append(value.get(make)))
    assert len(found) == 4
    assert len(set(map(id, found))) == 1


def test_a_pickled_value_is_made_again() -> None:
    value = PerProcess[int]()
    assert value.get(lambda: 1) == 1
    assert pickle.loads(pickle.dumps(value)).get(lambda: 2) == 2
