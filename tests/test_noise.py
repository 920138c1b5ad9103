"""Noise is a function of a seed, a purpose and indices, and the caller's generators never move."""

import torch

from ppl_vae import noise
from ppl_vae.noise import Purpose

CPU = torch.device("cpu")


def draw(*arguments):
    with noise.unit(CPU, *arguments):
        return torch.randn(5)


def test_a_unit_draws_the_same_whatever_came_before():
    first = draw(0, Purpose.EVIDENCE, 1, 2)
    torch.randn(100)
    assert torch.equal(first, draw(0, Purpose.EVIDENCE, 1, 2))


def test_units_differ_by_seed_purpose_and_indices():
    evidence, pilot = Purpose.EVIDENCE, Purpose.PILOT
    units = [(0, evidence, 1, 2), (1, evidence, 1, 2), (0, pilot, 1, 2), (0, evidence, 2, 1)]
    assert len({tuple(draw(*unit).tolist()) for unit in units}) == 4


def test_the_callers_generator_does_not_move():
    torch.manual_seed(3)
    expected = torch.randn(5)
    torch.manual_seed(3)
    draw(0, Purpose.EVIDENCE)
    noise.permutation(10, 0, 1)
    assert torch.equal(expected, torch.randn(5))


def test_seeds_mean_the_same_for_ever():
    assert noise.unit_seed(0, Purpose.TRAINING, 1, 2) == 16988321894045413679


def test_a_permutation_holds_every_row_once():
    assert sorted(noise.permutation(100, 0, 1).tolist()) == list(range(100))
