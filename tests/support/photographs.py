"""Random images in colour, in place of those of CIFAR-10."""

import torch

from l2o_graph.datasets.images import Images


def photographs() -> Images:
    """48 and 20 images of four classes, class by class as out of folders."""
    dice = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (68, 3, 8, 8), generator=dice, dtype=torch.uint8)
    train_y, test_y = torch.arange(4).repeat_interleave(12), torch.arange(4).repeat_interleave(5)
    return Images("photographs", x[:48], train_y, x[48:], test_y, (0.5,) * 3, (0.5,) * 3)
