"""Scaling of RGB pictures: Pillow's bicubic filter, to the last bit and several times as fast; and patches of their pixels.

Pillow (src/libImaging/Resample.c) weighs the pixels under the filter with integers of 22 bits behind the point, first
along the rows, then, from what that gave rounded to bytes, along the columns. The same sums are made here for sixteen
rows, or for many columns, at once. Without a compiler, or a processor with AVX2, Pillow does it.
"""

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Union

import numpy as np
from PIL import Image

from .compiling_kimi_k26 import address, compiled, i64


Picture = Union[Image.Image, np.ndarray]  # in mode RGB; or uint8 (height, width, 3), every row contiguous
Rows = Callable[[int, int], np.ndarray]  # of a picture, from the first on and before the second: uint8 (rows, width, 3), each contiguous
BAND = 2**20  # bytes of a picture, as Pillow holds it, that are worked on at a time


SOURCE = r"""
#include <immintrin.h>
#include <cstdint>
#include <cstring>
#include <cstdlib>

typedef int64_t i64;
typedef uint8_t u8;
typedef int32_t i32;
typedef u8 bytes __attribute__((vector_size(16)));

const int BITS = 22;  // of a weight behind the point

struct Taps {
    const i32 *first, *count;  // the first pixel under the filter for each pixel of the result, and how many there are
    const i32 *weight;         // `most` of each pixel of the result
    i64 most;
};

static inline bytes load(const u8* at) {
    bytes value;
    memcpy(&value, at, 16);
    return value;
}

static inline bytes load(const u8* at, i64 left) {  // no more than are left
    if (left >= 16) return load(at);
    bytes value = {};
    memcpy(&value, at, left);
    return value;
}

static inline void store(u8* at, bytes value, i64 left) {
    if (left >= 16) memcpy(at, &value, 16);
    else memcpy(at, &value, left);
}

#ifdef __AVX512F__
typedef i32 ints __attribute__((vector_size(64)));  // sixteen

static inline ints wide(bytes value) { return (ints)_mm512_cvtepu8_epi32((__m128i)value); }

static inline bytes rounded(ints sum) {
    const __m512i whole = _mm512_max_epi32((__m512i)(sum >> BITS), _mm512_setzero_si512());
    return (bytes)_mm512_cvtusepi32_epi8(whole);  // more than 255 becomes 255
}
#else
typedef i32 eight __attribute__((vector_size(32)));
struct ints { eight low, high; };  // the compiler makes little of vectors that are longer than the processor's

static inline ints operator+(ints a, i32 b) { return {a.low + b, a.high + b}; }
static inline ints operator*(ints a, i32 b) { return {a.low * b, a.high * b}; }
static inline void operator+=(ints& a, ints b) { a = {a.low + b.low, a.high + b.high}; }

static inline ints wide(bytes value) {
    return {(eight)_mm256_cvtepu8_epi32((__m128i)value), (eight)_mm256_cvtepu8_epi32(_mm_srli_si128((__m128i)value, 8))};
}

static inline bytes rounded(ints sum) {
    const __m256i halves = _mm256_packs_epi32((__m256i)(sum.low >> BITS), (__m256i)(sum.high >> BITS));
    const __m256i words = _mm256_permute4x64_epi64(halves, 0xd8);
    return (bytes)_mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));  // from 0 to 255
}
#endif

// Sixteen rows of sixteen bytes turned into sixteen columns.
static inline void turn(bytes* rows) {
    for (int round = 0; round < 4; round++) {
        bytes next[16];
        for (int i = 0; i < 8; i++) {
            bytes a = rows[i], b = rows[i + 8];
            next[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            next[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        memcpy(rows, next, sizeof next);
    }
}

// `in` (rows, width, 3), its rows `in_row` bytes apart -> `out` (rows, new_width, 3), contiguous.
extern "C" int kimi_scale_rows(const u8* in, i64 in_row, i64 rows, i64 width, u8* out, i64 new_width, Taps taps) {
    const i64 wide_in = 3 * width, wide_out = 3 * new_width;
    // Of sixteen rows, byte after byte: the sixteen of one place lie side by side.
    u8* turned = (u8*)malloc(16 * (wide_in + 16 + wide_out + 16));
    if (!turned) return 1;
    u8* made = turned + 16 * (wide_in + 16);
    for (i64 start = 0; start < rows; start += 16) {
        const i64 some = rows - start < 16 ? rows - start : 16;
        bytes block[16];
        for (i64 at = 0; at < wide_in; at += 16) {
            for (i64 row = 0; row < 16; row++) {
                const u8* from = in + (start + (row < some ? row : some - 1)) * in_row + at;
                block[row] = load(from, wide_in - at);
            }
            turn(block);
            memcpy(turned + 16 * at, block, sizeof block);
        }
        for (i64 x = 0; x < new_width; x++) {
            const u8* from = turned + 48 * (i64)taps.first[x];
            const i32* weight = taps.weight + x * taps.most;
            ints red = ints{} + (1 << (BITS - 1)), green = red, blue = red;
            for (i32 k = 0; k < taps.count[x]; k++, from += 48) {
                red += wide(load(from)) * weight[k];
                green += wide(load(from + 16)) * weight[k];
                blue += wide(load(from + 32)) * weight[k];
            }
            const bytes sums[3] = {rounded(red), rounded(green), rounded(blue)};
            memcpy(made + 48 * x, sums, sizeof sums);
        }
        for (i64 at = 0; at < wide_out; at += 16) {
            memcpy(block, made + 16 * at, sizeof block);
            turn(block);
            for (i64 row = 0; row < some; row++) store(out + (start + row) * wide_out + at, block[row], wide_out - at);
        }
    }
    free(turned);
    return 0;
}

// `in`, rows of `width` bytes -> `out` (rows, width).
extern "C" void kimi_scale_columns(const u8* in, i64 width, u8* out, i64 rows, Taps taps) {
    for (i64 y = 0; y < rows; y++) {
        const u8* from = in + taps.first[y] * width;
        const i32* weight = taps.weight + y * taps.most;
        u8* to = out + y * width;
        const ints half = ints{} + (1 << (BITS - 1));
        i64 at = 0;
        for (; at + 64 <= width; at += 64) {
            ints a = half, b = half, c = half, d = half;
            for (i32 k = 0; k < taps.count[y]; k++) {
                const u8* row = from + k * width + at;
                a += wide(load(row)) * weight[k];
                b += wide(load(row + 16)) * weight[k];
                c += wide(load(row + 32)) * weight[k];
                d += wide(load(row + 48)) * weight[k];
            }
            const bytes sums[4] = {rounded(a), rounded(b), rounded(c), rounded(d)};
            memcpy(to + at, sums, sizeof sums);
        }
        for (; at < width; at += 16) {
            ints sum = half;
            for (i32 k = 0; k < taps.count[y]; k++) sum += wide(load(from + k * width + at, width - at)) * weight[k];
            store(to + at, rounded(sum), width - at);
        }
    }
}

// `in` (height, width, 3), its rows `in_row` bytes apart -> `out` (rows, columns, 3, side, side): of each colour what `table` (3, 256)
// has for a pixel, and for none what it has for 0.
extern "C" void kimi_fill_patches(const u8* in, i64 in_row, i64 height, i64 width, const float* table, float* out, i64 rows, i64 columns, i64 side) {
    for (i64 row = 0; row < rows; row++)
        for (i64 column = 0; column < columns; column++) {
            const i64 left = width - column * side, there = left < 0 ? 0 : left < side ? left : side;
            for (i64 colour = 0; colour < 3; colour++) {
                const float* value = table + 256 * colour;
                for (i64 y = row * side; y < (row + 1) * side; y++, out += side) {
                    const u8* from = in + y * in_row + column * side * 3 + colour;
                    const i64 some = y < height ? there : 0;
                    for (i64 x = 0; x < some; x++) out[x] = value[from[3 * x]];
                    for (i64 x = some; x < side; x++) out[x] = value[0];
                }
            }
        }
}
"""

class Taps(ctypes.Structure):
    """`Taps` of the source."""

    _fields_ = [("first", address), ("count", address), ("weight", address), ("most", i64)]

    def after(self, pixels: int) -> "Taps":
        """Those of all pixels of the result but the first ones; they stay as long as all do."""
        return Taps(self.first + 4 * pixels, self.count + 4 * pixels, self.weight + 4 * pixels * self.most, self.most)


@functools.cache
def library():
    """The compiled kernels, or `None` where this machine cannot have them."""
    return compiled("scaling", SOURCE, {"avx2"})


@functools.lru_cache(maxsize=64)
def taps(size: int, new_size: int) -> Taps:
    """For each of `new_size` pixels made from `size`: the first under the filter, how many, and their weights.

    Pillow's formula (bicubic with a = -1/2, as wide as the scale) in its order of operations: all bits are to agree.
    """
    scale = size / new_size
    wider = max(scale, 1.0)
    support = 2.0 * wider
    most = math.ceil(support) * 2 + 1
    centre = (np.arange(new_size) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int32), 0)
    count = np.minimum((centre + support + 0.5).astype(np.int32), size) - first
    tap = np.arange(most)
    x = np.abs((tap + first[:, None] - centre[:, None] + 0.5) * (1.0 / wider))
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    weight = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0)) * (tap < count[:, None])
    weight /= np.add.accumulate(weight, axis=1)[:, -1:]  # one after the other, as Pillow adds
    fixed = (weight * 2**22 + np.where(weight < 0, -0.5, 0.5)).astype(np.int32)
    found = Taps(*(array.ctypes.data for array in (first, count, fixed)), most)
    found.arrays = first, count, fixed  # which stay as long as their addresses are known
    return found


def cut(count: int, parts: int) -> list[tuple[int, int]]:
    """0..count as at most `parts` runs of nearly one length: where each begins and ends."""
    parts = min(parts, count)
    edges = [count * part // parts for part in range(parts + 1)]
    return list(zip(edges, edges[1:]))


def size_of(picture: Picture) -> tuple[int, int]:
    """(width, height)."""
    return picture.size if isinstance(picture, Image.Image) else picture.shape[1::-1]


def parts_for(width: int, height: int, parts: int) -> int:
    """In how many bands of rows a picture is worked on, for so many `parts` at least: what one takes stays in the caches, and is memory
    that the one before has just given back."""
    return max(parts, 4 * width * height // BAND)


def rows_of(picture: Picture) -> Rows:
    """The pixels of a picture, by bands of rows."""
    if isinstance(picture, np.ndarray):
        return lambda top, bottom: picture[top:bottom]
    picture.load()  # by one thread
    return lambda top, bottom: np.asarray(picture.crop((0, top, picture.width, bottom)))


def scaled(picture: Picture, width: int, height: int, parts: int = 1, run: Callable = map) -> Rows:
    """The pixels of a picture scaled to `width` and `height`, by bands of rows, which are the same however it is cut.

    The work that all bands wait for is cut into `parts`, or more where it is large, which `run` may do at once, as the `map` of a
    pool of threads does. Where much more is lost in height than in width, newer versions of Pillow begin with the columns, and then Pillow
    itself is asked.
    """
    old_width, old_height = size_of(picture)
    if (old_width, old_height) == (width, height):
        return rows_of(picture)
    if old_height - height > 2 * (old_width - width) or library() is None:
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture)
        return rows_of(picture.resize((width, height), Image.Resampling.BICUBIC))

    given, middle = rows_of(picture), np.empty((old_height, width, 3), np.uint8)
    bands = cut(old_height, parts_for(old_width, old_height, parts))
    list(run(lambda band: scale_rows(given(*band), middle[slice(*band)]), bands))

    def rows(top: int, bottom: int) -> np.ndarray:
        band = np.empty((bottom - top, width, 3), np.uint8)
        scale_columns(middle, height, top, band)
        return band

    return rows


def scale_rows(pixels: np.ndarray, out: np.ndarray) -> None:
    """uint8 (height, width, 3), each row contiguous -> `out` (height, new width, 3), contiguous."""
    (height, width), new_width = pixels.shape[:2], out.shape[1]
    given = address(pixels.ctypes.data), *map(i64, (pixels.strides[0], height, width))
    if library().kimi_scale_rows(*given, address(out.ctypes.data), i64(new_width), taps(width, new_width)):
        raise MemoryError(f"no memory to scale a picture of {width}x{height} pixels")


def scale_columns(pixels: np.ndarray, new_height: int, top: int, out: np.ndarray) -> None:
    """uint8 (height, width, 3), contiguous -> `out` (rows, width, 3), contiguous: of the new height the rows from `top` on."""
    height, width = pixels.shape[:2]
    found = taps(height, new_height)
    given = address(pixels.ctypes.data), i64(3 * width)
    library().kimi_scale_columns(*given, address(out.ctypes.data), i64(len(out)), found.after(top))


def fill_patches(pixels: np.ndarray, table: np.ndarray, patches: np.ndarray) -> None:
    """Values of `table`, float32 (3, 256), for `pixels`, uint8 (height, width, 3), each row contiguous, and for 0 where there is
    none -> `patches`, float32 (rows, columns, 3, side, side), contiguous."""
    (height, width), (rows, columns, _, side, _) = pixels.shape[:2], patches.shape
    if library() is None:
        band = np.zeros((side, columns * side, 3), np.uint8)  # a row of patches, which stays in the caches
        for row in range(rows):
            part = pixels[row * side : (row + 1) * side]
            band[: len(part), :width] = part
            band[len(part) :] = 0
            for colour in range(3):
                patches[row, :, colour] = table[colour].take(band[:, :, colour]).reshape(side, columns, side).transpose(1, 0, 2)
        return
    given = address(pixels.ctypes.data), *map(i64, (pixels.strides[0], height, width)), address(table.ctypes.data)
    library().kimi_fill_patches(*given, address(patches.ctypes.data), *map(i64, (rows, columns, side)))
