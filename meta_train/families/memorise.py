"""256 examples that are to be known by heart: the loss falls as far as it is let."""

from meta_train.families.base import Batch, Plan
from meta_train.families.criteria import cross_entropy, squared
from meta_train.families.dice import Dice
from meta_train.families.examples import FixedSet
from meta_train.families.images import Pictures
from meta_train.families.initial import SCHEMES, gains, initial
from meta_train.families.networks import ACTIVATIONS, MLP, dashed
from meta_train.families.registry import register_family

COUNT = 256


@register_family("memorise")
def memorise(dice: Dice, pictures: Pictures) -> Plan:
    """Images with their labels, with random labels or with random numbers."""
    targets = dice.pick("labels", "labels", "random labels", "random numbers")
    sizes = [49, *[dice.integer(20, 40)] * dice.integer(1, 2), 1 if "numbers" in targets else 10]
    activation, scheme = dice.pick(*ACTIVATIONS), dice.pick(*SCHEMES)
    batch = dice.pick(32, 64, 128, 0)
    x, y = pictures.draw(dice, COUNT)
    if targets == "random labels":
        y = dice.integers(10, COUNT)
    elif targets == "random numbers":
        y = dice.normal(COUNT, 1)
    fixed: Batch = x.flatten(2), y
    module = MLP(sizes, activation)
    return Plan(
        name=f"memorise {dashed(sizes)} {activation}, {scheme}, {COUNT} images, {targets}, "
        + (f"batches of {batch}" if batch else "all at once"),
        module=module,
        start=initial(module, dice, scheme, gains(dice)),
        examples=FixedSet(dice, fixed, batch),
        criterion=squared if targets == "random numbers" else cross_entropy,
    )
