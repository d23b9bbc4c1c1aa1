"""Perturbations, and the estimate of a gradient that they give."""

import pytest
import torch

from meta_train.evolution import MOST_DIFFERENCE, gradient, perturbations, perturbed


def test_noise_follows_from_its_seed():
    one, again, other = (perturbations(seed, 5, 7) for seed in (3, 3, 4))
    assert one.shape == (5, 7)
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_the_noise_of_some_pairs_is_that_of_all():
    """Processes take parts of one draw."""
    noise, weights = perturbations(0, 4, 3), torch.randn(3)
    whole = perturbed(weights, noise, 0.1)
    parts = [perturbed(weights, noise[i : i + 2], 0.1) for i in (0, 2)]
    assert torch.equal(whole, torch.cat(parts))


def test_pairs_stand_side_by_side_and_lie_on_both_sides():
    noise, weights = perturbations(0, 4, 3), torch.randn(3)
    both = perturbed(weights, noise, 0.1)
    assert both.shape == (8, 3)
    for i in range(4):
        torch.testing.assert_close(both[2 * i], weights + 0.1 * noise[i])
        torch.testing.assert_close(both[2 * i + 1], weights - 0.1 * noise[i])


def test_the_gradient_is_that_of_each_pair_along_its_noise():
    noise, scores = perturbations(0, 3, 2), torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 2.5])
    found, mean = gradient(scores, noise)
    halves = [0.5, 0.5, -1.0]
    assert mean == pytest.approx(2 / 3)
    expected = sum(h * e for h, e in zip(halves, noise, strict=True)) / (2 / 3) / 3
    torch.testing.assert_close(found, expected)


def test_one_pair_does_not_outweigh_all_others():
    noise = torch.eye(20)
    scores = torch.tensor([1e-3, 0.0] * 19 + [1e6, 0.0])
    found, _ = gradient(scores, noise)
    assert found[-1] == pytest.approx(MOST_DIFFERENCE / 20)


def test_equal_scores_give_no_gradient():
    found, mean = gradient(torch.ones(8), perturbations(0, 4, 3))
    assert mean == 0
    assert not found.any()


def test_of_a_linear_score_it_is_the_slope_up_to_a_factor():
    slope, weights = torch.tensor([3.0, -1.0, 0.0]), torch.zeros(3)
    noise = perturbations(0, 20_000, 3)
    found, _ = gradient(perturbed(weights, noise, 0.1) @ slope, noise)
    cosine = (found @ slope) / found.norm() / slope.norm()
    assert cosine > 0.999
