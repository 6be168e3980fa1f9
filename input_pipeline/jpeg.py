"""Decodes the bytes of an image to pixels of one size, and no more than the crop needs.

The window is chosen from the header, before anything is decoded. This saves three things:

- Rows below the window are not decoded at all. A JPEG is a stream from top to bottom, so it is
  enough to tell the decoder that the image ends there.
- A window at least twice as large as wanted is decoded at half the size (or 1/4, 1/8), by an
  inverse cosine transform of fewer coefficients.
- The factor that remains is below two, for which bilinear interpolation skips no pixel.

The entropy coding above and beside the window, 0.7 of the work of decoding, cannot be saved.
"""

import os
import struct
from collections.abc import Callable, Set
from typing import NamedTuple, TypeAlias

import cv2
import numpy as np
import simplejpeg

# OpenCV's limit, which it keeps to itself for other formats.
MAX_PIXELS = int(os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"])

# The bounds of training windows: their share of the area, and width / height.
AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
# The side of test windows, as a share of the shorter side: 224 pixels of 256.
CENTRE = 224 / 256

# The worker processes run in parallel already. Threads of OpenCV would compete with each other.
cv2.setNumThreads(1)


# Markers in a JPEG: of its frame header, in any coding, and of the pixels that follow.
FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
SCAN = 0xDA


class UnreadableError(Exception):
    """The bytes are not an image, or not a whole one."""


class Window(NamedTuple):
    """A rectangle of pixels, not empty and within an image."""

    top: int
    left: int
    height: int
    width: int


# Maps the (height, width) of an image to the part of it to decode.
ChooseWindow: TypeAlias = Callable[[int, int], Window]


def random_window(rng: np.random.Generator, height: int, width: int) -> Window:
    """Draws a window of random area, shape and place (Szegedy et al., arXiv:1409.4842).

    Its area is uniform between 8% and 100% of the image. The logarithm of its aspect ratio is
    uniform between those of 3/4 and 4/3. A window that does not fit is drawn again, up to ten
    times.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*AREA)
        aspect = np.exp(rng.uniform(*np.log(ASPECT)))
        h, w = round(np.sqrt(area / aspect)), round(np.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return Window(
                int(rng.integers(height - h, endpoint=True)),
                int(rng.integers(width - w, endpoint=True)),
                h,
                w,
            )
    # The largest central window with an aspect ratio within the bounds.
    low, high = ASPECT
    return _centred(
        height, width, min(height, max(1, round(width / low))), min(width, round(height * high))
    )


def central_window(height: int, width: int) -> Window:
    """Returns the central square used for testing: 224 pixels of a shorter side of 256."""
    side = max(1, round(CENTRE * min(height, width)))
    return _centred(height, width, side, side)


def _centred(height: int, width: int, h: int, w: int) -> Window:
    h, w = max(1, h), max(1, w)
    return Window((height - h) // 2, (width - w) // 2, h, w)


def decode(data: bytes, choose: ChooseWindow, size: int) -> np.ndarray:
    """Decodes the window of an image that ``choose`` returns, at ``size`` x ``size`` pixels.

    JPEGs of colour or grey, baseline or not, CMYK, PNG and whatever else OpenCV reads are
    recognised by their content. An orientation tag is ignored, as ImageNet's labels do.

    Args:
      data: the content of the file.
      choose: the function from the image's height and width to the window.
      size: the side of the result.

    Returns:
      ``(size, size, 3)`` uint8, in the order red, green, blue.

    Raises:
      UnreadableError: if the image cannot be decoded, or ends too early.
    """
    header = _baseline_header(data)
    if header is None:
        pixels = _whole(data)
        window = choose(*pixels.shape[:2])
        scale = 1
    else:
        window = choose(header.height, header.width)
        scale = _scale(window, size)
        pixels = _top(data, header, window.top + window.height, scale)
    top, bottom = window.top // scale, -(-(window.top + window.height) // scale)
    left, right = window.left // scale, -(-(window.left + window.width) // scale)
    return cv2.resize(pixels[top:bottom, left:right], (size, size), interpolation=cv2.INTER_LINEAR)


def mirrored(image: np.ndarray) -> np.ndarray:
    """Returns the image with left and right exchanged."""
    return cv2.flip(image, 1)


def _scale(window: Window, size: int) -> int:
    """Returns the largest of the decoder's scales at which no detail is lost."""
    smaller = min(window.height, window.width) // size
    return next(scale for scale in (8, 4, 2, 1) if scale <= max(1, smaller))


class _Header(NamedTuple):
    """The size of a baseline JPEG, and the offset of its height in the file."""

    height: int
    width: int
    height_offset: int


def _baseline_header(data: bytes) -> _Header | None:
    """Returns the header of a grey or YCbCr JPEG coded in one pass from top to bottom, else None.

    Raises:
      UnreadableError: if such a JPEG has no end, or any JPEG claims more than ``MAX_PIXELS``.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        offset = _segment(data, 2, FRAMES)
        if data[offset] != 0xFF:
            return None
        height, width, components = struct.unpack_from(">HHB", data, offset + 5)
    except (IndexError, struct.error):
        return None
    marker = data[offset + 1]
    if height * width > MAX_PIXELS:
        raise UnreadableError(f"claims to have {width} x {height} pixels")
    if marker not in (0xC0, 0xC1) or components not in (1, 3) or not height * width:
        return None
    # A decoder would silently fill the missing part with grey. Of what follows the image, as in a
    # phone's moving photo, nothing is known.
    try:
        # From the end, where it usually is.
        whole = data.rfind(b"\xff\xd9", _segment(data, offset, {SCAN})) >= 0
    except IndexError:
        whole = False
    if not whole:
        raise UnreadableError("is cut off: it has no end-of-image marker")
    return _Header(height, width, offset + 5)


def _segment(data: bytes, offset: int, markers: Set[int]) -> int:
    """Returns the offset of the next segment with one of these markers.

    Segments are a marker, a length and as many bytes.

    Raises:
      IndexError: if there is none.
    """
    while (marker := data[offset + 1]) not in markers:
        # Any number of bytes 0xFF may stand before a marker.
        offset += 1 if marker == 0xFF else 2 + int.from_bytes(data[offset + 2 : offset + 4])
    return offset


def _top(data: bytes, header: _Header, rows: int, scale: int) -> np.ndarray:
    """Decodes the first ``rows`` rows, at ``1 / scale`` of the size."""
    shortened = bytearray(data)
    struct.pack_into(">H", shortened, header.height_offset, rows)
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(
            shortened,
            # The resizing that follows would lose interpolated colours.
            fastupsample=True,
            min_height=-(-rows // scale),
            min_width=-(-header.width // scale),
            min_factor=scale,
            # The decoder would otherwise reject the bytes after the last row.
            strict=False,
        )
    except ValueError as error:
        raise UnreadableError(str(error)) from error
    return pixels


def _whole(data: bytes) -> np.ndarray:
    """Decodes a whole image, whatever its format."""
    try:
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise UnreadableError(error.err or str(error)) from error
    if pixels is None:
        raise UnreadableError("is in no format that OpenCV reads, or damaged")
    return pixels[..., ::-1]
