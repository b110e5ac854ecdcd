"""Train a small GPT-2 with the Trainer of transformers, and go on from its newest checkpoint whenever the script is started again.

    torchrun --nproc-per-node 2 examples/trainer_gpt.py --folder runs/trainer-gpt --steps 20
    torchrun --nproc-per-node 3 examples/trainer_gpt.py --folder runs/trainer-gpt --steps 40

`--method ddp` does the same without zeroopt.
"""

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from train_gpt import VOCABULARY, load_text
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from zeroopt.integrations.transformers import enable


class Windows(Dataset[dict[str, Tensor]]):
    """Pieces of a text. The model itself shifts labels."""

    def __init__(self, tokens: Tensor, context: int, count: int) -> None:
        self.windows = tokens.unfold(0, context, context)[:count]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.windows[index].long()
        return {"input_ids": window, "labels": window}


def make_model(context: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=context, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def train(args: argparse.Namespace) -> list[dict[str, float]]:
    """What the Trainer has logged."""
    torch.manual_seed(args.seed)
    text, validation = load_text()
    arguments = TrainingArguments(
        output_dir=str(args.folder),
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=args.batch,
        max_steps=args.steps,
        learning_rate=1e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=args.every,
        save_steps=args.every,
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        seed=args.seed,
    )
    trainer = Trainer(
        model=make_model(args.context),
        args=arguments,
        train_dataset=Windows(text, args.context, 4096),
        eval_dataset=Windows(validation, args.context, 64),
    )
    if args.method == "zeroopt":
        enable(trainer, stage=args.stage)
    newest = get_last_checkpoint(args.folder) if args.folder.is_dir() else None  # type: ignore[no-untyped-call]
    trainer.train(resume_from_checkpoint=newest)
    trainer.save_model(str(args.folder / "model"))
    return trainer.state.log_history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/trainer-gpt"))
    parser.add_argument("--method", choices=["zeroopt", "ddp"], default="zeroopt")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10, help="steps between evaluations and checkpoints")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--context", type=int, default=32, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences a rank and step")
    parser.add_argument("--seed", type=int, default=0)
    log = train(parser.parse_args())
    if os.environ.get("RANK", "0") == "0":
        losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
        print("losses of evaluations:", *(f"{loss:.4f}" for loss in losses), flush=True)


if __name__ == "__main__":
    main()
