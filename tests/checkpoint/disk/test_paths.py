"""Paths of file systems are taken, URLs are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import wrapped
from worker_pool import RunOnRanks

import zeroopt.checkpoint
from zeroopt import CheckpointError
from zeroopt.checkpoint.disk.paths import is_file_name, local_path
from zeroopt.checkpoint.exporting import export
from zeroopt.checkpoint.format.reading import open_checkpoint
from zeroopt.checkpoint.inspection import inspect

URLS = ["s3://bucket/a", "gs://bucket", "hf://x/y", "file:///tmp/a", "simplecache::s3://b/a", "abfs+x://a"]


@pytest.mark.parametrize("path", ["a/b", "/a/b", "./s3:/a", "b/../c:d", "step:3", "run:/a", "C:/a", "a b/c::d"])
def test_local_paths_stay(path: str) -> None:
    assert local_path(path) == Path(path)


@pytest.mark.parametrize("path", [*URLS, Path("s3://bucket/a")])
def test_urls_are_refused(path: Any) -> None:
    with pytest.raises(CheckpointError, match="is a URL, .* give a path that is mounted there, and copy"):
        local_path(path)


def test_directories_named_like_urls() -> None:
    assert local_path(Path("/x/s3:/bucket")) == Path("/x/s3:/bucket")
    assert local_path(Path("C:/x")) == Path("C:/x")


def use_a_url(url: Any) -> list[str]:
    model, optimizer = wrapped("mlp", "sgd", {})
    errors = []
    for call in (zeroopt.checkpoint.save, zeroopt.checkpoint.async_save, zeroopt.checkpoint.load):
        with pytest.raises(CheckpointError) as raised:
            call(url, model, optimizer)
        errors.append(str(raised.value))
    return errors


def test_all_ranks_hear_of_it(run_on_ranks: RunOnRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answers = run_on_ranks(2, use_a_url, Path("s3://bucket/a"))
    assert answers[0] == answers[1]
    assert all("on rank 0: s3:/bucket/a is a URL" in error for error in answers[0])
    for call in (zeroopt.checkpoint.latest, open_checkpoint):
        with pytest.raises(CheckpointError, match="is a URL"):
            call("s3://bucket/a")
    assert "is a URL" in inspect("s3://bucket/a").problems[0]
    assert not list(tmp_path.iterdir())


def test_no_export_to_a_url(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(1, save_to, tmp_path / "a")
    with pytest.raises(CheckpointError, match="is a URL"):
        export(open_checkpoint(tmp_path / "a"), "s3://bucket/a.pt")


def save_to(path: Path) -> None:
    zeroopt.checkpoint.save(path, *wrapped("mlp", "sgd", {}))


def test_names_of_files_lead_nowhere_else() -> None:
    assert all(map(is_file_name, ["a", ".metadata", "__0_0.distcp", "a b", "..."]))
    assert not any(map(is_file_name, ["", ".", "..", "../a", "/etc/passwd", "a/b", "a/", "a\0b", 7, None]))
