"""MLP-mixer (Tolstikhin et al. 2021): MLPs across the rows of an image, and across channels."""

from torch import Tensor, nn

from meta_train.families.base import Batch, Plan
from meta_train.families.criteria import cross_entropy
from meta_train.families.dice import Dice
from meta_train.families.examples import Stream
from meta_train.families.images import Pictures
from meta_train.families.initial import initial
from meta_train.families.networks import MLP
from meta_train.families.registry import register_family

ROWS = 7


class Mixer(nn.Module):
    """Layers of two MLPs, each behind a LayerNorm and added to the stream."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.embed = nn.Linear(7, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        self.rows = nn.ModuleList(MLP([ROWS, 12, ROWS], "gelu") for _ in range(layers))
        self.channels = nn.ModuleList(MLP([width, 24, width], "gelu") for _ in range(layers))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, rows, pixels] -> [B, classes]."""
        x = self.embed(x)
        for i, (rows, channels) in enumerate(zip(self.rows, self.channels, strict=True)):
            x = x + rows(self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + channels(self.norms[2 * i + 1](x))
        return self.head(self.norms[-1](x).mean(1))


@register_family("mixer", held_out=True)
def mixer(dice: Dice, pictures: Pictures) -> Plan:
    """One or two layers on rows of 7 x 7 pixels."""
    width, layers, batch = dice.integer(8, 16), dice.integer(1, 2), dice.pick(8, 12)

    def make(dice: Dice) -> Batch:
        return pictures.draw(dice, batch)

    module = Mixer(width, layers)
    return Plan(
        name=f"mixer of width {width}, {layers} layers, batches of {batch}",
        module=module,
        start=initial(module, dice),
        examples=Stream(dice, make),
        criterion=cross_entropy,
    )
