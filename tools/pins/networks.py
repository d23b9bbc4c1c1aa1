"""Small networks with a batch each, and what is understood of their structure."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .find import Made


class _Attention(nn.Module):
    """A transformer layer between an embedding and the same embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the tokens at each position."""
        return self.layer(self.embed(x)) @ self.embed.weight.T


class _Recurrent(nn.Module):
    """A GRU and a linear layer."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """What is said behind the last step."""
        return self.out(self.rnn(x)[0][:, -1])


def mlp() -> tuple[nn.Module, Tensor]:
    """Linear layers and a norm, and a batch."""
    layers = nn.Linear(6, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 7), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(7, 3)), torch.randn(8, 6)


def cnn() -> tuple[nn.Module, Tensor]:
    """Convolutions, a norm, a flattening, and a batch."""
    first = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2)
    second = nn.Conv2d(4, 6, 3), nn.SiLU(), nn.Flatten(), nn.Linear(24, 3)
    return nn.Sequential(*first, *second), torch.randn(4, 2, 8, 8)


def attention() -> tuple[nn.Module, Tensor]:
    """The transformer layer and tokens."""
    return _Attention(), torch.randint(11, (3, 5))


def recurrent() -> tuple[nn.Module, Tensor]:
    """The GRU and sequences."""
    return _Recurrent(), torch.randn(4, 5, 4)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": mlp, "cnn": cnn, "attention": attention, "recurrent": recurrent,
}  # fmt: skip


def structure_pins() -> Made:
    """What is understood of networks, and their exchange with torch-geometric."""
    for network in NETWORKS:
        yield f"{network}", lambda n=network: _structure(n)


def _structure(network: str) -> list[Any]:
    from l2o_graph import neural_graph

    model, batch = NETWORKS[network]()
    followed = neural_graph(model, batch)
    guessed = neural_graph(model.named_parameters())
    data = followed.to_data()
    tensors = [data.x, data.edge_index, data.edge_attr, data.activation, data.loose]
    again = type(followed).from_data(data)
    told = [repr(g.spec) + str(g.spec) for g in (followed, guessed, again)]
    return [told, followed.values, tensors, again.values]
