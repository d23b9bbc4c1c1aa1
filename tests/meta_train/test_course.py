"""Spans of courses against the optimizer in an ordinary loop, one network at a time."""

import copy
import math

import pytest
import torch
from torch.func import functional_call

from l2o_graph import NGOptimizer
from l2o_graph.optim.controller import Controller, ControllerConfig, weights_from
from meta_train.course import (
    BATCHES_OF_AVERAGES,
    EVALUATE_EVERY,
    LEAST_LOSS,
    MOST_LOSS,
    score,
    start,
)
from meta_train.evolution import perturbations, perturbed
from meta_train.families import draw

PAIRS, STEPS = 2, 10
# Families whose courses here see the same examples again and again.
SEEN_AGAIN = {"few_examples", "ill_posed"}
CONFIG = ControllerConfig(channels=3)


@pytest.fixture
def data(tmp_path):
    """Where nothing lies, so that images are those of the packaged sample."""
    return tmp_path / "data"


def controllers(config: ControllerConfig = CONFIG) -> torch.Tensor:
    """Weights of PAIRS antithetic pairs."""
    torch.manual_seed(0)
    weights = Controller(config).vector()
    return perturbed(weights, perturbations(0, PAIRS, config.size), 0.3)


class Loop:
    """One network of a family, trained by the optimizer as anybody would."""

    def __init__(self, problems, member: int, vector, config: ControllerConfig, total_steps):
        self.problems, self.pair = problems, member // 2
        controller = Controller(config)
        controller.set_vector(vector)
        self.module = copy.deepcopy(problems.plan.module)
        with torch.no_grad():
            for p, first in zip(self.module.parameters(), problems.start(), strict=True):
                p.copy_(first[self.pair])
        self.optimizer = NGOptimizer(
            self.module.parameters(),
            checkpoint=controller,
            model=self.module,
            total_steps=total_steps,
        )
        with torch.no_grad():  # so that no examples are counted
            self.module(problems.batch(0)[0][self.pair])  # from which the structure is read

    def loss(self, batch) -> torch.Tensor:
        """In the units that parameters and losses of this instance are in."""
        x, y = (t[self.pair] for t in batch)
        units = self.problems.units[self.pair]
        named = {
            name: p * unit
            for (name, p), unit in zip(self.module.named_parameters(), units, strict=True)
        }
        answer = functional_call(self.module, named, (x,))
        return self.problems.plan.criterion(answer, y) * self.problems.loss_factor[self.pair]

    def step(self, at: int) -> float:
        """Train on a batch; the loss before, relative to the start of training."""
        self.optimizer.zero_grad()
        loss = self.loss(self.problems.batch(at))
        loss.backward()
        self.optimizer.step()
        return self.relative(loss.item())

    def averaged(self, age: int) -> float:
        """That of the averaged weights on what is held out, or on the batches that come next."""
        held_out = self.problems.plan.examples.held_out
        with self.optimizer.averaged(), torch.no_grad():
            ahead = range(age, age + BATCHES_OF_AVERAGES)
            batches = [held_out] if held_out else [self.problems.batch(at) for at in ahead]
            losses = [self.loss(batch).item() for batch in batches]
        return self.relative(sum(losses) / len(losses))

    def relative(self, loss: float) -> float:
        return min(loss / self.problems.scale[self.pair].item(), MOST_LOSS)


@pytest.mark.parametrize(
    ("family", "reader", "told"),
    [
        ("regression", "messages", False),
        ("classifier", "messages", True),
        ("cnn", "attention", False),
        ("embedding", "mean", True),
        ("ill_posed", "none", False),
        ("autoencoder", "sequence", False),
        ("few_examples", "none", True),
    ],
)
def test_a_span_is_a_loop_with_the_optimizer(family, reader, told, data):
    config = ControllerConfig(reader, channels=3)
    vectors = controllers(config)
    weights = weights_from(config, vectors)
    course = start(family, 3, PAIRS, STEPS, told, data_root=data)
    problems = draw(family, 3, PAIRS, data_root=data)
    total_steps = STEPS if told else None
    loops = [Loop(problems, k, v, config, total_steps) for k, v in enumerate(vectors)]
    for at in range(STEPS):
        losses = course.span(config, weights, 1)
        assert losses.shape == (2, 2 * PAIRS)
        expected = torch.tensor([loop.step(at) for loop in loops])
        torch.testing.assert_close(losses[0], expected, rtol=1e-3, atol=1e-4)
        expected = torch.tensor([loop.averaged(at + 1) for loop in loops])
        torch.testing.assert_close(losses[1], expected, rtol=1e-3, atol=1e-4)
    assert course.ended
    assert (losses[0] - 1).abs().max() > 1e-2
    parameters = sum(map(math.prod, problems.shapes))
    few = problems.plan.examples.few(STEPS - 1, parameters)
    counted = loops[0].optimizer._examples.few()
    if family in SEEN_AGAIN:
        assert float(few) == pytest.approx(float(counted), rel=0.05) and float(few) > 0.05
    else:
        assert few is None and float(counted) < 0.05


def test_spans_follow_on_each_other(data):
    vectors = controllers()
    one, other = (start("classifier", 1, PAIRS, 20, False, data_root=data) for _ in range(2))
    weights = weights_from(CONFIG, vectors)
    whole = one.span(CONFIG, weights, 20)
    parts = [other.span(CONFIG, weights, steps) for steps in (10, 7, 99)]
    assert one.ended and other.ended and other.age == 20
    assert torch.equal(whole[-1], parts[-1][-1])
    assert [len(part) for part in parts] == [2, 2, 2]
    torch.testing.assert_close(whole[0], parts[0][0])
    torch.testing.assert_close(whole[1], (7 * parts[1][0] + 3 * parts[2][0]) / 10)


def test_the_two_of_a_pair_begin_alike_and_part(data):
    course = start("classifier", 1, PAIRS, 20, False, data_root=data)
    networks = [p.unflatten(0, (2 * PAIRS, -1)) for p in course.parameters]
    assert all(torch.equal(p[0::2], p[1::2]) for p in networks)
    assert not all(torch.equal(p[0], p[2]) for p in networks)
    losses = course.span(CONFIG, weights_from(CONFIG, controllers()), 10)
    assert not torch.allclose(losses[:, 0::2], losses[:, 1::2], rtol=1e-4)


def test_families_are_judged_as_they_say(data):
    """On held-out examples from time to time, and at the end."""
    seed = next(
        seed
        for seed in range(9)
        if draw("few_examples", seed, PAIRS, data_root=data).plan.examples.held_out is not None
    )
    steps = 2 * EVALUATE_EVERY
    course = start("few_examples", seed, PAIRS, steps, False, data_root=data)
    losses = course.span(CONFIG, weights_from(CONFIG, controllers()), steps)
    assert losses.shape == (3, 2 * PAIRS)
    assert losses.isfinite().all() and (losses <= MOST_LOSS).all()


@pytest.mark.parametrize("factor", [torch.nan, torch.inf, 1e30])
def test_a_network_that_is_lost_counts_as_the_most_and_the_others_go_on(factor, data):
    course = start("regression", 0, PAIRS, 2, False, data_root=data)
    weights = weights_from(CONFIG, controllers())
    course.parameters = [p.clone() for p in course.parameters]
    for p in course.parameters:
        p.unflatten(0, (2 * PAIRS, -1))[1] *= factor
    for _ in range(2):
        losses = course.span(CONFIG, weights, 1)
        assert (losses[:, 1] == MOST_LOSS).all()
        assert (losses[:, [0, 2, 3]] < MOST_LOSS).all()


def test_a_score_is_half_the_way_and_half_the_end():
    losses = torch.tensor([[1.0, 0.5], [0.25, 0.0], [0.1, 2.0]])
    expected = [
        ((math.log(a + LEAST_LOSS) + math.log(b + LEAST_LOSS)) / 2 + math.log(c + LEAST_LOSS)) / 2
        for a, b, c in losses.T.tolist()
    ]
    assert score(losses).tolist() == pytest.approx(expected)
