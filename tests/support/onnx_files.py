"""What onnxruntime makes of an ONNX file, and the values that lie in one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def run_onnx(path: Path, *inputs: Tensor) -> Tensor:
    """The first output for these inputs, by onnxruntime on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [place.name for place in session.get_inputs()]
    fed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return torch.from_numpy(session.run(None, fed)[0])


def values_in(path: Path) -> list[Tensor]:
    """All that the graph computes with, besides its inputs."""
    import onnx
    from onnx import numpy_helper

    return [torch.from_numpy(numpy_helper.to_array(one).copy()) for one in onnx.load(path).graph.initializer]
