"""The number of each dataset shard in a store."""


def number(names: list[str], known: dict[str, int]) -> dict[str, int]:
    """A number for every dataset shard: known ones keep theirs, the others take the free ones in sorted order."""
    taken = set(known.values())
    free = (n for n in range(len(names) + len(known)) if n not in taken)
    return known | {name: next(free) for name in sorted(names) if name not in known}
