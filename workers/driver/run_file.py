"""`.statsvc/run.json`: the plan, where its dataset shards lie, and which were quarantined. Never served."""

from __future__ import annotations

from collections.abc import Mapping

from statsvc.dataset.expand import DatasetShard
from statsvc.dataset.urls import shown
from statsvc.digests import canonical_json
from statsvc.errors import DamagedObject
from statsvc.plan import Plan
from statsvc.storage.backend import Backend
from statsvc.store.paths import RUN
from statsvc.store.records import RanPlan, RunRecord, read_run


class RunFile:
    """The record of the last run, and now of this one. What is quarantined stays so until `statsvc run --retry`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        try:
            self._record = read_run(backend)
        except DamagedObject:
            self._record = RunRecord()  # nothing depends on it; the next run writes it anew

    @property
    def quarantine(self) -> Mapping[str, Mapping[str, str]]:
        """By phase and dataset shard, why it was given up."""
        return self._record.quarantine

    def write(self, plan: Plan, shards: dict[str, DatasetShard]) -> None:
        """Record what is being run; of URLs, nothing that may be a secret."""
        content = plan.model_dump(mode="json")
        content["data"]["shards"] = [shown(pattern) for pattern in plan.data.shards]
        locations = {name: shown(str(shard.location)) for name, shard in shards.items()}
        self._record = self._record.model_copy(update={"plan": RanPlan.model_validate(content), "locations": locations})
        self.save()

    def add_to_quarantine(self, phase: str, name: str, problem: str) -> None:
        """Give a dataset shard up until the user says otherwise."""
        of_phase = {**self._record.quarantine.get(phase, {}), name: problem}
        self._record = self._record.model_copy(update={"quarantine": {**self._record.quarantine, phase: of_phase}})
        self.save()

    def forget_quarantine(self) -> None:
        """Try everything again; kept once the record is written."""
        self._record = self._record.model_copy(update={"quarantine": {}})

    def save(self) -> None:
        """Keep the record as it is now."""
        self._backend.write(RUN, canonical_json(self._record.model_dump(mode="json", exclude_defaults=True)))
