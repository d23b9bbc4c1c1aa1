"""Figures of labelled rows of images."""

import io
from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor


def contact_sheet(
    rows: Mapping[str, Float[Tensor, "n *C height width"]], captions: Sequence[str] = ()
) -> bytes:
    """Plot rows of images.

    Args:
        rows: Label and images of each row, (n, height, width) or (n, 3, height, width), clipped to
            the range from 0 to 1.
        captions: Captions below the columns.

    Returns:
        PNG file.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    columns = max(map(len, rows.values()))
    size = (1.0 + 0.08 * max(map(len, rows)) + 0.9 * columns, 0.5 + 0.9 * len(rows))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, images, strict=True):
            channels_last = image if image.dim() == 2 else image.movedim(0, -1)
            axis.imshow(channels_last.clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")
    for axis, caption in zip(axes[-1], captions, strict=False):
        axis.set_xlabel(caption, fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
