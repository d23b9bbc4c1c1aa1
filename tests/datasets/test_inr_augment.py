"""Augmented INRs draw the image moved, by numbers of the sizes promised."""

import math

import pytest
import torch
from support.sirens import networks, pixel_by_pixel

from l2o_graph.datasets.inr.augment import (
    AMOUNTS,
    augmented,
    dropped,
    noisy,
    rotated,
    translated,
)
from l2o_graph.inr import coordinates, evaluate, render


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn_at(weights, biases, points):
    """What each network draws at points (I, 2, Q) of its own, as images."""
    rows = [
        evaluate([w[i : i + 1] for w in weights], [b[i : i + 1] for b in biases], points[i])
        for i in range(len(points))
    ]
    return torch.cat(rows).view(-1, 28, 28)


# Motions ---------------------------------------------------------------------------------------


def test_the_grid_is_what_render_draws():
    """What the tests below move."""
    torch.testing.assert_close(coordinates(dtype=torch.float64), pixel_by_pixel(28, 28).T)


def test_translated_networks_draw_at_shifted_points():
    weights, biases = networks(3, dtype=torch.float64)
    biases = [torch.randn_like(b) / 30 for b in biases]
    shift = torch.tensor([[0.2, -0.1], [-0.25, 0.05], [0.0, 0.0]], dtype=torch.float64)
    moved = translated(weights, biases, shift, torch.ones(3, dtype=torch.long))
    points = coordinates(dtype=torch.float64) + shift[..., None]
    found, expected = render(weights, moved), drawn_at(weights, biases, points)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert (found - render(weights, biases)).abs().amax((1, 2))[:2].min() > 1e-2
    single = [[t.float() for t in part] for part in (weights, moved)]
    torch.testing.assert_close(render(*single).double(), expected, rtol=0, atol=1e-4)


def test_a_translation_goes_through_as_many_weights_as_asked_for():
    layout = (2, 5, 4, 3, 1)
    weights, biases = networks(3, layout, dtype=torch.float64)
    shift = torch.randn(3, 2, dtype=torch.float64)
    moved = translated(weights, biases, shift, torch.tensor([1, 2, 3]))
    for network in range(3):
        for k in range(4):
            expected = biases[k][network]
            if k == network:
                product = shift[network]
                for weight in weights[: k + 1]:
                    product = weight[network] @ product
                expected = expected + product
            torch.testing.assert_close(moved[k][network], expected)


def test_rotated_networks_draw_at_turned_points():
    weights, biases = networks(3, dtype=torch.float64)
    angle = torch.tensor([0.5, -0.3, math.pi / 2], dtype=torch.float64)
    x, y = coordinates(dtype=torch.float64)
    turned = torch.complex(x, y) * torch.polar(torch.ones(3, 1).double(), angle[:, None])
    points = torch.stack([turned.real, turned.imag], dim=1)
    found = render([rotated(weights[0], angle), *weights[1:]], biases)
    expected = drawn_at(weights, biases, points)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    # A quarter turn brings x where y was: the picture, on its side.
    quarter = render([w[2:] for w in weights], [b[2:] for b in biases])
    torch.testing.assert_close(found[2:], quarter.rot90(1, (1, 2)))


# Disturbances ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 50), (2000,)], ids=["weights", "biases"])
def test_noise_has_its_deviation_in_each_network_and_no_mean(shape):
    size = torch.tensor([0.01, 1.0, 7.0]).double().view(3, *[1] * len(shape))
    x = size * torch.randn(3, *shape).double() + 5
    noise = (noisy(x, 0.1, generator()) - x).flatten(1)
    relative = noise / (0.1 * x.flatten(1).std(1, keepdim=True))
    # 2,000 normal numbers: deviations of 1.6 % of the one and of 2.2 % of the other.
    assert (relative.std(1) - 1).abs().max() < 0.06
    assert relative.mean(1).abs().max() < 0.09
    correlation = torch.corrcoef(relative)
    assert (correlation - torch.eye(3)).abs().max() < 0.09


def test_a_single_scalar_has_no_deviation_and_gets_no_noise():
    x = torch.randn(4, 1)
    assert torch.equal(noisy(x, 0.1, generator()), x)


def test_dropout_has_its_rate_and_leaves_the_rest_alone():
    x = torch.randn(10, 100, 100)
    found = dropped(x, 0.01, generator())
    gone = found == 0
    assert gone.float().mean().item() == pytest.approx(0.01, abs=1e-3)
    assert torch.equal(found[~gone], x[~gone])
    assert len({tuple(g.flatten().nonzero().flatten().tolist()) for g in gone}) == 10


# All together ----------------------------------------------------------------------------------


def test_sizes_of_all_motions():
    """Read off the first layer, which has neurons enough for noise and dropout to average out."""
    count, width = 300, 1000
    weights = [torch.randn(count, width, 2).double(), torch.randn(count, 1, width).double()]
    biases = [torch.zeros(count, width).double(), torch.zeros(count, 1).double()]
    (first, _), (moved, _) = augmented(weights, biases, generator())
    matrix = torch.linalg.lstsq(weights[0], first).solution
    shift = torch.linalg.lstsq(weights[0], moved[..., None]).solution[..., 0]
    factor = matrix.det().sqrt()
    angle = torch.atan2(matrix[:, 1, 0] - matrix[:, 0, 1], matrix[:, 0, 0] + matrix[:, 1, 1])
    for value, middle, most in ((shift[:, 0], 0, 0.25), (shift[:, 1], 0, 0.25),
                                (angle, 0, math.pi / 4), (factor, 1, 0.2)):  # fmt: skip
        off = (value - middle) / most
        assert off.abs().max() < 1.1
        # Uniform from -1 to 1: of 300 such numbers, the mean is within 0.1 and the deviation too.
        assert abs(off.mean()) < 0.15
        assert off.std().item() == pytest.approx(1 / math.sqrt(3), abs=0.06)
    residual = first - weights[0] @ matrix
    noise = residual.flatten(1).std(1) / first.flatten(1).std(1)
    # Noise of 0.1, and one entry in a hundred gone.
    assert noise.mean().item() == pytest.approx(math.sqrt(0.1**2 + 0.01), rel=0.05)


def test_each_network_is_shifted_at_one_depth_that_is_never_the_last():
    weights, _ = networks(90, (2, 6, 6, 6, 1))
    biases = [torch.zeros(90, n) for n in (6, 6, 6, 1)]  # without deviation, hence without noise
    _, moved = augmented(weights, biases, generator())
    shifted = torch.stack([b.any(1) for b in moved])
    assert torch.equal(shifted.sum(0), torch.ones(90, dtype=torch.long))
    assert not shifted[3].any()
    assert shifted[:3].sum(1).min() > 15


def test_the_same_generator_gives_the_same_and_nothing_is_written():
    given = networks(3)
    before = [t.clone() for part in given for t in part]
    once, again, other = (augmented(*given, generator(seed)) for seed in (1, 1, 2))
    for part in range(2):
        for a, b, c, t in zip(once[part], again[part], other[part], given[part], strict=True):
            assert a.dtype == t.dtype
            assert a.shape == t.shape
            assert torch.equal(a, b)
            if t.any() and t[0].numel() > 1:
                assert not torch.equal(a, c)
    for old, new in zip(before, (t for part in given for t in part), strict=True):
        assert torch.equal(old, new)


def test_equal_networks_are_changed_each_in_its_own_way():
    weights, biases = ([t.expand(4, *t.shape[1:]) for t in part] for part in networks(1))
    changed = augmented(weights, biases, generator())
    for t in (*changed[0], changed[1][0]):
        assert len({tuple(row.flatten().tolist()) for row in t}) > 1


@pytest.mark.parametrize("name", ["small", "small-mirrored", "mirrored"])
def test_small_changes_draw_the_image_in_another_frame(name):
    """What is drawn at x is what was drawn at A x + t; A and t are of the sizes promised."""
    weights, biases = networks(40, dtype=torch.float64)
    biases = [torch.randn_like(b) / 30 for b in biases]
    changed = augmented(weights, biases, generator(), AMOUNTS[name])
    frame = torch.linalg.lstsq(weights[0], changed[0][0]).solution
    shift = torch.linalg.lstsq(weights[0], (changed[1][0] - biases[0])[..., None]).solution
    expected = drawn_at(weights, biases, frame @ coordinates(dtype=torch.float64) + shift)
    torch.testing.assert_close(render(*changed), expected, rtol=0, atol=1e-8)
    most = AMOUNTS[name].translation
    assert most / 2 < shift.abs().max() <= most
    sign = frame.det().sign()
    assert sorted(set(sign.tolist())) == ([-1, 1] if "mirrored" in name else [1])
    upright = frame * torch.stack([sign, torch.ones_like(sign)], -1)[:, None]
    off = (upright - torch.eye(2, dtype=torch.float64)).abs().amax(0)
    assert off.min() > most and off.max() < 4.5 * most


@pytest.mark.parametrize("layout", [(3, 4, 1), (2, 1)])
def test_networks_without_coordinates_or_hidden_layer_are_refused(layout):
    message = r"expected networks with 2 inputs and a hidden layer, found layout \(\d, "
    with pytest.raises(ValueError, match=message):
        augmented(*networks(2, layout), generator())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second kind of device")
def test_a_generator_on_the_cpu_gives_the_same_on_a_gpu():
    given = networks(3, dtype=torch.float64)
    here = augmented(*given, generator())
    there = augmented(*([t.cuda() for t in part] for part in given), generator())
    for a, b in zip((*here[0], *here[1]), (*there[0], *there[1]), strict=True):
        torch.testing.assert_close(a, b.cpu())
