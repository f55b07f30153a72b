"""What a training that was broken off goes on from: one file, replaced whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from statsvc.errors import PlanError, StoreError
from statsvc.storage.atomic_file import PARTIAL, AtomicFile, partial_files, write_atomically

CHECKPOINT, REPORT, STUDENT = "checkpoint.pt", "report.json", "student.safetensors"


class Folder:
    """The folder of a student: checkpoint, report, weights.

    identity  what decides the numbers, flat: another one must not go on from this one's checkpoint
    """

    def __init__(self, path: str, identity: dict[str, Any]) -> None:
        self.path, self._identity = Path(path).expanduser(), identity
        existing = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            what = "cannot be written" if existing.is_dir() else "is a file"
            raise PlanError(f"out: {str(existing)!r} {what}; name a folder that this user may write to")

    @property
    def is_finished(self) -> bool:
        """Whether report and student are there; the report is written last."""
        return all((self.path / name).is_file() for name in (REPORT, STUDENT))

    def read(self, device: torch.device) -> dict[str, Any] | None:
        """The checkpoint, or None where there is none; loaded as tensors and numbers only, never as code.

        Raises PlanError where it is another recipe's, naming what differs, and where the folder holds other things.
        """
        if not (self.path / CHECKPOINT).is_file():
            there = self.path.iterdir() if self.path.exists() else ()
            if found := sorted(file.name for file in there if PARTIAL not in file.name):
                raise PlanError(
                    f"out: {str(self.path)!r} holds {found[0]!r} and no checkpoint; name a new or empty folder"
                )
            return None
        try:
            state: dict[str, Any] = torch.load(self.path / CHECKPOINT, map_location=device, weights_only=True)
            made: dict[str, Any] = json.loads(state["identity"])
        except Exception as error:  # whatever the file is; what torch says of it is advice to execute it
            raise StoreError(
                f"{self.path / CHECKPOINT} is no checkpoint ({type(error).__name__}); remove it to begin anew"
            ) from error
        keys = sorted(made.keys() | self._identity.keys())
        if differing := [key for key in keys if made.get(key) != self._identity.get(key)]:
            values = ", ".join(
                f"{key} is {made.get(key)} there and {self._identity.get(key)} here" for key in differing
            )
            raise PlanError(
                f"out: {str(self.path)!r} holds a student of another recipe: {values}. Use those, or another folder, "
                "or remove this one to begin anew"
            )
        return state

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        new = AtomicFile(self.path / CHECKPOINT)
        try:
            torch.save({**state, "identity": json.dumps(self._identity, sort_keys=True)}, new.file)
            new.publish()
        finally:
            new.discard()

    def write(self, name: str, data: bytes) -> None:
        write_atomically(self.path / name, data)

    def sweep(self) -> None:
        """Remove what a process that died left half written."""
        for file in partial_files(self.path):
            file.unlink(missing_ok=True)


def flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{a: {b: 1}} as {a.b: 1}: names of fields as messages show them."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
