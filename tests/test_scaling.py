"""The project's own scaling beside Pillow's, and what it is compiled by."""

import io
import time
from concurrent.futures import ThreadPoolExecutor
from random import Random

import numpy as np
import pytest
from PIL import Image

from kimi_k26 import compiling_kimi_k26, scaling_kimi_k26
from kimi_k26.scaling_kimi_k26 import fill_patches, library, scaled

natively = pytest.mark.skipif(library() is None, reason="no compiler, or a processor without AVX2")


def picture(width, height, seed=0, colours=256):
    """Noise; with two colours it is the hardest there is: sums far below 0 and far above 255."""
    values = np.linspace(0, 255, colours).astype(np.uint8)
    return values[np.random.default_rng(seed).integers(0, colours, (height, width, 3))]


def by_pillow(pixels, width, height):
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def whole(given, width, height):
    return scaled(given, width, height)(0, height)


@natively
@pytest.mark.parametrize("colours", [2, 256])
def test_pixels_are_pillows(colours, monkeypatch):
    own, calls = scaling_kimi_k26.scale_rows, []
    monkeypatch.setattr(scaling_kimi_k26, "scale_rows", lambda *given: calls.append(own(*given)))
    rng = Random(colours)
    sizes = [[rng.randint(1, 200) for _ in range(4)] for _ in range(120)]
    sizes += [(1, 1, 5, 3), (5, 5, 5, 4), (7, 9, 3, 9), (16, 16, 15, 15), (500, 3, 6, 1), (65, 64, 64, 63)]
    for seed, (width, height, new_width, new_height) in enumerate(sizes):
        pixels = picture(width, height, seed, colours)
        given = pixels if seed % 2 else Image.fromarray(pixels)
        expected = by_pillow(pixels, new_width, new_height)
        assert np.array_equal(whole(given, new_width, new_height), expected), (width, height, new_width, new_height)
    assert len(calls) > 50  # and were not made by Pillow


@natively
@pytest.mark.parametrize("parts", [2, 5])
def test_bands_and_threads_give_the_whole(parts):
    pixels = picture(301, 203)
    expected = by_pillow(pixels, 150, 101)
    edges = [(101 * k // parts, 101 * (k + 1) // parts) for k in range(parts)]
    with ThreadPoolExecutor(3) as pool:
        for run in (map, pool.map):
            for given in (pixels, Image.fromarray(pixels)):
                rows = scaled(given, 150, 101, parts, run)
                assert np.array_equal(np.concatenate([rows(*edge) for edge in edges]), expected)


def test_a_picture_that_is_not_read_yet():
    """Pillow reads a file when it is first asked for pixels, which two threads must not do at once."""
    pixels, file = picture(301, 203), io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    with ThreadPoolExecutor(3) as pool:
        for width, height in ((301, 203), (150, 101)):
            rows = scaled(Image.open(io.BytesIO(file.getvalue())), width, height, 5, pool.map)
            bands = pool.map(lambda top: rows(top, top + 1), range(height))
            assert np.array_equal(np.concatenate(list(bands)), by_pillow(pixels, width, height))


@natively
def test_rows_may_lie_apart_and_upside_down():
    """As a decoder leaves them."""
    held = picture(90, 61)
    for pixels in (held[:, 5:70], held[::-1], held[::-2, :33]):
        height, width = pixels.shape[:2]
        expected = by_pillow(np.ascontiguousarray(pixels), width - 9, height - 4)
        assert np.array_equal(whole(pixels, width - 9, height - 4), expected)


def test_without_the_kernels_pillow_does_it(monkeypatch):
    monkeypatch.setattr(scaling_kimi_k26, "library", lambda: None)
    pixels = picture(90, 61)
    for given in (pixels, Image.fromarray(pixels)):
        assert np.array_equal(whole(given, 40, 30), by_pillow(pixels, 40, 30))
        assert np.array_equal(whole(given, 90, 61), pixels)


def test_what_cannot_be_compiled_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    told = []
    monkeypatch.setattr(compiling_kimi_k26.logger, "warning", told.append)
    compiled = compiling_kimi_k26.compiled
    assert compiled("wings", 'extern "C" int one() { return 1; }', {"wings"}) is None and not told
    assert compiled("broken", "int one() {", set()) is None
    assert (library() is None and not told) or "broken" in told[0]
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"compiling.lock"}
    monkeypatch.setattr(compiling_kimi_k26.shutil, "which", lambda name: None)
    assert compiled("one", 'extern "C" int one() { return 1; }', set()) is None


@natively
def test_a_library_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = 'extern "C" int one() { return 1; }'
    assert compiling_kimi_k26.compiled("one", source, set()).one() == 1
    monkeypatch.setattr(compiling_kimi_k26, "_compile", None)
    assert compiling_kimi_k26.compiled("one", source, set()).one() == 1


@natively
def test_of_several_at_once_one_compiles(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source, counted, compiling = 'extern "C" int one() { return 1; }', [], compiling_kimi_k26._compile
    monkeypatch.setattr(compiling_kimi_k26, "_compile", lambda *given: (counted.append(1), time.sleep(0.2), compiling(*given)))
    with ThreadPoolExecutor(3) as pool:
        assert [each.one() for each in pool.map(lambda _: compiling_kimi_k26.compiled("one", source, set()), range(3))] == [1] * 3
    assert len(counted) == 1


def test_patches_with_and_without_the_kernels(monkeypatch):
    """Pixels that end within a patch or before one; rows that lie apart, or upside down."""
    table, held = np.random.default_rng(0).random((3, 256), np.float32), picture(61, 47)
    for pixels in (held, held[:, 9:50], held[::-1], held[:28, :28], held[:0]):
        patches = np.full((2, 4, 6, 3, 14, 14), np.nan, np.float32)
        fill_patches(pixels, table, patches[0])
        with monkeypatch.context() as without:
            without.setattr(scaling_kimi_k26, "library", lambda: None)
            fill_patches(pixels, table, patches[1])
        assert np.array_equal(patches[0], patches[1])
        whole = np.zeros((56, 84, 3), np.uint8)
        whole[: len(pixels), : pixels.shape[1]] = pixels
        assert np.array_equal(patches[0, 2, 3, 1], table[1][whole[28:42, 42:56, 1]])
