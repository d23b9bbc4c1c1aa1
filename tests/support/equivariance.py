"""Networks with their hidden neurons in another order, and how far updates are from following."""

import itertools

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from l2o_graph.optim.blocks import blocks_of
from l2o_graph.optim.controller import Controller, Learned
from l2o_graph.optim.memory import arrange, gathered, scattered
from l2o_graph.optim.step import advance
from l2o_graph.paper.rule import UpdateRule
from l2o_graph.paper.step import State, update
from l2o_graph.tracing.by_order import spec_of_module
from support.rules import random_like

IMAGES = [(3, 3), (1, 5)]  # a map that flattens to a square kernel, and one that does not


Orders = list[Tensor]  # for each set of neurons, the order in which to put them


@st.composite
def mlps(draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    """An MLP with one to four hidden layers, and the shape of what it reads."""
    sizes = draw(st.lists(st.integers(2, 5), min_size=3, max_size=6))
    layers: list[nn.Module] = []
    for source, target in itertools.pairwise(sizes):
        layers += [nn.Linear(source, target, bias=draw(st.booleans())), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double(), (sizes[0],)


@st.composite
def cnns(draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    """Two to four convolutions, some with norms, then pooling or flattening and a linear layer."""
    image = draw(st.sampled_from(IMAGES))
    channels = draw(st.lists(st.integers(2, 4), min_size=3, max_size=5))
    layers: list[nn.Module] = []
    for source, target in itertools.pairwise(channels):
        size, follow = draw(st.sampled_from([1, 3, 5])), draw(st.sampled_from(["", "bias", "norm"]))
        layers.append(nn.Conv2d(source, target, size, padding=size // 2, bias=follow == "bias"))
        layers += [nn.BatchNorm2d(target)] if follow == "norm" else []
        layers.append(nn.ReLU())
    pooled = draw(st.booleans())
    layers += [nn.AdaptiveAvgPool2d(1)] if pooled else []
    columns = channels[-1] if pooled else channels[-1] * image[0] * image[1]
    layers += [nn.Flatten(), nn.Linear(columns, 3, bias=draw(st.booleans()))]
    return nn.Sequential(*layers).double(), (channels[0], *image)


@st.composite
def permutations(draw):
    """A network, the shape of what it reads, and an order for each of its sets of neurons."""
    torch.manual_seed(draw(st.integers(0, 10**6)))  # of the weights, and of the data later
    network, shape = draw(mlps() | cnns())
    orders = identity(network)
    for n in range(1, len(orders) - 1):
        orders[n] = torch.tensor(draw(st.permutations(orders[n].tolist())))
    return network, shape, orders


def kernels_of(network: nn.Sequential) -> list[nn.Module]:
    return [layer for layer in network if isinstance(layer, (nn.Linear, nn.Conv2d))]


def identity(network: nn.Sequential) -> Orders:
    kernels = kernels_of(network)
    sizes = [kernels[0].weight.shape[1], *[kernel.weight.shape[0] for kernel in kernels]]
    return [torch.arange(size) for size in sizes]


def permuted(network: nn.Sequential, tensors: list[Tensor], orders: Orders) -> list[Tensor]:
    """Tensors in the shapes of the network's parameters, with its neurons in other orders."""
    queue, answer, at = list(tensors), [], 0
    for layer in network:
        own = [queue.pop(0) for _ in layer.parameters()]
        if layer in kernels_of(network):
            # Each source's columns lie together: one for a kernel, all pixels of a flattened map.
            blocks = own[0].unflatten(1, (len(orders[at]), -1))[:, orders[at]]
            own[0] = blocks.reshape(own[0].shape)
            at += 1
            own[0] = own[0][orders[at]]
            own[1:] = [bias[orders[at]] for bias in own[1:]]
        else:
            own = [vector[orders[at]] for vector in own]
        answer += own
    return answer


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest entry of each tensor."""
    return max(
        ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()
        for a, b in zip(found, expected, strict=True)
    )


Rule = UpdateRule | Controller


def updates(rule: Rule, network, parameters, gradients) -> list[list[Tensor]]:
    """Those of some steps, from given parameters and gradients."""
    spec, answer = spec_of_module(network), []
    state = [State.fresh(p) for p in parameters]
    memory = arrange(spec, blocks_of(spec), 1, like=parameters[0])

    def flat(tensors: list[Tensor]) -> list[Tensor]:
        return gathered(memory, [t.reshape(1, -1) for t in tensors])

    with torch.no_grad():
        for each in gradients:
            if isinstance(rule, Controller):
                learned = Learned.of(rule.config, rule.weights())
                steps, _ = advance(learned, memory, flat(each), flat(parameters))
                found = scattered(memory, steps)
                deltas = [found[i].view(p.shape).clone() for i, p in enumerate(parameters)]
            else:
                deltas, state = update(rule, spec, parameters, each, state)
            parameters = [p + d for p, d in zip(parameters, deltas, strict=True)]
            answer.append(deltas)
    return answer


def error_of_updates(rule: Rule, network: nn.Sequential, orders: Orders, steps: int = 4) -> float:
    """How far the updates of the permuted network are from the permuted updates.

    In four steps a controller also makes one with roots that it has kept, the third.
    """
    parameters = [p.detach() for p in network.parameters()]
    gradients = [random_like(parameters, seed) for seed in range(steps)]
    for each in gradients:
        each[0][0, 0] = 0  # a parameter without a gradient
    moved = [permuted(network, tensors, orders) for tensors in (parameters, *gradients)]
    found = updates(rule, network, moved[0], moved[1:])
    expected = updates(rule, network, parameters, gradients)
    return max(apart(a, permuted(network, b, orders)) for a, b in zip(found, expected, strict=True))


def flattening() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 3)
    ).double()
