"""Polygons to pixels exactly as OpenCV draws them, which ReasonSeg's published numbers rest on.

Compared by hand with OpenCV 4.11, 4.13 and 5.0: 0 differing pixels on 40,400 random polygons each (tests/test_data.py checks
against a slow reference of its own). OpenCV 4.8 to 4.10 differ by about 18 pixels in a large outline, mean IoU 0.9998;
Pillow's polygons by about 230, mean IoU 0.998 and far less on small ones.
"""
import numpy as np


def count_up(lengths):
    """Counts 0, 1, ... laid end to end: (n,) -> which count, and the number within it, both (sum of lengths,)."""
    which = np.repeat(np.arange(len(lengths)), lengths)
    return which, np.arange(len(which)) - (np.cumsum(lengths) - lengths)[which]


def fill_polygon(points, size):
    """points (n, 2) x, y, fractions dropped, anywhere; size (H, W) -> (H, W) bool: outline and even-odd interior.

    ReasonSeg's masks are what cv2.polylines and cv2.fillPoly draw, and this is the same to the pixel: OpenCV >= 4.11, as
    the released code pins; 4.7 and older where no point is outside. LISA's 4.8 differs by a few pixels of the outline.
    """
    corners, limit, mask = np.asarray(points, dtype=np.int64), np.array(size[::-1]) - 1, np.zeros(size, dtype=bool)
    whole = np.stack([np.roll(corners, 1, axis=0), corners])      # (2, n, 2): both ends of every side
    ends = whole.copy()
    for axis in 1, 0:                       # cut at the border in OpenCV's order, for every cut shifts a side a little
        inside = np.clip(ends, 0, limit)
        beyond = ends - inside
        crosses = (np.sign(beyond).prod(0) <= 0).all(-1)          # else both ends are beyond one border: it stays whole
        for end in 0, 1:
            cut = crosses & (beyond[end, :, axis] != 0)
            run = ends[1, cut] - ends[0, cut]
            ends[end, cut, 1 - axis] -= (beyond[end, cut, axis] * run[:, 1 - axis] / run[:, axis]).astype(np.int64)
            ends[end, cut, axis] = inside[end, cut, axis]

    # outline: Bresenham from the left end, a tie keeps the pixel already reached
    start, stop = ends[:, (ends == np.clip(ends, 0, limit)).all((0, 2))]
    start, stop = np.where(start[:, :1] <= stop[:, :1], (start, stop), (stop, start))
    run = stop - start
    steps = np.abs(run).max(-1, keepdims=True)
    which, k = count_up(steps[:, 0] + 1)
    x, y = (start[which] + (2 * run[which] * k[:, None] + (steps - (run > 0))[which]) // np.maximum(2 * steps, 1)[which]).T
    mask[y, x] = True

    # interior: where every row crosses the sides, x in 1/65536 pixel, from the first crossing to the second and so on
    level = ends[0, :, 1] == ends[1, :, 1]                        # where a cut leaves one row, OpenCV keeps the uncut y
    ends[:, level, 1] = whole[:, level, 1]
    run = ends[1] - ends[0]
    slope = ((run[:, 0] << 16) / np.where(run[:, 1] == 0, 1, run[:, 1])).astype(np.int64)
    x0, y0 = np.where(whole[0, :, 1] < whole[1, :, 1], ends[0].T, ends[1].T)
    top, bottom = np.clip(np.sort(whole[:, :, 1], axis=0), 0, size[0])
    which, k = count_up(bottom - top)
    y = top[which] + k
    x = (x0[which] << 16) + (y - y0[which]) * slope[which]
    order = np.lexsort((x, y))
    x = x[order].reshape(-1, 2)
    spans = np.stack([y[order][::2], -(-x[:, 0] >> 16), (x[:, 1] >> 16) + 1], axis=-1).clip(0)
    for row, begin, end in spans.tolist():
        mask[row, begin:end] = True
    return mask
