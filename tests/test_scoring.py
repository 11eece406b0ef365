"""Scores of whole recordings, their calibration and the measures of both."""

import numpy as np
import pytest
import torch

from models.r2 import R2
from models.r2_types import R2Config
from stream.moments import MomentOptions
from tests.tv import WIDTH, make_tvstream
from trainer.dataset import Dataset, Sample
from trainer.scoring import (
    ZERO_SHOT_FACTORS,
    Calibration,
    balanced_ap,
    calibrate,
    mean_ap,
    measures,
    query_maps,
    saliencies,
    tell,
    weigh_zero_shot,
    zero_shot,
)
from trainer.tvstream import load_tvstream

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load_tvstream(make_tvstream(tmp_path_factory.mktemp("tv")), 2.0)


def model(mode: str = "causal") -> R2:
    torch.manual_seed(0)
    embedding = WIDTH if mode == "causal" else 0
    config = R2Config(mode, WIDTH, WIDTH, embedding=embedding, depth=1, width=32, heads=2, window=6)  # type: ignore[arg-type]
    return R2(config).eval()


def test_scores_of_a_recording_are_those_of_stepping_through_it(dataset: Dataset) -> None:
    r2, samples = model(), dataset.samples["val"]
    together = list(saliencies(r2, dataset, samples))
    chosen = [0, len(samples) - 1]
    for place in chosen:
        sample, video = samples[place], dataset.video(samples[place].vid)
        with torch.inference_mode():
            query, state = query_maps(r2, [dataset.text(sample.query)]), r2.new_state(1)
            for window, expected in enumerate(together[place]):
                layers, embedding = (
                    torch.from_numpy(each[window : window + 1].astype(np.float32))
                    for each in (video.layers, video.embedding)
                )
                outputs, columns = r2.step(r2.video_maps(layers, embedding), None, query, state)
                state.append(columns)
                assert outputs.saliency.item() == pytest.approx(expected, abs=1e-4)


def test_clip_mode_sees_pieces_and_every_window_gets_a_score(dataset: Dataset) -> None:
    r2, samples = model("clip"), dataset.samples["val"][:3]
    for sample, saliency in zip(samples, saliencies(r2, dataset, samples, clip_length=50), strict=True):
        assert saliency.shape == sample.inside.shape and np.isfinite(saliency).all()


def test_scoring_leaves_the_model_in_the_mode_it_was_in(dataset: Dataset) -> None:
    r2 = model().train()
    list(saliencies(r2, dataset, dataset.samples["val"][:1]))
    assert r2.training


def made(truth: list[bool], hop_s: float = 2.0) -> Sample:
    true = np.array(truth)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], true, [0]]))).reshape(-1, 2) * hop_s
    return Sample.of("v", "q", edges.astype(np.float64), len(truth) * hop_s, len(truth), hop_s)


def test_half_is_where_the_frames_f1_is_best() -> None:
    rng = np.random.default_rng(0)
    sample = made((rng.random(400) < 0.2).tolist())
    saliency = 3 * sample.inside + rng.normal(size=400)
    calibration = calibrate([sample], [saliency])

    def f1(threshold: float) -> float:
        taken = saliency >= threshold
        return 2 * float((taken & sample.inside).sum()) / float(taken.sum() + sample.inside.sum())

    assert f1(calibration.centre) == pytest.approx(max(f1(each) for each in saliency))
    assert calibration(np.array([calibration.centre]))[0] == pytest.approx(0.5)


def test_the_slope_is_that_of_the_true_probabilities() -> None:
    """Where the truth is drawn by a logistic curve, the fit finds it."""
    rng = np.random.default_rng(1)
    saliency = rng.uniform(-3, 5, 20_000)
    true = rng.random(len(saliency)) < 1 / (1 + np.exp(-1.7 * (saliency - 1)))
    sample = Sample(
        "v",
        "q",
        np.zeros((0, 2)),
        1.0,
        true,
        np.zeros((len(true), 2), np.float32),
        true.astype(np.float32),
        np.ones(len(true), bool),
    )
    assert calibrate([sample], [saliency]).slope == pytest.approx(1.7, rel=0.1)


@pytest.mark.parametrize("scores", [[0.2] * 8, [0.1, 0.9] * 4])
def test_a_calibration_with_equal_scores_is_still_finite(scores: list[float]) -> None:
    calibration = calibrate([made([True, False] * 4)], [np.array(scores)])
    assert np.isfinite([calibration.centre, calibration.slope]).all() and calibration.slope > 0


def test_nothing_true_is_refused() -> None:
    with pytest.raises(ValueError, match="frames that are true"):
        calibrate([made([False] * 5)], [np.arange(5.0)])


def test_moments_are_told_as_the_live_path_tells_them() -> None:
    sample = made([False] * 5 + [True] * 5 + [False] * 10)
    told = tell(sample, np.where(sample.inside, 0.9, 0.1), 2.0, MomentOptions())
    assert [(m.start_s, m.end_s) for m in told.closed] == [(10.0, 20.0)]
    assert told.opened[0].publish_s == 12.0, "at the end of the window that opened it"
    assert told.closed[0].publish_s > 22.0


def test_measures_are_perfect_for_perfect_scores_and_part_seen_from_unseen(dataset: Dataset) -> None:
    samples = dataset.samples["test"]
    perfect = [sample.inside.astype(np.float64) for sample in samples]
    found = measures(dataset, samples, perfect, Calibration(0.5, 20.0))
    for name in ("frame_ap", "frame_ap_seen", "frame_ap_unseen", "f1", "frame_recall"):
        assert found[name] == pytest.approx(1.0), name
    wrong = [
        score if sample.query in dataset.unseen else -score for sample, score in zip(samples, perfect, strict=True)
    ]
    found = measures(dataset, samples, wrong, Calibration(0.5, 20.0))
    assert found["frame_ap_unseen"] == pytest.approx(1.0) and (found["frame_ap_seen"] or 0) < 0.5


def test_zero_shot_is_the_zero_shot_part_of_the_model(dataset: Dataset) -> None:
    """A model whose own part is silent says what the backbone says."""
    r2, samples = model(), dataset.samples["val"][:4]
    with torch.no_grad():
        r2.zero_shot.fill_(1.0)
        r2.heads.classify.out.weight.zero_()
        r2.heads.classify.out.bias.fill_(-100.0)
    for own, bare in zip(saliencies(r2, dataset, samples), zero_shot(dataset, samples), strict=True):
        np.testing.assert_allclose(own, bare, atol=1e-5)


def test_the_scale_of_zero_shot_is_what_ranks_best_and_the_scores_are_the_models_own(dataset: Dataset) -> None:
    r2, samples = model(), dataset.samples["val"]
    with torch.no_grad():
        r2.zero_shot.fill_(0.05)  # next to the noise of an untrained head
    before = list(saliencies(r2, dataset, samples))
    told = weigh_zero_shot(r2, dataset, samples, before)
    assert r2.zero_shot.item() == pytest.approx(0.05 * max(ZERO_SHOT_FACTORS))
    assert balanced_ap(dataset, samples, told) > balanced_ap(dataset, samples, before)
    for own, expected in zip(saliencies(r2, dataset, samples), told, strict=True):
        np.testing.assert_allclose(own, expected, atol=1e-5)


def test_choices_weigh_seen_and_unseen_queries_alike(dataset: Dataset) -> None:
    samples = dataset.samples["test"]
    unseen = [sample.query in dataset.unseen for sample in samples]
    assert 0 < sum(unseen) < len(samples) / 2
    scores = [
        sample.inside.astype(np.float64) * (1.0 if new else -1.0) for sample, new in zip(samples, unseen, strict=True)
    ]
    kinds = [[i for i, new in enumerate(unseen) if new is kind] for kind in (False, True)]
    expected = [mean_ap([samples[i] for i in kind], [scores[i] for i in kind]) for kind in kinds]
    assert balanced_ap(dataset, samples, scores) == pytest.approx(np.mean(expected))
