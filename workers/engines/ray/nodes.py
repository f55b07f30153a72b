"""What differs between machines, and what is said of them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from statsvc.dataset.folder import FolderShard
from statsvc.errors import EngineError
from workers.engines.ray.cluster import Node
from workers.unit.job import Unit
from workers.unit.worker import Failed

log = logging.getLogger("statsvc")


def check_same(address: str, first: dict[str, str], here: dict[str, str]) -> None:
    """Raises EngineError where a node computes with other libraries: what is stored would depend on who did it."""
    differing = sorted(name for name in first.keys() | here.keys() if first.get(name) != here.get(name))
    if not differing:
        return
    told = ", ".join(f"{name} is {here.get(name)} there and {first.get(name)} elsewhere" for name in differing)
    if differing != ["device"] or "cpu" in (first["device"], here["device"]):
        raise EngineError(f"node {address} would give other numbers: {told}; make all nodes the same")
    log.warning("node %s may give other last digits: %s", address, told)


def told_room(wanted: dict[str, float], nodes: list[Node]) -> str:
    """What a worker takes, and what the nodes have."""

    def told(resources: dict[str, float]) -> str:
        return ", ".join(f"{resources.get(name, 0):g} {name}" for name in wanted)

    there = "; ".join(f"{node.address} has {told(node.total)}, free {told(node.free)}" for node in nodes)
    return f"it takes {told(wanted)}; {there or 'there is no node'}"


def death(address: str, error: Exception) -> Failed:
    """What became of a worker on that node, by what Ray says."""
    text = str(error)
    if "node has died" in text or type(error).__name__ in ("ActorUnavailableError", "NodeDiedError"):
        message = f"node {address} is gone, with the worker on it"
    elif type(error).__name__ == "OutOfMemoryError":
        message = f"node {address} is short of memory, and Ray ended the worker"
    else:
        message = f"the worker process on node {address} died"
    return Failed("again", message, text)


def with_absolute_paths(unit: Unit) -> Unit:
    """Relative paths begin where the driver was started, on whatever node."""
    location = unit.location
    if isinstance(location, FolderShard):
        return replace(unit, location=replace(location, folder=absolute(location.folder)))
    return replace(unit, location=absolute(location))


def absolute(path: str) -> str:
    """A local path as it holds in any folder; URLs as they are."""
    return path if "://" in path else str(Path(path).expanduser().absolute())
