import base64
import io
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kimi_k26.media_kimi_k26 import MediaError, MediaLimits, load_image

from .media_samples import data_uri, picture_bytes, served

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
PNG = picture_bytes(PICTURE)


@pytest.mark.parametrize("form", ["str", "Path", "file", "file%20", "bytes", "bytearray", "object", "base64", "uri"])
def test_sources_of_a_picture(form, tmp_path):
    path = tmp_path / "a picture.png"
    path.write_bytes(PNG)
    text = base64.b64encode(PNG).decode()
    source = {
        "str": str(path),
        "Path": path,
        "file": f"file://{path}",
        "file%20": path.as_uri(),
        "bytes": PNG,
        "bytearray": bytearray(PNG),
        "object": io.BytesIO(PNG),
        "base64": text,
        "uri": data_uri(PNG),
    }[form]
    assert np.array_equal(load_image(source), PIXELS)


@pytest.mark.parametrize(
    "uri",
    [
        data_uri(PNG, gap=" "),
        data_uri(PNG, kind="application/octet-stream"),
        "DATA:image/png;name=a.png;BASE64," + base64.b64encode(PNG).decode(),
        "data:image/png;base64," + base64.urlsafe_b64encode(PNG).decode().rstrip("="),
        "data:image/png;base64," + base64.encodebytes(PNG).decode(),
        "data:image/png;base64," + base64.b64encode(PNG).decode().replace("+", "%2B").replace("=", "%3D"),
    ],
)
def test_forms_of_data_uris(uri):
    assert np.array_equal(load_image(uri), PIXELS)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "I", "F", "I;16", "La"]
)
def test_modes_become_rgb_as_pillow_does_it(mode):
    if mode in ("La", "RGBa"):
        picture = PICTURE.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    elif mode == "PA":
        picture = PICTURE.convert("P").convert("PA")
    else:
        picture = PICTURE.convert("I").convert(mode) if mode == "I;16" else PICTURE.convert(mode)
    expected = (picture.convert("LA") if mode == "La" else picture).convert("RGB")
    got = load_image(picture)
    assert got.mode == "RGB" and np.array_equal(got, expected)


def test_transparent_palette_and_alpha_are_dropped():
    rgba = Image.fromarray(np.dstack([PIXELS, np.full((20, 30), 7, np.uint8)]))
    assert np.array_equal(load_image(picture_bytes(rgba)), PIXELS)
    palette = PICTURE.convert("P")
    stored = picture_bytes(palette, transparency=3)
    assert np.array_equal(load_image(stored), palette.convert("RGB"))


def test_first_frame_of_an_animation_and_no_exif_rotation():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    gif = picture_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(gif).getpixel((0, 0)) == (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(picture_bytes(PICTURE, "PNG", exif=exif)).size == (30, 20)


@pytest.mark.parametrize(
    "array",
    [
        PIXELS,
        PIXELS.transpose(2, 0, 1),
        PIXELS.astype(np.int64),
        PIXELS.astype(np.float64) / 255,
        (PIXELS / 255.0).astype(np.float32).transpose(2, 0, 1),
        torch.from_numpy(PIXELS),
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        torch.from_numpy(PIXELS).permute(2, 0, 1).float() / 255,
        np.dstack([PIXELS, PIXELS[..., :1]]),
    ],
)
def test_arrays(array):
    assert np.array_equal(load_image(array), PIXELS)


def test_gray_and_boolean_arrays():
    gray = PIXELS[..., 0]
    expected = np.repeat(gray[..., None], 3, -1)
    for array in (gray, gray[..., None], gray[None], torch.from_numpy(gray), np.dstack([gray, gray])):
        assert np.array_equal(load_image(array), expected)
    assert np.array_equal(load_image(gray > 99), np.where(expected > 99, 255, 0))


@pytest.mark.parametrize(
    "source, words",
    [
        (b"", "empty"),
        ("", "empty"),
        ("no/such/file.png", "not an existing file"),
        (Path("no/such/file.png"), "cannot open"),
        (b"not a picture at all", "not a picture"),
        (PNG[:-300], "damaged or truncated"),
        (picture_bytes(PICTURE.resize((300, 200)), "JPEG")[:-2000], "damaged or truncated"),
        ("data:image/png;base64,!!!!", "not valid base64"),
        ("data:image/png;base64", "without a comma"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "EPS"),
        (12, "cannot read a int"),
        (np.zeros((6, 7, 5)), "shape"),
        (np.full((4, 4, 3), 2.0), "0..1"),
        (np.full((4, 4, 3), np.nan), "0..1"),
        (np.full((4, 4), 300), "0..255"),
        (np.zeros((4, 4), complex), "complex"),
        (np.zeros((0, 4, 3), np.uint8), "shape"),
    ],
)
def test_what_is_no_picture(source, words):
    with pytest.raises(MediaError, match=words):
        load_image(source)


def test_picture_limits():
    with pytest.raises(MediaError, match="600 is over the limit max_image_pixels=599"):
        load_image(PNG, MediaLimits(max_image_pixels=599))
    assert load_image(PNG, MediaLimits(max_image_pixels=600)).size == (30, 20)
    for source in (PICTURE, PIXELS):
        with pytest.raises(MediaError, match="max_image_pixels"):
            load_image(source, MediaLimits(max_image_pixels=1))
    for source in (PNG, data_uri(PNG)):
        with pytest.raises(MediaError, match="max_bytes"):
            load_image(source, MediaLimits(max_bytes=100))
    with pytest.raises(ValueError, match="max_bytes"):
        MediaLimits(max_bytes=0)


def test_size_is_checked_before_pixels_are_decoded():
    # a header that promises 10^10 pixels, without any of them, and one over Pillow's warning: no warning leaks
    header = bytearray(PNG)
    header[16:24] = (100_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with pytest.raises(MediaError, match="limit"):
        load_image(bytes(header))
    header[16:24] = (10_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(MediaError, match="max_image_pixels=50,000,000"):
            load_image(bytes(header), MediaLimits(max_image_pixels=50_000_000))


def test_an_address_is_the_bytes_behind_it(monkeypatch):
    """With the limits and refusals that bytes meet, and no more read than they allow."""
    monkeypatch.setenv("no_proxy", "*")
    turned = Image.Exif()
    turned[0x0112] = 6
    jpeg = picture_bytes(PICTURE, "JPEG", exif=turned)
    with served(a=PNG, turned=jpeg, eps=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", junk=b"junk") as (host, asked):
        assert np.array_equal(load_image(f"{host}/a"), PIXELS) and asked == ["/a"]
        assert load_image(f"{host}/turned").size == load_image(jpeg).size == PICTURE.size
        for name, limits, words in (
            ("a", MediaLimits(max_bytes=100), "max_bytes=100"),
            ("a", MediaLimits(max_image_pixels=100), "max_image_pixels=100"),
            ("eps", MediaLimits(), "EPS"),
            ("junk", MediaLimits(), "not a picture"),
            ("missing", MediaLimits(), "cannot load .*404"),
        ):
            with pytest.raises(MediaError, match=words):
                load_image(f"{host}/{name}", limits)
    with pytest.raises(MediaError, match="cannot load"):
        load_image(f"{host}/a")
