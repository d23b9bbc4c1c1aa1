"""MLPs: that classify or reproduce images, and that learn functions."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from meta_train.families.base import Batch, Examples, Plan
from meta_train.families.criteria import squared
from meta_train.families.dice import Dice
from meta_train.families.examples import FixedSet, Stream, noisy_labels
from meta_train.families.images import Pictures
from meta_train.families.initial import SCHEMES, gains, initial
from meta_train.families.networks import ACTIVATIONS, MLP, dashed
from meta_train.families.registry import register_family
from meta_train.families.teachers import TEACHERS

BATCHES = (8, 16, 32, 64, 128)
JUDGES = 256  # examples to be judged by


@register_family("classifier")
def classifier(dice: Dice, pictures: Pictures) -> Plan:
    """One to three hidden layers, or four to six narrow ones; sometimes some wrong labels."""
    deep = dice.chance(0.3)
    if deep:
        hidden = [dice.integer(12, 24)] * dice.integer(4, 6)
    else:
        hidden = [dice.integer(12, 40) for _ in range(dice.integer(1, 3))]
    sizes, activation = [49, *hidden, 10], dice.pick(*ACTIVATIONS)
    norm, batch = dice.chance(0.2), dice.pick(*(BATCHES[:-1] if deep else BATCHES))
    noise: Tensor | None = dice.uniform(low=0.1, high=0.4) if dice.chance(0.3) else None
    module, scheme = MLP(sizes, activation, norm), dice.pick(*SCHEMES)
    # Signals of a deep network die at a gain that is low, and explode at one that is high.
    start = initial(module, dice, scheme, gains(dice))
    name = (
        f"classifier {dashed(sizes)} {activation}{', LayerNorm' if norm else ''}, "
        f"{scheme}, batches of {batch}{'' if noise is None else ', noisy labels'}"
    )
    examples = Stream(dice, pictures.batches(batch, noise=noise))
    return Plan(name, module, start, examples, F.cross_entropy)


@register_family("autoencoder")
def autoencoder(dice: Dice, pictures: Pictures) -> Plan:
    """Squared error of standardised pixels or cross-entropy of pixels; sometimes denoising."""
    wide, code = dice.integer(16, 32), dice.integer(4, 12)
    sizes = [49, wide, code, wide, 49] if dice.chance(0.7) else [49, code, 49]
    activation, batch = dice.pick(*ACTIVATIONS), dice.pick(16, 32, 64, 128)
    raw, scheme = dice.chance(0.5), dice.pick(*SCHEMES)
    noise = dice.number(0.1, 0.5) if dice.chance(0.3) else 0.0

    def make(dice: Dice) -> Batch:
        x, _ = pictures.draw(dice, batch, raw=raw)
        x = x.flatten(2)
        return (x + noise * dice.normal(*x.shape[1:]) if noise else x), x

    module = MLP(sizes, activation)
    start = initial(module, dice, scheme, gains(dice))
    name = (
        f"autoencoder {dashed(sizes)} {activation}, {scheme}, "
        f"{'cross-entropy' if raw else 'squared error'}{', denoising' if noise else ''}, "
        f"batches of {batch}"
    )
    criterion = F.binary_cross_entropy_with_logits if raw else squared
    return Plan(name, module, start, Stream(dice, make), criterion)


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
    """Functions with noise, in whatever units; new examples at every step, or some and judges."""
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
    start = initial(module, dice, scheme, gains(dice))
    name = (
        f"regression {dashed(sizes)} {activation}, {scheme}, {said}, batches of {batch}"
        f"{f' of {count}' if count else ''}"
    )
    return Plan(name, module, start, examples, squared)


@register_family("few_examples")
def few_examples(dice: Dice, pictures: Pictures) -> Plan:
    """100 to 400 images or noisy numbers, and judges: who minimises the loss too well, loses."""
    count, batch = dice.integer(100, 400), dice.pick(16, 32, 64, 0)
    hidden = [dice.integer(16, 48) for _ in range(dice.integer(1, 2))]
    activation, scheme = dice.pick(*ACTIVATIONS), dice.pick(*SCHEMES)
    if dice.chance(0.5):
        sizes, criterion = [49, *hidden, 10], F.cross_entropy
        x, y = pictures.draw(dice.other("examples"), count, seen=True)
        judges_x, judges_y = pictures.draw(dice.other("judges"), JUDGES, seen=False)
        said = "images"
        if dice.chance(0.4):
            y, said = noisy_labels(dice, y, dice.uniform(low=0.1, high=0.4)), "images, noisy labels"
        fixed, judges = (x.flatten(2), y), (judges_x.flatten(2), judges_y)
    else:
        inputs, criterion = dice.integer(4, 16), squared
        sizes = [inputs, *hidden, 1]
        make, said = examples_of(dice, inputs, dice.chance(0.5), (0.1, 0.3, 1.0))
        # Noise in what one is judged by would only hide differences.
        judges = make(dice.other("judges"), JUDGES, True)
        fixed = make(dice.other("examples"), count)
    module = MLP(sizes, activation)
    start = initial(module, dice, scheme, gains(dice))
    name = f"few_examples {dashed(sizes)} {activation}, {scheme}, {count} {said}, " + (
        f"batches of {batch}" if batch else "all at once"
    )
    return Plan(name, module, start, FixedSet(dice, fixed, batch, judges), criterion)
