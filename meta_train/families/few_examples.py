"""A few hundred examples, and others to be judged by: who minimises the loss too well, loses."""

from meta_train.families.base import Batch, Examples, Plan
from meta_train.families.criteria import cross_entropy, squared
from meta_train.families.dice import Dice
from meta_train.families.examples import FixedSet, noisy_labels
from meta_train.families.images import Pictures
from meta_train.families.initial import SCHEMES, gains, initial
from meta_train.families.networks import ACTIVATIONS, MLP, dashed
from meta_train.families.registry import register_family
from meta_train.families.regression import JUDGES, examples_of


@register_family("few_examples")
def few_examples(dice: Dice, pictures: Pictures) -> Plan:
    """100 to 400 images or numbers with noise, in batches of 16 to 64 or all at once."""
    count, batch = dice.integer(100, 400), dice.pick(16, 32, 64, 0)
    hidden = [dice.integer(16, 48) for _ in range(dice.integer(1, 2))]
    activation, scheme = dice.pick(*ACTIVATIONS), dice.pick(*SCHEMES)
    if dice.chance(0.5):
        sizes, criterion = [49, *hidden, 10], cross_entropy
        examples, said = _images(dice, pictures, count, batch)
    else:
        inputs, criterion = dice.integer(4, 16), squared
        sizes = [inputs, *hidden, 1]
        make, said = examples_of(dice, inputs, dice.chance(0.5), (0.1, 0.3, 1.0))
        # Noise in what one is judged by would only hide differences.
        judges = make(dice.other("judges"), JUDGES, True)
        examples = FixedSet(dice, make(dice.other("examples"), count), batch, judges)
    module = MLP(sizes, activation)
    return Plan(
        name=f"few_examples {dashed(sizes)} {activation}, {scheme}, {count} {said}, "
        + (f"batches of {batch}" if batch else "all at once"),
        module=module,
        start=initial(module, dice, scheme, gains(dice)),
        examples=examples,
        criterion=criterion,
    )


def _images(dice: Dice, pictures: Pictures, count: int, batch: int) -> tuple[Examples, str]:
    """Images to learn from, of which some have wrong labels, and others with right ones."""
    x, y = pictures.draw(dice.other("examples"), count, seen=True)
    judges_x, judges_y = pictures.draw(dice.other("judges"), JUDGES, seen=False)
    noisy = dice.chance(0.4)
    if noisy:
        y = noisy_labels(dice, y, dice.uniform(low=0.1, high=0.4))
    judges: Batch = judges_x.flatten(2), judges_y
    said = "images, noisy labels" if noisy else "images"
    return FixedSet(dice, (x.flatten(2), y), batch, judges), said
