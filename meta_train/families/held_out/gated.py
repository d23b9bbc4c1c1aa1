"""Gated linear units (Shazeer 2020) in residual layers, on images."""

from torch import Tensor, nn
from torch.nn import functional as F

from meta_train.families.base import Batch, Plan
from meta_train.families.criteria import cross_entropy
from meta_train.families.dice import Dice
from meta_train.families.examples import Stream
from meta_train.families.images import Pictures
from meta_train.families.initial import initial
from meta_train.families.registry import register_family


class Gated(nn.Module):
    """silu(gate) times value, brought back to the stream and added."""

    def __init__(self, width: int, hidden: int, layers: int):
        super().__init__()
        self.embed = nn.Linear(49, width)
        self.gates = nn.ModuleList(nn.Linear(width, hidden) for _ in range(layers))
        self.values = nn.ModuleList(nn.Linear(width, hidden) for _ in range(layers))
        self.back = nn.ModuleList(nn.Linear(hidden, width) for _ in range(layers))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, pixels] -> [B, classes]."""
        x = self.embed(x)
        for gate, value, back in zip(self.gates, self.values, self.back, strict=True):
            x = x + back(F.silu(gate(x)) * value(x))
        return self.head(x)


@register_family("gated", held_out=True)
def gated(dice: Dice, pictures: Pictures) -> Plan:
    """One to three layers, no norm."""
    width, hidden, layers = dice.integer(12, 20), dice.integer(16, 24), dice.integer(1, 3)
    batch = dice.pick(16, 32, 64)

    def make(dice: Dice) -> Batch:
        x, y = pictures.draw(dice, batch)
        return x.flatten(2), y

    module = Gated(width, hidden, layers)
    return Plan(
        name=f"gated, width {width}, {layers} layers of {hidden}, batches of {batch}",
        module=module,
        start=initial(module, dice),
        examples=Stream(dice, make),
        criterion=cross_entropy,
    )
