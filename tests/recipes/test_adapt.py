"""Adapters learn to answer and to prefer, the same by DDP and by zeroopt, and beside a trunk that stays as it is."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from recipe_runs import check, run_recipe
from torch import nn
from worker_pool import RunOnRanks

pytest.importorskip("tokenizers")

from recipes.adapt.lora import LoRALinear, add_adapters, merge_adapters
from recipes.adapt.preferences import encode_preferences, log_probabilities, margins, preference_loss, worse_than
from recipes.adapt.presets import LAYERS, PRESETS
from recipes.adapt.trunk import load_trunk
from recipes.generate.answers import Pair
from recipes.generate.model import GPT, IGNORED
from recipes.outcome import Outcome
from recipes.text import find_tokens

SMALL = "--steps=8"


@pytest.fixture(scope="module")
def trunk(run_on_ranks: RunOnRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trunk")
    outcome = run_on_ranks(2, run_recipe, "adapt", "zeroopt", out, "--part=trunk", SMALL)[0]
    assert outcome.learned, outcome.figures
    return out / "trunk-1m-zeroopt.pt"


def test_it_learns_the_same_by_both_methods(run_on_ranks: RunOnRanks, trunk: Path, tmp_path: Path) -> None:
    ddp, zeroopt = (
        run_on_ranks(2, run_recipe, "adapt", method, tmp_path, f"--trunk={trunk}", SMALL)[0]
        for method in ("ddp", "zeroopt")
    )
    check(ddp, zeroopt)
    assert list(zeroopt.losses) == ["answers", "choices"]
    assert zeroopt.losses["choices"][0] == pytest.approx(math.log(2)), "at first it is the reference"


def run_as_the_largest(out: Path, trunk: Path) -> Outcome:
    small = PRESETS["1m"]
    large = replace(small, trunk=replace(small.trunk, bfloat16=True, recomputed=True, built_by_wrap=True))
    with patch.dict(PRESETS, {"1m": large}):
        return run_recipe("adapt", "zeroopt", out, f"--trunk={trunk}", SMALL)


def test_wrap_builds_the_trunk_of_the_largest(run_on_ranks: RunOnRanks, trunk: Path, tmp_path: Path) -> None:
    outcome = run_on_ranks(2, run_as_the_largest, tmp_path, trunk)[0]
    assert outcome.learned, outcome.figures


def make_gpt() -> GPT:
    torch.manual_seed(2)
    return GPT(vocabulary=30, context=8, layers=2, width=16, heads=2)


def adapted() -> GPT:
    """With adapters that have learned something."""
    model = make_gpt()
    add_adapters(model, LAYERS, rank=3, alpha=6)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.lora_b)
    return model


TOKENS = torch.arange(16).view(2, 8)


def test_new_adapters_change_nothing_and_are_all_that_is_trained() -> None:
    plain, model = make_gpt(), make_gpt()
    add_adapters(model, LAYERS, rank=3, alpha=6)
    assert torch.equal(model(TOKENS), plain(TOKENS))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * len(LAYERS) and all("lora_" in name for name in trained)
    assert plain.state_dict().keys() <= model.state_dict().keys(), "checkpoints of the trunk fit"


def test_a_merged_model_does_the_same_without_adapters() -> None:
    model = adapted()
    expected = model(TOKENS)
    assert not torch.allclose(expected, make_gpt()(TOKENS))
    merge_adapters(model)
    assert model.state_dict().keys() == make_gpt().state_dict().keys()
    torch.testing.assert_close(model(TOKENS), expected)


def test_they_do_what_those_of_peft_do() -> None:
    peft = pytest.importorskip("peft")
    model, other = adapted(), make_gpt()
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(LAYERS))
    peft.inject_adapter_in_model(config, other)
    own = {name.rpartition(".")[0]: layer for name, layer in model.named_parameters() if "lora_" in name}
    assert len(own) == 2 * len(LAYERS)
    for path in own:
        for name, mine in ((name, getattr(model.get_submodule(path), name)) for name in ("lora_a", "lora_b")):
            theirs = getattr(other.get_submodule(path), name.replace("_a", "_A").replace("_b", "_B"))["default"]
            theirs.weight.data.copy_(mine.data)
    torch.testing.assert_close(model(TOKENS), other(TOKENS))
    trained = sum(parameter.numel() for parameter in other.parameters() if parameter.requires_grad)
    assert trained == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_without_a_trunk_it_is_said_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train one by --part trunk"):
        load_trunk(make_gpt(), tmp_path / "none.pt")


def test_a_worse_answer_has_the_same_words_and_too_short_ones_are_left_out() -> None:
    pair = Pair("What does f(x) of m do?", "Return the sum of all numbers that are in x.")
    assert sorted(worse_than(pair).answer.split()) == sorted(pair.answer.split()) != worse_than(pair).answer.split()
    tokenizer = find_tokens([pair.prompt, pair.answer], 400)
    tokens, targets = encode_preferences(tokenizer, [pair, Pair("And g?", "Return nothing.")], context=100)
    assert tokens.shape == targets.shape == (1, 2, 100)
    assert not torch.equal(*targets[0])


def test_log_probabilities_are_of_answers_alone() -> None:
    logits = torch.randn(2, 3, 5)
    targets = torch.tensor([[IGNORED, 1, 4], [2, IGNORED, IGNORED]])
    every = logits.log_softmax(-1)
    expected = torch.stack([every[0, 1, 1] + every[0, 2, 4], every[1, 0, 2]])
    torch.testing.assert_close(log_probabilities(logits, targets), expected)


def test_the_loss_is_the_papers() -> None:
    policy = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]], requires_grad=True)
    reference = torch.tensor([[-1.5, -1.0], [-3.0, -1.0]])
    margin = margins(policy, reference)
    assert margin.tolist() == [1.5, 0.0]
    loss = preference_loss(margin, beta=2.0)
    assert loss.item() == pytest.approx((math.log1p(math.exp(-3.0)) + math.log(2)) / 2)
    loss.backward()
    assert policy.grad is not None
    assert (policy.grad[:, 0] < 0).all() and torch.equal(policy.grad[:, 0], -policy.grad[:, 1])
