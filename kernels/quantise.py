"""Products in int8: weights once, activations as they come, each by its own range. For ONNX Runtime on a CPU."""

import logging
import tempfile
from pathlib import Path

import onnx
import onnxruntime
from onnxruntime.quantization import QuantType, quantize_dynamic


def quantise(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every MatMul by a constant in int8, one scale an output channel; the rest stays as it is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        logging.disable(logging.WARNING)  # it recommends a pre-processing that our export does not need
        try:
            quantize_dynamic(
                model,
                path,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                # Without a type for what it cannot infer it gives up; all that it meets here is fp32.
                extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
            )
        finally:
            logging.disable(logging.NOTSET)
        return onnx.load(path)


def fold_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which what depends on no input is a weight: the exporter leaves the large ones to be computed."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "folded.onnx"
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(
            model.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["MatMulAddFusion"],  # it would make them Gemm, which is not quantised here
        )
        return onnx.load(path)
