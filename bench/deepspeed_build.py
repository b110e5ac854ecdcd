"""Whether DeepSpeed's own optimizer can be used: it is compiled when it is first asked for."""

import importlib.util
import os
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root


def cpu_adam_is_compiled() -> bool:
    """Compiling it takes minutes: leave that to whoever wants the comparison."""
    if importlib.util.find_spec("deepspeed") is None:
        return False
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", get_default_build_root()))
    return any(folder.glob("**/cpu_adam/cpu_adam.so"))
