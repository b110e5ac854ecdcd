"""Lightning 2: `Trainer(strategy="zeroopt_stage_2")` and `Fabric(strategy="zeroopt_stage_2")`, once this has been imported.

For the package `pytorch_lightning`, and `lightning_fabric`, import `zeroopt.integrations.pytorch_lightning` instead.
"""

from __future__ import annotations

try:
    from lightning.fabric.strategies import STRATEGY_REGISTRY
    from lightning.fabric.strategies.ddp import DDPStrategy as _FabricDDPStrategy
    from lightning.pytorch.strategies import DDPStrategy as _DDPStrategy
    from lightning.pytorch.strategies import StrategyRegistry
except ImportError as error:
    raise ImportError(
        "zeroopt.integrations.lightning needs lightning (tried with 2.6.6): pip install lightning. For the package pytorch_lightning, import "
        "zeroopt.integrations.pytorch_lightning"
    ) from error

from .lightning_strategies.fabric import FabricStrategy, unwrap
from .lightning_strategies.options import register
from .lightning_strategies.saving import consolidate
from .lightning_strategies.trainer import TrainerStrategy


class ZeroStrategy(TrainerStrategy, _DDPStrategy):
    """`Trainer(strategy=ZeroStrategy(stage=2, …))`: its options are those of `zeroopt.wrap`, and of Lightning's DDPStrategy."""


class ZeroFabricStrategy(FabricStrategy, _FabricDDPStrategy):
    """`Fabric(strategy=ZeroFabricStrategy(stage=2, …))`: its options are those of `zeroopt.wrap`, and of Fabric's DDPStrategy."""


register(StrategyRegistry, ZeroStrategy)
register(STRATEGY_REGISTRY, ZeroFabricStrategy)

__all__ = ["ZeroFabricStrategy", "ZeroStrategy", "consolidate", "unwrap"]
