"""What verifying a finished store finds."""

from __future__ import annotations

from statsvc.cli import cli
from statsvc.integrity.findings import Damage
from statsvc.integrity.verify import examine
from tests.support.finished import Finished


def found(made: Finished) -> dict[str, Damage]:
    """The damage by path."""
    return {damage.path: damage for damage in examine(str(made.path)).damage}


def verify(made: Finished, *options: str) -> int:
    """The exit code of the command."""
    code: int = cli.main(["verify", "--store", str(made.path), *options], standalone_mode=False)
    return code
