"""Compute one color matrix per image that changes brightness, contrast, saturation and hue.

Main entry: `color_matrices(brightness, contrast, saturation, hue)` takes four NumPy float arrays
(N,), one value for each image.

- `brightness`, `contrast`, `saturation`: factors; 1 changes nothing.
- `hue`: share of the full color circle by which the hue turns; 0 changes nothing.

It returns float32 (N, 12): for each image a 3 x 4 matrix, row by row. The rows give the new red,
green and blue. A row has the factors of the old red, green and blue, and an offset that is added,
for RGB values of 0 to 255.

`IDENTITY` is the matrix that changes nothing, `GRAY` the one that makes an image gray; both are
tuples of 12 numbers in this order.
"""

import numpy as np

IDENTITY = (1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
"""Color matrix that changes nothing: three rows of (red, green, blue, offset)."""

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in gray (ITU-R BT.601), as in JPEG and in Pillow's mode "L"."""

GRAY = (*LUMA, 0.0, *LUMA, 0.0, *LUMA, 0.0)

TO_YIQ = np.array([LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)])
FROM_YIQ = np.linalg.inv(TO_YIQ)


def color_matrices(
    brightness: np.ndarray, contrast: np.ndarray, saturation: np.ndarray, hue: np.ndarray
) -> np.ndarray:
    """Combine brightness, contrast, saturation and hue (in turns), each (N,), into 3 x 4 color
    matrices, row by row: float32 (N, 12).

    All four are linear here. In torchvision, contrast needs the image's mean, and hue converts to
    HSV. Here, contrast pivots on mid-gray (127.5), and hue rotates the chroma plane of YIQ (the
    NTSC primaries, as in DALI's color operators). So the matrix is known before the pixels are, and
    both backends apply the same numbers.
    """
    angle = 2 * np.pi * hue
    turn = np.zeros((len(hue), 3, 3))
    turn[:, 0, 0] = 1.0
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * np.cos(angle)
    turn[:, 2, 1] = saturation * np.sin(angle)
    turn[:, 1, 2] = -turn[:, 2, 1]
    linear = (brightness * contrast)[:, None, None] * (FROM_YIQ @ turn @ TO_YIQ)
    offset = np.repeat(127.5 * (1.0 - contrast), 3).reshape(-1, 3, 1)
    return np.concatenate([linear, offset], axis=2).astype(np.float32).reshape(-1, 12)
