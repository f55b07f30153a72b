"""One way to say how a mistake is refused: a sentence in which "..." stands for any words."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from statsvc.cli import main
from statsvc.errors import PlanError


def says(found: str, sentence: str) -> None:
    """The whole text is the sentence. "..." within it stays on its line; at either end it may be many lines."""
    inner = ".*".join(re.escape(part) for part in sentence.removeprefix("...").removesuffix("...").split("..."))
    before, after = (r"[\s\S]*" if there else "" for there in (sentence.startswith("..."), sentence.endswith("...")))
    assert re.fullmatch(before + inner + after, found), found


def refuses(sentence: str, call: Callable[..., object], *arguments: Any, **keys: Any) -> None:
    with pytest.raises(PlanError) as refused:
        call(*arguments, **keys)
    says(str(refused.value), sentence)


class Ended(NamedTuple):
    code: int
    printed: str
    errors: str


def command(capfd: pytest.CaptureFixture[str], *arguments: object) -> Ended:
    """`statsvc` with these arguments, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["statsvc", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return Ended(int(ended.value.code or 0), *capfd.readouterr())


def command_refuses(words: str, capfd: pytest.CaptureFixture[str], *arguments: object) -> None:
    """It ends with 2, these words on stderr, and nothing on stdout."""
    ended = command(capfd, *arguments)
    assert (ended.code, ended.printed) == (2, "")
    assert words in ended.errors
    assert "Traceback" not in ended.errors
