"""TensorRT-RTX and TensorRT: the one file that imports either, and the one place where they differ.

TensorRT-RTX builds without a GPU, for the compute capabilities it is told; TensorRT builds on the GPU that will run the
engine, for that one alone. Networks are strongly typed: the types of the ONNX graph are the arithmetic.
"""

import importlib
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from kernels.errors import BundleError

# By target: modules that hold the same classes, and what to install.
_MODULES = {
    "tensorrt-rtx": (
        ("tensorrt_rtx", "tensorrt_rtx_bindings"),
        "pip install tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs",
    ),
    "tensorrt": (("tensorrt",), "pip install tensorrt-cu13, from NVIDIA's package index, on the machine with the GPU"),
}
CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
"""That TensorRT-RTX builds for unless told otherwise."""

Profiles = Mapping[str, Sequence[int]]
"""Axis -> least, usual and largest length."""


def load_module(target: str) -> Any:
    """The module of a target.

    Raises:
        BundleError: it is not installed.
    """
    names, advice = _MODULES[target]
    for name in names:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError):  # OSError: its shared libraries are missing
            continue
    raise BundleError(f"the target {target} needs the package {names[0]}: {advice}")


class Messages:
    """What a TensorRT module complains of, kept until somebody wants to know."""

    def __init__(self, module: Any) -> None:
        kept: deque[str] = deque(maxlen=8)

        class Logger(module.ILogger):  # type: ignore[misc]
            def log(self, severity: Any, message: str) -> None:
                # Without a GPU it reports once that there is no driver, and builds nevertheless.
                if severity <= module.ILogger.ERROR and "cudaError" not in message:
                    kept.append(message)

        self.kept, self.logger = kept, Logger()


def compile_engine(
    model: bytes, axes: Mapping[str, Sequence[str | int]], target: str, profiles: Profiles, capabilities: Sequence[str]
) -> bytes:
    """An engine of an ONNX graph.

    Args:
        axes: of each input, the length or the name of each axis.
        capabilities: of the GPUs to build for; TensorRT builds for the one at hand.
    Raises:
        BundleError: the module is missing, a capability is unknown to it, or it does not take the graph.
    """
    trt = load_module(target)
    messages = Messages(trt)
    builder = trt.Builder(messages.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, messages.logger)
    if not parser.parse(model):
        raise BundleError(f"{target} cannot read the graph: {_line(str(parser.get_error(0)))}")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for name, lengths in axes.items():
        if any(isinstance(length, str) for length in lengths):
            shapes = ([each if isinstance(each, int) else profiles[each][i] for each in lengths] for i in range(3))
            profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
    config.clear_flag(
        trt.BuilderFlag.TF32
    )  # what the graph has in fp32 is to stay so: a state must not lose by the hour
    if target == "tensorrt-rtx":
        config.num_compute_capabilities = len(capabilities)
        for place, capability in enumerate(capabilities):
            config.set_compute_capability(compute_capability(trt, capability), place)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BundleError(f"{target} cannot build the engine: {_line((messages.kept or ['it does not say why'])[-1])}")
    return bytes(engine)


def compute_capability(module: Any, capability: str) -> Any:
    """`8.6` -> what the module calls it.

    Raises:
        BundleError: it does not know it.
    """
    members = module.ComputeCapability.__members__
    known = {f"{name[2:-1]}.{name[-1]}": each for name, each in members.items() if name.startswith("SM")}
    if capability not in known:
        raise BundleError(
            f"TensorRT-RTX does not build for compute capability {capability}, but for {', '.join(known)}"
        )
    return known[capability]


def _line(message: str) -> str:
    return " ".join(message.split())[:300]
