"""A variational autoencoder (Kingma and Welling 2014): noise on the code, and a price for it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meta_train.families.base import Batch, Plan
from meta_train.families.dice import Dice
from meta_train.families.examples import Stream
from meta_train.families.images import Pictures
from meta_train.families.initial import initial
from meta_train.families.networks import ACTIVATIONS, MLP
from meta_train.families.registry import register_family


class Variational(nn.Module):
    """Pixels and noise go in; logits of pixels, means and log variances come out."""

    def __init__(self, hidden: int, code: int, activation: str):
        super().__init__()
        self.encoder = MLP([49, hidden, 2 * code], activation)
        self.decoder = MLP([code, hidden, 49], activation)

    def forward(self, x: Tensor) -> Tensor:
        """[B, pixels + code] -> [B, pixels + 2 code]."""
        pixels, noise = x[:, :49], x[:, 49:]
        code = self.encoder(pixels)
        mean, log_variance = code.chunk(2, -1)
        return torch.cat([self.decoder(mean + noise * (0.5 * log_variance).exp()), code], -1)


def bound(answer: Tensor, y: Tensor) -> Tensor:
    """Minus the evidence's lower bound, in nats a pixel."""
    mean, log_variance = answer[:, 49:].chunk(2, -1)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1).mean()
    return F.binary_cross_entropy_with_logits(answer[:, :49], y) + divergence / 49


@register_family("variational", held_out=True)
def variational(dice: Dice, pictures: Pictures) -> Plan:
    """Codes of two to six numbers."""
    hidden, code, batch = dice.integer(16, 28), dice.integer(2, 6), dice.pick(16, 32, 64)
    activation = dice.pick(*ACTIVATIONS)

    def make(dice: Dice) -> Batch:
        x = pictures.draw(dice, batch, raw=True)[0].flatten(2)
        return torch.cat([x, dice.normal(batch, code)], -1), x

    module = Variational(hidden, code, activation)
    return Plan(
        name=f"variational 49-{hidden}-{code}-{hidden}-49 {activation}, batches of {batch}",
        module=module,
        start=initial(module, dice),
        examples=Stream(dice, make),
        criterion=bound,
    )
