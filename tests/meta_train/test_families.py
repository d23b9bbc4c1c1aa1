"""Families of small problems: the same instances for everyone, and problems that can be solved."""

from functools import cache

import pytest
import torch
from torch.func import functional_call

from l2o_graph.datasets.images import DATA_VARIABLE
from meta_train.families import FAMILIES, HELD_OUT, TRAINING, draw, register_family
from meta_train.families.base import losses
from meta_train.families.dice import Dice
from meta_train.families.examples import FixedSet
from meta_train.families.images import Pictures

PAIRS = 3
JUDGED = ("few_examples", "fine_tune")  # by held-out examples, at least in some draws
SEEDS = (0, 1)
# Families whose steps take the longest. Twenty lower their losses by a fifth or more.
DEAR = ("full_cnn", "image_cnn", "language", "patches", "restore")

every_family = pytest.mark.parametrize("family", sorted(FAMILIES))


@pytest.fixture(autouse=True)
def _sample(monkeypatch, tmp_path):
    """The packaged sample, whatever lies on this machine."""
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))


@cache  # nothing changes problems, and some take a second to draw
def problems_of(family, seed=0, pairs=PAIRS, augment=True):
    return draw(family, seed, pairs, augment=augment)


def in_pairs(parameters):
    return [p.repeat_interleave(2, 0).requires_grad_() for p in parameters]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@every_family
@pytest.mark.parametrize("seed", SEEDS)
def test_pairs_see_the_same_and_gradients_reach_every_instance(family, seed):
    problems = problems_of(family, seed)
    start, batch = problems.start(), problems.batch(0)
    assert problems.shapes == problems.spec.shapes == tuple(tuple(p.shape[1:]) for p in start)
    assert all(p.shape[0] == problems.pairs == PAIRS and p.dtype == torch.float32 for p in start)
    assert not problems.spec.loose

    parameters = in_pairs(start)
    loss = problems.loss(parameters, batch)
    assert loss.shape == (2 * PAIRS,)
    assert torch.allclose(loss[::2], loss[1::2], rtol=1e-4)
    assert problems.scale.shape == (PAIRS,) and (problems.scale > 0).all()
    assert problems.scale.isfinite().all()
    gradients = torch.autograd.grad(loss.sum(), parameters)
    assert all(g.isfinite().all() for g in gradients)
    assert (sum(g.abs().flatten(1).sum(1) for g in gradients) > 0).all()


@every_family
def test_all_is_determined_by_the_seed(family):
    before = torch.random.get_rng_state()
    one, other, third = draw(family, 1, PAIRS), problems_of(family, 1), problems_of(family, 2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.spec == other.spec
    assert same(one.start(), other.start()) and torch.equal(one.scale, other.scale)
    for step in (7, 0, 7):  # in any order
        assert same(one.batch(step), other.batch(step))
    assert one.spec != third.spec or not same(one.start(), third.start())
    one.start()[0].zero_()  # the caller's own
    assert same(one.start(), other.start())


@every_family
@pytest.mark.parametrize("mine", [slice(1, 3), slice(0, None, 2)])
def test_a_part_of_the_pairs_is_the_same_instances(family, mine):
    everyone, part = problems_of(family, 1), draw(family, 1, PAIRS, mine)
    assert part.pairs == 2 and part.spec == everyone.spec
    assert same(part.start(), [p[mine] for p in everyone.start()])
    for step in (0, 30):
        assert same(part.batch(step), [t[mine] for t in everyone.batch(step)])
    assert torch.allclose(part.scale, everyone.scale[mine], rtol=1e-4)
    loss = everyone.loss(everyone.start(), everyone.batch(3))[mine]
    assert torch.allclose(part.loss(part.start(), part.batch(3)), loss, rtol=1e-4)


@every_family
@pytest.mark.parametrize("seed", SEEDS)
def test_an_instance_is_an_ordinary_module(family, seed):
    problems = problems_of(family, seed)
    plan, (x, y) = problems.plan, problems.batch(2)
    together = problems.loss(problems.start(), (x, y)) / problems.loss_factor
    for i in range(PAIRS):
        stored = zip(problems.spec.names, problems.start(), problems.units[i], strict=True)
        named = {name: p[i] * unit for name, p, unit in stored}
        answer = functional_call(plan.module, named, (x[i],))
        torch.testing.assert_close(plan.criterion(answer, y[i]), together[i], rtol=1e-3, atol=1e-6)
        if plan.twin is not None and family != "pinn":  # whose twin has no second derivative
            torch.testing.assert_close(functional_call(plan.twin, named, (x[i],)), answer)


@every_family
def test_units_change_neither_the_start_nor_the_data(family):
    plain, changed = (problems_of(family, 2, 12, a) for a in (False, True))
    factor, units = changed.loss_factor, changed.units
    assert (factor != 1).any() and (units != 1).any() and (units == 1).all(1).any()
    assert same(plain.batch(4), changed.batch(4))
    restored = [
        p * u.view(-1, *[1] * (p.dim() - 1)) for p, u in zip(changed.start(), units.T, strict=True)
    ]
    assert all(torch.allclose(a, b) for a, b in zip(plain.start(), restored, strict=True))
    torch.testing.assert_close(changed.scale, plain.scale * factor, rtol=1e-3, atol=0.0)
    one, other = (p.loss(p.start(), p.batch(4)) for p in (plain, changed))
    torch.testing.assert_close(other, one * factor, rtol=1e-3, atol=0.0)
    judged = plain.held_out(plain.start()), changed.held_out(changed.start())
    if judged[0] is not None:
        torch.testing.assert_close(judged[1], judged[0] * factor, rtol=1e-3, atol=0.0)


@every_family
def test_adam_lowers_the_loss(family):
    problems = problems_of(family, 2)
    # Three networks of each instance, under three rates.
    rates = torch.tensor([1e-3, 1e-2, 1e-1]).repeat(PAIRS)
    parameters = [p.repeat_interleave(3, 0).requires_grad_() for p in problems.start()]
    of_row = [rates.view(-1, *[1] * (p.dim() - 1)) for p in parameters]
    # Rates are in the units that parameters are stored in.
    of_row = [
        r / u.repeat_interleave(3).view_as(r) for r, u in zip(of_row, problems.units.T, strict=True)
    ]
    optimizer, end = torch.optim.Adam(parameters, 1.0, eps=0.0), []
    steps = 20 if family in DEAR else 60
    for step in range(steps):
        loss = problems.loss(parameters, problems.batch(step))
        if step >= steps - 10:
            end.append(loss.detach())
        optimizer.zero_grad()
        loss.sum().backward()
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        with torch.no_grad():
            for p, old, rate in zip(parameters, before, of_row, strict=True):
                p.copy_(old + rate * torch.nan_to_num(p - old))
    relative = torch.stack(end).mean(0).view(PAIRS, 3) / problems.scale[:, None]
    assert (relative.min(1).values < 0.98).all()


@pytest.mark.parametrize("family", JUDGED)
def test_judged_by_examples_that_are_not_trained_on(family):
    drawn = [problems_of(family, seed) for seed in range(3)]
    judged = [p for p in drawn if p.held_out(p.start()) is not None]
    assert judged
    for problems in judged:
        loss = problems.held_out(in_pairs(problems.start()))
        assert loss.shape == (2 * PAIRS,) and loss.isfinite().all() and not loss.requires_grad
        x, _ = problems.plan.examples.held_out
        seen = torch.cat([problems.batch(step)[0] for step in range(40)], 1)
        for i in range(PAIRS):
            same = (x[i].flatten(1)[:, None] == seen[i].flatten(1)[None]).all(-1)
            assert not same.any()


def test_fixed_examples_come_in_epochs():
    dice = Dice(0, PAIRS)
    x = torch.arange(10.0).expand(PAIRS, -1)
    fixed = FixedSet(dice, (x, x), size=3)
    epochs = [torch.cat([fixed.batch(3 * e + i)[0] for i in range(3)], 1) for e in range(2)]
    for epoch in epochs:  # none comes twice, the tenth waits
        assert all(len(set(row.tolist())) == 9 for row in epoch)
    assert not torch.equal(*epochs) and not torch.equal(epochs[0][0], epochs[0][1])
    assert torch.equal(FixedSet(dice, (x, x)).batch(5)[0], x)


def test_validation_shows_other_images():
    training, validation = (Pictures.load(None, v) for v in (False, True))
    assert len(training._labels) == 5000 and len(validation._labels) == 1000
    one, other = (draw("classifier", 0, PAIRS, validation=v) for v in (False, True))
    assert one.spec == other.spec and same(one.start(), other.start())
    assert not same(one.batch(0), other.batch(0))


def test_copies_of_an_instance_may_be_any_number():
    problems = problems_of("classifier")
    one = problems.loss(problems.start(), problems.batch(0))
    three = problems.loss([p.repeat_interleave(3, 0) for p in problems.start()], problems.batch(0))
    assert torch.allclose(three, one.repeat_interleave(3), rtol=1e-4)
    assert losses(problems.plan, problems.start(), problems.batch(0)).shape == (PAIRS,)


def test_kinds_are_for_training_or_held_out():
    assert set(TRAINING) | set(HELD_OUT) == set(FAMILIES)
    assert not set(TRAINING) & set(HELD_OUT) and HELD_OUT


def test_refusals():
    with pytest.raises(ValueError, match="unknown family 'mlp', expected one of"):
        draw("mlp", 0, 2)
    with pytest.raises(ValueError, match="mine: expected at least one of 2 pairs"):
        draw("classifier", 0, 2, slice(5, 9))
    with pytest.raises(ValueError, match="there is a family 'classifier' already"):
        register_family("classifier")(FAMILIES["classifier"].build)
