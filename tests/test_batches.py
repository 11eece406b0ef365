"""Training batches hold what the samples hold."""

import numpy as np
import pytest
import torch

from tests.tv import make_tvstream
from trainer.batches import Cutter, groups
from trainer.dataset import Dataset, Sample, Text, Video
from trainer.tvstream import load_tvstream


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load_tvstream(make_tvstream(tmp_path_factory.mktemp("tv")), 2.0)


def test_an_epoch_is_every_sample_once_and_groups_share_a_video(dataset: Dataset) -> None:
    samples = dataset.samples["train"]
    found = groups(samples, 4, np.random.default_rng(0))
    assert sorted(id(sample) for group in found for sample in group) == sorted(id(sample) for sample in samples)
    assert all(len({sample.vid for sample in group}) == 1 and len(group) <= 4 for group in found)
    assert found != groups(samples, 4, np.random.default_rng(1))


def test_a_crop_is_a_stretch_of_its_video_and_truth_comes_along(dataset: Dataset) -> None:
    samples, rng = dataset.samples["train"], np.random.default_rng(0)
    found = groups(samples, 2, rng)
    for at in range(0, len(found), 3):
        batch = Cutter(dataset, 40).collate(found[at : at + 3], rng)
        assert batch.layers.shape[1] == 40 and (batch.targets.inside & batch.targets.counted).any()
    group = [
        [sample for sample in samples if sample.vid == "v1"][:2],
        [sample for sample in samples if sample.vid == "v0"][:1],
    ]
    batch = Cutter(dataset, 40).collate(group, np.random.default_rng(3))
    assert batch.row_video.tolist() == [0, 0, 1]
    for row, sample in enumerate([*group[0], *group[1]]):
        whole = torch.from_numpy(dataset.video(sample.vid).embedding.astype(np.float32))
        crop = batch.embedding[batch.row_video[row]]
        start = next(s for s in range(len(whole) - 39) if torch.equal(whole[s : s + 40], crop))
        part = slice(start, start + 40)
        assert torch.equal(batch.layers[batch.row_video[row], :, 0, 0], crop)
        assert np.array_equal(batch.targets.inside[row].numpy(), sample.inside[part])
        assert np.array_equal(batch.targets.distances[row].numpy(), sample.distances[part])
        assert np.array_equal(batch.targets.counted[row].numpy(), sample.counted[part])
        np.testing.assert_array_equal(batch.asked[row], dataset.text(sample.query).embedding)


def test_every_crop_holds_a_moment_of_one_of_its_queries(dataset: Dataset) -> None:
    samples = dataset.samples["train"]
    for seed in range(20):
        batch = Cutter(dataset, 12).collate([[samples[seed]]], np.random.default_rng(seed))
        assert batch.targets.inside.any()


def test_a_video_shorter_than_the_crop_is_padded_and_nothing_of_the_padding_counts() -> None:
    data = tiny([5, 9])
    batch = Cutter(data, 20).collate([[data.samples["train"][0]], [data.samples["train"][1]]], np.random.default_rng(0))
    assert batch.layers.shape[1] == 9, "no longer than the longest video"
    assert batch.mask.tolist() == [[True] * 5 + [False] * 4, [True] * 9]
    assert not batch.targets.counted[0, 5:].any() and not batch.layers[0, 5:].any()


def test_texts_of_different_lengths_are_padded_with_a_mask() -> None:
    data = tiny([5, 9])
    batch = Cutter(data, 20).collate([[data.samples["train"][0]], [data.samples["train"][1]]], np.random.default_rng(0))
    assert batch.word_mask.tolist() == [[True, False, False], [True, True, True]]
    assert batch.words.shape == (2, 2, 3, 4) and not batch.words[0, :, 1:].any()
    np.testing.assert_array_equal(batch.words[1].numpy(), data.text("q1").layers.astype(np.float32))


def test_the_same_text_and_another_true_one_do_not_contradict_a_window() -> None:
    data = tiny([9, 9])
    first, second = data.samples["train"]
    twin = Sample.of("v1", "q0", second.windows, 18.0, 9, 2.0)
    batch = Cutter(data, 9).collate([[second, twin]], np.random.default_rng(0))
    assert batch.targets.alike.all(), "both are true at the same windows of one video"
    batch = Cutter(data, 9).collate([[first], [second]], np.random.default_rng(0))
    assert batch.targets.alike.tolist() == [[True, False], [False, True]]


def test_the_same_seed_draws_the_same_batch(dataset: Dataset) -> None:
    samples = dataset.samples["train"]
    a, b = (Cutter(dataset, 30).collate([samples[:2], samples[5:6]], np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(a.layers, b.layers) and torch.equal(a.targets.positive, b.targets.positive)


def tiny(lengths: list[int]) -> Dataset:
    rng = np.random.default_rng(0)
    videos = {
        f"v{i}": Video(rng.normal(size=(n, 2, 3, 4)).astype(np.float16), rng.normal(size=(n, 4)).astype(np.float16))
        for i, n in enumerate(lengths)
    }
    texts = {
        f"q{i}": Text(rng.normal(size=(2, 1 + 2 * i, 4)).astype(np.float16), rng.normal(size=5).astype(np.float32))
        for i in range(len(lengths))
    }
    samples = [Sample.of(f"v{i}", f"q{i}", np.array([[2.0, 6.0]]), 2.0 * n, n, 2.0) for i, n in enumerate(lengths)]
    return Dataset(2.0, "none", {"train": samples}, videos.__getitem__, texts.__getitem__)
