"""The GPT learns, and the same by DDP and by zeroopt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from recipe_runs import check, run_recipe
from worker_pool import RunOnRanks

pytest.importorskip("tokenizers")

from recipes.generate.answers import Pair, encode_pairs, pairs_of
from recipes.generate.model import IGNORED
from recipes.generate.presets import PRESETS
from recipes.text import END, Docstring, find_tokens

STEPS = 10


def test_it_learns_the_same_by_both_methods_and_goes_on(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    options = tmp_path, f"--steps={STEPS}", f"--checkpoints={tmp_path / 'saved'}", "--every=6"
    ddp = run_on_ranks(2, run_recipe, "generate", "ddp", *options[:2])[0]
    zeroopt = run_on_ranks(2, run_recipe, "generate", "zeroopt", *options)[0]
    check(ddp, zeroopt)
    assert list(zeroopt.losses) == ["text", "answers"] and len(zeroopt.losses["text"]) == STEPS
    assert len(zeroopt.texts) == 6
    rest = run_on_ranks(2, run_recipe, "generate", "zeroopt", *options)[0]
    assert rest.losses == {"text": zeroopt.losses["text"][6:], "answers": zeroopt.losses["answers"]}


def learns_as_large_ones_do(out: Path) -> bool:
    """The smallest preset, trained as the largest is."""
    large = replace(PRESETS["1m"], bfloat16=True, recomputed=True, built_by_wrap=True)
    with patch.dict(PRESETS, {"1m": large}):
        return run_recipe("generate", "zeroopt", out, f"--steps={STEPS}").learned


def test_it_learns_in_bfloat16_built_by_wrap(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    assert run_on_ranks(2, learns_as_large_ones_do, tmp_path)[0]


@pytest.mark.parametrize(
    ("preset", "billions"), {"1m": 0.001, "3m": 0.003, "124m": 0.124, "1.5b": 1.5, "17b": 17}.items()
)
def test_presets_are_of_the_size_that_they_are_named_for(preset: str, billions: float) -> None:
    with torch.device("meta"):
        model, _ = PRESETS[preset]()
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.1)


def test_only_answers_are_learned() -> None:
    known = Docstring("json", "json", "dump(obj, fp)", "Serialize an object\nto a file.\n\nAnd more.")
    (pair,) = pairs_of([known, Docstring("json", "json", "JSONEncoder", "Extensible JSON encoder for Python.")])
    assert pair == Pair("What does dump(obj, fp) of json do?", "Serialize an object to a file.")
    tokenizer = find_tokens([pair.prompt, pair.answer], 400)
    tokens, targets = encode_pairs(tokenizer, [pair], context=100)
    learned = targets[0][targets[0] != IGNORED].tolist()
    assert tokenizer.decode(learned, skip_special_tokens=False) == f" {pair.answer}{END}"
    assert tokens.shape == targets.shape == (1, 100)
    assert encode_pairs(tokenizer, [pair], context=10)[0].numel() == 0, "too long: left out"
