"""Object storage by S3: what every storage must do, and what goes wrong on the way to a server."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from statsvc.errors import DamagedObject, PlanError, StoreError
from statsvc.storage import open_backend
from statsvc.storage.backend import Backend
from statsvc.storage.bucket.client import PART_NBYTES
from statsvc.storage.bucket.transfers import WINDOW_NBYTES
from tests.storage.test_backends import BackendContract, start
from tests.support.faulty_proxy import Fault, FaultyProxy
from tests.support.http_stub import record_of
from tests.support.s3_server import KEY, SECRET, S3Server
from tests.support.waiting import wait_for

# Each script is given the location of the storage.
WRITE_PARTS_AND_WAIT = f"""
import sys
from statsvc.storage import open_backend
upload = open_backend(sys.argv[1]).create("long")
upload.file.write(bytes({3 * PART_NBYTES}))
print("ready", flush=True)
sys.stdin.read()
"""
ADD_LINES = """
import os, sys
from statsvc.storage import open_backend
storage = open_backend(sys.argv[1])
for number in range(20):
    line = b"%d %d\\n" % (os.getpid(), number)
    while line not in (now := storage.read("log")):
        storage.swap("log", now, now + line)
"""
FORK = """
import os, sys, threading
from statsvc.storage import open_backend
from statsvc.storage.bucket import forked
from tests.support.http_stub import record_of
storage, data = open_backend(sys.argv[1]), os.urandom(20_000_000)
storage.write("long", data)
pid = os.fork()
if pid:
    assert os.waitpid(pid, 0)[1] == 0
    assert storage.read("written") == b"1"
    sys.exit()
def fetch():
    out = bytearray(len(data))
    with storage.fetch(record_of("long", data), 0, len(data)) as fill:
        fill(memoryview(out))
    same.append(out == data)
same = []
threads = [threading.Thread(target=fetch) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert same == [True] * 3
storage.write("written", b"1")
assert storage.swap("lease", None, b"1") and storage.list("") == ["lease", "long", "written"]
for refused in (lambda: storage.read("nothing"), lambda: storage.create("long")):
    try:
        refused()
    except Exception as error:
        print(type(error).__name__)
print(forked._helper[0].pid, flush=True)
os._exit(0)
"""


class TestObjectBackend(BackendContract):
    LEFT_BEHIND = 0  # parts that were sent are no object, and are removed by a rule of the bucket

    @pytest.fixture
    def location(self, s3_store: str) -> str:
        return s3_store

    def test_what_is_written_through_the_descriptor_and_through_the_file_is_all_there(self, storage: Backend) -> None:
        """An upload has no descriptor, and is written in order."""
        upload = storage.create("object")
        with pytest.raises(OSError, match="fileno"):
            upload.file.fileno()
        upload.file.write(b"1234")
        upload.file.write(b"5678")
        upload.publish()
        assert storage.read("object") == b"12345678"


# --- long objects ---


def test_a_long_object_is_sent_in_parts_while_it_is_written(storage: Backend, s3_proxy: FaultyProxy) -> None:
    data = os.urandom(3 * PART_NBYTES + 1)
    upload = storage.create("folder/long")
    for begin in range(0, len(data), 1 << 20):
        upload.file.write(data[begin : begin + (1 << 20)])
    wait_for(lambda: sent_parts(s3_proxy) >= 2)  # nobody has asked for the end of it
    assert storage.size("folder/long") is None
    upload.publish()
    upload.discard()
    assert sent_parts(s3_proxy) == 4
    assert storage.read("folder/long") == data
    out = bytearray(len(data) - 5)
    with storage.fetch(record_of("folder/long", data), 3, len(data) - 2) as fill:
        for begin in range(0, len(out), 1 << 20):
            fill(memoryview(out)[begin : begin + (1 << 20)])
    assert out == data[3:-2]


def test_a_short_object_is_one_request(storage: Backend, s3_proxy: FaultyProxy) -> None:
    upload = storage.create("short")
    upload.file.write(b"1" * 1000)
    s3_proxy.requests.clear()
    upload.publish()
    assert [method for method, _ in s3_proxy.requests] == ["PUT"]


def test_discarding_a_long_object_removes_its_parts(storage: Backend, s3_proxy: FaultyProxy) -> None:
    upload = storage.create("long")
    upload.file.write(bytes(2 * PART_NBYTES + 1))
    upload.discard()
    assert [path for method, path in s3_proxy.requests if method == "DELETE" and "uploadId=" in path]
    assert storage.list("") == []
    with pytest.raises(ValueError, match="over"):
        upload.file.write(b"1")


def test_a_writer_that_is_killed_after_some_parts_leaves_no_object(storage: Backend, s3_proxy: FaultyProxy) -> None:
    storage.write("long", b"before")
    with start(WRITE_PARTS_AND_WAIT, location_of(storage)) as writer:
        assert writer.stdout
        writer.stdout.readline()
        wait_for(lambda: sent_parts(s3_proxy) >= 2)
        writer.kill()
    assert (storage.list(""), storage.read("long")) == (["long"], b"before")


def test_a_long_object_that_is_replaced_while_it_is_read_is_damage(storage: Backend) -> None:
    data = bytes(6 * WINDOW_NBYTES)
    storage.write("long", data)
    with storage.fetch(record_of("long", data), 0, len(data)) as fill:
        storage.write("long", b"\1" * len(data))
        with pytest.raises(DamagedObject, match="long: replaced while it was read"):
            fill(memoryview(bytearray(len(data))))


def test_a_list_has_all_pages(storage: Backend, s3_proxy: FaultyProxy) -> None:
    names = [f"{number:06d}.json" for number in range(1100)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: storage.write(f"commits/{name}", b"{}"), names))
    s3_proxy.requests.clear()
    assert storage.list("commits") == names
    assert len(s3_proxy.requests) == 2  # of at most 1000
    assert storage.list("") == ["commits"]


# --- swap ---


def test_swaps_whose_answers_are_lost_undo_nothing(storage: Backend, s3_proxy: FaultyProxy) -> None:
    """Each of 60 swaps adds a line of its own: none may be missing, and none there twice."""
    lost = [Fault("status", 500, reached=True), Fault("reset", reached=True), Fault("status", 503), Fault("truncate")]
    s3_proxy.fail_randomly(lost, 0.2, seed=1)
    storage.write("log", b"")
    writers = [start(ADD_LINES, location_of(storage)) for _ in range(3)]
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    s3_proxy.heal()
    assert sum(s3_proxy.injected.values()) > 20
    lines = storage.read("log").splitlines()
    assert (len(lines), len(set(lines))) == (60, 60)


@pytest.mark.parametrize("reached", [True, False])
def test_a_swap_whose_answer_is_lost_is_done_once_all_the_same(
    storage: Backend, s3_proxy: FaultyProxy, reached: bool
) -> None:
    storage.write("lease", b"old")
    s3_proxy.fail(Fault("reset", reached=reached), 1, "PUT")
    assert storage.swap("lease", b"old", b"new")
    assert storage.read("lease") == b"new"
    assert not storage.swap("lease", b"old", b"another's")


# --- what goes wrong on the way ---

FAULTS = [
    Fault("status", 500), Fault("status", 503), Fault("status", 429), Fault("reset"), Fault("truncate"),
    Fault("stall", 1.2), Fault("stall-body", 1.2), Fault("slow", 5_000_000),
]  # fmt: skip


@pytest.mark.usefixtures("impatient_s3")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_request_is_sent_again_after_a_fault(storage: Backend, s3_proxy: FaultyProxy, fault: Fault) -> None:
    data = os.urandom(1_000_000)
    s3_proxy.fail(fault, 1, "PUT")
    storage.write("folder/object", data)
    for use, result in (
        (lambda: storage.read("folder/object"), data),
        (lambda: fetched(storage, "folder/object", data), data),
        (lambda: storage.size("folder/object"), len(data)),
        (lambda: storage.list("folder"), ["object"]),
    ):
        s3_proxy.fail(fault)
        assert use() == result
    s3_proxy.fail(fault, 1, "PUT")
    assert storage.swap("lease", None, b"1")
    assert storage.read("lease") == b"1"
    s3_proxy.fail(fault, 1, "POST")
    storage.remove("folder/object")
    assert storage.size("folder/object") is None
    assert s3_proxy.injected[fault.name] == 7


@pytest.mark.usefixtures("impatient_s3")
@pytest.mark.parametrize(
    "fault",
    [*FAULTS[:4], Fault("stall", 1.2), Fault("reset", reached=True), Fault("status", 500, reached=True)],
    ids=lambda fault: f"{fault.name}{' reached' * fault.reached}",
)
def test_an_upload_survives_a_fault_of_each_of_its_requests(
    storage: Backend, s3_proxy: FaultyProxy, fault: Fault
) -> None:
    for method, part in (("POST", "uploads"), ("PUT", "partNumber=1&"), ("PUT", "partNumber=2&"), ("POST", "uploadId")):
        s3_proxy.fail(fault, 1, method, part)
    data = os.urandom(PART_NBYTES + 1000)
    upload = storage.create("long")
    upload.file.write(data)
    upload.publish()
    assert storage.read("long") == data
    assert s3_proxy.injected[fault.name] == 4


@pytest.mark.usefixtures("impatient_s3")
@pytest.mark.parametrize("fault", [Fault("truncate"), Fault("stall-body", 1.2)], ids=lambda fault: fault.name)
def test_an_upload_whose_end_was_reached_is_published_though_the_answer_broke_off(
    storage: Backend, s3_proxy: FaultyProxy, fault: Fault
) -> None:
    data = os.urandom(PART_NBYTES + 1000)
    upload = storage.create("long")
    upload.file.write(data)
    s3_proxy.fail(fault, 1, "POST", "uploadId")
    upload.publish()
    assert storage.read("long") == data


@pytest.mark.usefixtures("impatient_s3")
@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (Fault("status", 503), r".* status code: 503 Service Unavailable$"),
        (Fault("reset"), r".* HTTP error: error sending request \(\w+\)$"),
        (Fault("stall", 30), r".* HTTP error: error sending request \(Timeout\)$"),
        (Fault("truncate"), r".* HTTP error: .* \(\w+\)$"),
    ],
    ids=lambda value: value.name if isinstance(value, Fault) else "",
)
def test_what_fails_for_good_says_where_what_and_what_to_do(
    storage: Backend, s3_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, fault: Fault, why: str
) -> None:
    monkeypatch.setattr("statsvc.storage.bucket.backend.SWAP_SECONDS", 1.0)
    storage.write("a/object", b"0123456789")
    s3_proxy.fail(fault, float("inf"))
    for use in (
        lambda: storage.read("a/object"),
        lambda: fetched(storage, "a/object", b"0123456789"),
        lambda: storage.swap("a/object", b"0123456789", b"1"),
    ):
        with pytest.raises(StoreError, match=r"^s3://.*/store: a/object: .*; check that the storage at") as error:
            use()
        assert re.match(why, str(error.value).partition("; check")[0])
        assert_tells_no_secret(error)


def test_what_is_refused_is_not_asked_for_again(
    storage: Backend, s3_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-s3cret")
    refused = open_backend(location_of(storage))
    for use in (lambda: refused.read("object"), lambda: refused.list(""), lambda: refused.write("object", b"1")):
        s3_proxy.requests.clear()
        with pytest.raises(StoreError, match=r"refuses these credentials: .* status code: 403") as error:
            use()
        assert_tells_no_secret(error)
        assert len(s3_proxy.requests) == 1
    with pytest.raises(PlanError, match=r"^store: s3://.*AWS_SECRET_ACCESS_KEY .*, and that they may read"):
        refused.check()


def test_a_bucket_that_is_not_there_is_named(s3: S3Server) -> None:
    nowhere = open_backend("s3://no-such-bucket/store")
    with pytest.raises(PlanError, match=rf"there is no bucket 'no-such-bucket' at {s3.endpoint}; make it") as error:
        nowhere.check()
    assert_tells_no_secret(error)
    with pytest.raises(StoreError, match="there is no bucket"):
        nowhere.list("")


def test_a_check_changes_nothing_and_finds_a_storage_without_conditions(
    storage: Backend, s3_proxy: FaultyProxy
) -> None:
    storage.check()
    assert storage.list("") == []
    s3_proxy.fail(Fault("status", 200), 1, "PUT", "probe")  # as if it had been written in spite of the condition
    with pytest.raises(PlanError, match="ignores If-Match, so that two drivers could write"):
        storage.check()
    s3_proxy.fail(Fault("status", 403), 1, "PUT", "probe")  # may read and list, but not write
    with pytest.raises(PlanError, match="refuses these credentials"):
        storage.check()


def test_a_profile_without_boto3_is_refused(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.setitem(sys.modules, "obstore.auth.boto3", None)
    with pytest.raises(PlanError, match="AWS_PROFILE are read by boto3, which is not installed"):
        open_backend(s3.location()).exists()


@pytest.mark.parametrize(
    "location",
    [
        "s3://",
        "s3:///x",
        "s3://me:s3cret@bucket/x",
        "s3://bucket?s3cret",
        "s3://bucket/x?s3cret",
        "s3://bucket/x#s3cret",
        "s3://bucket/../x",
        "s3://b/x//y",
        "gs://-/x",
    ],
)
def test_a_location_that_is_none_is_refused_without_its_secrets(location: str) -> None:
    with pytest.raises(PlanError, match=r"it looks like (s3|gs)://bucket/prefix") as refused:
        open_backend(location)
    assert "s3cret" not in str(refused.value)


# --- processes ---


def test_a_pickled_backend_carries_no_credentials(storage: Backend) -> None:
    storage.write("object", b"1")
    pickled = pickle.dumps(storage)
    assert SECRET.encode() not in pickled
    assert pickle.loads(pickled).read("object") == b"1"
    assert SECRET not in repr(storage)


def test_a_forked_process_reads_and_writes_though_its_parent_did_before(storage: Backend) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, location_of(storage)], capture_output=True, text=True, timeout=120
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    helper = int(ran.stdout.split()[-1])
    assert ran.stdout.split()[:-1] == ["FileNotFoundError", "StoreError"]
    wait_for(lambda: not psutil.pid_exists(helper))  # it ended with the process that it helped


# --- tools of these tests ---


@pytest.fixture
def storage(s3_proxy: FaultyProxy, s3_store: str) -> Backend:
    del s3_proxy
    return open_backend(s3_store)


def location_of(storage: Backend) -> str:
    location: str = pickle.loads(pickle.dumps(storage.__reduce__()))[1][0]
    return location


def sent_parts(s3_proxy: FaultyProxy) -> int:
    return len([path for method, path in s3_proxy.requests if method == "PUT" and "partNumber=" in path])


def fetched(storage: Backend, path: str, data: bytes) -> bytes:
    out = bytearray(len(data))
    with storage.fetch(record_of(path, data), 0, len(data)) as fill:
        fill(memoryview(out))
    return bytes(out)


def assert_tells_no_secret(error: pytest.ExceptionInfo[BaseException]) -> None:
    """Nor does it carry what the library said."""
    shown = "".join(traceback.format_exception(error.value))
    assert "s3cret" not in shown
    assert KEY not in shown
    assert "obstore.exceptions" not in shown


def test_folders_that_a_console_makes_are_no_objects(s3_store: str, s3: S3Server) -> None:
    storage = open_backend(s3_store)
    storage.write("folder/object", b"1")
    bucket, _, prefix = s3_store.removeprefix("s3://").partition("/")
    for key in (f"{prefix}/", f"{prefix}/folder/"):  # obstore cannot name them
        url = f"{s3.endpoint}/{bucket}/{key}"
        command = ["curl", "--fail", "--silent", "--aws-sigv4", "aws:amz:us-east-1:s3", "-u", f"{KEY}:{SECRET}"]
        subprocess.run([*command, "-X", "PUT", "-d", "", url], check=True)
    assert (storage.list(""), storage.list("folder")) == (["folder"], ["object"])


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "host", "http://", "ftp://host", "http:///x"])
def test_an_endpoint_that_is_none_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(PlanError, match=r"AWS_ENDPOINT_URL: .* is not a valid endpoint; it looks like https://host"):
        open_backend("s3://bucket/prefix").exists()


def test_an_empty_variable_is_as_good_as_none(s3_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "")
    storage = open_backend(s3_store)
    storage.write("object", b"1")
    assert storage.read("object") == b"1"


@pytest.mark.parametrize("location", ["s3:/bucket/prefix", "S3:/bucket", "http:/host"])
def test_a_missing_slash_is_noticed(location: str) -> None:
    with pytest.raises(PlanError, match="one slash is missing"):
        open_backend(location)
