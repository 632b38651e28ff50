"""MoonViT-3D and the projector against loops over patches, heads and frames."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

import kimi_k26.vision_kimi_k26 as vision
from kimi_k26 import KimiK26Config
from kimi_k26.native_kimi_k26 import library
from kimi_k26.tests.tiny_models import config_dict, fill
from kimi_k26.vision_kimi_k26 import KimiK26PositionTable, KimiK26Projector, KimiK26VisionTower, rotary_2d


def vision_config(attn="eager", **vision):
    given = config_dict()
    given["vision_config"] |= vision
    return KimiK26Config(**given, attn_implementation=attn).vision_config


def random_tower(attn="eager", dtype=torch.float64, **vision):
    return fill(KimiK26VisionTower(vision_config(attn, **vision))).to(dtype)


def random_clips(grids, seed=0, dtype=torch.float64):
    patches = sum(t * h * w for t, h, w in grids)
    pixels = torch.randn(patches, 3, 14, 14, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return pixels, torch.tensor(grids)


def cubic(t: float) -> list[float]:
    """Weights of the four neighbours at distance 1 + t, t, 1 - t, 2 - t for Keys' kernel with a = -0.75."""
    a = -0.75

    def near(x):
        return (a + 2) * x**3 - (a + 3) * x**2 + 1

    def far(x):
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a

    return [far(1 + t), near(t), near(1 - t), far(2 - t)]


def plain_resize(table: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Bicubic, pixel centres at halves, edges repeated, by loops."""
    height, width, channels = table.shape
    out = torch.zeros(rows, columns, channels, dtype=table.dtype)
    for i in range(rows):
        y = (i + 0.5) * height / rows - 0.5
        for j in range(columns):
            x = (j + 0.5) * width / columns - 0.5
            top, left = math.floor(y), math.floor(x)
            for di, wy in enumerate(cubic(y - top)):
                for dj, wx in enumerate(cubic(x - left)):
                    row = min(max(top - 1 + di, 0), height - 1)
                    column = min(max(left - 1 + dj, 0), width - 1)
                    out[i, j] += wy * wx * table[row, column]
    return out


def plain_layer_norm(x, norm, eps):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm.weight + norm.bias


def linear(x, module):
    return x @ module.weight.T + module.bias


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def plain_rotate(x, row, column):
    """One head's vector, pair by pair."""
    out, dim = x.clone(), len(x)
    for pair in range(dim // 2):
        angle = (column if pair % 2 == 0 else row) * 10_000 ** (-4 * (pair // 2) / dim)
        a, b = x[2 * pair], x[2 * pair + 1]
        out[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


@torch.no_grad()
def plain_tower(tower, pixels, grid) -> torch.Tensor:
    """One clip, patch by patch; `(tokens, 4, width)`."""
    config, (frames, rows, columns) = tower.config, grid
    width, heads = config.vt_hidden_size, config.vt_num_attention_heads
    size = width // heads
    places = [(t, i, j) for t in range(frames) for i in range(rows) for j in range(columns)]
    table = tower.patch_embed.pos_emb.weight
    table = table if table.shape[:2] == (rows, columns) else plain_resize(table, rows, columns)
    embed = tower.patch_embed.proj
    x = []
    for patch, (t, i, j) in zip(pixels, places):
        vector = (embed.weight * patch).sum((1, 2, 3)) + embed.bias + table[i, j]
        if frames > 1:
            angles = [t / 10_000 ** (2 * k / width) for k in range(width // 2)]
            vector = vector + torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
        x.append(vector)
    x = torch.stack(x)
    for block in tower.encoder.blocks:
        query, key, value = linear(plain_layer_norm(x, block.norm0, 1e-5), block.wqkv).split(width, dim=-1)
        out = []
        for head in range(heads):
            q, k, v = (part[:, head * size : (head + 1) * size] for part in (query, key, value))
            q = torch.stack([plain_rotate(vector, i, j) for vector, (_, i, j) in zip(q, places)])
            k = torch.stack([plain_rotate(vector, i, j) for vector, (_, i, j) in zip(k, places)])
            out.append((q @ k.T / math.sqrt(size)).softmax(-1) @ v)
        x = x + linear(torch.cat(out, -1), block.wo)
        x = x + linear(gelu_tanh(linear(plain_layer_norm(x, block.norm1, 1e-5), block.mlp.fc0)), block.mlp.fc1)
    x = plain_layer_norm(x, tower.encoder.final_layernorm, 1e-5)
    by_place = {place: vector for place, vector in zip(places, x)}
    tokens = []
    for i in range(0, rows, 2):
        for j in range(0, columns, 2):
            block = [(i, j), (i, j + 1), (i + 1, j), (i + 1, j + 1)]
            tokens.append(torch.stack([sum(by_place[t, a, b] for t in range(frames)) / frames for a, b in block]))
    return torch.stack(tokens)


# The model keeps angles and frame codes in float32.
NEAR = {"rtol": 0, "atol": 2e-5}
GRIDS = {
    "one token": [(1, 2, 2)],
    "flat": [(1, 2, 14)],
    "tall": [(1, 10, 4)],
    "the table": [(1, 6, 6)],
    "larger than the table": [(1, 8, 12)],
    "a clip of the table": [(4, 6, 6)],
    "clips": [(2, 4, 2), (3, 2, 6), (4, 2, 2)],
    "all mixed": [(1, 4, 6), (4, 2, 4), (1, 2, 2), (2, 6, 6), (3, 8, 4)],
}


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS.keys())
@torch.no_grad()
def test_tower_against_loops(grids, attn):
    tower, (pixels, grid_thws) = random_tower(attn), random_clips(grids)
    out = tower(pixels, grid_thws)
    assert out.shape == (sum(h * w // 4 for _, h, w in grids), 4, 16)
    clips = pixels.split([t * h * w for t, h, w in grids])
    expected = torch.cat([plain_tower(tower, clip, grid) for clip, grid in zip(clips, grids)])
    torch.testing.assert_close(out, expected, **NEAR)


def test_other_sizes_of_the_tower():
    changes = {"vt_hidden_size": 24, "mm_hidden_size": 24, "vt_num_attention_heads": 3, "vt_num_hidden_layers": 1}
    tower, (pixels, grid_thws) = random_tower(**changes), random_clips([(2, 4, 6)])
    torch.testing.assert_close(tower(pixels, grid_thws), plain_tower(tower, pixels, (2, 4, 6)), **NEAR)
    tower = random_tower(init_pos_emb_height=4, init_pos_emb_width=8, patch_size=7)
    pixels = torch.randn(2 * 4 * 8, 3, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(tower(pixels, torch.tensor([[2, 4, 8]])), plain_tower(tower, pixels, (2, 4, 8)), **NEAR)


@torch.no_grad()
def test_projector_against_its_formula():
    projector = fill(KimiK26Projector(vision_config())).double()
    x = torch.randn(5, 4, 16, dtype=torch.float64)
    first, second = projector.proj[0], projector.proj[2]
    rows = torch.cat([plain_layer_norm(x[:, i], projector.pre_norm, 1e-5) for i in range(4)], dim=-1)
    hidden = linear(rows, first)
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(projector(x), linear(hidden, second))


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@torch.no_grad()
def test_a_clip_does_not_see_what_else_is_in_the_call(attn):
    tower, grids = random_tower(attn, torch.float32), [(1, 4, 4), (3, 2, 6), (1, 2, 2), (4, 4, 2)]
    pixels, grid_thws = random_clips(grids, dtype=torch.float32)
    clips = pixels.split([t * h * w for t, h, w in grids])
    alone = [tower(clip, grid[None]) for clip, grid in zip(clips, grid_thws)]
    torch.testing.assert_close(tower(pixels, grid_thws), torch.cat(alone), rtol=1e-5, atol=1e-5)
    other_way = tower(torch.cat(clips[::-1]), grid_thws.flip(0))
    torch.testing.assert_close(other_way, torch.cat(alone[::-1]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_clip_of_one_picture_repeated_is_not_that_picture():
    """Only clips of several frames carry the code of their frames."""
    tower, (pixels, _) = random_tower(), random_clips([(1, 4, 4)])
    still = tower(pixels, torch.tensor([[1, 4, 4]]))
    clip = tower(pixels.repeat(2, 1, 1, 1), torch.tensor([[2, 4, 4]]))
    assert (still - clip).abs().max() > 0.01


def test_the_table():
    table = fill(KimiK26PositionTable(vision_config()))
    assert torch.equal(table((1, 6, 6)), table.weight.flatten(0, 1))
    resized = table((1, 4, 10)).detach()
    torch.testing.assert_close(resized, plain_resize(table.weight.detach(), 4, 10).flatten(0, 1), rtol=0, atol=1e-5)
    frames = table((3, 4, 10)).detach().view(3, 40, 16) - resized
    expected = torch.tensor([[f(t / 10_000 ** (2 * k / 16)) for f in (math.sin, math.cos) for k in range(8)] for t in range(3)])
    torch.testing.assert_close(frames, expected.unsqueeze(1).expand(-1, 40, -1), rtol=0, atol=1e-5)
    assert table.bfloat16()((2, 4, 4)).dtype == torch.bfloat16


def test_angles_by_hand():
    cos, sin = rotary_2d([(2, 2, 3)], 8, torch.device("cpu"))
    assert cos.shape == (12, 4) and cos.dtype == torch.float32
    row, column, slow = 1, 2, 10_000 ** (-4 / 8)
    expected = torch.tensor([column, row, column * slow, row * slow])
    for place in (5, 11):  # the same in both frames
        torch.testing.assert_close(cos[place], expected.cos())
        torch.testing.assert_close(sin[place], expected.sin())


@pytest.mark.parametrize("name, value", [("ROWS", 5), ("ROWS", 1), ("PATCHES", 30), ("PATCHES", 1), ("SCORES", 100)])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@torch.no_grad()
def test_pieces_give_what_the_whole_gives(name, value, attn, monkeypatch):
    tower, given = random_tower(attn), random_clips(GRIDS["all mixed"])
    whole = tower(*given)
    monkeypatch.setattr(vision, name, value)
    torch.testing.assert_close(tower(*given), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "patches, parts",
    [
        ([4, 4, 4], [[4, 4, 4]]),
        ([8, 8, 4, 4, 8], [[8, 8, 4], [4, 8]]),
        ([4, 48, 4, 4], [[4], [48], [4, 4]]),
        ([48, 20, 4], [[48], [20], [4]]),
    ],
)
def test_neighbouring_clips_go_together_while_there_is_room(patches, parts, monkeypatch):
    monkeypatch.setattr(vision, "PATCHES", 20)
    found = vision.some_at_a_time([(1, 2, count // 2) for count in patches])
    assert [[math.prod(grid) for grid in part] for part in found] == parts


@torch.no_grad()
def test_a_hook_sees_all_rows_at_once(monkeypatch):
    monkeypatch.setattr(vision, "ROWS", 4)
    tower, seen = random_tower(), []
    block = tower.encoder.blocks[0]
    block.mlp.fc0.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    tower(*random_clips([(1, 4, 4), (2, 2, 2)]))
    assert seen == [24]


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_no_tensor_holds_every_pair_of_patches(dtype, attn, monkeypatch):
    monkeypatch.setattr(vision, "SCORES", 2**14)
    tower, given = random_tower(attn, dtype, vt_num_hidden_layers=1), random_clips([(1, 32, 32)], dtype=dtype)
    with Largest() as largest:
        tower(*given)
    assert given[0].numel() <= largest.numbers < 2**20 // 1.5  # the pixels are the most; pairs would be 2**20 to a head


@pytest.mark.parametrize("rows", [1024, 5])
def test_gradients(rows, monkeypatch):
    monkeypatch.setattr(vision, "ROWS", rows)
    tower, (pixels, grid_thws) = random_tower(vt_num_hidden_layers=1), random_clips([(2, 2, 4), (1, 2, 2)])
    names = ["patch_embed.pos_emb.weight", "patch_embed.proj.bias", "encoder.blocks.0.wqkv.weight"]
    weights = [tower.get_parameter(name).detach().requires_grad_() for name in names]

    def call(pixels, *weights):
        return torch.func.functional_call(tower, dict(zip(names, weights)), (pixels, grid_thws))

    assert torch.autograd.gradcheck(call, (pixels.requires_grad_(), *weights), fast_mode=True)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_is_near(dtype, attn):
    pixels, grid_thws = random_clips([(1, 4, 6), (3, 2, 4)])
    exact, low = random_tower()(pixels, grid_thws), random_tower(attn, dtype)(pixels.float(), grid_thws)
    assert low.dtype == dtype and low.isfinite().all()
    assert (low.double() - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.skipif(library() is None, reason="no compiler, or a processor without AVX2")
@pytest.mark.parametrize("heads, size", [(2, 72), (3, 8), (1, 20), (16, 72)])
@pytest.mark.parametrize("patches", [1, 4, 33, 130, 517])
@torch.no_grad()
def test_native_attention_sees_all_patches(patches, heads, size):
    generator = torch.Generator().manual_seed(patches)
    query, key, value = torch.randn(3, 1, heads, patches, size, generator=generator).bfloat16()
    assert vision.serves(query)
    scale = 2 * size**-0.5
    exact = vision.eager_attention(query.double(), key.double(), value.double(), scale)
    apart = {
        name: (attend(query, key, value, scale=scale).double() - exact).square().mean().sqrt()
        for name, attend in (("native", vision.native_attention), ("plain", F.scaled_dot_product_attention))
    }
    assert apart["native"] <= 1.1 * apart["plain"] + 1e-4 < 0.01


def emulated_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """What the library's flash attention functions do with clips of several lengths in one row, in plain loops."""
    ends = kwargs.pop("cu_seq_lens_q")
    assert attention_mask is None and kwargs.pop("is_causal") is False and not module.is_causal and dropout == 0.0
    assert ends.dtype == torch.int32 and torch.equal(ends, kwargs.pop("cu_seq_lens_k"))
    assert kwargs.pop("max_length_q") == kwargs.pop("max_length_k") == int(ends.diff().max()) and not kwargs
    assert query.shape[0] == 1 and query.shape[2] == int(ends[-1])
    parts = []
    for start, stop in zip(ends.tolist(), ends.tolist()[1:]):
        q, k, v = (part[:, :, start:stop] for part in (query, key, value))
        parts.append((q @ k.transpose(-1, -2) * scaling).softmax(-1) @ v)
    return torch.cat(parts, dim=2).transpose(1, 2), None


AttentionInterface.register("emulated_vision_attention", emulated_attention)


@torch.no_grad()
def test_flash_attention_gets_the_clips():
    pixels, grid_thws = random_clips(GRIDS["all mixed"])
    out = random_tower("emulated_vision_attention")(pixels, grid_thws)
    torch.testing.assert_close(out, random_tower()(pixels, grid_thws), **NEAR)


@pytest.mark.parametrize(
    ("pixels", "grids", "words"),
    [
        ((8, 3, 14, 14), [[1, 2, 2]], ["describes 4 patches", "has 8"]),
        ((4, 3, 14, 14), [[5, 2, 2]], [r"grid_thws\[0\]", "5 frames", "1 to 4"]),
        ((4, 3, 14, 14), [[0, 2, 2]], [r"grid_thws\[0\]", "0 frames"]),
        ((10, 3, 14, 14), [[1, 2, 2], [1, 3, 2]], [r"grid_thws\[1\]", "3 x 2", "multiple of 2"]),
        ((4, 3, 14, 14), [[1, 0, 2]], ["0 x 2"]),
        ((4, 3, 14, 14), [[1, -2, -2]], ["-2 x -2"]),
        ((4, 3, 7, 14), [[1, 2, 2]], [r"\(patches, 3, 14, 14\)", r"\(4, 3, 7, 14\)"]),
        ((3, 28, 28), [[1, 2, 2]], [r"\(3, 28, 28\)"]),
        ((4, 3, 14, 14), [1, 2, 2], [r"\(clips, 3\)", r"\(3,\)"]),
        ((4, 3, 14, 14), [[2, 2]], [r"\(clips, 3\)"]),
        ((0, 3, 14, 14), torch.empty(0, 3), ["one clip or more", r"\(0, 3\)"]),
    ],
)
def test_sizes_that_do_not_fit_are_named(pixels, grids, words):
    for word in words:
        with pytest.raises(ValueError, match=word):
            random_tower(dtype=torch.float32)(torch.randn(pixels), torch.as_tensor(grids, dtype=torch.long))


@torch.no_grad()
def test_other_dtypes_of_the_inputs():
    tower, (pixels, grid_thws) = random_tower(dtype=torch.float32), random_clips([(1, 4, 4)])
    out = tower(pixels.double(), grid_thws.to(torch.int32))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, tower(pixels.float(), grid_thws))
    assert F.mse_loss(tower(pixels.bfloat16(), grid_thws), out) < 1e-3
