"""(answer of one network, what it is to be) -> loss, a mean; beside those of torch itself."""

from torch import Tensor
from torch.nn import functional as F


def next_tokens(answer: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of tokens, at as many of the last positions as there are targets."""
    asked = answer[:, answer.shape[1] - y.shape[1] :]
    return F.cross_entropy(asked.flatten(0, 1), y.flatten())


def squared(answer: Tensor, y: Tensor) -> Tensor:
    """Mean squared error."""
    return (answer - y).square().mean()
