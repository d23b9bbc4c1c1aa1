"""A U-Net of two levels that takes noise away (Ronneberger et al. 2015)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meta_train.families.base import Batch, Plan
from meta_train.families.criteria import squared
from meta_train.families.dice import Dice
from meta_train.families.examples import Stream
from meta_train.families.images import Pictures
from meta_train.families.initial import initial
from meta_train.families.registry import register_family

SIZE = 14


class UNet(nn.Module):
    """Down, on, up by repeating pixels, and out of both levels."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.on = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.out = nn.Conv2d(3 * channels, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, size, size] -> the same."""
        fine = F.relu(self.first(x))
        coarse = F.relu(self.on(F.relu(self.down(fine))))
        up = F.interpolate(coarse, scale_factor=2, mode="nearest")
        return self.out(torch.cat([fine, up], 1))


@register_family("unet", held_out=True)
def unet(dice: Dice, pictures: Pictures) -> Plan:
    """Images of 14 x 14 pixels under noise as strong as they are."""
    channels, batch, noise = dice.integer(2, 4), 2, dice.number(0.5, 1.0)

    def make(dice: Dice) -> Batch:
        x = pictures.draw(dice, batch, SIZE)[0][:, :, None]
        return x + noise * dice.normal(*x.shape[1:]), x

    module = UNet(channels)
    return Plan(
        name=f"unet of {SIZE} x {SIZE}, {channels} channels, batches of {batch}",
        module=module,
        start=initial(module, dice),
        examples=Stream(dice, make),
        criterion=squared,
    )
