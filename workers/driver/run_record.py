"""`.statsvc/run.json`: the plan, where its dataset shards lie, and what was given up. Never served."""

from __future__ import annotations

import json
from typing import Any

from statsvc.dataset.expand import DatasetShard
from statsvc.dataset.urls import shown
from statsvc.digests import canonical_json
from statsvc.plan import Plan
from statsvc.storage.backend import Backend
from statsvc.store.paths import RUN


class RunRecord:
    """The record of a store; what it says of quarantine holds until `statsvc run --retry`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.read()

    def read(self) -> None:
        """Take the record as it stands now."""
        try:
            self._content: dict[str, Any] = json.loads(self._backend.read(RUN))
        except (FileNotFoundError, ValueError):
            self._content = {}

    def write(self, plan: Plan, shards: dict[str, DatasetShard]) -> None:
        """Record what is being run; of URLs, nothing that may be a secret."""
        self._content["plan"] = plan.model_dump(mode="json")
        self._content["plan"]["data"]["shards"] = [shown(pattern) for pattern in plan.data.shards]
        self._content["locations"] = {name: shown(str(shard.location)) for name, shard in shards.items()}
        self.save()

    def quarantined(self, phase: str) -> dict[str, str]:
        """The dataset shards given up in a phase, with the reason."""
        found: dict[str, str] = self._content.get("quarantine", {}).get(phase, {})
        return found

    def all_quarantined(self) -> list[tuple[str, str, str]]:
        """Phase, dataset shard and reason of all that was given up."""
        return [
            (phase, name, problem)
            for phase, shards in self._content.get("quarantine", {}).items()
            for name, problem in shards.items()
        ]

    def quarantine(self, phase: str, name: str, problem: str) -> None:
        """Give a dataset shard up until the user says otherwise."""
        self._content.setdefault("quarantine", {}).setdefault(phase, {})[name] = problem
        self.save()

    def forget_quarantine(self) -> None:
        """Try everything again; kept once the record is written."""
        self._content.pop("quarantine", None)

    def save(self) -> None:
        """Keep the record as it is now."""
        self._backend.write(RUN, canonical_json(self._content))
