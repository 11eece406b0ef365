"""What fp16 and bf16 graphs give on a GPU, found on a CPU: in fp32, each value rounded as soon as it is there.

ONNX Runtime has no bf16 arithmetic for CPUs, and runs fp16 in fp32 with fewer roundings than the graph says: what
overflows between two operators would go unseen. A GPU multiplies either and adds in fp32, and so does what this makes.
"""

import onnx
from onnx import TensorProto, helper, numpy_helper

_NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a graph that ONNX Runtime computes in fp32 and rounds where the graph has fp16 or bf16."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    inferred = onnx.shape_inference.infer_shapes(copy, check_type=False, data_prop=False).graph.value_info
    narrow = {each.name: kind for each in inferred if (kind := each.type.tensor_type.elem_type) in _NARROW}
    for tensor in graph.initializer:
        _widen(tensor)
    nodes = list(graph.node)
    del graph.node[:]
    inputs = {each.name for each in graph.input if each.type.tensor_type.elem_type in _NARROW}
    for name in inputs:
        graph.node.append(helper.make_node("Cast", [name], [f"{name}.wide"], to=TensorProto.FLOAT))
    for node in nodes:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i in _NARROW:
                attribute.i = TensorProto.FLOAT
            elif attribute.type == onnx.AttributeProto.TENSOR:
                _widen(attribute.t)
        for place, name in enumerate(node.input):
            if name in inputs:
                node.input[place] = f"{name}.wide"
        results = [name for name in node.output if name in narrow]
        for place, name in enumerate(node.output):
            if name in results:
                node.output[place] = f"{name}.exact"
        graph.node.append(node)
        for name in results:
            graph.node.append(helper.make_node("Cast", [f"{name}.exact"], [f"{name}.narrow"], to=narrow[name]))
            graph.node.append(helper.make_node("Cast", [f"{name}.narrow"], [name], to=TensorProto.FLOAT))
    return copy


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in _NARROW:
        values = numpy_helper.to_array(tensor).astype("float32")
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
