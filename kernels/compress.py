"""Stores the weights of an ONNX model in fewer bytes. The arithmetic stays fp32: only what lies on disk shrinks.

Each large fp32 weight is replaced by a smaller one and the nodes that bring it back. ONNX Runtime folds those nodes
into an fp32 constant when it loads the model, so the speed is that of fp32; the table of an embedding is left small
in memory too, because the nodes go behind the Gather that reads a few of its rows.

    int8    symmetric; one scale (fp16) for every BLOCK inputs of an output channel, or for the row of a table
    fp16    a cast
"""

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

SMALL = 4096
"""Weights of fewer elements than this stay as they are: biases and norms cost nothing and matter."""
BLOCK = 32
"""Inputs that share a scale. One scale for a whole channel lets its largest weight blunt all others."""


def compress(model: onnx.ModelProto, precision: dict[str, str], block: int = BLOCK) -> None:
    """Compress a model in place.

    Args:
        precision: operator type -> "int8" or "fp16", for the weights that operators of this type read;
            "Gather" is the embedding tables. Types that are not named stay fp32.
        block: inputs of a matrix that share a scale.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        for position, name in enumerate(node.input):
            tensor = weights.get(name)
            stored = precision.get(node.op_type)
            if tensor is None or stored is None:
                continue
            values = numpy_helper.to_array(tensor)
            if values.dtype != np.float32 or values.size < SMALL:
                continue
            # Restored once, in front of its first reader, it serves all: a loop that the export unrolled reads often.
            readers = [other.op_type for other in graph.node if name in other.input]
            if len(readers) > 1 and ("Gather" in readers or {precision.get(each) for each in readers} != {stored}):
                raise ValueError(f"weight {name} is read by {', '.join(readers)}: they do not want it alike")
            graph.initializer.remove(weights.pop(name))
            if stored == "fp16":
                _store(graph, name + ".fp16", values.astype(np.float16))
                _restore(graph, node, position, [_cast(name + ".fp16", name)])
            elif node.op_type == "Gather":
                _int8_table(graph, node, values)
            elif node.op_type == "MatMul" and values.ndim == 2 and len(values) % block == 0:
                _int8_matrix(graph, node, position, values, block)
            else:
                raise ValueError(f"int8 is for embedding tables and matrices, not for {node.op_type} {name}")


def _quantise(values: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Symmetric int8 along an axis, whose largest value becomes 127."""
    scale = (np.abs(values).max(axis=axis, keepdims=True) / 127).astype(np.float16)
    # The smallest fp16 stands for an all-zero block, and one ulp up keeps the largest value inside 127.
    scale = np.nextafter(scale, np.float16(np.inf))
    return np.round(values / scale.astype(np.float32)).astype(np.int8), scale


def _int8_matrix(
    graph: onnx.GraphProto, node: onnx.NodeProto, position: int, values: NDArray[np.float32], block: int
) -> None:
    """(inputs, outputs) = reshape((inputs / block, block, outputs) int8 * (inputs / block, 1, outputs))."""
    name = node.input[position]
    quantised, scale = _quantise(values.reshape(-1, block, values.shape[1]), 1)
    _store(graph, name + ".int8", quantised)
    _store(graph, name + ".scale", scale)
    _store(graph, name + ".shape", np.array(values.shape, dtype=np.int64))
    chain = [
        _cast(name + ".int8", name + ".cast"),
        _cast(name + ".scale", name + ".factor"),
        helper.make_node("Mul", [name + ".cast", name + ".factor"], [name + ".blocks"], name=name + ".scaled"),
        helper.make_node("Reshape", [name + ".blocks", name + ".shape"], [name], name=name + ".whole"),
    ]
    _restore(graph, node, position, chain)


def _int8_table(graph: onnx.GraphProto, gather: onnx.NodeProto, values: NDArray[np.float32]) -> None:
    """rows[i] = int8_rows[i] * scale[i], done on the gathered rows alone."""
    table, indices, result = gather.input[0], gather.input[1], gather.output[0]
    quantised, scale = _quantise(values, 1)
    _store(graph, table + ".int8", quantised)
    _store(graph, table + ".scale", scale)
    gather.input[0] = table + ".int8"
    gather.output[0] = result + ".int8"
    after = list(graph.node).index(gather) + 1
    for node in (
        helper.make_node("Mul", [result + ".cast", result + ".factor"], [result], name=result + ".scaled"),
        _cast(result + ".scale", result + ".factor"),
        _cast(result + ".int8", result + ".cast"),
        helper.make_node("Gather", [table + ".scale", indices], [result + ".scale"], name=result + ".scales"),
    ):
        graph.node.insert(after, node)


def _store(graph: onnx.GraphProto, name: str, values: NDArray[np.generic]) -> None:
    graph.initializer.append(numpy_helper.from_array(values, name))


def _cast(source: str, target: str) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], to=onnx.TensorProto.FLOAT, name=target + ".restore")


def _restore(graph: onnx.GraphProto, node: onnx.NodeProto, position: int, chain: list[onnx.NodeProto]) -> None:
    """Put the nodes that rebuild a weight in front of the node that reads it."""
    before = list(graph.node).index(node)
    for link in reversed(chain):
        graph.node.insert(before, link)
    assert node.input[position] == chain[-1].output[0]
