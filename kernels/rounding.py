"""Runs bf16 graphs where nothing does: the same graph in fp32, each value rounded to bf16 as soon as it is there.

ONNX Runtime has no bf16 arithmetic for CPUs. A GPU multiplies bf16 and adds in fp32, and so does what this makes.
"""

import onnx
from onnx import TensorProto, helper, numpy_helper


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a graph with bf16 in it that ONNX Runtime can run on a CPU."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    del graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(copy, check_type=False, data_prop=False).graph.value_info
    narrow = {each.name for each in inferred if each.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name))
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        results = [name for name in node.output if name in narrow]
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
            elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.BFLOAT16:
                values = numpy_helper.to_array(attribute.t).astype("float32")
                attribute.t.CopyFrom(numpy_helper.from_array(values))
        for place, name in enumerate(node.output):
            if name in results:
                node.output[place] = f"{name}.exact"
        graph.node.append(node)
        for name in results:
            for source, target, kind in (
                (f"{name}.exact", f"{name}.bf16", TensorProto.BFLOAT16),
                (f"{name}.bf16", name, TensorProto.FLOAT),
            ):
                graph.node.append(helper.make_node("Cast", [source], [target], to=kind))
    return copy
