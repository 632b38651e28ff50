"""Scaling of RGB pictures: Pillow's bicubic filter, to the last bit and several times as fast.

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

// `in`, its rows of `width` bytes `in_row` apart -> `out` (new_height, width), its rows `out_row` apart.
extern "C" void kimi_scale_columns(const u8* in, i64 in_row, i64 width, u8* out, i64 out_row, i64 new_height, Taps taps) {
    for (i64 y = 0; y < new_height; y++) {
        const u8* from = in + taps.first[y] * in_row;
        const i32* weight = taps.weight + y * taps.most;
        u8* to = out + y * out_row;
        const ints half = ints{} + (1 << (BITS - 1));
        i64 at = 0;
        for (; at + 64 <= width; at += 64) {
            ints a = half, b = half, c = half, d = half;
            for (i32 k = 0; k < taps.count[y]; k++) {
                const u8* row = from + k * in_row + at;
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
            for (i32 k = 0; k < taps.count[y]; k++) sum += wide(load(from + k * in_row + at, width - at)) * weight[k];
            store(to + at, rounded(sum), width - at);
        }
    }
}
"""

class Taps(ctypes.Structure):
    """`Taps` of the source."""

    _fields_ = [("first", address), ("count", address), ("weight", address), ("most", i64)]


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


def scaled_strips(picture: Picture, edges: list[tuple[int, int]], height: int, run: Callable = map) -> list[np.ndarray]:
    """Strips of columns, from `left` to `right` of each of `edges`, of a picture scaled to `height` and the last edge:
    uint8 (height, right - left, 3). `run` may make them at once, as the `map` of a pool of threads does.

    Bands of rows, then strips of columns, give the pixels of the whole. Where much more is lost in height than in
    width, newer versions of Pillow begin with the columns, and then Pillow itself is asked.
    """
    width, (old_width, old_height) = edges[-1][1], size_of(picture)
    same = (old_width, old_height) == (width, height)
    if same or old_height - height > 2 * (old_width - width) or library() is None:
        if isinstance(picture, np.ndarray):
            picture = picture if same else Image.fromarray(picture)
        pixels = np.asarray(picture if same else picture.resize((width, height), Image.Resampling.BICUBIC))
        return [pixels[:, left:right] for left, right in edges]

    middle = np.empty((old_height, width, 3), np.uint8)

    def along_rows(band: tuple[int, int]) -> None:
        if isinstance(picture, np.ndarray):
            scale_rows(picture[slice(*band)], middle[slice(*band)])
        else:
            scale_rows(np.asarray(picture.crop((0, band[0], old_width, band[1]))), middle[slice(*band)])

    def along_columns(edge: tuple[int, int]) -> np.ndarray:
        strip = np.empty((height, edge[1] - edge[0], 3), np.uint8)
        scale_columns(middle[:, slice(*edge)], strip)
        return strip

    list(run(along_rows, cut(old_height, len(edges))))
    return list(run(along_columns, edges))


def scale_rows(pixels: np.ndarray, out: np.ndarray) -> None:
    """uint8 (height, width, 3), each row contiguous -> `out` (height, new width, 3), contiguous."""
    (height, width), new_width = pixels.shape[:2], out.shape[1]
    given = address(pixels.ctypes.data), *map(i64, (pixels.strides[0], height, width))
    if library().kimi_scale_rows(*given, address(out.ctypes.data), i64(new_width), taps(width, new_width)):
        raise MemoryError(f"no memory to scale a picture of {width}x{height} pixels")


def scale_columns(pixels: np.ndarray, out: np.ndarray) -> None:
    """uint8 (height, width, 3), each row contiguous -> `out` (new height, width, 3), each row contiguous."""
    (height, width), new_height = pixels.shape[:2], out.shape[0]
    given = address(pixels.ctypes.data), i64(pixels.strides[0]), i64(3 * width)
    made = address(out.ctypes.data), i64(out.strides[0]), i64(new_height)
    library().kimi_scale_columns(*given, *made, taps(height, new_height))
