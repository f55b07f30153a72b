"""What verifying a finished store finds."""

from __future__ import annotations

from statsvc.cli import cli
from statsvc.integrity.findings import Damage
from statsvc.integrity.verify import examine
from statsvc.store.paths import COPIES, INDEX
from tests.support.finished import Finished


def found(made: Finished) -> dict[str, Damage]:
    """The damage by path."""
    return {damage.path: damage for damage in examine(str(made.path)).damage}


def may_be_missing(path: str) -> bool:
    """Without its commit, a unit of the cache phase was not done yet; the next run writes the index and the copies."""
    return "commits/cache" in path or path.startswith((COPIES, INDEX))


def verify(made: Finished, *options: str) -> int:
    """The exit code of the command."""
    code: int = cli.main(["verify", "--store", str(made.path), *options], standalone_mode=False)
    return code
