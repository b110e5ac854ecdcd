"""`bench.smoke`: what its commands are, and how it ends."""

from __future__ import annotations

import shlex
import sys
from importlib.util import find_spec

import pytest

from bench import smoke


def test_commands_are_benchmarks() -> None:
    for line in smoke.COMMANDS:
        assert find_spec(f"bench.{shlex.split(line)[0]}") is not None, line


def test_it_ends_as_the_first_one_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.argv
    smoke.run("scale", "--models", "1.5 B", "--gpus", "8", "--buckets-mb", "100")
    assert "1.5 B" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        smoke.run("scale", "--models", "none of that name")
    assert end.value.code == 2
    assert sys.argv is before
