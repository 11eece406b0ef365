"""Compressed weights: smaller on disk, the same sums to within what the format allows, refusals."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from kernels.compress import BLOCK, compress

RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(500, 64)).astype(np.float32)
MATRIX = (RNG.normal(size=(64, 96)) * RNG.lognormal(size=(64, 1))).astype(np.float32)
INDICES = np.array([3, 499, 0], dtype=np.int64)


def model(matrix: NDArray[np.float32] = MATRIX, *, twice: bool = False) -> onnx.ModelProto:
    """rows of the table, times the matrix."""
    nodes = [
        helper.make_node("Gather", ["table", "indices"], ["rows"]),
        helper.make_node("MatMul", ["rows", "matrix"], ["result"]),
    ]
    outputs = [helper.make_tensor_value_info("result", TensorProto.FLOAT, ["N", None])]
    if twice:
        nodes.append(helper.make_node("MatMul", ["rows", "matrix"], ["again"]))
        outputs.append(helper.make_tensor_value_info("again", TensorProto.FLOAT, ["N", None]))
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("indices", TensorProto.INT64, ["N"])],
        outputs,
        [numpy_helper.from_array(TABLE, "table"), numpy_helper.from_array(matrix, "matrix")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def result(compressed: onnx.ModelProto, name: str = "result") -> NDArray[Any]:
    onnx.checker.check_model(compressed)
    session = onnxruntime.InferenceSession(compressed.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run([name], {"indices": INDICES})[0])


@pytest.mark.parametrize(
    ("precision", "error", "size"),
    [
        ({}, 1e-6, 1.0),
        ({"MatMul": "fp16"}, 1e-3, 0.95),
        ({"MatMul": "fp16", "Gather": "fp16"}, 2e-3, 0.55),
        ({"MatMul": "int8", "Gather": "int8"}, 2e-2, 0.35),
    ],
)
def test_the_sums_stay_and_the_file_shrinks(precision: dict[str, str], error: float, size: float) -> None:
    compressed = model()
    compress(compressed, precision)
    expected = TABLE[INDICES] @ MATRIX
    off = np.linalg.norm(result(compressed) - expected) / np.linalg.norm(expected)
    assert off < error
    assert off > error / 100 or not precision  # it did compress
    assert compressed.ByteSize() <= size * model().ByteSize() * 1.02


def test_a_block_has_its_own_scale() -> None:
    """A large weight blunts its own block only."""
    spiky = RNG.normal(size=(64, 96)).astype(np.float32)
    spiky[0] = 1000
    compressed = model(spiky)
    compress(compressed, {"MatMul": "int8"})
    stored = {t.name: numpy_helper.to_array(t) for t in compressed.graph.initializer}
    whole = stored["matrix.int8"].astype(np.float32) * stored["matrix.scale"].astype(np.float32)
    restored = whole.reshape(spiky.shape)
    assert np.abs(restored - spiky)[BLOCK:].max() < 0.03
    assert np.abs(restored - spiky)[:BLOCK].max() < 5


def test_an_empty_block_is_no_division_by_zero() -> None:
    zeros = MATRIX.copy()
    zeros[:BLOCK] = 0
    compressed = model(zeros)
    compress(compressed, {"MatMul": "int8"})
    assert np.isfinite(result(compressed)).all()


@pytest.mark.parametrize("stored", ["fp16", "int8"])
def test_a_weight_with_two_readers_is_stored_once_for_both(stored: str) -> None:
    compressed, alone = model(twice=True), model()
    compress(compressed, {"MatMul": stored})
    compress(alone, {"MatMul": stored})
    np.testing.assert_array_equal(result(compressed, "again"), result(alone))
    assert len(compressed.graph.initializer) == len(alone.graph.initializer)


def test_readers_that_want_a_weight_differently_are_refused() -> None:
    shared = model()
    shared.graph.node[1].input[0] = "other"
    shared.graph.node.append(helper.make_node("Gather", ["matrix", "indices"], ["other"]))
    for precision in ({"MatMul": "fp16"}, {"MatMul": "fp16", "Gather": "fp16"}):
        with pytest.raises(ValueError, match="matrix is read by MatMul, Gather: they do not want it alike"):
            compress(shared, precision)


def test_int8_is_not_for_convolutions() -> None:
    weight = numpy_helper.from_array(RNG.normal(size=(64, 64, 3, 3)).astype(np.float32), "weight")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "weight"], ["y"])],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weight],
    )
    with pytest.raises(ValueError, match="not for Conv"):
        compress(helper.make_model(graph), {"Conv": "int8"})
