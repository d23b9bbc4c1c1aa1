"""SIRENs: batched and by hand against one module at a time through autograd."""

import copy
import math

import pytest
import torch
from support.sirens import Siren, networks, pixel_by_pixel, single
from torch import nn

from l2o_graph.inr import RECIPES, Recipe, evaluate, fit, psnr, render, stack_networks


def fit_one(image, weights, biases, recipe, rates):
    """One network, one module, torch's Adam; returns it and the steps it took."""
    module = Siren(weights, biases)
    optimizer = torch.optim.Adam(module.parameters(), betas=recipe.betas)
    points, target = pixel_by_pixel(*image.shape[-2:]), image.reshape(len(biases[-1]), -1).T
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        loss = nn.functional.mse_loss(module(points), target)
        if recipe.stop is not None and -10 * math.log10(loss.item()) >= recipe.stop:
            return module, step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module, len(rates)


def drawable(layout, count, size):
    """Random images as networks of a layout draw them: grey ones have no axis of channels."""
    shape = (count, *size) if layout[-1] == 1 else (count, layout[-1], *size)
    return torch.rand(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    "layout", [(2, 32, 32, 1), (2, 5, 1), (2, 7, 3, 6, 1), (2, 32, 32, 3), (2, 6, 2)]
)
def test_fit_is_adam_through_autograd_on_one_network_at_a_time(layout):
    images = drawable(layout, 4, (6, 9))
    weights, biases = networks(4, layout, dtype=torch.float64)
    before = copy.deepcopy((weights, biases))
    recipe = Recipe(steps=10, lr=3e-3, betas=(0.8, 0.95), tail=0.4)
    fitted = fit(images, weights, biases, recipe)
    rates = [3e-3] * 7 + [3e-3 * share for share in (0.75, 0.5, 0.25)]
    for i in range(4):
        twin, _ = fit_one(images[i], single(weights, i), single(biases, i), recipe, rates)
        for layer, w, b in zip(twin.layers, *fitted, strict=True):
            torch.testing.assert_close(w[i], layer.weight.detach(), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(b[i], layer.bias.detach(), rtol=1e-9, atol=1e-12)
    for old, new in zip((*before[0], *before[1]), (*weights, *biases), strict=True):
        assert torch.equal(old, new), "what was given must stay as it was"


@pytest.mark.parametrize("layout", [(2, 32, 32, 1), (2, 32, 32, 3)])
def test_steps_see_interleaved_grids_by_turns_and_all_pixels_at_the_end(layout):
    """The error of a step is the mean over the grid that it sees, filled up to 16 by its first."""
    images = drawable(layout, 2, (5, 7))
    weights, biases = networks(2, layout, dtype=torch.float64)
    recipe = Recipe(steps=10, lr=1e-3, betas=(0.9, 0.99), grids=2)
    (*fitted,) = zip(*fit(images, weights, biases, recipe), strict=True)
    where = torch.arange(35).view(5, 7)
    black = [int(where[i, j]) for i in range(5) for j in range(7) if (i + j) % 2 == 0]
    white = [k for k in range(35) if k not in black]
    filled = [black + black[: 32 - 18], white + white[: 32 - 17]]
    seen = [filled[step % 2] for step in range(9)] + [list(range(35))]
    twin = single(weights, 0), single(biases, 0)
    parameters = [torch.nn.Parameter(t.clone()) for pair in zip(*twin, strict=True) for t in pair]
    optimizer = torch.optim.Adam(parameters, recipe.lr, recipe.betas)
    for index in seen:
        drawn = render(
            [p[None] for p in parameters[::2]], [p[None] for p in parameters[1::2]], (5, 7)
        )
        optimizer.zero_grad()
        (drawn - images[:1]).flatten(-2)[..., index].square().mean().backward()
        optimizer.step()
    for (w, b), v, c in zip(fitted, parameters[::2], parameters[1::2], strict=True):
        torch.testing.assert_close(w[0], v.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(b[0], c.detach(), rtol=1e-9, atol=1e-12)


def test_each_network_stops_by_itself_at_the_psnr_asked_for():
    images = torch.linspace(0, 1, 54, dtype=torch.float64).view(1, 6, 9).repeat(4, 1, 1)
    images[1:3] += torch.rand(2, 6, 9, dtype=torch.float64) / 3
    weights, biases = networks(4, dtype=torch.float64)
    recipe = Recipe(steps=40, lr=1e-3, betas=(0.9, 0.999), stop=18.0)
    fitted = fit(images, weights, biases, recipe)
    taken = []
    for i in range(4):
        twin, steps = fit_one(
            images[i], single(weights, i), single(biases, i), recipe, [recipe.lr] * 40
        )
        taken.append(steps)
        for layer, w, b in zip(twin.layers, *fitted, strict=True):
            torch.testing.assert_close(w[i], layer.weight.detach(), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(b[i], layer.bias.detach(), rtol=1e-9, atol=1e-12)
    assert len(set(taken)) > 2
    assert min(taken) < max(taken)


def test_recipes_say_what_the_published_one_is():
    published = RECIPES["published"]
    assert (published.steps, published.lr, published.stop) == (1000, 5e-4, 40.0)
    assert {published.rate(step) for step in range(1000)} == {5e-4}


@pytest.mark.parametrize("size", [(28, 28), (5, 12)])
def test_render_is_the_module_on_every_pixel(size):
    weights, biases = networks(3, dtype=torch.float64)
    pixels = render(weights, biases, size)
    assert pixels.shape == (3, *size)
    for i in range(3):
        twin = Siren(single(weights, i), single(biases, i))
        expected = twin(pixel_by_pixel(*size)).detach().view(size)
        torch.testing.assert_close(pixels[i], expected)


def test_colours_are_drawn_channel_by_channel():
    weights, biases = networks(3, (2, 8, 8, 3), dtype=torch.float64)
    pixels = render(weights, biases, (4, 6))
    assert pixels.shape == (3, 3, 4, 6)
    for channel in range(3):
        last = weights[-1][:, channel : channel + 1], biases[-1][:, channel : channel + 1]
        grey = render([*weights[:-1], last[0]], [*biases[:-1], last[1]], (4, 6))
        torch.testing.assert_close(pixels[:, channel], grey)
    assert (pixels[:, 0] - pixels[:, 1]).abs().max() > 1e-2
    twin = Siren(single(weights, 2), single(biases, 2))
    expected = twin(pixel_by_pixel(4, 6)).detach().T.view(3, 4, 6)
    torch.testing.assert_close(pixels[2], expected)


def test_other_omegas_and_points_of_ones_own():
    weights, biases = networks(2, dtype=torch.float64)
    points = torch.tensor([[-0.3, 0.9], [0.5, -1.0]], dtype=torch.float64)
    found = evaluate(weights, biases, points, omega0=7.0)
    for i in range(2):
        twin = Siren(single(weights, i), single(biases, i), omega0=7.0)
        torch.testing.assert_close(found[i, 0], twin(points.T).detach()[:, 0])


def test_render_can_be_differentiated():
    weights, biases = networks(2, dtype=torch.float64)
    for t in (*weights, *biases):
        t.requires_grad_()
    gradients = torch.autograd.grad(render(weights, biases).square().sum(), [*weights, *biases])
    for i in range(2):
        twin = Siren(single(weights, i), single(biases, i))
        twin(pixel_by_pixel(28, 28)).square().sum().backward()
        for layer, g in zip(twin.layers, gradients[:3], strict=True):
            torch.testing.assert_close(g[i], layer.weight.grad)


@pytest.mark.parametrize("size", [(28, 28), (13, 13)])
def test_a_network_renders_to_the_same_bits_alone_and_in_any_company(size):
    weights, biases = networks(70)
    whole = render(weights, biases, size)
    for chosen in ([0], [69], [3, 4, 5], list(range(69, -1, -1)), [7] * 9 + [64, 1]):
        some = render([w[chosen] for w in weights], [b[chosen] for b in biases], size)
        assert torch.equal(some, whole[chosen])
    # Nor does it matter where in memory the weights lie.
    shifted = [torch.cat([torch.zeros(1), w.flatten()])[1:].view(w.shape) for w in weights]
    assert torch.equal(render(shifted, biases, size), whole)


def test_a_fit_has_the_same_bits_in_any_company():
    images = torch.rand(20, 28, 28)
    weights, biases = networks(20)
    recipe = Recipe(steps=5, lr=2e-3, betas=(0.9, 0.95), grids=2)

    def fitted(chosen):
        ws, bs = fit(images[chosen], [w[chosen] for w in weights], [b[chosen] for b in biases],
                     recipe)  # fmt: skip
        return [*ws, *bs]

    whole = fitted(list(range(16)))
    other = fitted([19, 18, 17, 16, *range(11, -1, -1)])
    for a, b in zip(whole, other, strict=True):
        assert torch.equal(a[:12], b[4:].flip(0))
    few = fitted(list(range(3)))
    for a, b in zip(whole, few, strict=True):
        torch.testing.assert_close(a[:3], b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("output", ["sine", "linear"])
def test_first_weights_are_uniform_within_their_bounds(output):
    weights, biases = networks(300, output=output)
    sine = [math.sqrt(6 / 2) / 30, math.sqrt(6 / 32) / 30, math.sqrt(6 / 32) / 30]
    bounds = sine if output == "sine" else [*sine[:2], 1 / math.sqrt(32)]
    for weight, bound in zip(weights, bounds, strict=True):
        assert float(weight.abs().max()) <= bound
        assert float(weight.abs().max()) == pytest.approx(bound, rel=1e-2)
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=2e-2)
    assert not any(bool(b.any()) for b in biases[:-1])
    expected = 0.0 if output == "sine" else 1 / math.sqrt(32 * 3)
    assert float(biases[-1].std()) == pytest.approx(expected, rel=0.1)


def test_psnr_is_that_of_each_image():
    images = torch.zeros(2, 4, 4)
    pixels = torch.stack([torch.full((4, 4), 0.1), torch.full((4, 4), 0.01)])
    torch.testing.assert_close(psnr(pixels, images), torch.tensor([20.0, 40.0]))
    # Of three channels one is off by 0.3: 0.09 / 3 on average.
    colours = torch.stack([torch.full((4, 4), off) for off in (0.3, 0.0, 0.0)])[None]
    torch.testing.assert_close(psnr(colours, torch.zeros(1, 3, 4, 4)), torch.tensor([15.2287875]))


def test_modules_are_stacked_to_what_draws_the_same():
    twins = [Siren(*(single(part, i) for part in networks(3))) for i in range(3)]
    weights, biases = stack_networks(twins)
    assert not any(t.requires_grad for t in (*weights, *biases))
    pixels = render(weights, biases, (9, 9))
    for i, twin in enumerate(twins):
        expected = twin(pixel_by_pixel(9, 9).float()).detach().view(9, 9)
        torch.testing.assert_close(pixels[i], expected)


def test_modules_that_are_no_inrs_are_named():
    good = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    for bad, shapes in (
        (nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 1)), r"0\.weight \(4, 2\), 1\."),
        (nn.Conv1d(2, 4, 1), r"weight \(4, 2, 1\), bias \(4,\)"),
    ):
        with pytest.raises(ValueError, match=rf"INR 1: expected parameters .* found {shapes}"):
            stack_networks([good, bad])
    wide = nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 1))
    with pytest.raises(ValueError, match="expected one layout, found 2"):
        stack_networks([good, wide])
    with pytest.raises(ValueError, match="expected one layout, found 0"):
        stack_networks([])
    with pytest.raises(ValueError, match=r"INR 0: .* found none"):
        stack_networks([nn.ReLU()])


def test_errors_name_the_layer():
    weights, biases = networks(3)
    with pytest.raises(ValueError, match=r"layer 1: expected a weight \(3, out, 32\) and a bias"):
        render([weights[0], weights[1][:, :, :7], weights[2]], biases)
    with pytest.raises(ValueError, match="found 3 weights and 2 biases"):
        render(weights, biases[:2])
    with pytest.raises(ValueError, match=r"expected 2 inputs, found layout \(32, 32, 1\)"):
        render(weights[1:], biases[1:])
    with pytest.raises(
        ValueError, match=r"found images \(4, 28, 28\) and 3 networks of layout \(2, "
    ):
        fit(torch.rand(4, 28, 28), weights, biases)
    with pytest.raises(ValueError, match=r"found images \(3, 3, 28, 28\) and 3 networks of layout"):
        fit(torch.rand(3, 3, 28, 28), weights, biases)
    with pytest.raises(
        ValueError, match=r"\(I, C, height, width\) with C > 1, .*found images \(3, 1, "
    ):
        fit(torch.rand(3, 1, 28, 28), weights, biases)
    with pytest.raises(ValueError, match="tail: expected from 0 to 1, found 2"):
        Recipe(steps=1, lr=1.0, betas=(0.9, 0.9), tail=2.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second kind of device")
def test_fit_and_render_on_a_gpu_are_those_on_the_cpu():
    images = torch.rand(40, 28, 28, dtype=torch.float64)
    weights, biases = networks(40, dtype=torch.float64)
    recipe = Recipe(steps=5, lr=2e-3, betas=(0.9, 0.95))
    here = fit(images, weights, biases, recipe)
    there = fit(images.cuda(), [w.cuda() for w in weights], [b.cuda() for b in biases], recipe)
    for a, b in zip((*here[0], *here[1]), (*there[0], *there[1]), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-8, atol=1e-10)
    pixels = render(*there)
    torch.testing.assert_close(render(*here), pixels.cpu())
    assert torch.equal(render(*([t[5:6] for t in part] for part in there)), pixels[5:6])
