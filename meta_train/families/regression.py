"""MLPs that learn functions with noise, targets and inputs in whatever units they are in."""

from collections.abc import Callable

from meta_train.families.base import Batch, Examples, Plan
from meta_train.families.criteria import squared
from meta_train.families.dice import Dice
from meta_train.families.examples import FixedSet, Stream
from meta_train.families.images import Pictures
from meta_train.families.initial import SCHEMES, gains, initial
from meta_train.families.networks import ACTIVATIONS, MLP, dashed
from meta_train.families.registry import register_family
from meta_train.families.teachers import TEACHERS

JUDGES = 256  # examples to be judged by, without noise


def examples_of(
    dice: Dice, inputs: int, raw: bool, noises: tuple[float, ...]
) -> tuple[Callable[..., Batch], str]:
    """A function for each pair, as what draws examples of it.

    Args:
        dice: To draw the functions with.
        inputs: Number of inputs of a function.
        raw: Whether inputs and targets are in units of their own, targets often far from zero.
        noises: Of which one is the standard deviation of the noise, in that of the targets.

    Returns:
        (dice, count, clean) -> [P, count, inputs] and [P, count, 1]; and the teacher's name.
    """
    kind, noise = dice.pick(*TEACHERS), dice.pick(*noises)
    teacher = TEACHERS[kind](dice, inputs)
    columns = dice.log_uniform(0.1, 10.0, 1, inputs) if raw and dice.chance(0.7) else 1.0
    scale = dice.log_uniform(0.01, 100.0, 1, 1) if raw else 1.0
    offset = dice.normal(1, 1) * dice.pick(0.0, 0.0, 3.0) if raw else 0.0

    def make(dice: Dice, count: int, clean: bool = False) -> Batch:
        x = dice.normal(count, inputs)
        y = teacher(x) + offset
        if noise and not clean:
            y = y + noise * dice.normal(count, 1)
        return x * columns, y * scale

    return make, f"{kind}{', raw units' if raw else ''}, noise {noise:g}"


@register_family("regression")
def regression(dice: Dice, pictures: Pictures) -> Plan:
    """One to three hidden layers; new examples at every step, or a set of them and judges."""
    inputs = dice.integer(2, 16)
    make, said = examples_of(dice, inputs, dice.chance(0.8), (0.0, 0.1, 0.3, 1.0))
    sizes = [inputs, *(dice.integer(16, 40) for _ in range(dice.integer(1, 3))), 1]
    activation, batch = dice.pick(*ACTIVATIONS), dice.pick(16, 32, 64, 128, 256)
    scheme, count = dice.pick(*SCHEMES), dice.pick(0, 256, 512 if batch < 128 else 256)
    module = MLP(sizes, activation)
    if count:
        fixed = make(dice.other("examples"), count)
        judges = make(dice.other("judges"), JUDGES, True)
        examples: Examples = FixedSet(dice, fixed, batch, judges)
    else:
        examples = Stream(dice, lambda dice: make(dice, batch))
    return Plan(
        name=f"regression {dashed(sizes)} {activation}, {scheme}, {said}, batches of {batch}"
        + (f" of {count}" if count else ""),
        module=module,
        start=initial(module, dice, scheme, gains(dice)),
        examples=examples,
        criterion=squared,
    )
