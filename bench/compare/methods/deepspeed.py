"""DeepSpeed's ZeRO stages 1 and 2."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from bench.compare import formula
from bench.compare.methods.method import Method, Obstacle, Training, adamw
from bench.compare.setting import Setting
from bench.deepspeed_build import cpu_adam_is_compiled


class EngineTraining(Training):
    """DeepSpeed counts the micro-batches itself: its `step` does nothing before the last."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine, engine.optimizer)
        self.engine = engine

    def backward(self, loss: Tensor, accumulation: int) -> None:
        self.engine.backward(loss)  # which divides by the number of micro-batches

    def end_micro_batch(self) -> None:
        self.engine.step()

    def step(self) -> None:
        self.engine.step()


def prepare(net: nn.Module, setting: Setting, *, stage: int, overlap: bool = False, cpu_adam: bool = False) -> Training:
    import deepspeed  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import deepspeed.ops  # type: ignore[import-not-found, import-untyped, unused-ignore]

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled here and now
    deepspeed.init_distributed("nccl" if setting.device == "cuda" else "gloo", verbose=False)
    optimizer = adamw(net, setting, fused=True)
    if cpu_adam:
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(net.parameters(), lr=setting.lr, weight_decay=0.01)
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=optimizer, config=config_of(setting, stage, overlap), dist_init_required=False
    )
    return EngineTraining(engine)


def config_of(setting: Setting, stage: int, overlap: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": overlap}
    if setting.bucket_mb is not None:
        zero |= {name: int(setting.bucket_mb * 2**20 / 4) for name in ("reduce_bucket_size", "allgather_bucket_size")}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": setting.accumulation,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
    if setting.precision == "bfloat16":
        config |= {"bf16": {"enabled": True}, "communication_data_type": "fp32"}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def needs_cpu_adam(setting: Setting) -> str | None:
    return None if cpu_adam_is_compiled() else "DeepSpeedCPUAdam is not compiled (it is when one is made)"


def method(
    name: str, stage: int, *, overlap: bool = False, cpu_adam: bool = False, obstacle: Obstacle = lambda setting: None
) -> Method:
    prepared = partial(prepare, stage=stage, overlap=overlap, cpu_adam=cpu_adam)
    return Method(f"DeepSpeed {name}", prepared, formula.deepspeed(stage), needs=("deepspeed",), obstacle=obstacle)


METHODS = (
    method("ZeRO-1", 1),
    method("ZeRO-1, overlap_comm", 1, overlap=True),
    method("ZeRO-2", 2),
    method("ZeRO-2, overlap_comm", 2, overlap=True),
    method("ZeRO-2, CPUAdam", 2, cpu_adam=True, obstacle=needs_cpu_adam),
)
