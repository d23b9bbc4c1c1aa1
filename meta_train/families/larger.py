"""Networks that are far from done after a thousand steps: wider, on larger images and batches.

Small networks on small batches are soon as good as they get, and ask for short steps early. These
ask for the opposite. They cost as much as the others do with an eighth of the instances.
"""

from torch import Tensor, nn

from meta_train.families.base import Batch, Plan
from meta_train.families.cnn import NORMS, ConvNet
from meta_train.families.criteria import cross_entropy, squared
from meta_train.families.dice import Dice
from meta_train.families.examples import Stream
from meta_train.families.images import Pictures
from meta_train.families.initial import SCHEMES, gains, initial
from meta_train.families.networks import ACTIVATIONS, MLP, dashed
from meta_train.families.registry import register_family

SIZE = 14
SHARE = 0.125


@register_family("wide", share=SHARE)
def wide(dice: Dice, pictures: Pictures) -> Plan:
    """MLPs of 196 inputs and up to 72 neurons a layer, which classify or reproduce images."""
    reproduces = dice.chance(0.3)
    hidden = [dice.integer(32, 72) for _ in range(dice.integer(2, 3))]
    if reproduces:
        hidden[len(hidden) // 2] = dice.integer(8, 24)
    sizes = [SIZE * SIZE, *hidden, SIZE * SIZE if reproduces else 10]
    activation, norm = dice.pick(*ACTIVATIONS), dice.chance(0.2)
    batch, scheme = dice.pick(64, 128), dice.pick(*SCHEMES)

    def make(dice: Dice) -> Batch:
        x, y = pictures.draw(dice, batch, SIZE)
        flat: Tensor = x.flatten(2)
        return flat, flat if reproduces else y

    module = MLP(sizes, activation, norm)
    return Plan(
        name=f"wide {dashed(sizes)} {activation}, {scheme}, batches of {batch}",
        module=module,
        start=initial(module, dice, scheme, gains(dice)),
        examples=Stream(dice, make),
        criterion=squared if reproduces else cross_entropy,
    )


@register_family("image_cnn", share=SHARE)
def image_cnn(dice: Dice, pictures: Pictures) -> Plan:
    """Three convolutions of 8 to 20 channels on 14 x 14 pixels, pooled at the end."""
    width = 2 * dice.integer(4, 5)
    channels = [width, 2 * width, 2 * width]
    norm = dice.pick(*NORMS) if dice.chance(0.4) else ""
    activation, scheme = dice.pick(*ACTIVATIONS), dice.pick(*SCHEMES)
    batch, strides = dice.pick(32, 64), dice.pick([2, 1, 1], [2, 2, 1])

    def make(dice: Dice) -> Batch:
        x, y = pictures.draw(dice, batch, SIZE)
        return x[:, :, None], y

    module: nn.Module = ConvNet(SIZE, channels, strides, norm=norm, activation=activation)
    return Plan(
        name=f"image_cnn, channels {dashed(channels)} {activation}, {norm or 'no'} norm, "
        f"{scheme}, batches of {batch}",
        module=module,
        start=initial(module, dice, scheme, gains(dice, 0.7, 1.4)),
        examples=Stream(dice, make),
        criterion=cross_entropy,
    )
