"""Crops out of pieces of many recordings: what is true of them follows from where each piece came from."""

import numpy as np
import pytest

from tests.test_batches import tiny
from trainer.batches import Cutter, groups
from trainer.dataset import Sample
from trainer.remix import Piece, Remixer


def sample(vid: str, query: str, inside: str) -> Sample:
    true = np.array([char == "#" for char in inside])
    edges = np.flatnonzero(np.diff(np.concatenate([[0], true, [0]]))).reshape(-1, 2).astype(np.float64)
    made = Sample.of(vid, query, edges * 2.0, 2.0 * len(true), len(true), 2.0)
    assert np.array_equal(made.inside, true)
    return made


DOG = sample("a", "a dog", "..####....")
CAT = sample("b", "a cat", "#####.....")
PERSON_A, PERSON_B = sample("a", "a person", "....####.."), sample("b", "a person", "..........")
OTHER = sample("c", "a car", "...#######")
ALL = [DOG, CAT, PERSON_A, PERSON_B, OTHER]


def test_truth_follows_the_pieces() -> None:
    pieces = [Piece("b", 2, 6), Piece("a", 3, 9), Piece("c", 0, 2), Piece("a", 0, 4)]
    remixer = Remixer(ALL)

    def shown(name: str, asked: Sample) -> str:
        return "".join(".#"[int(each)] for each in getattr(remixer.truth(asked, pieces), name))

    assert shown("inside", DOG) == "....###.......##"
    assert shown("counted", DOG) == "#" * 16, "asked of one recording alone: false in the others"
    assert shown("inside", CAT) == "###............."
    assert shown("inside", PERSON_A) == shown("inside", PERSON_B) == ".....####......."
    assert shown("counted", PERSON_A) == "##########..####", "nobody asked it of c"


def test_distances_are_those_of_the_crop_not_of_the_recordings() -> None:
    truth = Remixer(ALL).truth(DOG, [Piece("a", 4, 7), Piece("c", 0, 2), Piece("a", 2, 4), Piece("a", 2, 3)])
    assert truth.inside.tolist() == [True, True, False, False, False, True, True, True]
    assert truth.distances.tolist() == [
        [0.5, 1.5], [1.5, 0.5], [0, 0], [0, 0], [0, 0], [0.5, 2.5], [1.5, 1.5], [2.5, 0.5]
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(10))
def test_pieces_fill_the_crop_and_show_a_moment_of_each_query(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pieces = Remixer(ALL).pieces([DOG, CAT], 30, 4, rng)
    assert sum(piece.end - piece.start for piece in pieces) == 30
    assert all(piece.end - piece.start <= 6 and 0 <= piece.start < piece.end <= 10 for piece in pieces)
    for asked in (DOG, CAT):
        assert any(p.vid == asked.vid and asked.inside[p.start : p.end].any() for p in pieces)
    assert {piece.vid for piece in pieces} >= {"a", "b"}


def test_the_order_of_the_pieces_is_drawn_too() -> None:
    first = {Remixer(ALL).pieces([DOG, CAT], 30, 4, np.random.default_rng(seed))[0].vid for seed in range(30)}
    assert first == {"a", "b", "c"}


def test_a_crop_holds_the_features_of_its_pieces() -> None:
    data = tiny([9, 9, 7])
    samples = data.samples["train"]
    remixer = Remixer(samples)
    batch = Cutter(data, 12, remixer, 4).collate([samples[:2], samples[2:]], np.random.default_rng(4))
    rng = np.random.default_rng(4)
    for place, group in enumerate((samples[:2], samples[2:])):
        pieces = remixer.pieces(group, 12, 4, rng)
        expected = np.concatenate([data.video(p.vid).layers[p.start : p.end] for p in pieces])
        np.testing.assert_array_equal(batch.layers[place].numpy(), expected.astype(np.float32))
    assert batch.mask.all() and batch.row_video.tolist() == [0, 0, 1]


def test_mixed_groups_hold_every_sample_once() -> None:
    found = groups(ALL, 2, np.random.default_rng(0), mixed=True)
    assert sorted(len(group) for group in found) == [1, 2, 2]
    assert sorted(id(each) for group in found for each in group) == sorted(map(id, ALL))
