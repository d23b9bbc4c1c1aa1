"""MLPs that pass images through a few neurons."""

from meta_train.families.base import Batch, Plan
from meta_train.families.criteria import pixels, squared
from meta_train.families.dice import Dice
from meta_train.families.examples import Stream
from meta_train.families.images import Pictures
from meta_train.families.initial import SCHEMES, gains, initial
from meta_train.families.networks import ACTIVATIONS, MLP, dashed
from meta_train.families.registry import register_family


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
    return Plan(
        name=f"autoencoder {dashed(sizes)} {activation}, {scheme}, "
        f"{'cross-entropy' if raw else 'squared error'}{', denoising' if noise else ''}, "
        f"batches of {batch}",
        module=module,
        start=initial(module, dice, scheme, gains(dice)),
        examples=Stream(dice, make),
        criterion=pixels if raw else squared,
    )
