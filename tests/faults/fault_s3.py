"""An object storage that is slow, fails, cuts its answers or says nothing; a real one, behind a proxy that does it."""

from __future__ import annotations

from pathlib import Path

import pytest
from obstore.store import S3Store

from tests.faults.conftest import UNUSABLE, Faults, new_site
from tests.faults.records import Line
from tests.faults.site import Site
from tests.support.faulty_proxy import Fault, faulty_proxy
from tests.support.s3_server import S3Server, environment

STALL_SECONDS = 30
SLOW_BYTES = 20_000.0  # a second
KINDS = {
    "status 500": "S3: status 500",
    "status 503": "S3: status 503",
    "reset": "S3: connection reset, before or after the work was done",
    "truncate": "S3: body cut",
    f"slow {SLOW_BYTES:g}": "S3: slow answer",
}
COMPARED = "every object on S3 with an undisturbed run"
IMPATIENT: dict[str, float] = {
    "statsvc.storage.bucket.client.RETRIES": 2,
    "statsvc.storage.bucket.client.RETRY_SECONDS": 2,
    "statsvc.storage.bucket.backend.SWAP_SECONDS": 2,
}


@pytest.fixture
def remote(s3_once: S3Server, photos: Path, tmp_path: Path) -> Site:
    """The photographs on this disk, and a store on the server."""
    return new_site(tmp_path / "remote", photos, s3_once.location())


def settle(line: Line, site: Site, server: S3Server, like: Site, injected: int) -> None:
    """Of a copy of what lies in the bucket, fetched by another client than the one under test."""
    bucket, _, prefix = site.location.removeprefix("s3://").partition("/")
    found = server.environment
    client = S3Store(
        bucket,
        prefix=prefix,
        endpoint=found["AWS_ENDPOINT_URL"],
        access_key_id=found["AWS_ACCESS_KEY_ID"],
        secret_access_key=found["AWS_SECRET_ACCESS_KEY"],
        region=found["AWS_REGION"],
        client_options={"allow_http": True},
    )
    copy = Site(site.folder.parent / "copy")
    copy.photos.symlink_to(site.photos)
    for batch in client.list():
        for listed in batch:
            path = copy.store / listed["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(client.get(listed["path"]).bytes()))
    verified = site.command("verify", environment=server.environment)
    assert verified.code == 0, verified
    line.settle(copy, like, injected, UNUSABLE, "every object on S3")


def test_a_storage_that_fails_now_and_then_costs_time_and_nothing_else(
    remote: Site, s3_once: S3Server, undisturbed: Site, faults: Faults
) -> None:
    lines = {name: faults(kind) for name, kind in KINDS.items()}
    mixed = [Fault("status", 500), Fault("status", 503), Fault("truncate"), Fault("slow", SLOW_BYTES)]
    with faulty_proxy(s3_once.endpoint) as proxy:
        proxy.fail_randomly([*mixed, Fault("reset"), Fault("reset", reached=True)], rate=0.08, seed=7)
        ended = remote.run(environment=environment(proxy.endpoint))
        assert ended.code == 0, ended
    assert lines.keys() == proxy.injected.keys()
    for name, line in lines.items():
        line.injected += proxy.injected[name]
    settle(next(iter(lines.values())), remote, s3_once, undisturbed, injected=0)
    for name, line in lines.items():
        line.passed(proxy.injected[name], COMPARED)


def test_a_storage_that_says_nothing_for_thirty_seconds_is_asked_again(
    remote: Site, s3_once: S3Server, undisturbed: Site, faults: Faults
) -> None:
    line = faults(f"S3: stall of {STALL_SECONDS} s")
    with faulty_proxy(s3_once.endpoint) as proxy:
        with remote.started(hold="commit measure 1", environment=environment(proxy.endpoint)) as driver:
            driver.wait_until_held()
            for method, path in (("PUT", "codes/c/1"), ("PUT", "lease.json"), ("GET", "transforms")):
                proxy.fail(Fault("stall", STALL_SECONDS), times=1, method=method, path=path)
            driver.release()
            ended = driver.end()
        assert ended.code == 0, ended
        count = sum(proxy.injected.values())
    assert count == 3
    settle(line, remote, s3_once, undisturbed, count)


def test_a_storage_that_says_nothing_when_the_lease_is_taken_is_asked_again(
    remote: Site, s3_once: S3Server, undisturbed: Site, faults: Faults
) -> None:
    line = faults(f"S3: stall of {STALL_SECONDS} s")
    with faulty_proxy(s3_once.endpoint) as proxy:
        proxy.fail(Fault("stall", STALL_SECONDS), times=1, method="PUT", path="lease.json")
        ended = remote.run(environment=environment(proxy.endpoint))
        assert ended.code == 0, ended
        assert sum(proxy.injected.values()) == 1
    settle(line, remote, s3_once, undisturbed, 1)


def test_a_storage_that_is_gone_for_good_ends_the_run_with_a_sentence(
    remote: Site, s3_once: S3Server, undisturbed: Site, faults: Faults
) -> None:
    line = faults("S3: outage")
    with faulty_proxy(s3_once.endpoint) as proxy:
        reached = environment(proxy.endpoint)
        ended = remote.run_with(
            "commit cache 2", lambda: proxy.fail(Fault("status", 503), times=1 << 30), constants=IMPATIENT,
            environment=reached,
        )  # fmt: skip
        assert ended.code == 3
        assert "503" in ended.sentence or remote.location in ended.sentence
        proxy.heal()
        again = remote.run(environment=reached)
        assert again.code == 0, again
    settle(line, remote, s3_once, undisturbed, 1)
