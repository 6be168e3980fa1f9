"""From the bytes of a picture to pixels of one size, decoding no more than the crop needs.

The window is chosen from the header, before anything is decoded. Then three things are saved:

- rows under the window are not decoded at all: a JPEG is a stream from top to bottom, so it is
  enough to tell the decoder that the picture ends there;
- a window at least twice as large as wanted is decoded at half the size (or 1/4, 1/8), by an
  inverse cosine transform of fewer coefficients;
- what remains is a factor below two, for which bilinear interpolation skips no pixel.

What cannot be saved is the entropy coding above and beside the window, 0.7 of the work of decoding.
"""

import struct
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

# Windows of training pictures, as shares of the area and as width / height.
AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
# The side of test windows, as a share of the shorter side: 224 pixels of 256.
CENTRE = 224 / 256
# A header may claim anything; no real photograph has as many pixels.
MAX_PIXELS = 2**27

# Worker processes are the parallelism here; threads of OpenCV would get into each other's way.
cv2.setNumThreads(1)


class UnreadableError(Exception):
    """Bytes that are no picture, or not the whole of one."""


class Window(NamedTuple):
    """A rectangle of pixels, not empty and within a picture."""

    top: int
    left: int
    height: int
    width: int


# (height, width) of a picture -> the part of it to be seen.
ChooseWindow = Callable[[int, int], Window]


def random_window(rng: np.random.Generator, height: int, width: int) -> Window:
    """A window of random area, shape and place (Szegedy et al., arXiv:1409.4842).

    Its area is uniform in 8% to 100% of the picture, the logarithm of its aspect ratio uniform
    between those of 3/4 and 4/3; what does not fit is drawn again, up to ten times.
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
    # The largest in the middle that has an aspect ratio within the bounds.
    low, high = ASPECT
    return _centred(
        height, width, min(height, max(1, round(width / low))), min(width, round(height * high))
    )


def central_window(height: int, width: int) -> Window:
    """The square in the middle that is seen when tested: 224 pixels of a shorter side of 256."""
    side = max(1, round(CENTRE * min(height, width)))
    return _centred(height, width, side, side)


def _centred(height: int, width: int, h: int, w: int) -> Window:
    h, w = max(1, h), max(1, w)
    return Window((height - h) // 2, (width - w) // 2, h, w)


def picture(data: bytes, choose: ChooseWindow, size: int) -> np.ndarray:
    """Decodes the window of a picture that ``choose`` wants, at ``size`` x ``size`` pixels.

    JPEGs of colour or grey, baseline or not, CMYK, PNG and whatever else OpenCV reads are
    recognised by their content. A mark of orientation is ignored, as ImageNet's labels do.

    Args:
      data: the file's content.
      choose: given its height and width, returns the window.
      size: the side of the result.

    Returns:
      ``(size, size, 3)`` uint8, in the order red, green, blue.

    Raises:
      UnreadableError: if it cannot be decoded, or ends too early.
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
    """The picture with left and right exchanged."""
    return cv2.flip(image, 1)


def _scale(window: Window, size: int) -> int:
    """The largest of the decoder's scales at which no detail is lost."""
    smaller = min(window.height, window.width) // size
    return next(scale for scale in (8, 4, 2, 1) if scale <= max(1, smaller))


class _Header(NamedTuple):
    """Of a baseline JPEG: its size, and where in the file its height stands."""

    height: int
    width: int
    height_offset: int


def _baseline_header(data: bytes) -> _Header | None:
    """The header of a grey or YCbCr JPEG coded from top to bottom in one go, else None.

    Raises:
      UnreadableError: if such a JPEG has no end, or any claims to be larger than any picture.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    offset = 2
    try:
        # Segments are a marker, a length and as many bytes, until the frame header.
        while not 0xC0 <= (marker := data[offset + 1]) <= 0xCF or marker in (0xC4, 0xC8, 0xCC):
            offset += 2 + int.from_bytes(data[offset + 2 : offset + 4])
        if data[offset] != 0xFF:
            return None
        height, width, components = struct.unpack_from(">HHB", data, offset + 5)
    except (IndexError, struct.error):
        return None
    if height * width > MAX_PIXELS:
        raise UnreadableError(f"claims to have {width} x {height} pixels")
    if marker not in (0xC0, 0xC1) or components not in (1, 3) or not height * width:
        return None
    # A decoder would fill what is missing with grey and say nothing.
    if data.rfind(b"\xff\xd9", max(offset, data.rfind(b"\xff\xda"))) < 0:
        raise UnreadableError("is cut off: it has no end-of-image marker")
    return _Header(height, width, offset + 5)


def _top(data: bytes, header: _Header, rows: int, scale: int) -> np.ndarray:
    """Decodes the first rows, at ``1 / scale`` of the size."""
    shortened = bytearray(data)
    struct.pack_into(">H", shortened, header.height_offset, rows)
    try:
        return simplejpeg.decode_jpeg(
            shortened,
            # Interpolated colours would be lost in the resizing that follows.
            fastupsample=True,
            min_height=-(-rows // scale),
            min_width=-(-header.width // scale),
            min_factor=scale,
            # It would complain about the bytes after the last row.
            strict=False,
        )
    except ValueError as error:
        raise UnreadableError(str(error)) from error


def _whole(data: bytes) -> np.ndarray:
    """Decodes all of a picture, whatever its format."""
    try:
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise UnreadableError(error.err or str(error)) from error
    if pixels is None:
        raise UnreadableError("is in no format that OpenCV reads, or damaged")
    return pixels[..., ::-1]
