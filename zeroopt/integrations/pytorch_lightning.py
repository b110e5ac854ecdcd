"""What `zeroopt.integrations.lightning` is to the package `lightning`, to `pytorch_lightning` and `lightning_fabric`."""

from __future__ import annotations

try:
    from lightning_fabric.strategies import STRATEGY_REGISTRY
    from lightning_fabric.strategies.ddp import DDPStrategy as _FabricDDPStrategy
    from pytorch_lightning.strategies import DDPStrategy as _DDPStrategy
    from pytorch_lightning.strategies import StrategyRegistry
except ImportError as error:
    raise ImportError(
        "zeroopt.integrations.pytorch_lightning needs pytorch_lightning (tried with 2.6.6): pip install pytorch-lightning. For the package lightning, import "
        "zeroopt.integrations.lightning"
    ) from error

from .lightning_strategies.fabric import FabricStrategy, unwrap
from .lightning_strategies.options import register
from .lightning_strategies.saving import consolidate
from .lightning_strategies.trainer import TrainerStrategy


class ZeroStrategy(TrainerStrategy, _DDPStrategy):  # type: ignore[misc]
    """`Trainer(strategy=ZeroStrategy(stage=2, …))`: its options are those of `zeroopt.wrap`, and of Lightning's DDPStrategy."""


class ZeroFabricStrategy(FabricStrategy, _FabricDDPStrategy):  # type: ignore[misc]
    """`Fabric(strategy=ZeroFabricStrategy(stage=2, …))`: its options are those of `zeroopt.wrap`, and of Fabric's DDPStrategy."""


register(StrategyRegistry, ZeroStrategy)
register(STRATEGY_REGISTRY, ZeroFabricStrategy)

__all__ = ["ZeroFabricStrategy", "ZeroStrategy", "consolidate", "unwrap"]
