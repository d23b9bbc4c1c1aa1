"""The editing task of Zhou et al. 2023: networks that draw a digit with thicker strokes."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from l2o_graph.datasets.images import Images
from l2o_graph.datasets.inr.files import INRs
from l2o_graph.storage.shards import check_split


def dilated(images: UInt8[Tensor, "I height width"]) -> UInt8[Tensor, "I height width"]:
    """The largest of each pixel and its eight neighbours: grey dilation by 3 x 3, once.

    As ``cv2.dilate`` does it: what lies outside of an image counts for nothing.
    """
    return F.max_pool2d(images[:, None].float(), 3, stride=1, padding=1)[:, 0].to(torch.uint8)


def dilation_targets(inrs: INRs, data: Images, split: str) -> Float[Tensor, "I height width"]:
    """Make the images that edited networks should draw: digits with thicker strokes.

    Args:
        inrs: The networks, I of them.
        data: Their dataset, of one channel.
        split: "train" and "val", which number the training images, or "test".

    Returns:
        Images (I, height, width) from 0 to 1, in the order of the networks.

    Raises:
        ValueError: For a split that is not known, and networks whose number or label is not that
            of an image of the split.

    Source:
        Zhou et al., "Permutation Equivariant Neural Functionals", 2023.
    """
    check_split(split)
    x, y = (data.test_x, data.test_y) if split == "test" else (data.train_x, data.train_y)
    there = (inrs.index >= 0) & (inrs.index < len(x))
    fits = there & (y[inrs.index.where(there, 0)] == inrs.labels)
    if not bool(fits.all()):
        bad = (~fits).nonzero().flatten().tolist()
        raise ValueError(
            f"INRs: expected images and labels of {data.name}, split '{split}', found others in "
            f"{len(bad)} of {len(inrs)} networks, the first of them {bad[0]} (image "
            f"{int(inrs.index[bad[0]])}, label {int(inrs.labels[bad[0]])})"
        )
    return dilated(x[inrs.index, 0]).float() / 255
