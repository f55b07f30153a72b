"""What a check of a store has found: damaged and foreign objects, and those of work that is not finished."""

from __future__ import annotations

from typing import NamedTuple

GIVEN_UP = "nothing is left that says what it must be"


class Damage(NamedTuple):
    """A damaged object, and the commit that vouches for it (None: only the object itself has to be made anew).

    foreign  it is no part of this store: nothing in it accounts for the object
    removed  by `--repair`; not what no run makes anew, and not what others put there
    """

    path: str
    reason: str
    commit: str | None
    foreign: bool = False
    removed: bool = True


class Verdict(NamedTuple):
    """checked: how many objects; damage: by path; unfinished: objects of work that is not committed, which is fine."""

    checked: int
    damage: list[Damage]
    unfinished: list[str]


class Findings:
    """Where all parts of one check write down what they come across.

    checked     how many objects were looked at
    damage      by path; what is found first about an object counts
    unfinished  paths of objects of work that is not committed
    """

    def __init__(self) -> None:
        self.checked, self.damage, self.unfinished = 0, dict[str, Damage](), list[str]()

    def damaged(
        self, path: str, reason: object, commit: str | None = None, *, foreign: bool = False, removed: bool = True
    ) -> None:
        """Write down a damaged object; see Damage for the rest. Errors that name the path name it once."""
        self.damage.setdefault(path, Damage(path, str(reason).removeprefix(f"{path}: "), commit, foreign, removed))

    def verdict(self) -> Verdict:
        """All that was found."""
        return Verdict(self.checked, [self.damage[path] for path in sorted(self.damage)], self.unfinished)
