"""A recipe, or any other module that trains, by the workers of a Ray cluster.

    python -m recipes.launch.ray_train --workers 16 --storage /shared/ray recipes.generate --preset 1.5b --out /shared/runs

Ray makes the process group, and runs the module as `python -m` would, in each of its workers.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(config: dict[str, Any]) -> None:
    """What each worker does."""
    sys.path.insert(0, config["folder"])
    sys.argv = [config["module"], *config["arguments"]]
    try:
        runpy.run_module(config["module"], run_name="__main__")
    except SystemExit as end:  # of a script that returns an exit code
        if end.code:
            raise RuntimeError(f"{config['module']} ended with {end.code}") from end


def make_trainer(args: argparse.Namespace) -> TorchTrainer:
    return TorchTrainer(
        train,
        train_loop_config={"module": args.module, "arguments": args.arguments, "folder": str(Path.cwd())},
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=not args.cpu),
        run_config=RunConfig(
            storage_path=str(args.storage.resolve()), failure_config=FailureConfig(max_failures=args.restarts)
        ),
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="ranks, a GPU each")
    parser.add_argument("--cpu", action="store_true", help="workers without GPUs")
    parser.add_argument("--storage", type=Path, default=Path("runs/ray"), help="a folder that all hosts see")
    parser.add_argument("--restarts", type=int, default=0, help="of all workers, when one has failed")
    parser.add_argument("module", help="what is trained, such as recipes.generate")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the module")
    return parser.parse_args()


if __name__ == "__main__":
    make_trainer(parse_arguments()).fit()
