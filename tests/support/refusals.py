"""One way to say how a mistake is refused: a sentence in which "..." stands for any words."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
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


def file_refusal(content: str | bytes, file: Path, read: Callable[[Path], object]) -> str:
    """What is said of a file with that content, after the path that every sentence begins with."""
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PlanError) as refused:
        read(file)
    sentences = str(refused.value).splitlines()
    assert all(sentence.startswith(str(file)) for sentence in sentences)
    return "\n".join(sentence.removeprefix(str(file)).lstrip(":, ") for sentence in sentences)


def file_refuses(sentences: str, content: str | bytes, file: Path, read: Callable[[Path], object]) -> None:
    """These sentences, one a line, and no more of them."""
    said = file_refusal(content, file, read)
    says(said, sentences)
    assert len(said.splitlines()) == len(sentences.splitlines())


class Ended(NamedTuple):
    code: int
    printed: str
    errors: str


def command(capfd: pytest.CaptureFixture[str], *arguments: object) -> Ended:
    """`statsvc` with these arguments, in this process."""
    capfd.readouterr()  # of what was before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["statsvc", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return Ended(int(ended.value.code or 0), *capfd.readouterr())


def refused(words: str, ended: Ended) -> None:
    """A command ended with 2, these words on stderr, and nothing on stdout."""
    assert (ended.code, ended.printed) == (2, "")
    assert words in ended.errors
    assert "Traceback" not in ended.errors
