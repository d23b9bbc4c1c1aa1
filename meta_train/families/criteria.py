"""(answer of one network, what it is to be) -> loss, a mean."""

from torch import Tensor
from torch.nn import functional as F


def cross_entropy(answer: Tensor, y: Tensor) -> Tensor:
    """Of classes, in nats."""
    return F.cross_entropy(answer, y)


def next_tokens(answer: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of tokens, at as many of the last positions as there are targets."""
    asked = answer[:, answer.shape[1] - y.shape[1] :]
    return F.cross_entropy(asked.flatten(0, 1), y.flatten())


def squared(answer: Tensor, y: Tensor) -> Tensor:
    """Mean squared error."""
    return (answer - y).square().mean()


def pixels(answer: Tensor, y: Tensor) -> Tensor:
    """Binary cross-entropy of pixels in [0, 1]."""
    return F.binary_cross_entropy_with_logits(answer, y)
