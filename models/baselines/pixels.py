"""k-means on pixels, the first row of the field's tables: what grouping by colour and layout alone achieves.

The rows that this module makes go to `kmeans.train`, which puts them on the unit sphere: brightness then counts
less, and CIFAR-10 is grouped slightly better than by the bare pixels.

Letters in shapes: N images, B of them, H and W pixels, C colours, F = 32 * 32 * C.
"""

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

SIDE = 32
BLOCK = 1024


def rows(pixels_NHWC: np.ndarray) -> np.ndarray:
    """Each image as one row of its colours, from 0 to 1, at 32 x 32 pixels: float16 of shape (N, F).

    Larger images are averaged over areas, smaller ones repeat pixels. A memory map is read some images at a time.
    """
    n, _, _, colours = pixels_NHWC.shape
    rows_NF = np.empty((n, SIDE * SIDE * colours), np.float16)
    for start in range(0, n, BLOCK):
        block_BCHW = torch.from_numpy(np.array(pixels_NHWC[start : start + BLOCK])).permute(0, 3, 1, 2).float() / 255
        small_BCHW = adaptive_avg_pool2d(block_BCHW, SIDE)
        rows_NF[start : start + BLOCK] = small_BCHW.permute(0, 2, 3, 1).flatten(1).numpy()
    return rows_NF
