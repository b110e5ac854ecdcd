"""transformers' Trainer with zeroopt against the same Trainer with DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from pages import snippets
from paths import ROOT
from torch import Tensor, nn
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.checkpoint.inspection import inspect

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerators import as_started
from trainers import GLOBAL_BATCH, Log, Sequences, arguments, assert_same_log, llama, log_of, make, values
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from zeroopt.errors import CheckpointError, ConfigError, NotSupportedError, StateError
from zeroopt.integrations.accelerate.optimizers import plain_optimizer
from zeroopt.integrations.transformers import ZeroTrainerMixin, enable

NORM_ORDER = 2e-6  # what the order in which squares are summed may change of a norm, and of what is clipped by it
ROUNDING = 2e-5  # the same of gradients that are summed over other numbers of ranks, in a few steps
UNFUSED = {"fused": False}

UNCLIPPED: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "warmup_steps": 2},
    "activation checkpointing": {"activation_checkpointing": True},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "bf16": {"bf16": True},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
}


def without_norms(log: Log) -> Log:
    return [{name: value for name, value in entry.items() if name != "grad_norm"} for entry in log]


def norms(log: Log) -> Log:
    return [{"grad_norm": entry["grad_norm"]} for entry in log if "grad_norm" in entry]


def compare(folder: Path, given: dict[str, Any], tolerance: float) -> None:
    """Logs and parameters in all stages; norms are sums in another order."""
    with as_started():
        reference = make(folder, None, **given)
        reference.train()
        expected = log_of(reference)
        for stage in (0, 1, 2):
            trainer = make(folder, {"stage": stage, **UNFUSED}, **given)
            trainer.train()
            assert isinstance(trainer.model_wrapped, zeroopt.ZeroDataParallel)
            assert_same_log(without_norms(log_of(trainer)), without_norms(expected), tolerance)
            assert_same_log(norms(log_of(trainer)), norms(expected), NORM_ORDER)
            torch.testing.assert_close(values(trainer.model), values(reference.model), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", UNCLIPPED)
def test_same_as_with_ddp(run_on_ranks: RunOnRanks, tmp_path: Path, name: str) -> None:
    run_on_ranks(2, compare, tmp_path, {"max_grad_norm": 0.0, **UNCLIPPED[name]}, 0.0, timeout=200)


def test_same_as_with_ddp_when_clipping(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, compare, tmp_path, {"max_grad_norm": 0.1}, ROUNDING)


def train_in_16_bits(folder: Path) -> None:
    """Parameters in bfloat16 with float32 masters follow float32 ones under autocast."""
    with as_started():
        reference = make(folder, None, bf16=True, max_steps=8)
        reference.train()
        trainer = make(
            folder, {"param_dtype": torch.bfloat16}, bf16=True, max_steps=8, save_strategy="steps", save_steps=8
        )
        trainer.train()
        assert {param.dtype for param in trainer.model.parameters()} == {torch.bfloat16}
        assert_same_log(norms(log_of(trainer)), norms(log_of(reference)), 0.03)
        assert_same_log(without_norms(log_of(trainer)), without_norms(log_of(reference)), 0.003)


def test_param_dtype(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, train_in_16_bits, tmp_path)


# Saving and resuming.

SAVING = {"save_strategy": "steps", "save_steps": 2}
TIERS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 and 8 bits": {"param_dtype": torch.bfloat16, "master_weights": "remainder", "state_dtype": torch.int8},
    "whole state": {"whole_state": True},
}


def train_and_save(folder: Path, zero: dict[str, Any] | None, given: dict[str, Any]) -> tuple[Log, dict[str, Tensor]]:
    with as_started():
        trainer = make(folder, zero, **SAVING, **given)
        trainer.train()
        return log_of(trainer), values(trainer.model)


def resume(folder: Path, zero: dict[str, Any] | None, given: dict[str, Any]) -> tuple[Log, dict[str, Tensor]]:
    """From the checkpoint after two steps, with a model of other weights."""
    with as_started():
        trainer = make(folder, zero, llama(seed=1), **given)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        return log_of(trainer), values(trainer.model)


@pytest.mark.parametrize("tier", TIERS)
def test_resuming(run_on_ranks: RunOnRanks, tmp_path: Path, tier: str) -> None:
    zero = TIERS[tier]
    expected, its_values = run_on_ranks(2, train_and_save, tmp_path, zero, {})[0]
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert ("optimizer.pt" in names, "zeroopt" in names) == (tier == "whole state", tier != "whole state")
    for log, here in run_on_ranks(2, resume, tmp_path, zero, {}):
        assert_same_log(
            log[:-1], expected[:-1]
        )  # the last entry is the mean loss of those steps that this train() took
        torch.testing.assert_close(here, its_values, rtol=0, atol=0)
    for ranks in (1, 3):
        log, here = run_on_ranks(ranks, resume, tmp_path, zero, {})[0]
        assert_same_log(
            without_norms(log[:-1]), without_norms(expected[:-1]), ROUNDING if tier != "bfloat16 and 8 bits" else 0.01
        )


def test_resuming_from_ddp_and_with_it(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    given = {"max_grad_norm": 0.0}
    expected, its_values = run_on_ranks(2, train_and_save, tmp_path / "ddp", None, given)[0]
    for zero in (UNFUSED, {**UNFUSED, "stage": 1, "whole_state": True}):
        log, here = run_on_ranks(2, resume, tmp_path / "ddp", zero, given)[0]
        assert_same_log(without_norms(log[:-1]), without_norms(expected[:-1]))
        torch.testing.assert_close(here, its_values, rtol=0, atol=0)
    run_on_ranks(2, train_and_save, tmp_path / "zeroopt", {**UNFUSED, "whole_state": True}, given)
    log, here = run_on_ranks(2, resume, tmp_path / "zeroopt", None, given)[0]
    assert_same_log(without_norms(log[:-1]), without_norms(expected[:-1]))
    torch.testing.assert_close(here, its_values, rtol=0, atol=0)


WAYS_OF_SAVING: dict[str, dict[str, Any] | None] = {"without": None, "parts": UNFUSED, "whole": TIERS["whole state"]}


class StateAtTheStart(TrainerCallback):
    """Takes the first moments by parameter when training begins, after a checkpoint has been loaded."""

    def on_train_begin(self, *args: Any, optimizer: Any, **given: Any) -> None:
        self.moments = moments(optimizer)


def moments(optimizer: Any) -> dict[int, Tensor]:
    plain = plain_optimizer(optimizer)
    if isinstance(plain, zeroopt.ZeroOptimizer):
        plain.consolidate_state_dict(to=dist.get_rank())
    return {position: entry["exp_avg"].clone() for position, entry in plain.state_dict()["state"].items()}


def write_over(folder: Path, first: str, second: str) -> str | None:
    """Two runs of other weights save the same checkpoint. From it a third one gets the state of the second run, or an error."""
    saved = []
    with as_started():
        for seed, way in enumerate((first, second)):
            run = make(folder, WAYS_OF_SAVING[way], llama(seed), max_steps=1, save_steps=1, save_strategy="steps")
            run.train()
            if dist.get_world_size() == 1:
                saved.append(moments(run.optimizer))
        start = StateAtTheStart()
        third = make(folder, UNFUSED, llama(2), {"callbacks": [start]}, max_steps=2)
        try:
            third.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
        except CheckpointError as error:
            return str(error)
    assert start.moments.keys() == saved[0].keys() == saved[1].keys() != set()
    assert all(torch.equal(start.moments[position], saved[1][position]) for position in saved[1])
    assert not all(torch.equal(start.moments[position], saved[0][position]) for position in saved[0])
    return None


@pytest.mark.parametrize(("first", "second"), [("parts", "whole"), ("whole", "parts"), ("without", "parts")])
def test_a_checkpoint_written_over(run_on_ranks: RunOnRanks, tmp_path: Path, first: str, second: str) -> None:
    assert run_on_ranks(1, write_over, tmp_path / "alone", first, second) == [None]
    names = {path.name for path in (tmp_path / "alone" / "checkpoint-1").iterdir()}
    assert [name for name in names if "zeroopt" in name or "optimizer" in name] == [
        "zeroopt" if second == "parts" else "optimizer.pt"
    ]


def test_a_checkpoint_written_over_without_zeroopt_is_refused(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    for error in run_on_ranks(2, write_over, tmp_path, "parts", "without"):
        assert error is not None and "checkpoint-1 has the optimizer's state twice" in error


def keep_the_best(
    folder: Path, zero: dict[str, Any] | None, given: dict[str, Any]
) -> tuple[set[str], dict[str, Tensor]]:
    """A learning rate that is too high makes an early model the best."""
    with as_started():
        trainer = make(
            folder,
            zero,
            learning_rate=0.3,
            max_grad_norm=0.0,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            **given,
        )
        trainer.train()
        assert trainer.state.best_global_step is not None
        dist.barrier()
        return {path.name for path in folder.iterdir()}, values(trainer.model)


@pytest.mark.parametrize("options", [{}, {"share_parameters": True}, {"param_dtype": torch.bfloat16}], ids=str)
def test_best_model_and_rotation(run_on_ranks: RunOnRanks, tmp_path: Path, options: dict[str, Any]) -> None:
    given = {"save_only_model": not options}
    names, best = run_on_ranks(2, keep_the_best, tmp_path / "ddp", None, given)[0]
    for its_names, here in run_on_ranks(2, keep_the_best, tmp_path / "zeroopt", {**UNFUSED, **options}, given):
        assert its_names == names
        if "param_dtype" not in options:
            torch.testing.assert_close(here, best, rtol=0, atol=0)
    newest = tmp_path / "zeroopt" / max(names)
    assert (newest / "zeroopt").exists() == bool(options)


# Evaluation, and training more than once.


def evaluate_around(folder: Path, zero: dict[str, Any] | None, before: bool) -> tuple[list[float], Tensor, Log]:
    """Losses of evaluations before and after training, predictions, and the log of a second training."""
    with as_started():
        trainer = make(folder, zero, max_grad_norm=0.0)
        losses = [trainer.evaluate()["eval_loss"]] if before else []
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
        predicted = torch.as_tensor(trainer.predict(Sequences(GLOBAL_BATCH)).predictions)
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
        return losses, predicted, without_norms(log_of(trainer))


def test_evaluation_before_training_and_a_second_training(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    """With DDP, Trainer trains the bare model after an evaluation, each rank for itself."""
    first, second = run_on_ranks(2, evaluate_around, tmp_path, UNFUSED, True)
    expected = run_on_ranks(2, evaluate_around, tmp_path, None, False)[0]
    for one in (first, second):
        assert one[0][1:] == expected[0] and one[0][0] > 4
        torch.testing.assert_close(one[1], expected[1], rtol=0, atol=0)
        assert_same_log(one[2], expected[2])


# A second Trainer, and a Trainer that begins anew with smaller batches.


def two_trainers(folder: Path, zero: dict[str, Any] | None) -> list[Log]:
    with as_started():
        model = llama()
        first = make(folder, zero, model, max_grad_norm=0.0)
        first.train()
        second = make(folder, zero, model, max_grad_norm=0.0)
        second.train()
        second.evaluate()
        return [without_norms(log_of(first)), without_norms(log_of(second))]


def test_a_second_trainer_of_the_same_model(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    for log, expected in zip(
        run_on_ranks(2, two_trainers, tmp_path, UNFUSED)[0],
        run_on_ranks(2, two_trainers, tmp_path, None)[0],
        strict=True,
    ):
        assert_same_log(log, expected)


class TooLarge(nn.Module):
    """Says in training that there is no memory for a batch of more than three."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        if self.training and len(input_ids) > 3:
            raise RuntimeError("CUDA out of memory.")
        return self.inner(input_ids=input_ids, labels=labels)


def find_batch_size(folder: Path, zero: dict[str, Any] | None) -> tuple[Log, int]:
    with as_started():
        trainer = make(folder, zero, TooLarge(), max_grad_norm=0.0, auto_find_batch_size=True)
        trainer.train()
        return without_norms(log_of(trainer)), trainer._train_batch_size


def test_finding_a_batch_size(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    log, size = run_on_ranks(2, find_batch_size, tmp_path, UNFUSED)[0]
    expected, its_size = run_on_ranks(2, find_batch_size, tmp_path, None)[0]
    assert size == its_size <= 3
    assert_same_log(log, expected)


# Optimizers.

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw_torch": {},
    "adamw_torch_fused": {},
    "adafactor": {},
    "sgd": {"optim_args": "momentum=0.9"},
    "adagrad": {},
    "rmsprop": {},
    "schedule_free_adamw": {"optim_args": None, "lr_scheduler_type": "constant"},
    "schedule_free_sgd": {"optim_args": None, "lr_scheduler_type": "constant"},
    "schedule_free_radam": {"optim_args": None, "lr_scheduler_type": "constant"},
}


def try_optimizer(folder: Path, name: str, given: dict[str, Any]) -> None:
    with as_started():
        given = {
            "optim": name,
            "max_grad_norm": 0.0,
            "gradient_accumulation_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            **given,
        }
        reference = make(folder, None, **given)
        reference.train()
        for stage in (1, 2):
            trainer = make(folder, {"stage": stage}, **given)
            trainer.train()
            assert_same_log(without_norms(log_of(trainer)), without_norms(log_of(reference)), ROUNDING)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(run_on_ranks: RunOnRanks, tmp_path: Path, name: str) -> None:
    if name.startswith("schedule_free"):
        pytest.importorskip("schedulefree")
    run_on_ranks(2, try_optimizer, tmp_path, name, OPTIMIZERS[name])


def train_with_objects(folder: Path) -> None:
    """A class from elsewhere by its name, and an optimizer and a scheduler that were made before the Trainer."""
    from lion_pytorch import Lion

    def by_class(zero: dict[str, Any] | None) -> Trainer:
        return make(folder, zero, besides={"optimizer_cls_and_kwargs": (Lion, {"lr": 1e-3})}, max_grad_norm=0.0)

    def made_before(zero: dict[str, Any] | None) -> Trainer:
        model = llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        return make(folder, zero, model, {"optimizers": (optimizer, scheduler)}, max_grad_norm=0.0)

    with as_started():
        for build in (by_class, made_before):
            reference, trainer = build(None), build(UNFUSED)
            reference.train()
            trainer.train()
            assert_same_log(without_norms(log_of(trainer)), without_norms(log_of(reference)))


def test_optimizers_given_as_objects(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    pytest.importorskip("lion_pytorch")
    run_on_ranks(2, train_with_objects, tmp_path)


def compile_it(folder: Path) -> None:
    """Compiled under DDP, the model's name is lost, by which Trainer shifts labels: the reference is not compiled."""
    with as_started():
        given = {"max_grad_norm": 0.0, "label_smoothing_factor": 0.1, "eval_strategy": "steps", "eval_steps": 2}
        reference = make(folder, None, **given)
        reference.train()
        trainer = make(folder, UNFUSED, **given, torch_compile=True, torch_compile_backend="aot_eager")
        trainer.evaluate()  # before there is an optimizer: the model that it leaves compiled is the one to train
        trainer.train()
        assert torch._dynamo.utils.counters["frames"]["ok"] > 0
        assert_same_log(without_norms(log_of(trainer)), without_norms(log_of(reference)), ROUNDING)


def test_torch_compile(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, compile_it, tmp_path, timeout=300)


# What builds on Trainer.


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=61,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return T5ForConditionalGeneration(config)


def generate(folder: Path, zero: dict[str, Any] | None) -> tuple[Log, Any]:
    """With a metric of what was generated."""
    with as_started():
        args = arguments(
            Seq2SeqTrainingArguments,
            folder,
            max_grad_norm=0.0,
            predict_with_generate=True,
            generation_max_length=6,
            eval_strategy="steps",
            eval_steps=2,
        )
        trainer = Seq2SeqTrainer(
            model=t5(),
            args=args,
            train_dataset=Sequences(),
            eval_dataset=Sequences(GLOBAL_BATCH),
            compute_metrics=lambda result: {"mean": float(result.predictions.mean())},
        )
        if zero is not None:
            enable(trainer, **zero)
        trainer.train()
        return without_norms(log_of(trainer)), trainer.predict(Sequences(GLOBAL_BATCH)).predictions


def test_seq2seq_with_generate(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    log, tokens = run_on_ranks(2, generate, tmp_path, UNFUSED)[0]
    expected, its_tokens = run_on_ranks(2, generate, tmp_path, None)[0]
    assert_same_log(log, expected)
    assert (tokens == its_tokens).all() and (tokens[:, 1:] != 0).any()


def adapted(seed: int = 0) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def train_adapters(
    folder: Path, zero: dict[str, Any] | None, from_checkpoint: str | None
) -> tuple[Log, dict[str, Tensor]]:
    with as_started():
        trainer = make(
            folder,
            zero,
            adapted(0 if from_checkpoint is None else 1),
            max_grad_norm=0.0,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            **SAVING,
        )
        trainer.train(resume_from_checkpoint=from_checkpoint)
        return without_norms(log_of(trainer)), values(trainer.model)


@pytest.mark.parametrize("options", [{}, {"param_dtype": torch.bfloat16}], ids=str)
def test_peft(run_on_ranks: RunOnRanks, tmp_path: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("peft")
    zero = {**UNFUSED, **options}
    log, here = run_on_ranks(2, train_adapters, tmp_path / "zeroopt", zero, None)[0]
    expected, its_values = run_on_ranks(2, train_adapters, tmp_path / "ddp", None, None)[0]
    assert_same_log(log, expected, 0.003 if options else 0.0)
    if not options:
        torch.testing.assert_close(here, its_values, rtol=0, atol=0)
    saved = tmp_path / "zeroopt" / "checkpoint-2"
    keys = [tensor.key for tensor in inspect(saved / "zeroopt").tensors]
    assert keys and all("lora_" in key for key in keys), "the frozen model is not saved once more"
    resumed, again = run_on_ranks(2, train_adapters, tmp_path / "zeroopt", zero, str(saved))[0]
    assert_same_log(resumed[:-1], log[:-1])
    torch.testing.assert_close(again, here, rtol=0, atol=0)


def fine_tune(folder: Path, zero: dict[str, Any] | None, packing: bool) -> Log:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    with as_started():
        rows = [sequence["input_ids"].tolist() for sequence in map(Sequences().__getitem__, range(5 * GLOBAL_BATCH))]
        trainer = SFTTrainer(
            model=llama(),
            args=arguments(
                SFTConfig, folder, max_grad_norm=0.0, max_length=12, packing=packing, gradient_accumulation_steps=2
            ),
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=tokenizer(),
        )
        if zero is not None:
            enable(trainer, **zero)
        trainer.train()
        return without_norms(log_of(trainer))


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(59)} | {"<pad>": 59, "<eos>": 60}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "w0")), pad_token="<pad>", eos_token="<eos>"
    )


def test_sft_trainer(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    log = run_on_ranks(2, fine_tune, tmp_path, UNFUSED, False, timeout=200)[0]
    expected = run_on_ranks(2, fine_tune, tmp_path, None, False)[0]
    assert_same_log(log, expected)


# What zeroopt adds, and what it refuses.


def step_in_backward(folder: Path) -> None:
    with as_started():
        reference = make(folder, None, max_grad_norm=0.0)
        reference.train()
        trainer = make(folder, {"step_in_backward": True, **UNFUSED}, max_grad_norm=0.0)
        trainer.train()
        assert_same_log(log_of(trainer), without_norms(log_of(reference)))


def test_step_in_backward(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    """There is no norm in the log, for there are no gradients."""
    run_on_ranks(2, step_in_backward, tmp_path)


class Counting(ZeroTrainerMixin, Trainer):
    zeroopt_options: ClassVar[Mapping[str, Any]] = {"stage": 1, **UNFUSED}

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.num_losses = getattr(self, "num_losses", 0) + 1
        return super().compute_loss(*args, **kwargs)


def train_a_class_of_its_own(folder: Path) -> None:
    """Written with the mix-in, and enabled later."""
    with as_started():
        given: dict[str, Any] = {"args": arguments(TrainingArguments, folder), "train_dataset": Sequences()}
        one = Counting(model=llama(), **given)
        plain_class = type("Plain", (Trainer,), {})
        other = plain_class(model=llama(), **given)
        assert enable(other, stage=1, **UNFUSED) is other
        assert enable(other, stage=1, **UNFUSED) is other
        assert isinstance(other, plain_class) and type(other).__name__ == "Plain"
        for trainer in (one, other):
            trainer.train()
            assert isinstance(trainer.model_wrapped, zeroopt.ZeroDataParallel)
            assert trainer.model_wrapped.optimizers[0].stage == 1
        assert one.num_losses == 4
        assert_same_log(log_of(one), log_of(other))


def test_classes_of_ones_own(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, train_a_class_of_its_own, tmp_path)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({"max_grad_norm": 1.0}, {}, ConfigError, r"TrainingArguments\(max_grad_norm"),
    ({"average_every": 4}, {}, NotSupportedError, "what rank 0 has"),
    ({"step_in_backward": True}, {}, ConfigError, r"TrainingArguments\(max_grad_norm=0\)"),
    (
        {"step_in_backward": True},
        {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2},
        ConfigError,
        "gradient_accumulation_steps=1",
    ),
    ({}, {"save_on_each_node": True}, ConfigError, "whole_state=True"),
    ({"buckets": 3}, {}, ConfigError, "buckets"),
]


def refuse(folder: Path) -> None:
    with as_started():
        for zero, given, error, text in REFUSED:
            trainer = make(folder, None, **given)
            with pytest.raises(error, match=text):
                enable(trainer, **zero)
            assert type(trainer) is Trainer
        trainer = make(folder, None, type("Sharded", (TooLarge,), {"is_distributed_loading_by_transformers": True})())
        with pytest.raises(NotSupportedError, match="sharded when it was loaded"):
            enable(trainer)
        with pytest.raises(ConfigError, match="expected a transformers.Trainer, got Linear"):
            enable(nn.Linear(1, 1))
        trainer = make(folder, None, max_steps=1)
        trainer.train()
        with pytest.raises(StateError, match="before its first train"):
            enable(trainer)


def test_what_does_not_go_together_is_refused(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, refuse, tmp_path)


def run_page(folder: Path) -> None:
    """What docs/frameworks/transformers.md shows."""
    with as_started():
        names: dict[str, Any] = {
            "model": llama(),
            "arguments": arguments(TrainingArguments, folder, max_steps=1),
            "dataset": Sequences(),
        }
        for snippet in snippets(ROOT / "docs" / "frameworks" / "transformers.md"):
            exec(snippet, names)  # noqa: S102
        assert isinstance(names["trainer"].model_wrapped, zeroopt.ZeroDataParallel)
        made = names["MyTrainer"](llama(), names["arguments"], train_dataset=Sequences())
        made.train()
        assert isinstance(made.model_wrapped, zeroopt.ZeroDataParallel)


def test_the_page_runs(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, run_page, tmp_path)
