"""The encoder learns, the same by DDP and by zeroopt, and is fine-tuned on another number of ranks than it was pre-trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from recipe_runs import run_recipe
from worker_pool import RunOnRanks

pytest.importorskip("tokenizers")
pytest.importorskip("scipy")

from recipes.outcome import Outcome, differences
from recipes.side_by_side import FIRST_TOLERANCE, LAST_TOLERANCE
from recipes.text import PAD_ID, find_tokens
from recipes.understand.domains import DOMAINS, encode_texts, prose_of, read_domains
from recipes.understand.masking import count_missing, mask
from recipes.understand.presets import PRESETS

STEPS = 120
MORE = 3  # steps on the other ranks
BOTH_METHODS = "ddp", "zeroopt"


def run_part(method: str, out: Path, part: str, steps: int) -> Outcome:
    short = replace(PRESETS["tiny"], batch=24, draws=1, label_steps=30)
    with patch.dict(PRESETS, {"tiny": short}):
        options = f"--part={part}", f"--steps={steps}", f"--checkpoints={out / method}"
        return run_recipe("understand", method, out, *options)


@pytest.mark.slow
def test_it_learns_the_same_by_both_methods_and_goes_on_with_other_ranks(
    run_on_ranks: RunOnRanks, tmp_path: Path
) -> None:
    begun = [run_on_ranks(2, run_part, method, tmp_path, "words", STEPS)[0] for method in BOTH_METHODS]
    done = [run_on_ranks(3, run_part, method, tmp_path, "both", STEPS + MORE)[0] for method in BOTH_METHODS]
    first, last = differences(*begun)
    assert first <= FIRST_TOLERANCE and last <= LAST_TOLERANCE
    assert max(differences(*done)) <= LAST_TOLERANCE, "they go on from what each had come to by itself"
    for before, after in zip(begun, done, strict=True):
        assert len(before.losses["missing words"]) == STEPS and len(after.losses["missing words"]) == MORE
        assert before.final_loss("missing words") < 0.9 * before.losses["missing words"][0]
        (missing,) = before.figures
        missing_later, told = after.figures
        assert missing_later.value == pytest.approx(missing.value, rel=0.02)
        assert told.value > 2 / len(DOMAINS), (
            "more than by guessing; to be ahead of what begins from nothing takes longer"
        )


def refuse_without_words(out: Path) -> bool:
    with pytest.raises(FileNotFoundError, match="begin with --part words"):
        run_part("zeroopt", out, "labels", STEPS)
    return True


def test_labels_need_something_pre_trained(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    assert all(run_on_ranks(2, refuse_without_words, tmp_path))


def test_as_many_words_of_each_row_are_missing() -> None:
    tokens = torch.arange(3, 203).view(2, 100)
    masked = mask(tokens, 0.3, 300, torch.Generator().manual_seed(0))
    assert masked.missing.shape == (2, 30)
    assert torch.equal(tokens.gather(1, masked.places), masked.missing)
    kept = torch.ones_like(tokens, dtype=torch.bool).scatter(1, masked.places, False)
    assert torch.equal(masked.tokens[kept], tokens[kept])
    assert count_missing(0.01, 10) == 1


DOCSTRING = """Compute the pivoted LU decomposition
    of a matrix.

    The decomposition is::

    Too short.

    Parameters
    ----------
    a : (M, N) array_like

    >>> from scipy.linalg import lu

    .. versionadded:: 1.2.0
    """


def test_prose_is_what_is_read() -> None:
    assert prose_of(DOCSTRING) == ["compute the pivoted lu decomposition of a matrix."]


def test_what_is_tested_is_nowhere_else() -> None:
    domains = read_domains()
    tested = {text for text, _ in domains.tested}
    assert tested.isdisjoint(text for text, _ in domains.pool)
    assert not any(whole.startswith(text) for text in tested for whole in domains.unlabelled)
    few = domains.label(2, seed=0)
    assert [label for _, label in few] == [number // 2 for number in range(2 * len(DOMAINS))]
    assert few == domains.label(2, seed=0) != domains.label(2, seed=1)
    assert {label for _, label in domains.tested} == set(range(len(DOMAINS)))


def test_texts_are_cut_and_padded() -> None:
    tokenizer = find_tokens(["the cat and the dog"] * 3, 300)
    tokens, words, labels = encode_texts(tokenizer, [("the cat and the dog", 3), ("the", 1)], 4)
    assert tokens.shape == words.shape == (2, 4) and labels.tolist() == [3, 1]
    assert words[0].all() and torch.equal(words, tokens != PAD_ID) and not words[1].all()


@pytest.mark.parametrize(("preset", "millions"), {"tiny": 0.19, "base": 110, "large": 336}.items())
def test_presets_are_of_their_size(preset: str, millions: float) -> None:
    with torch.device("meta"):
        model, _ = PRESETS[preset]()
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.05)
