"""State dicts in an optimizer's own format, such as that of bitsandbytes, which hides some of the state from FSDP in dicts within.

By a `load_state_dict` of its own an optimizer says how it reads them. So one of its class reads such entries here, one by one. Those
without a dict within are state as it is, which is what zeroopt collects of any optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..plan.dtensors import is_distributed
from ..plan.params import ParamState
from ..probing.probe import copy_with


def in_torchs_format(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an optimizer's class makes of a state dict of the plain optimizer; the state dict itself where the class reads as torch does,
    or it belongs to other parameters. The optimizer is left alone.

    Raises:
        Exception: what the class raises, where it cannot read it.
    """
    if type(optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict:
        return state_dict
    groups = [number for number, group in enumerate(optimizer.param_groups) for _ in group["params"]]
    params = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    keys = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
    if len(keys) != len(params) or any(map(is_distributed, params)):
        return state_dict
    state = dict(state_dict["state"])
    for key, group, param in zip(keys, groups, params, strict=True):
        if any(isinstance(value, dict) for value in state.get(key, {}).values()):
            state[key] = _read(optimizer, group, param, state[key])
    return {**state_dict, "state": state}


def _read(optimizer: torch.optim.Optimizer, group: int, param: Tensor, entry: Mapping[str, Any]) -> ParamState:
    # Of the parameter's shape, without its memory: its values may be on their way.
    stand_in = nn.Parameter(torch.zeros((), dtype=param.dtype, device=param.device).expand(param.shape))
    reader = copy_with(optimizer, group, [[stand_in]], set(), with_state=False)
    options = {name: value for name, value in dict.items(reader.param_groups[0]) if name != "params"}
    reader.load_state_dict({"state": {0: entry}, "param_groups": [{**options, "params": [0]}]})
    return dict(reader.state[stand_in])
