"""What a check of a store has found: damaged and foreign objects, and those of work that is not finished."""

from __future__ import annotations

from typing import NamedTuple


class Damage(NamedTuple):
    """A damaged object, and the commit that lists it (None: only the object itself has to be made again).

    foreign   it is no part of this store: nothing in it accounts for the object
    removed   by `--repair`; not what no run makes again, and not what others put there
    restored  by `--repair`, from its second copy, or as the copy of a sound original
    """

    path: str
    reason: str
    commit: str | None
    foreign: bool = False
    removed: bool = True
    restored: bool = False


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
        self,
        path: str,
        reason: object,
        commit: str | None = None,
        *,
        foreign: bool = False,
        removed: bool = True,
        restored: bool = False,
    ) -> None:
        """Write down a damaged object; see Damage for the rest. Errors that name the path name it once."""
        reason = str(reason).removeprefix(f"{path}: ")
        self.damage.setdefault(path, Damage(path, reason, commit, foreign, removed, restored))

    def verdict(self) -> Verdict:
        """All that was found."""
        return Verdict(self.checked, [self.damage[path] for path in sorted(self.damage)], self.unfinished)
