"""torch to ONNX, for the build half: any module whose inputs and outputs are plain tensors."""

import inspect
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, nn

Axes = Mapping[str, Mapping[int, str]]
"""Input -> the axes that may have any length, each by the name of its length."""


def export(module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], axes: Axes) -> onnx.ModelProto:
    """The module's `forward` as an ONNX graph.

    Args:
        module: takes the inputs in their order, gives a tensor or a tuple of them.
        inputs: examples by name, at least 2 long on the axes that vary: a length of 1 would be taken for a constant.
        outputs: their names.
        axes: of the inputs; those left out keep the length of the example.
    """
    shapes: tuple[Any, ...] = tuple(dict(axes.get(name, {})) for name in inputs)
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    if kinds == [inspect.Parameter.VAR_POSITIONAL]:
        shapes = (shapes,)  # torch counts *tensors as one argument
    # The exporter speaks of its own internals (deprecations, missing torchvision): nothing a user could act on.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto
