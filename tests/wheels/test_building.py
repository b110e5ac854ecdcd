"""What commands find around them."""

from __future__ import annotations

import sys

import pytest

from wheels.building import run


def test_what_pythonpath_names_is_not_there(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    run([sys.executable, "-c", "import os; print(os.environ.get('PYTHONPATH'))"])
    assert capfd.readouterr().out.splitlines()[-1] == "None"
