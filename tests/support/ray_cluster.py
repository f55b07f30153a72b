"""A Ray cluster of several real nodes on one machine, each with an address of its own, for tests that kill them."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.support.ports import free_port

HEAD = "127.0.0.2"  # 127.0.0.1 is rewritten by Ray
OBJECT_STORE_BYTES = 80 << 20
START_SECONDS = 120


class RayCluster:
    """The head runs inside the `with` block; other nodes come and go as a test says.

    with RayCluster() as cluster:
        cluster.add("127.0.0.3")
        subprocess.run([...], env=cluster.environment)      # its plan: engine: {kind: ray, address: cluster.address}
        cluster.kill("127.0.0.3")
    """

    def __init__(self, cpus: int = 1) -> None:
        self._cpus = cpus
        # Not below the folder of a test: Linux limits the paths of sockets to 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="ray-test-", dir="/tmp"))
        token = self._folder / "token"
        token.write_text(secrets.token_hex(32))
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # at Ray's own 15, whatever else the machine does comes first
        }
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.address = f"{HEAD}:{free_port()}"

    def __enter__(self) -> Self:
        port = self.address.rpartition(":")[2]
        try:
            self._start(HEAD, ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={self._folder}/r"])
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for address in list(self._nodes):
            self.kill(address)
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, address: str, **environment: str) -> None:
        """Start a node; it is part of the cluster when this returns."""
        self._start(address, [f"--address={self.address}"], environment)

    @contextlib.contextmanager
    def node(self, address: str, **environment: str) -> Iterator[None]:
        """A node as long as the `with` block lasts; what is told of its environment holds for its workers."""
        self.add(address, **environment)
        try:
            yield
        finally:
            self.kill(address)

    def kill(self, address: str) -> None:
        """SIGKILL to everything on a node, as if its plug was pulled."""
        node = self._nodes.pop(address)
        everything = psutil.Process(node.pid).children(recursive=True) if node.poll() is None else []
        node.kill()
        for process in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()
        psutil.wait_procs(everything, timeout=10)

    def workers(self) -> list[psutil.Process]:
        """The processes with a worker of ours in them, on all nodes."""
        found = []
        for node in self._nodes.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in psutil.Process(node.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        if " ".join(process.cmdline()).startswith("ray::Actor"):
                            found.append(process)
        return found

    def _start(self, address: str, arguments: list[str], environment: dict[str, str] | None = None) -> None:
        log = self._folder / f"{address}.log"
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
            f"--node-ip-address={address}", f"--num-cpus={self._cpus}", "--num-gpus=0",
            f"--object-store-memory={OBJECT_STORE_BYTES}", *arguments,
        ]  # fmt: skip
        with log.open("wb") as output:
            # Somewhere else than the driver: relative paths of a plan must not be those of a node.
            self._nodes[address] = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                env={**self.environment, **(environment or {})},
            )
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in (said := log.read_text(errors="replace")):
            if self._nodes[address].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the Ray node {address} does not start: {said[-2000:]}")
            time.sleep(0.1)
