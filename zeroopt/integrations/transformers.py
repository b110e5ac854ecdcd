"""transformers' Trainer, and those that build on it (Seq2SeqTrainer, trl's), train with zeroopt.

    trainer = Trainer(model=model, args=args, train_dataset=dataset)
    zeroopt.integrations.transformers.enable(trainer, stage=2)
    trainer.train()

docs/frameworks/transformers.md says what that changes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import CheckpointError, ConfigError, NotSupportedError, StateError
from ..module import ZeroDataParallel
from ..optimizer import ZeroOptimizer
from . import accelerate as of_accelerate
from .accelerate.optimizers import plain_optimizer

try:
    from transformers import Trainer
    from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
except ImportError as error:
    raise ImportError(
        "zeroopt.integrations.transformers needs transformers (tried with 5.23.0): pip install transformers accelerate"
    ) from error

from accelerate.utils import gather_object

__all__ = ["ZeroTrainerMixin", "enable"]

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)

STATE_FOLDER = "zeroopt"
"""In a Trainer's checkpoint, the directory with the optimizer's state: a checkpoint of `zeroopt.checkpoint`."""


class ZeroTrainerMixin:
    """Methods that go before those of a Trainer.

    `enable` puts them into a Trainer that there is. A class of one's own has them as
    `class MyTrainer(ZeroTrainerMixin, Trainer): zeroopt_options = {"stage": 2}`.

    Attributes:
        zeroopt_options: what `enable` takes, by name.
    """

    zeroopt_options: Mapping[str, Any] = MappingProxyType({})

    accelerator: Any
    args: Any
    lr_scheduler: Any
    model_wrapped: nn.Module
    optimizer: Any

    def create_accelerator_and_postprocess(self) -> None:
        """As that of Trainer, which calls it in its constructor and for each trial of a search for hyper-parameters."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        enable_accelerator(self, self.zeroopt_options)

    def _update_auto_batch_size(self, batch_size: int) -> None:
        """Trainer begins anew with smaller batches, for which it unwraps the model; here it can stay wrapped."""
        model = self.model_wrapped
        super()._update_auto_batch_size(batch_size)  # type: ignore[misc]
        if isinstance(model, ZeroDataParallel):
            self.model_wrapped = model

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Any:
        """For the log. With `step_in_backward` gradients are gone by now."""
        if self.zeroopt_options.get("step_in_backward"):
            return None
        return super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._writing_parameters():
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        with self._writing_parameters():
            super()._load_best_model()  # type: ignore[misc]

    @contextmanager
    def _writing_parameters(self) -> Iterator[None]:
        """Trainer writes into the model within the wrapped one, on every rank the same. Collective, once the model is wrapped."""
        model = self.model_wrapped
        if isinstance(model, ZeroDataParallel):
            with model.write_parameters():
                yield
        else:
            yield

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Each rank saves its part of the state; with `whole_state`, a rank that saves for its node all of it. Collective."""
        optimizer = plain_optimizer(self.optimizer)
        if not isinstance(optimizer, ZeroOptimizer):
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        whole = self.zeroopt_options.get("whole_state")
        if self.args.should_save:
            _remove_former_state(output_dir, STATE_FOLDER if whole else OPTIMIZER_NAME)
        if whole:
            for rank, saves in enumerate(gather_object([self.args.should_save])):
                if saves:
                    optimizer.consolidate_state_dict(to=rank)
                    if rank == self.args.process_index:
                        torch.save(optimizer.full_state_dict(), os.path.join(output_dir, OPTIMIZER_NAME))
        else:
            from .. import checkpoint  # imports torch.distributed.checkpoint, which takes long

            model = self._wrapped_model()
            checkpoint.save(os.path.join(output_dir, STATE_FOLDER), model, model.optimizers, trained_only=True)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Of a checkpoint by whichever number of ranks, or of one that Trainer has saved without zeroopt. Collective.

        Raises:
            CheckpointError: it has the optimizer's state twice, a file is damaged, or `zeroopt.checkpoint.load` raises it. On all
                ranks; nothing has been loaded of that state.
        """
        optimizer = plain_optimizer(self.optimizer)
        if checkpoint is None or not isinstance(optimizer, ZeroOptimizer):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        from ..checkpoint.format.plain import load_plain  # imports torch.distributed.checkpoint, which takes long

        parts, whole = os.path.join(checkpoint, STATE_FOLDER), os.path.join(checkpoint, OPTIMIZER_NAME)
        if any(gather_object([os.path.isdir(parts) and os.path.isfile(whole)])):
            raise CheckpointError(
                f"{checkpoint} has the optimizer's state twice, by parts in {STATE_FOLDER}/ and whole in {OPTIMIZER_NAME}, saved by "
                "two runs: remove the one that is not of the same run as its model"
            )
        if os.path.isdir(parts):
            from ..checkpoint import load

            model = self._wrapped_model()
            load(parts, model, model.optimizers, trained_only=True)
        elif os.path.isfile(whole):
            optimizer.load_state_dict(load_plain(Path(whole), whole, mapped=True))
        else:  # it was saved with save_only_model
            return
        scheduler = Path(checkpoint, SCHEDULER_NAME)
        self.lr_scheduler.load_state_dict(load_plain(scheduler, scheduler))

    def _wrapped_model(self) -> ZeroDataParallel:
        assert isinstance(self.model_wrapped, ZeroDataParallel)
        return self.model_wrapped


def _remove_former_state(checkpoint: str, name: str) -> None:
    """What another run has left of its optimizer in a checkpoint that is written over, in the form that is not written now.

    It goes before the new state comes: it does not belong to the model, which has been saved already. Of a directory a crash may
    leave some files, which `zeroopt.checkpoint.load` refuses.
    """
    former = Path(checkpoint, name)
    if former.is_dir():
        shutil.rmtree(former)
    else:
        former.unlink(missing_ok=True)


def enable(trainer: AnyTrainer, stage: int = 2, *, whole_state: bool = False, **options: Any) -> AnyTrainer:
    """Have a Trainer train with zeroopt in the place of DistributedDataParallel.

    Call it on every rank, before `trainer.train()`. The trainer stays the same object; its class becomes a subclass of the one that
    it had. What TrainingArguments say holds, except how DistributedDataParallel is to find its buckets and unused parameters.

    Args:
        trainer: a `transformers.Trainer` or of a subclass, such as Seq2SeqTrainer and `trl.SFTTrainer`.
        whole_state: checkpoints hold the optimizer's state as Trainer itself saves it, all of it in one file of rank 0 (or of one
            rank of each node, with `save_on_each_node`), which then needs CPU memory for it; a Trainer without zeroopt can go on
            from it. Else each rank saves its part, to a directory "zeroopt" in the checkpoint. Both are loaded, whatever
            is chosen here.
        stage, options: those of `zeroopt.wrap`.

    Returns:
        The trainer.

    Raises:
        ConfigError: what is no Trainer, an option that `zeroopt.wrap` does not have, or one that does not go with
            TrainingArguments. Nothing has been changed.
        NotSupportedError: the trainer was set up for something else that splits the training state. Nothing has been changed.
        StateError: it has trained without zeroopt already. Nothing has been changed.
    """
    if not isinstance(trainer, Trainer):
        raise ConfigError(f"expected a transformers.Trainer, got {type(trainer).__name__}")
    if isinstance(trainer.model_wrapped, DistributedDataParallel):
        raise StateError(
            "this Trainer has put its model into DistributedDataParallel: call zeroopt.integrations.transformers.enable before its "
            "first train(), or make a new Trainer"
        )
    chosen = {"stage": stage, "whole_state": whole_state, **options}
    enable_accelerator(trainer, chosen)
    enabled: Any = trainer
    if not isinstance(trainer, ZeroTrainerMixin):
        enabled.__class__ = with_zeroopt(enabled.__class__)
    enabled.zeroopt_options = chosen
    return trainer


def enable_accelerator(trainer: Any, chosen: Mapping[str, Any]) -> None:
    """Have the Accelerator of a Trainer go on with zeroopt.

    Raises:
        ConfigError, NotSupportedError, StateError: as `enable`.
    """
    options = {"stage": 2, **chosen}
    whole_state = options.pop("whole_state", False)
    _check(trainer.args, options, whole_state=whole_state)
    if getattr(trainer.model, "is_distributed_loading_by_transformers", False):
        raise NotSupportedError(
            "this model was sharded when it was loaded, and averages gradients itself: load it without distributed_config, or train it "
            "without zeroopt"
        )
    of_accelerate.enable(trainer.accelerator, **options)


def _check(args: Any, options: dict[str, Any], *, whole_state: bool) -> None:
    if args.n_gpu > 1:
        raise ConfigError(
            f"one process was started for {args.n_gpu} GPUs, for which Trainer uses torch.nn.DataParallel: start one for each, with "
            "torchrun --nproc-per-node"
        )
    if options.get("max_grad_norm") is not None:
        raise ConfigError(
            "Trainer clips gradients itself: pass TrainingArguments(max_grad_norm=…) instead of this option"
        )
    if options.get("average_every") is not None:
        raise NotSupportedError(
            "Trainer saves, and logs, what rank 0 has: with average_every, other ranks have other parameters between averagings"
        )
    if options.get("step_in_backward"):
        if args.max_grad_norm > 0:
            raise ConfigError(
                "step_in_backward keeps no gradients that could be clipped, which Trainer does by default: pass "
                "TrainingArguments(max_grad_norm=0)"
            )
        if args.gradient_accumulation_steps > 1:
            raise ConfigError(
                "step_in_backward steps in each backward: pass TrainingArguments(gradient_accumulation_steps=1)"
            )
    if args.save_on_each_node and not whole_state:
        raise ConfigError(
            "with save_on_each_node checkpoints are on file systems that only some ranks see, and each rank's part of the state "
            "would be on one of them: pass whole_state=True too, or save to one that all ranks see"
        )


@cache
def with_zeroopt(plain: type) -> type:
    """The class that a Trainer of some class becomes."""
    names = {name: getattr(plain, name) for name in ("__doc__", "__module__", "__qualname__")}
    return type(plain.__name__, (ZeroTrainerMixin, plain), names)
