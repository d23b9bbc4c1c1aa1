"""Targets of the editing task of Zhou et al. 2023: dilation of the represented digits."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from l2o_graph.datasets.images import Images
from l2o_graph.datasets.inr.files import INRs
from l2o_graph.storage.shards import check_split


def dilated(images: UInt8[Tensor, "I height width"]) -> UInt8[Tensor, "I height width"]:
    """Apply grey dilation by 3 x 3: each pixel becomes the maximum of its neighbourhood.

    Equal to ``cv2.dilate``, which ignores pixels outside of the image.
    """
    return F.max_pool2d(images[:, None].float(), 3, stride=1, padding=1)[:, 0].to(torch.uint8)


def dilation_targets(inrs: INRs, data: Images, split: str) -> Float[Tensor, "I height width"]:
    """Compute the target images of edited networks: digits with thicker strokes.

    Args:
        inrs: I networks.
        data: Their image dataset, with one channel.
        split: "train" or "val", where ``inrs.index`` refers to training images, or "test".

    Returns:
        Images (I, height, width) from 0 to 1, in the order of the networks.

    Raises:
        ValueError: For an unknown split, and networks whose index or label does not match an image
            of the split.

    Source:
        Zhou et al., "Permutation Equivariant Neural Functionals", 2023.
    """
    check_split(split)
    x, y = (data.test_x, data.test_y) if split == "test" else (data.train_x, data.train_y)
    exists = (inrs.index >= 0) & (inrs.index < len(x))
    matches = exists & (y[inrs.index.where(exists, 0)] == inrs.labels)
    if not bool(matches.all()):
        bad = (~matches).nonzero().flatten().tolist()
        raise ValueError(
            f"INRs: expected images and labels of {data.name}, split '{split}', found others in "
            f"{len(bad)} of {len(inrs)} networks, first in network {bad[0]} (image "
            f"{int(inrs.index[bad[0]])}, label {int(inrs.labels[bad[0]])})"
        )
    return dilated(x[inrs.index, 0]).float() / 255
