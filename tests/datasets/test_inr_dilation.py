"""The targets of the dilation task: the right images in the right order, dilated."""

import pytest
import torch
from support.sirens import networks

from l2o_graph.datasets.images import load_images
from l2o_graph.datasets.inr.dilation import dilated, dilation_targets
from l2o_graph.datasets.inr.files import INRs

SAMPLE = load_images("fmnist_sample")


def inrs_of(index, labels):
    index = torch.tensor(index)
    weights, biases = networks(len(index))
    view = torch.zeros_like(index)
    return INRs(tuple(weights), tuple(biases), labels[index], index, view, psnr=None, omega0=30.0)


def slow(image):
    """The largest of the pixels next to each, and itself, that there are."""
    height, width = len(image), len(image[0])
    return [
        [
            max(
                image[y][x]
                for y in range(max(row - 1, 0), min(row + 2, height))
                for x in range(max(column - 1, 0), min(column + 2, width))
            )
            for column in range(width)
        ]
        for row in range(height)
    ]


def test_dilation_equals_the_loop_over_pixels():
    random = torch.randint(256, (2, 5, 8), dtype=torch.uint8)
    corner = torch.zeros(1, 5, 8, dtype=torch.uint8)
    corner[0, 0, 7] = 255
    images = torch.cat([random, corner])
    found = dilated(images)
    assert found.dtype == torch.uint8
    assert found.tolist() == [slow(image) for image in images.tolist()]
    assert found[2].sum() == 4 * 255  # a dot in a corner has three neighbours


def test_dilation_equals_that_of_scipy():
    ndimage = pytest.importorskip("scipy.ndimage")
    images = SAMPLE.train_x[:20, 0]
    for image, found in zip(images, dilated(images), strict=True):
        expected = ndimage.grey_dilation(image.numpy(), size=(3, 3), mode="constant", cval=0)
        assert (found.numpy() == expected).all()


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_targets_are_the_dilated_images_of_the_networks_in_order(split):
    index = {"train": [3, 0, 3, 5_499], "val": [5_500, 5_999], "test": [2, 0, 999]}[split]
    x, y = (SAMPLE.test_x, SAMPLE.test_y) if split == "test" else (SAMPLE.train_x, SAMPLE.train_y)
    inrs = inrs_of(index, y)
    targets = dilation_targets(inrs, SAMPLE, split)
    assert targets.dtype == torch.float32
    for target, i in zip(targets, index, strict=True):
        expected = torch.tensor(slow(x[i, 0].tolist())) / 255
        torch.testing.assert_close(target, expected)


def test_networks_of_other_images_are_refused_by_number():
    inrs = inrs_of([0, 1, 2, 3], SAMPLE.train_y)
    with pytest.raises(ValueError, match=r"split 'test', found others in \d of 4 networks, first"):
        dilation_targets(inrs, SAMPLE, "test")
    inrs.index[2] = 6_000
    with pytest.raises(ValueError, match=r"in 1 of 4 networks, first in network 2 \(image 6000"):
        dilation_targets(inrs, SAMPLE, "train")
    with pytest.raises(ValueError, match="unknown split 'dev', expected one of"):
        dilation_targets(inrs, SAMPLE, "dev")
