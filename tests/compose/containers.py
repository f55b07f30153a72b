"""Compose from outside, as a user has it: the docker commands, processes of the host, HTTP on the loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil

from tests.support.ports import free_port

T = TypeVar("T")
NO_SETTINGS = {"STATSVC_PLAN": "", "STATSVC_DATA": "", "STATSVC_STORE": ""}


class Failed(Exception):
    """Something is not as it must be."""


class Containers:
    """One project of a compose file: its own names, volumes and port, so that it disturbs no other."""

    def __init__(self, file: Path, environment: dict[str, str]) -> None:
        self.name = f"statsvc-test-{os.getpid()}-{file.stem.replace('.', '-')}"
        self.port = free_port()
        self._compose = [*program(), "--project-name", self.name, "--file", str(file)]
        self._environment = {**os.environ, **environment, "STATSVC_PORT": str(self.port)}

    def compose(self, *arguments: str, output: bool = False, environment: dict[str, str] | None = None) -> str:
        """Run one compose command; its standard output where asked for, else it is shown."""
        done = subprocess.run(
            [*self._compose, *arguments],
            env={**self._environment, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if output else None,
            text=True,
        )
        if done.returncode:
            raise Failed(f"{' '.join([*self._compose, *arguments])} ended with {done.returncode}")
        return done.stdout or ""

    def container(self, service: str) -> str:
        return self.compose("ps", "--all", "--quiet", service, output=True).strip()

    def inspect(self, service: str) -> dict[str, Any]:
        return json.loads(docker("inspect", self.container(service)))[0]  # type: ignore[no-any-return]

    def execute(self, service: str, *command: str) -> bytes:
        """What a command prints in a running container."""
        return docker("exec", self.container(service), *command)

    def run(self, *command: str, environment: dict[str, str] | None = None) -> str:
        """What a command prints in a new container of the worker."""
        return self.compose("run", "--rm", "--no-deps", "-T", "worker", *command, output=True, environment=environment)

    def has_ended(self, service: str) -> bool:
        return bool(self.inspect(service)["State"]["Status"] == "exited")

    def processes(self, service: str, named: str) -> list[psutil.Process]:
        """Those below the main process with a word in their command lines, the oldest first."""
        try:
            below = psutil.Process(self.inspect(service)["State"]["Pid"]).children(recursive=True)
            return [child for child in below if named in " ".join(child.cmdline())]
        except psutil.Error:
            return []  # they end while they are looked at

    def kill(self, service: str, named: str | None = None) -> str:
        """SIGKILL from outside to the main process, or to the oldest below it with a word in its command line.

        Not `docker kill`: that one means it, and such a container is not started again.
        """
        process = psutil.Process(self.inspect(service)["State"]["Pid"])
        if named is not None:
            below = self.processes(service, named)
            if not below:
                raise Failed(f"no process of {service} has {named} in its command line")
            process = below[0]
        command = " ".join(process.cmdline())
        os.kill(process.pid, signal.SIGKILL)
        return command

    def get(self, path: str) -> bytes | None:
        """The body of a 200; None for what is not there yet, or where nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
                body: bytes = answer.read()
                return body
        except urllib.error.HTTPError as error:
            if error.code in (404, 503):
                return None
            raise Failed(f"GET {path}: {error.code} {error.read().decode(errors='replace')}") from error
        except OSError:
            return None

    def get_json(self, path: str) -> Any:
        body = self.get(path)
        return None if body is None else json.loads(body)


def program() -> list[str]:
    """Compose: what the variable COMPOSE says, else the plugin of docker, else the older program."""
    if given := os.environ.get("COMPOSE"):
        return given.split()
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True)
    return ["docker", "compose"] if plugin.returncode == 0 else ["docker-compose"]


def docker(*arguments: str) -> bytes:
    done = subprocess.run(["docker", *arguments], capture_output=True)
    if done.returncode:
        raise Failed(f"docker {' '.join(arguments)}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def is_usable() -> bool:
    """Whether there is a docker to speak of."""
    return bool(shutil.which("docker")) and subprocess.run(["docker", "info"], capture_output=True).returncode == 0


def wait_for(what: str, seconds: float, probe: Callable[[], T]) -> T:
    """The first answer that is true. Raises Failed when there is none in time."""
    end = time.monotonic() + seconds
    while not (answer := probe()):
        if time.monotonic() > end:
            raise Failed(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.2)
    return answer


def expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Failed(otherwise)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Print what was done and how long it took, or what was not."""
    begun, outcome = time.monotonic(), "FAILED: "
    try:
        yield
        outcome = ""
    finally:
        print(f"[{time.monotonic() - begun:5.1f} s] {outcome}{name}", flush=True)


@contextmanager
def torn_down(*projects: Containers) -> Iterator[None]:
    """Nothing of them is left after the block; what they said is shown where it failed."""
    try:
        yield
    except BaseException:
        for project in projects:
            project.compose("logs", "--no-color", "--timestamps")
        raise
    finally:
        with step("everything torn down"):
            for project in projects:
                # Without settings every volume is in use, and only volumes that are in use are removed.
                project.compose("down", "--volumes", "--remove-orphans", "--timeout", "5", environment=NO_SETTINGS)
