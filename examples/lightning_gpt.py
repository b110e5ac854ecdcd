"""Train a small GPT with Lightning's Trainer, and go on from the last checkpoint when the script is started again.

    torchrun --nproc-per-node 2 examples/lightning_gpt.py --epochs 2
    python examples/lightning_gpt.py --ranks 2 --epochs 4            # the Trainer starts the other process itself

`--strategy ddp` does the same without zeroopt; each reads the other's files.
"""

import argparse
import os
from pathlib import Path

import lightning.pytorch as pl
from gpt import GPT
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from train_gpt import VOCABULARY, load_text, make_optimizer, make_scheduler

import zeroopt.integrations.lightning  # noqa: F401  the Trainer knows "zeroopt_stage_2" from here on


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Pieces of a text, and the tokens that follow theirs."""

    def __init__(self, tokens: Tensor, context: int, count: int) -> None:
        self.windows = tokens.unfold(0, context + 1, context + 1)[:count]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.windows[index].long()
        return window[:-1], window[1:]


class LightningGPT(pl.LightningModule):
    def __init__(self, context: int, steps: int) -> None:
        super().__init__()
        self.net = GPT(VOCABULARY, context, layers=2, width=64, heads=4)
        self.steps = steps

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss: Tensor = self.net(*batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("validation_loss", self.net(*batch), sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = make_optimizer(self, learning_rate=3e-3)
        scheduler = make_scheduler(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(args: argparse.Namespace) -> dict[str, float]:
    """The last losses."""
    pl.seed_everything(args.seed)
    text, validation = load_text()
    training = DataLoader(Windows(text, args.context, args.windows), args.batch, shuffle=True)
    saving = ModelCheckpoint(args.checkpoints, "{epoch}", "validation_loss", save_top_k=2, save_last=True)
    trainer = pl.Trainer(
        accelerator="auto",
        devices=args.ranks,
        strategy=args.strategy,
        max_epochs=args.epochs,
        gradient_clip_val=1.0,
        callbacks=[saving],
        logger=False,
        enable_progress_bar=False,
    )
    steps = 10 * len(training) // args.ranks
    trainer.fit(
        LightningGPT(args.context, steps),
        training,
        DataLoader(Windows(validation, args.context, args.windows // 4), args.batch),
        ckpt_path="last",  # none the first time
    )
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="zeroopt_stage_2")
    parser.add_argument("--ranks", type=int, default=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/lightning-gpt"))
    parser.add_argument("--context", type=int, default=32, help="tokens a sequence")
    parser.add_argument("--windows", type=int, default=256, help="sequences of an epoch")
    parser.add_argument("--batch", type=int, default=8, help="sequences a rank and step")
    parser.add_argument("--seed", type=int, default=0)
    print({name: round(value, 4) for name, value in train(parser.parse_args()).items()}, flush=True)


if __name__ == "__main__":
    main()
