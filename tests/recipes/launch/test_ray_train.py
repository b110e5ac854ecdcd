"""Ray's workers train what they are given. Skipped where Ray is not installed: development does not need it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from launched import notes
from paths import PYTHON_PATH

ray = pytest.importorskip("ray", reason="Ray is not installed")


@pytest.mark.slow
def test_two_workers_train_together(tmp_path: Path) -> None:
    from recipes.launch.ray_train import make_trainer

    args = Namespace(workers=2, cpu=True, storage=tmp_path / "ray", restarts=0)
    ray.init(
        num_cpus=3,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": PYTHON_PATH, "GLOO_SOCKET_IFNAME": "lo"}},
    )
    try:
        make_trainer(Namespace(**vars(args), module="launched", arguments=[str(tmp_path)])).fit()
        first, second = notes(tmp_path)
        assert (first["RANK"], second["RANK"], first["WORLD_SIZE"]) == (0, 1, 2)
        assert first["weight"] == second["weight"]
        with pytest.raises(ray.train.TrainingFailedError):
            make_trainer(Namespace(**vars(args), module="no_such_module", arguments=[])).fit()
    finally:
        ray.shutdown()
