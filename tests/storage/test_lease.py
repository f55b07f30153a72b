"""One driver per store at a time, whatever happens to it: real processes hold, lose and are killed with leases."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from statsvc.errors import LeaseError
from statsvc.storage import open_backend
from statsvc.storage.backend import Backend
from statsvc.storage.fence import LEASE, RELEASED
from statsvc.storage.lease import TIMING, Lease, Timing, driven_since, read_lease, start_of, this_machine
from statsvc.storage.local import LocalBackend
from tests.support.waiting import wait_for

TOMBSTONE = b"statsvc: no object lies here".ljust(1009)  # what earlier versions left in a bucket
HOLD = """
import sys
from statsvc.storage import open_backend
from statsvc.storage.lease import Lease
with Lease(open_backend(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
TRY = """
import sys
from statsvc.storage import open_backend
from statsvc.errors import LeaseError
from statsvc.storage.lease import Lease
print("ready", flush=True)
sys.stdin.readline()
try:
    with Lease(open_backend(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.readline()
except LeaseError:
    print("refused", flush=True)
"""


# Of leases that look expired; that a living driver shows in time is tested with longer ones.
SHORT_WATCH = Timing(watch=0.05, poll=0.01)
QUICK = replace(SHORT_WATCH, heartbeat=0.02)


@pytest.fixture
def storage(tmp_path: Path) -> Backend:
    return open_backend(str(tmp_path))


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def held(storage: Backend, **changes: Any) -> dict[str, Any]:
    """Write a lease as a driver would, held by this very process unless changed."""
    now = time.time()
    lease = {
        "token": "t", "host": socket.gethostname(), "machine": this_machine(), "pid": os.getpid(),
        "started": start_of(os.getpid()), "since": now, "heartbeat": now, **changes,
    }  # fmt: skip
    storage.write(LEASE, json.dumps(lease).encode())
    return lease


def test_a_lease_is_there_while_it_is_held_and_released_afterwards(storage: Backend) -> None:
    assert read_lease(storage) is None
    with Lease(storage, SHORT_WATCH) as lease:
        content = json.loads(read_lease(storage) or b"")
        assert (content["host"], content["pid"]) == (socket.gethostname(), os.getpid())
        lease.check()
    assert read_lease(storage) == RELEASED == b'{"released":true}'


def test_a_released_lease_is_nobodys(storage: Backend) -> None:
    storage.write(LEASE, RELEASED)
    assert driven_since(storage) is None
    Lease(storage).wait_for_others(pytest.fail)
    with Lease(storage, replace(SHORT_WATCH, watch=1e6)) as lease:  # nobody is watched
        lease.check()


def test_a_lease_is_given_back_when_the_driver_fails(storage: Backend) -> None:
    with pytest.raises(RuntimeError), Lease(storage, SHORT_WATCH):
        raise RuntimeError
    assert read_lease(storage) == RELEASED
    with Lease(storage, SHORT_WATCH):
        pass


def test_a_store_that_another_process_holds_is_refused_with_its_holder(
    storage: Backend, holder: subprocess.Popen[str]
) -> None:
    before = read_lease(storage)
    with pytest.raises(LeaseError, match=r"another driver holds this store: .*wait for it or stop it") as refused:
        Lease(storage, SHORT_WATCH).__enter__()
    assert f"process {holder.pid} on {socket.gethostname()}" in str(refused.value)
    assert read_lease(storage) == before


def test_once_the_holder_is_done_the_next_driver_has_it(storage: Backend, holder: subprocess.Popen[str]) -> None:
    holder.communicate("")
    with Lease(storage, SHORT_WATCH) as lease:
        lease.check()


def test_the_lease_of_a_driver_that_was_killed_is_taken_at_once(
    storage: Backend, holder: subprocess.Popen[str]
) -> None:
    holder.kill()
    holder.wait()
    assert read_lease(storage) is not None
    with Lease(storage, SHORT_WATCH) as lease:
        lease.check()


def test_a_killed_driver_that_nobody_has_reaped_yet_is_gone_too(
    storage: Backend, holder: subprocess.Popen[str]
) -> None:
    # As in a container whose first process does not look after orphans.
    os.kill(holder.pid, signal.SIGKILL)
    wait_for(lambda: start_of(holder.pid) is None)
    assert holder.pid in psutil.pids()
    with Lease(storage, SHORT_WATCH) as lease:
        lease.check()


def test_a_driver_that_stands_still_keeps_its_lease_until_it_expires(
    storage: Backend, holder: subprocess.Popen[str]
) -> None:
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(LeaseError):
        Lease(storage, SHORT_WATCH).__enter__()
    with Lease(storage, replace(SHORT_WATCH, expires=0.0)):
        pass


def test_it_is_the_very_process_that_began_when_the_lease_says(storage: Backend, holder: subprocess.Popen[str]) -> None:
    lease = json.loads(read_lease(storage) or b"")
    began = psutil.boot_time() + lease["started"] / os.sysconf("SC_CLK_TCK")
    assert abs(began - psutil.Process(holder.pid).create_time()) < 1.5  # the boot time is in whole seconds


def test_a_process_that_was_given_the_same_number_is_another(storage: Backend) -> None:
    held(storage, started=(start_of(os.getpid()) or 0) - 1)
    with Lease(storage, SHORT_WATCH):
        pass


def test_on_another_host_only_the_heartbeat_tells(storage: Backend) -> None:
    held(storage, host="elsewhere", machine="x", heartbeat=time.time() - TIMING.expires + 5)
    with pytest.raises(LeaseError, match=r"process \d+ on elsewhere, since .*, last heartbeat 5\d s ago"):
        Lease(storage, SHORT_WATCH).__enter__()
    held(storage, host="elsewhere", machine="x", heartbeat=time.time() - TIMING.expires - 1)
    with Lease(storage, SHORT_WATCH):
        pass


def test_a_clock_that_runs_ahead_elsewhere_does_not_break_the_lease(storage: Backend) -> None:
    held(storage, host="elsewhere", machine="x", heartbeat=time.time() + 30)
    with pytest.raises(LeaseError, match="last heartbeat 0 s ago"):
        Lease(storage, SHORT_WATCH).__enter__()


@pytest.mark.parametrize("hours", [-5000, -1, 1, 5000])
def test_a_clock_that_was_set_does_not_cost_a_living_driver_its_lease(storage: Backend, hours: int) -> None:
    held(storage, host="elsewhere", machine="x", heartbeat=time.time() + hours * 3600, since=time.time())
    change = {"host": "elsewhere", "machine": "x", "heartbeat": time.time() + hours * 3600 + 10}
    beat = threading.Timer(0.1, lambda: held(storage, **change))
    beat.start()
    with pytest.raises(LeaseError, match="another driver holds this store"):
        Lease(storage, replace(SHORT_WATCH, watch=10.0)).__enter__()
    beat.join()


def test_a_clock_that_was_set_does_not_keep_the_lease_of_a_driver_that_is_gone(storage: Backend) -> None:
    held(storage, host="elsewhere", machine="x", heartbeat=time.time() + 1e9)
    with Lease(storage, SHORT_WATCH):
        pass


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"null", b"[]", b"\xff", b'{"host": 1}', b'{"host": "x", "pid": 1, "started": "?"}', TOMBSTONE],
)
def test_an_unreadable_lease_is_replaced(storage: Backend, content: bytes) -> None:
    storage.write(LEASE, content)
    with Lease(storage, SHORT_WATCH) as lease:
        lease.check()
    assert read_lease(storage) == RELEASED


@pytest.mark.parametrize("change", [{"heartbeat": "now"}, {"pid": "1"}, {"pid": -1}, {"pid": 2**40}])
def test_a_lease_that_makes_no_sense_is_replaced(storage: Backend, change: dict[str, Any]) -> None:
    held(storage, **change)
    with Lease(storage, SHORT_WATCH):
        pass


# --- the heartbeat ---


def test_heartbeats_come_often_enough_to_miss_some() -> None:
    assert TIMING.expires >= 5 * TIMING.heartbeat
    assert TIMING.watch >= 2 * TIMING.heartbeat


def test_the_heartbeat_goes_on_while_the_lease_is_held(storage: Backend) -> None:
    with Lease(storage, QUICK):
        beats = set[float]()

        def beat() -> bool:
            beats.add(json.loads(read_lease(storage) or b"{}")["heartbeat"])
            return len(beats) > 3

        wait_for(beat)
    assert read_lease(storage) == RELEASED
    assert not [thread for thread in threading.enumerate() if thread.name == "lease"]


def test_a_driver_whose_lease_was_taken_over_stops_and_leaves_the_new_one_alone(storage: Backend) -> None:
    with Lease(storage, QUICK) as lease:
        lease.check()
        held(storage, token="of another")

        def lost() -> bool:
            try:
                lease.check()
            except LeaseError as error:
                return "another driver took it over" in str(error)
            return False

        wait_for(lost)
        with pytest.raises(LeaseError, match="run again to go on"):
            lease.check()
    assert json.loads(read_lease(storage) or b"{}")["token"] == "of another"


class Unreliable(LocalBackend):
    """A storage that cannot be written for a while."""

    broken, failed = False, 0

    def swap(self, path: str, expected: bytes | None, data: bytes) -> bool:
        if self.broken:
            self.failed += 1
            raise OSError(5, "Input/output error")
        return super().swap(path, expected, data)


def test_a_storage_that_fails_for_a_moment_does_not_cost_the_lease(tmp_path: Path) -> None:
    storage = Unreliable(str(tmp_path))
    with Lease(storage, QUICK) as lease:
        storage.broken = True
        wait_for(lambda: storage.failed > 2, "beats that fail")
        lease.check()
        storage.broken = False
        before = read_lease(storage)
        wait_for(lambda: read_lease(storage) != before)
        lease.check()


class Late(LocalBackend):
    """A storage of which an answer was lost: what it was asked for is done after the asker has given up."""

    late: tuple[str, bytes] | None = None
    stalls = False

    def swap(self, path: str, expected: bytes | None, data: bytes) -> bool:
        if self.late:
            self.write(*self.late)
            self.late = None
        if self.stalls and data != RELEASED:
            self.stalls, self.late = False, (path, data)
            raise OSError(110, "no answer in time")
        return super().swap(path, expected, data)


@pytest.mark.parametrize("then_it_ends", [False, True])
def test_a_beat_that_arrives_after_it_was_given_up_does_not_cost_the_lease(tmp_path: Path, then_it_ends: bool) -> None:
    storage = Late(str(tmp_path))
    with Lease(storage, QUICK) as lease:
        storage.stalls = True
        wait_for(lambda: storage.late is not None or not storage.stalls)
        if not then_it_ends:
            wait_for(lambda: storage.late is None)
            arrived = read_lease(storage)
            wait_for(lambda: read_lease(storage) != arrived)
            lease.check()
    assert read_lease(storage) == RELEASED


def test_a_storage_that_fails_for_longer_than_a_lease_lasts_does(tmp_path: Path) -> None:
    storage = Unreliable(str(tmp_path))
    lease = Lease(storage, replace(QUICK, expires=0.1))
    lease.__enter__()
    storage.broken = True

    def lost() -> bool:
        try:
            lease.check()
        except LeaseError as error:
            return "its heartbeat cannot be written: [Errno 5]" in str(error)
        return False

    wait_for(lost)
    lease.__exit__(None, None, None)


# --- many at once ---


def test_of_many_processes_that_begin_together_one_holds_the_store(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", TRY, str(tmp_path)], stdin=-1, stdout=-1, text=True) for _ in range(5)
    ]
    pipes = [(process.stdin, process.stdout) for process in processes if process.stdin and process.stdout]
    assert [output.readline() for _, output in pipes] == ["ready\n"] * 5
    for begin, _ in pipes:
        begin.write("\n")
        begin.flush()
    assert sorted(output.readline() for _, output in pipes) == ["held\n"] + ["refused\n"] * 4
    for process in processes:
        process.communicate("\n")


def test_of_many_that_take_over_a_dead_drivers_lease_one_holds_the_store(storage: Backend) -> None:
    held(storage, heartbeat=0.0)
    barrier, answers, done = threading.Barrier(8), list[str](), threading.Event()

    def take() -> None:
        lease = Lease(storage, SHORT_WATCH)
        barrier.wait()
        try:
            with lease:
                answers.append("held")
                done.wait(120)
        except LeaseError:
            answers.append("refused")

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(answers) == 8)
    done.set()
    for thread in threads:
        thread.join()
    assert sorted(answers) == ["held"] + ["refused"] * 7


class TestADriverOfAnotherHost:
    """Its process cannot be looked at: only its heartbeat tells."""

    def held(self, age: float = 0.0, machine: str = "elsewhere", pid: int = 1) -> bytes:
        now = time.time()
        lease = {"token": "x", "host": "elsewhere", "machine": machine, "pid": pid, "started": 5, "since": now}
        return json.dumps({**lease, "heartbeat": now - age}).encode()

    def test_is_waited_for_until_its_lease_expires(self, storage: Backend) -> None:
        begun, told = time.monotonic(), list[str]()
        storage.write(LEASE, self.held())
        Lease(storage, replace(SHORT_WATCH, expires=0.3)).wait_for_others(told.append)
        assert time.monotonic() - begun > 0.2
        assert len(told) == 1
        assert "elsewhere" in told[0]

    def test_is_respected_once_its_heart_beats(self, storage: Backend) -> None:
        storage.write(LEASE, self.held(age=5))
        beat = threading.Timer(0.1, lambda: storage.write(LEASE, self.held()))
        beat.start()
        with pytest.raises(LeaseError, match="elsewhere"):
            Lease(storage, SHORT_WATCH).wait_for_others(lambda _: None)
        beat.join()

    def test_makes_way_when_it_ends(self, storage: Backend) -> None:
        storage.write(LEASE, self.held())
        end = threading.Timer(0.1, lambda: storage.write(LEASE, RELEASED))
        end.start()
        Lease(storage, SHORT_WATCH).wait_for_others(lambda _: None)
        end.join()

    def test_nobody_waits_for_a_driver_of_this_host(self, storage: Backend, holder: subprocess.Popen[str]) -> None:
        assert holder.poll() is None
        with pytest.raises(LeaseError, match="another driver holds"):
            Lease(storage, SHORT_WATCH).wait_for_others(pytest.fail)
        storage.write(LEASE, self.held(machine=this_machine(), pid=2**22))  # a process that never was
        Lease(storage, SHORT_WATCH).wait_for_others(pytest.fail)

    def test_is_waited_for_only_once(self, storage: Backend) -> None:
        storage.write(LEASE, self.held())
        lease = Lease(storage, replace(SHORT_WATCH, expires=0.3))
        lease.wait_for_others(lambda _: None)
        lease._timing = replace(SHORT_WATCH, expires=0.3, watch=1e6)
        with lease:
            lease.check()
