import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from input_pipeline import jpeg
from tests.images import encoded, photograph


def whole(height, width):
    return jpeg.Window(0, 0, height, width)


def reference(data, window, size):
    """All of it decoded by another library, cropped, and resized with a filter."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    top, left, height, width = window
    box = (left, top, left + width, top + height)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box), np.float32)


def difference(data, window, size):
    got = jpeg.decode(data, lambda height, width: window, size)
    assert got.shape == (size, size, 3)
    assert got.dtype == np.uint8
    return np.abs(got - reference(data, window, size)).mean()


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize(
    "window",
    [
        jpeg.Window(0, 0, 300, 400),
        jpeg.Window(13, 27, 101, 77),  # enlarged
        jpeg.Window(150, 200, 150, 200),  # to the last row
        jpeg.Window(40, 0, 260, 399),  # a scale of 1/2
        jpeg.Window(299, 399, 1, 1),
    ],
)
def test_a_window_is_that_of_the_image_decoded_whole(window, subsampling):
    data = encoded(photograph(300, 400), subsampling=subsampling)
    assert difference(data, window, 128) < 2.5


def test_a_window_of_a_image_decoded_at_an_eighth_is_right_to_a_pixel():
    data = encoded(photograph(300, 400))
    assert difference(data, whole(300, 400), 30) < 4
    assert difference(data, whole(296, 400), 30) < 3


def test_only_what_is_needed_is_decoded(monkeypatch):
    sizes = []
    decode = jpeg.simplejpeg.decode_jpeg

    def spy(*args, **kwargs):
        sizes.append(decode(*args, **kwargs).shape[:2])
        return decode(*args, **kwargs)

    monkeypatch.setattr(jpeg.simplejpeg, "decode_jpeg", spy)
    data = encoded(photograph(300, 400))
    for window, size in (((10, 10, 90, 90), 64), ((0, 0, 300, 400), 100), ((0, 0, 300, 400), 30)):
        jpeg.decode(data, lambda height, width, w=window: jpeg.Window(*w), size)
    assert sizes == [(100, 400), (150, 200), (38, 50)]


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk(mode):
    data = encoded(photograph(60, 80, mode=mode))
    assert difference(data, whole(60, 80), 50) < 3


def test_progressive():
    data = encoded(photograph(60, 80), progressive=True)
    assert difference(data, jpeg.Window(5, 5, 30, 40), 32) < 2.5


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_png_whatever_it_is_called(mode):
    data = encoded(photograph(60, 80).convert(mode), format="png")
    assert difference(data, jpeg.Window(5, 5, 30, 40), 32) < 2.5


def test_a_mark_of_orientation_changes_nothing():
    image = photograph(60, 80)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    data = encoded(image, exif=exif)
    assert difference(data, whole(60, 80), 50) < 2.5
    progressive = encoded(image, exif=exif, progressive=True)
    assert difference(progressive, whole(60, 80), 50) < 2.5


def test_bytes_after_the_end_change_nothing():
    data = encoded(photograph(60, 80))
    assert difference(data + bytes(100), whole(60, 80), 50) < 2.5


JPEG = encoded(photograph(60, 80))
SIZE_OFFSET = JPEG.index(b"\xff\xc0") + 5
HUGE = bytearray(JPEG)
struct.pack_into(">HH", HUGE, SIZE_OFFSET, 65000, 65000)
START_OF_SCAN = JPEG.index(b"\xff\xda")
SEGMENT = b"\xff\xe5\x00\x06\xff\xd8\xff\xd9"
THUMBNAIL = JPEG[:START_OF_SCAN] + SEGMENT + JPEG[START_OF_SCAN:]


def test_a_segment_between_the_headers_changes_nothing():
    assert difference(THUMBNAIL, whole(60, 80), 50) < 2.5


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "."),
        (b"not an image at all", "no format"),
        (JPEG[:2], "."),
        (JPEG[:20], "."),
        (JPEG[: len(JPEG) // 2], "cut off"),
        (JPEG[:-2], "cut off"),
        # A thumbnail's end is not the image's: here in a segment after the frame header.
        (THUMBNAIL[:-100], "cut off"),
        (bytes(HUGE).replace(b"\xff\xc0", b"\xff\xc2", 1), "65000 x 65000"),
        (bytes(HUGE), "65000 x 65000"),
        (encoded(photograph(60, 80), format="png")[:200], "."),
    ],
)
def test_what_cannot_be_read_is_said_to_be(data, reason):
    with pytest.raises(jpeg.UnreadableError, match=reason):
        jpeg.decode(data, whole, 32)


def damaged(changes, start, length):
    data = bytearray(JPEG)
    for at, byte in changes.items():
        data[at] = byte
    del data[start : start + length]
    return bytes(data)


# Often in the frame header.
AT = st.integers(SIZE_OFFSET - 5, SIZE_OFFSET + 5) | st.integers(0, len(JPEG) - 1)
DAMAGED = st.builds(
    damaged,
    changes=st.dictionaries(AT, st.integers(0, 255), max_size=4),
    start=AT,
    length=st.sampled_from([0, 0, 1, 30, len(JPEG)]),
)


@settings(max_examples=300)
@given(data=DAMAGED | st.binary() | st.binary().map(b"\xff\xd8".__add__), size=st.integers(1, 40))
def test_bytes_of_any_kind_are_decoded_or_refused(data, size):
    try:
        image = jpeg.decode(data, jpeg.central_window, size)
    except jpeg.UnreadableError:
        return
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8


def test_random_windows_have_the_distribution_they_say():
    rng = np.random.default_rng(0)
    height, width = 3000, 4000
    windows = np.array([jpeg.random_window(rng, height, width) for _ in range(4000)])
    _, left, h, w = windows.T
    area, aspect = h * w / (height * width), w / h
    assert area.min() >= 0.079
    assert area.max() <= 1
    # Small windows always fit, so there the area is uniform and the aspect ratio log-uniform.
    small = area < 0.5
    assert np.mean(area[small] < 0.29) == pytest.approx(0.5, abs=0.03)
    assert np.mean(np.log(aspect[small])) == pytest.approx(0, abs=0.015)
    # Places are uniform.
    free = left[w < width] / (width - w[w < width])
    assert np.mean(free) == pytest.approx(0.5, abs=0.02)


SIDE = st.integers(1, 9) | st.integers(1, 2**16)


@settings(max_examples=300)
@given(height=SIDE, width=SIDE, seed=st.integers(0, 2**32))
def test_windows_are_within_the_image_and_neither_too_flat_nor_too_tall(height, width, seed):
    drawn = jpeg.random_window(np.random.default_rng(seed), height, width)
    central = jpeg.central_window(height, width)
    assert central.height == central.width
    for top, left, h, w in (drawn, central):
        assert min(h, w) >= 1
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w
        # To half a pixel, as sides are rounded.
        assert (w - 0.5) / (h + 0.5) <= 4 / 3
        assert (w + 0.5) / (h - 0.5) >= 3 / 4


def test_where_no_window_fits_it_is_the_largest_in_the_centre():
    rng = np.random.default_rng(0)
    assert jpeg.random_window(rng, 9000, 300) == (4300, 0, 400, 300)
    assert jpeg.random_window(rng, 300, 9000) == (0, 4300, 300, 400)


@pytest.mark.parametrize(
    "after", [b"\xff\xda" + bytes(9), b"\xff\xd8\xff\xc0", encoded(photograph(9, 9))]
)
def test_what_follows_an_image_is_nothing_to_it(after):
    """Phones keep a film behind a photograph, in whose bytes any marker may be."""
    data = encoded(photograph(30, 40))
    decoded = jpeg.decode(data, whole, 16)
    np.testing.assert_array_equal(jpeg.decode(data + after, whole, 16), decoded)
    with pytest.raises(jpeg.UnreadableError, match="cut off"):
        jpeg.decode(data[:-2], whole, 16)


def test_padding_before_a_marker_is_skipped():
    data = encoded(photograph(30, 40))
    for marker in (b"\xff\xc0", b"\xff\xda"):
        data = data.replace(marker, b"\xff\xff" + marker, 1)
    assert jpeg._baseline_header(data)[:2] == (30, 40)
    assert difference(data, whole(30, 40), 16) < 4


@pytest.mark.parametrize(
    ("format", "offset"), [("gif", 6), ("png", 16), ("bmp", 18), ("tiff", None)]
)
def test_no_format_may_claim_more_pixels_than_the_limit(format, offset):
    image, side = Image.new("L", (10, 10)), 30_000
    data = bytearray(encoded(image, format=format))
    if format == "gif":
        struct.pack_into("<HH", data, offset, side, side)
    elif format == "png":
        struct.pack_into(">II", data, offset, side, side)
        struct.pack_into(">I", data, offset + 13, zlib.crc32(data[12 : offset + 13]))
    elif format == "bmp":
        struct.pack_into("<ii", data, offset, side, side)
    else:
        for tag in (256, 257):  # ImageWidth and ImageLength, as one long or short.
            at = data.index(struct.pack("<H", tag))
            struct.pack_into("<HIHH", data, at + 2, 3, 1, side, 0)
    with pytest.raises(jpeg.UnreadableError, match=r"CV_IO_MAX_IMAGE_PIXELS|no format"):
        jpeg.decode(bytes(data), whole, 16)


def test_the_central_window_is_224_pixels_of_256():
    assert jpeg.central_window(256, 512) == (16, 144, 224, 224)


def test_mirrored():
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    np.testing.assert_array_equal(jpeg.mirrored(image), image[:, ::-1])


def test_images_do_not_start_threads_of_their_own():
    assert cv2.getNumThreads() == 1
