"""A Ray cluster as the driver sees it: joined or started, its nodes and the room on them.

Ray is imported here and nowhere else, once the environment is what it reads when it is loaded.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.util
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from statsvc.errors import EngineError, PlanError
from workers.engines.resources import cores

OBJECT_STORE_BYTES = 80 << 20  # nothing large goes through it; Ray takes no less than 75 MiB
CONNECT_SECONDS = 5.0
HEAD_SECONDS = 20.0  # that a head may be away; Ray ends processes that miss it for a minute
LONGEST_FOLDER = 40  # Ray puts sockets below it, whose paths Linux limits to 107 bytes
PREFIX = "statsvc-ray-"


@dataclass(frozen=True, slots=True)
class Node:
    """total, free: its resources by Ray's count; what other jobs hold is not free."""

    id: str
    address: str
    total: dict[str, float]
    free: dict[str, float]

    def slots(self, wanted: dict[str, float], *, free: bool = False) -> int:
        """How many workers find room here."""
        there = self.free if free else self.total
        return min(int(there.get(name, 0.0) / each) for name, each in wanted.items())


class Cluster:
    """Raises PlanError where Ray is not installed, EngineError where no cluster answers."""

    def __init__(self, address: str) -> None:
        self.is_own = address == "local"
        self._folder: Path | None = None
        if importlib.util.find_spec("ray") is None:
            raise PlanError("engine.kind: ray needs the package ray; pip install 'statsvc[ray]', on every node")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or every worker without a GPU warns
        if self.is_own:
            os.environ.setdefault("RAY_worker_niceness", "0")  # as workers of the inline engine; Ray's own is 15
        address = address if self.is_own else _found(address)
        if "RAY_AUTH_MODE" not in os.environ and (self.is_own or _has_token()):
            os.environ["RAY_AUTH_MODE"] = "token"  # as `ray start` decides where there is a token
            if not _has_token():
                os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # nobody else has business in our own cluster
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        self.ray: Any = importlib.import_module("ray")
        self._state: Any = importlib.import_module("ray._private.state")
        try:
            with _handlers_kept():
                self._join(address)
        except Exception as error:
            self.close()
            raise EngineError(
                f"engine.address: no Ray cluster can be joined at {address}: {_first_line(error)}. The driver must run "
                "on a node of the cluster, with the same versions of Ray and Python, and the same RAY_AUTH_TOKEN_PATH"
                if not self.is_own
                else f"Ray cannot start a cluster on this machine: {_first_line(error)}"
            ) from error
        # Ray prints what befalls its nodes into whatever is on the terminal; the driver says what matters itself.
        importlib.import_module("ray._private.worker")._worker_logs_enabled = False  # type: ignore[attr-defined]
        self._is_gone = False
        self._head: str = self.ray.get_runtime_context().gcs_address

    def _join(self, address: str) -> None:
        quiet = {"log_to_driver": False, "configure_logging": False, "logging_level": logging.CRITICAL}
        if not self.is_own:
            self.ray.init(address=address, **quiet)
            return
        import torch

        self._folder = _new_folder()
        self.ray.init(
            address="local",
            num_cpus=cores(),
            num_gpus=torch.cuda.device_count(),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(self._folder),
            **quiet,
        )

    def check(self) -> None:
        """Raises EngineError once the head no longer answers; asked before it is, as Ray would end this process."""
        host, _, port = self._head.rpartition(":")
        end = time.monotonic() + HEAD_SECONDS
        while True:
            try:
                socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
                return
            except OSError as error:
                if time.monotonic() > end:
                    self._is_gone = True
                    raise EngineError(
                        f"the head of the Ray cluster at {self._head} is gone ({error}), and with it the cluster; what "
                        "is finished is kept: start it again, then run the same command to go on"
                    ) from error
            time.sleep(1)

    def kill(self, handle: Any) -> None:
        """End an actor. Raises EngineError as `check` does."""
        self.check()
        self.ray.kill(handle)

    def nodes(self) -> list[Node]:
        """Those that are there now. Raises EngineError as `check` does."""
        self.check()
        free = self._state.available_resources_per_node()
        return [
            Node(node["NodeID"], node["NodeManagerAddress"], dict(node["Resources"]), free.get(node["NodeID"], {}))
            for node in self.ray.nodes()
            if node["Alive"]
        ]

    def actor(self, kind: type, node: Node, wanted: dict[str, float]) -> Any:
        """An actor that waits for its place on that node; when it dies, the driver replaces it."""
        strategies: Any = importlib.import_module("ray.util.scheduling_strategies")
        remote = self.ray.remote(
            num_cpus=wanted["CPU"],
            num_gpus=wanted.get("GPU", 0),
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups={"progress": 1},
            scheduling_strategy=strategies.NodeAffinitySchedulingStrategy(node.id, soft=False),
        )
        return remote(kind).remote()

    def close(self) -> None:
        """Leave; a cluster of our own ends with that."""
        if getattr(self, "_is_gone", False):
            atexit.register(_end_at_once)
        elif hasattr(self, "ray"):
            with _handlers_kept():
                self.ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _found(address: str) -> str:
    """host:port of a cluster that answers."""
    if address == "auto":
        asked = os.environ.get("RAY_ADDRESS", "auto")
        if asked.startswith("ray://"):
            raise PlanError(
                f"engine.address: auto is RAY_ADDRESS, and {asked} is for Ray Client; set it to host:port of the head"
            )
        if asked in ("auto", "local"):
            return "auto"
        address = asked
    host, _, port = address.rpartition(":")
    # Ray itself tries for half a minute, with a line of its own each second.
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise EngineError(
            f"engine.address: no Ray cluster answers at {address}: {error}; start its head there with `ray start "
            f"--head --port {port}`, or use address: local"
        ) from error
    return address


def _has_token() -> bool:
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(given) or Path("~/.ray/auth_token").expanduser().is_file()


def _new_folder() -> Path:
    """For sockets and logs of a cluster of our own; those of drivers that were killed are removed."""
    root = Path(tempfile.gettempdir())
    if len(str(root)) + len(PREFIX) + 16 > LONGEST_FOLDER:
        root = Path("/tmp")
    for old in root.glob(f"{PREFIX}*"):
        pid = old.name.removeprefix(PREFIX).partition("-")[0]
        if not pid.isdigit() or not Path(f"/proc/{pid}").exists():
            _end_users(old)
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=root))


def _end_users(folder: Path) -> None:
    """Ray's agents outlive a driver that was killed; they are known by the logs that they hold open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError, ValueError):
            if os.readlink(link).startswith(f"{folder}/"):  # noqa: PTH115 - of a file that may be gone
                os.kill(int(link.parts[2]), signal.SIGKILL)


def _end_at_once() -> None:
    """The last words of a driver whose cluster is gone: Ray's would wait for its head, until Ray ends this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(3)  # as an EngineError ends the command


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself, which is the driver's."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # not the main thread: then Ray took nothing
            signal.signal(signal.SIGTERM, before)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
