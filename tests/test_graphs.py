"""The exported graphs in ONNX Runtime: what torch says, for any number of rows, streams, patches and words."""

from collections.abc import Mapping

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from kernels.export import export
from models.errors import ModelError
from models.graphs import Graph, graphs, step_axes, step_columns, step_inputs
from models.r2 import R2
from models.r2_types import VideoMaps
from tests.test_r2 import Recording, Texts, ask, build, forward, record

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW = 3
Arrays = dict[str, np.ndarray]


class Engine:
    """One graph in ONNX Runtime."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        model = export(graph.module, graph.inputs, graph.outputs, graph.axes)
        self.session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])

    def __call__(self, inputs: Arrays) -> Arrays:
        return dict(zip(self.graph.outputs, self.session.run(list(self.graph.outputs), inputs), strict=True))

    def check(self, *inputs: Tensor) -> None:
        """It says what torch does, and leaves its inputs alone."""
        given = {name: each.detach().numpy().copy() for name, each in zip(self.graph.inputs, inputs, strict=True)}
        before = {name: each.copy() for name, each in given.items()}
        ours = self(given)
        with torch.no_grad():
            theirs = self.graph.module(*inputs)
        for name, want in zip(self.graph.outputs, theirs, strict=True):
            assert ours[name].shape == tuple(want.shape), name
            np.testing.assert_allclose(ours[name], want.numpy(), rtol=1e-4, atol=1e-4, err_msg=name)
        for name, each in given.items():
            np.testing.assert_array_equal(each, before[name], err_msg=name)


@pytest.fixture(scope="module")
def model() -> R2:
    return build(depth=2, window=WINDOW, strides=(1, 2))


@pytest.fixture(scope="module")
def engines(model: R2) -> Mapping[str, Engine]:
    return {name: Engine(graph) for name, graph in graphs(model, 3).items()}


def test_the_graphs_name_what_they_exchange(model: R2, engines: Mapping[str, Engine]) -> None:
    """What `video` and `query` give is what `step` takes; what varies is named once for all."""
    given = {*engines["video"].graph.outputs, *engines["query"].graph.outputs}
    rings = {f"{name}_{k}" for name in ("keys", "values") for k in range(2)}
    assert set(engines["step"].graph.inputs) == given | rings | {"row_stream", "history", "count"}
    assert (
        list(engines["step"].graph.inputs)
        == list(step_axes(2))
        == [each.name for each in engines["step"].session.get_inputs()]
    )
    for engine in engines.values():
        for each in engine.session.get_inputs():
            varying = {axis: size for axis, size in enumerate(each.shape) if isinstance(size, str)}
            assert varying == engine.graph.axes[each.name], each.name


@pytest.mark.parametrize(("streams", "patches"), [(1, 0), (1, 1), (5, 7), (2, 3)])
def test_video_is_what_torch_says(model: R2, engines: Mapping[str, Engine], streams: int, patches: int) -> None:
    recording = record(model, 1, patches=patches, batch=streams)
    engines["video"].check(recording.layers[:, 0], recording.embedding[:, 0])


@pytest.mark.parametrize("lengths", [(1,), (7,), (3, 1, 6, 6)])
def test_query_is_what_torch_says(model: R2, engines: Mapping[str, Engine], lengths: tuple[int, ...]) -> None:
    texts = ask(model, *lengths)
    engines["query"].check(texts.layers, texts.embedding, mask_of(texts))


@pytest.mark.parametrize(
    ("counts", "streams", "patches", "lengths"),
    [
        ((0,), 1, 0, (1,)),
        ((0, 0), 1, 3, (5, 5)),
        ((3,), 3, 1, (1,)),
        ((0, 1, 3, 4, 5, 30, 10**6 + 3), 2, 6, (4, 1, 2, 9, 3, 3, 5)),
    ],
)
def test_step_is_what_torch_says(
    model: R2,
    engines: Mapping[str, Engine],
    counts: tuple[int, ...],
    streams: int,
    patches: int,
    lengths: tuple[int, ...],
) -> None:
    """Rings hold rubbish where a row of so few windows has not written yet."""
    recording, texts = record(model, 1, patches=patches, batch=streams), ask(model, *lengths)
    state = model.new_state(len(counts))
    for tensor in state.tensors[:-1]:
        tensor.normal_()
    state.count[:] = torch.tensor(counts)
    with torch.no_grad():
        maps = model.video_maps(recording.layers[:, 0], recording.embedding[:, 0])
    watched = torch.arange(len(counts)).flip(0) % streams
    engines["step"].check(*step_inputs(maps, watched, texts.maps(model), state))


@pytest.mark.parametrize(("patches", "lengths"), [(0, (1,)), (4, (4, 1, 2, 9, 3))])
def test_rows_of_one_stream_need_not_name_it(
    model: R2, engines: Mapping[str, Engine], patches: int, lengths: tuple[int, ...]
) -> None:
    """`solo` is torch's step without `row_stream`, which is the step of rows that all name the first stream."""
    recording, texts = record(model, 1, patches=patches), ask(model, *lengths)
    query, state = texts.maps(model), model.new_state(len(lengths))
    for tensor in state.tensors[:-1]:
        tensor.normal_()
    state.count[:] = 100 + torch.arange(len(lengths))
    with torch.no_grad():
        maps = model.video_maps(recording.layers[:, 0], recording.embedding[:, 0])
        watched = torch.zeros(len(lengths), dtype=torch.int64)
        named, unnamed = (model.step(maps, rows, query, state) for rows in (watched, None))
    for ours, theirs in zip((*unnamed[0], *unnamed[1].keys), (*named[0], *named[1].keys), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    with pytest.raises(ModelError, match="row_stream must tell"):
        model.step(VideoMaps(*(torch.cat([each, each]) for each in maps)), None, query, state)
    engines["solo"].check(*maps, *step_inputs(maps, watched, query, state)[3:])


def test_a_graph_that_varies_is_not_bound_to_its_examples() -> None:
    """One layer, CLS alone, no embedding: axes that are 1 or 0 long in the example."""
    model = build(depth=1, window=WINDOW, strides=(1,), embedding=0, width=8)
    step = Engine(graphs(model, 0)["step"])
    recording, texts = record(model, 1, patches=2, batch=2), ask(model, 3, 4, 1)
    with torch.no_grad():
        maps = model.video_maps(recording.layers[:, 0], recording.embedding[:, 0])
    step.check(*step_inputs(maps, torch.tensor([1, 1, 0]), texts.maps(model), model.new_state(3)))


def test_engines_with_rings_of_their_own_say_what_forward_says(model: R2, engines: Mapping[str, Engine]) -> None:
    """Serving without torch: NumPy rings, each new column written in place at count % length."""
    length, rows = 8 * WINDOW, 3
    recording, texts = record(model, length, batch=2), ask(model, 5, 2, 1)
    streams, opened = [0, 1, 1], [0, 0, 9]  # the last row opens late
    query = engines["query"](
        {"layers": texts.layers.numpy(), "embedding": texts.embedding.numpy(), "mask": mask_of(texts).numpy()}
    )
    names = ("keys_0", "keys_1", "values_0", "values_1", "history", "count")
    state = dict(zip(names, (each.numpy() for each in model.new_state(rows).tensors), strict=True))
    told = []
    for t in range(length):
        features = {"layers": recording.layers[:, t].numpy(), "embedding": recording.embedding[:, t].numpy()}
        outputs = engines["step"]({**engines["video"](features), "row_stream": np.array(streams), **query, **state})
        active = [begin <= t for begin in opened]
        for row in np.flatnonzero(active).tolist():
            for name, ring in state.items():
                if name == "count":
                    continue
                ring = ring[row].swapaxes(0, -2)  # (length, ..)
                ring[state["count"][row] % len(ring)] = outputs[f"new_{name}"][row]
        state["count"] += active
        told.append(outputs)
    for row, (stream, begin) in enumerate(zip(streams, opened, strict=True)):
        seen = Recording(recording.layers[stream, None, begin:], recording.embedding[stream, None, begin:])
        expected = forward(model, seen, texts.alone(row))
        for name in ("logits", "distances", "saliency"):
            ours = np.stack([outputs[name][row] for outputs in told[begin:]])
            np.testing.assert_allclose(ours, getattr(expected, name)[0].numpy(), rtol=1e-4, atol=1e-4, err_msg=name)


def test_the_columns_of_a_graph_are_those_of_a_step(model: R2, engines: Mapping[str, Engine]) -> None:
    """`step_columns` hands `TemporalState.append` what the graph gave, layer by layer."""
    recording, texts = record(model, 3), ask(model, 4)
    query, states = texts.maps(model), [model.new_state(1), model.new_state(1)]
    row = torch.zeros(1, dtype=torch.int64)
    for t in range(3):
        with torch.no_grad():
            maps = model.video_maps(recording.layers[:, t], recording.embedding[:, t])
            states[0].append(model.step(maps, row, query, states[0])[1])
        given = zip(step_axes(2), step_inputs(maps, row, query, states[1]), strict=True)
        outputs = engines["step"]({name: each.numpy() for name, each in given})
        states[1].append(step_columns({name: torch.from_numpy(each) for name, each in outputs.items()}, 2))
    for ours, theirs in zip(*(state.tensors for state in states), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def mask_of(texts: Texts) -> Tensor:
    return torch.arange(texts.layers.shape[2]) < torch.tensor(texts.lengths)[:, None]
