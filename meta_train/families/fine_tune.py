"""Fine-tuning of trained networks: with a new head, or on changed images."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meta_train.families.base import Plan, losses
from meta_train.families.cnn import ConvNet
from meta_train.families.dice import Dice
from meta_train.families.examples import Batch, Examples, FixedSet, Stream
from meta_train.families.images import Pictures
from meta_train.families.networks import ACTIVATIONS, MLP, initial
from meta_train.families.registry import register_family

NUM_HELD_OUT = 256  # number of held-out examples; half as many for CNNs, which take longer
RATE = 5e-3  # learning rate of Adam for the training before


Change = Callable[[Dice, Tensor], Tensor]


def same(_: Dice, x: Tensor) -> Tensor:
    """Return images unchanged."""
    return x


CHANGES: tuple[Change, ...] = (
    lambda dice, x: x + dice.normal(*x.shape[1:]),  # noise as strong as the images
    lambda dice, x: x.transpose(-1, -2).flip(-1),  # rotated by 90 degrees
    lambda dice, x: 0.2 * x + 1,  # a fifth of the contrast, brighter
    lambda dice, x: x.roll((2, 2), (-1, -2)),  # shifted by two pixels, cyclically
    lambda dice, x: -x,  # inverted
)


@register_family("fine_tune")
def fine_tune(dice: Dice, pictures: Pictures) -> Plan:
    """MLPs or CNNs after 100 to 300 steps of Adam; 200 to 500 examples, or always new ones."""
    convolutional, batch = dice.chance(0.3), dice.pick(16, 32)
    before, activation = dice.integer(100, 300), dice.pick(*ACTIVATIONS)
    if convolutional:
        channels = [2 * dice.integer(2, 4) for _ in range(2)]
        norm = dice.pick("", "group")
        module: nn.Module = ConvNet(7, channels, [2, 1], norm=norm, activation=activation)
        before, batch, head = before // 2, 16, "head"
    else:
        hidden = [dice.integer(16, 32) for _ in range(dice.integer(1, 3))]
        module, head = MLP([49, *hidden, 10], activation), f"linear.{len(hidden)}"

    def shaped(x: Tensor) -> Tensor:
        return x[:, :, None] if convolutional else x.flatten(2)

    def make(dice: Dice, count: int, seen: bool | None, change: Change) -> Batch:
        x, y = pictures.draw(dice, count, seen=seen)
        return shaped(change(dice, x)), y

    new_head = dice.chance(0.4)

    def earlier(dice: Dice) -> Batch:
        x, y = make(dice, batch, True, same)
        return x, (y // 2 if new_head else y)  # five coarse classes before a new head

    # Every process trains all pairs: rounding would depend on the number of pairs.
    everyone = dice.of_all("before")
    first = Plan(module, initial(module, everyone), Stream(everyone, earlier), F.cross_entropy)
    start = {name: p[dice.mine] for name, p in trained(first, before).items()}
    if new_head:
        start |= {n: p for n, p in initial(module, dice).items() if n.startswith(f"{head}.")}
        change = same
    else:
        change = dice.pick(*CHANGES)

    count = dice.integer(200, 500) if dice.chance(0.6) else 0
    if count:
        fixed = make(dice.other("examples"), count, True, change)
        held_out = make(dice.other("judges"), NUM_HELD_OUT // (1 + convolutional), False, change)
        examples: Examples = FixedSet(dice, fixed, batch, held_out)
    else:
        examples = Stream(dice, lambda dice: make(dice, batch, True, change))
    return Plan(module, start, examples, F.cross_entropy)


def trained(plan: Plan, steps: int) -> dict[str, Tensor]:
    """Train all instances for some steps of Adam; return their parameters."""
    names = [name for name, _ in plan.module.named_parameters()]
    parameters = [plan.start[name].clone().requires_grad_() for name in names]
    optimizer = torch.optim.Adam(parameters, RATE)
    with torch.enable_grad():
        for step in range(steps):
            loss = losses(plan, parameters, plan.examples.batch(step)).sum()
            gradients = torch.autograd.grad(loss, parameters)
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            optimizer.step()
    return {name: p.detach() for name, p in zip(names, parameters, strict=True)}
