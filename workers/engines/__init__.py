"""What carries units to workers. A new engine is one new file and one line in ENGINES."""

from __future__ import annotations

from collections.abc import Callable

from workers.engines.base import Engine, EngineSetup
from workers.engines.inline import InlineEngine
from workers.engines.ray.engine import RayEngine

ENGINES: dict[str, Callable[[EngineSetup], Engine]] = {
    "inline": InlineEngine,
    "ray": RayEngine,
}
