"""MLPs that classify small images, shallow or deep and narrow, sometimes by wrong labels."""

from torch import Tensor

from meta_train.families.base import Batch, Plan
from meta_train.families.criteria import cross_entropy
from meta_train.families.dice import Dice
from meta_train.families.examples import Stream, noisy_labels
from meta_train.families.images import Pictures
from meta_train.families.initial import SCHEMES, gains, initial
from meta_train.families.networks import ACTIVATIONS, MLP, dashed
from meta_train.families.registry import register_family

BATCHES = (8, 16, 32, 64, 128)


@register_family("classifier")
def classifier(dice: Dice, pictures: Pictures) -> Plan:
    """One to three hidden layers, or four to six narrow ones; batches of 8 to 128."""
    deep = dice.chance(0.3)
    if deep:
        hidden = [dice.integer(12, 24)] * dice.integer(4, 6)
    else:
        hidden = [dice.integer(12, 40) for _ in range(dice.integer(1, 3))]
    sizes, activation = [49, *hidden, 10], dice.pick(*ACTIVATIONS)
    norm, batch = dice.chance(0.2), dice.pick(*(BATCHES[:-1] if deep else BATCHES))
    noise: Tensor | None = dice.uniform(low=0.1, high=0.4) if dice.chance(0.3) else None

    def make(dice: Dice) -> Batch:
        x, y = pictures.draw(dice, batch)
        return x.flatten(2), y if noise is None else noisy_labels(dice, y, noise)

    module = MLP(sizes, activation, norm)
    scheme = dice.pick(*SCHEMES)
    # Signals of a deep network die at a gain that is low, and explode at one that is high.
    gain = gains(dice)
    return Plan(
        name=f"classifier {dashed(sizes)} {activation}{', LayerNorm' if norm else ''}, "
        f"{scheme}, batches of {batch}{'' if noise is None else ', noisy labels'}",
        module=module,
        start=initial(module, dice, scheme, gain),
        examples=Stream(dice, make),
        criterion=cross_entropy,
    )
