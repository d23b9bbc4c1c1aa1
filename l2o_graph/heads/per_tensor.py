"""Features of a tensor -> one number for it: how long its step should be."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.features import NUM_TENSOR


class PerTensorHead(nn.Linear):
    """Logarithm of how much longer than nominal the steps of a tensor are, within (-2, 2).

    What length pays shows only at the end of a training run, and few numbers can be learned
    from so few outcomes: hence a linear map of ten features, shared by all tensors. It starts
    at zero.
    """

    MOST = 2.0

    def __init__(self):
        super().__init__(NUM_TENSOR, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Float[Tensor, "N T"]) -> Float[Tensor, " N"]:
        """The logarithm for each of N tensors."""
        return self.MOST * torch.tanh(super().forward(input)[:, 0] / self.MOST)
