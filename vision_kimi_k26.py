"""MoonViT-3D and the projector: patches of pictures and video clips → media features of the text model's width.

No tensor grows with the square of the patches: attention is the CPU's own kernel or PyTorch's, and where it is written out
it takes some queries at a time. Clips do not see each other, so many of them pass through a part at a time.
"""

from collections.abc import Callable
from math import prod

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_kimi_k26 import rotate_pairs
from .configuration_kimi_k26 import KimiK26VisionConfig
from .decoding_kimi_k26 import apply_linear, serves
from .experts_kimi_k26 import at_least_float32
from .native_kimi_k26 import attention, is_plain


LAYER_NORM_EPS = 1e-5  # of the tower; the projector's own stands in the config
ROTARY_BASE = 10_000.0
FRAME_BASE = 10_000.0
PATCHES = 16_384  # through the tower at a time, but no less than a clip
ROWS = 1024  # through a linear layer at a time on a CPU: what comes out stays in its caches
SCORES = 2**24  # of attention that is written out, held at a time

Grid = tuple[int, int, int]  # frames, patch rows, patch columns


class KimiK26PositionTable(nn.Module):
    """A learned table over the picture, resized to each clip, plus a fixed sine and cosine code for the frame."""

    def __init__(self, config: KimiK26VisionConfig):
        super().__init__()
        size = (config.init_pos_emb_height, config.init_pos_emb_width, config.vt_hidden_size)
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, grid: Grid) -> torch.Tensor:
        """The code of each patch of a clip, `(frames * rows * columns, width)`."""
        frames, rows, columns = grid
        table = self.weight
        if (rows, columns) != tuple(table.shape[:2]):
            channels_first = table.to(at_least_float32(table.dtype)).permute(2, 0, 1).unsqueeze(0)
            table = F.interpolate(channels_first, size=(rows, columns), mode="bicubic").squeeze(0).permute(1, 2, 0)
        codes = table.flatten(0, 1)
        if frames > 1:
            codes = codes + self.frame_codes(frames).unsqueeze(1)  # (frames, rows * columns, width)
        return codes.reshape(-1, codes.shape[-1]).to(self.weight.dtype)

    def frame_codes(self, frames: int) -> torch.Tensor:
        """`(frames, width)` float32: the sines of frame · 10000^(-2i/width), then the cosines."""
        width, device = self.weight.shape[-1], self.weight.device
        frequencies = FRAME_BASE ** (-torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
        angles = torch.arange(frames, dtype=torch.float32, device=device).unsqueeze(1) * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class KimiK26PatchEmbed(nn.Module):
    """Pixels → patches with the code of their place."""

    def __init__(self, config: KimiK26VisionConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, config.vt_hidden_size, config.patch_size, stride=config.patch_size)
        self.pos_emb = KimiK26PositionTable(config)

    def forward(self, pixel_values: torch.Tensor, grids: list[Grid]) -> torch.Tensor:
        """`(patches, 3, patch_size, patch_size)` → `(patches, width)`."""
        codes = {grid: self.pos_emb(grid) for grid in dict.fromkeys(grids)}
        patches = self.proj(pixel_values).flatten(1)
        return patches + torch.cat([codes[grid] for grid in grids])


def rotary_2d(grids: list[Grid], head_dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each `(patches, head_dim / 2)` float32, that turn the interleaved pairs of a head.

    Pair 2i turns by column · f_i and pair 2i+1 by row · f_i, with f_i = 10000^(-4i / head_dim); frames turn alike.
    """
    frequencies = ROTARY_BASE ** (-torch.arange(0, head_dim, 4, dtype=torch.float32, device=device) / head_dim)
    angles = []
    for frames, rows, columns in grids:
        row, column = torch.meshgrid(
            torch.arange(rows, dtype=torch.float32, device=device),
            torch.arange(columns, dtype=torch.float32, device=device),
            indexing="ij",
        )
        place = torch.stack((column, row), dim=-1).flatten(0, 1)  # (rows * columns, 2)
        turns = frequencies.unsqueeze(-1) * place.unsqueeze(1)  # (rows * columns, head_dim / 4, 2)
        angles.append(turns.flatten(1).repeat(frames, 1))
    angles = torch.cat(angles)
    return angles.cos(), angles.sin()


class KimiK26VisionMLP(nn.Module):
    def __init__(self, config: KimiK26VisionConfig):
        super().__init__()
        self.fc0 = nn.Linear(config.vt_hidden_size, config.vt_intermediate_size)
        self.fc1 = nn.Linear(config.vt_intermediate_size, config.vt_hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return apply_linear(self.fc1, apply_linear(self.fc0, x, gelu=True))


class KimiK26VisionBlock(GradientCheckpointingLayer):
    """Attention within each clip, then the network, each over normed patches and added to them."""

    def __init__(self, config: KimiK26VisionConfig):
        super().__init__()
        self.config = config
        self.heads = config.vt_num_attention_heads
        self.scaling = (config.vt_hidden_size // self.heads) ** -0.5
        self.is_causal = False  # read by the library's attention functions
        self.norm0 = nn.LayerNorm(config.vt_hidden_size, eps=LAYER_NORM_EPS)
        self.norm1 = nn.LayerNorm(config.vt_hidden_size, eps=LAYER_NORM_EPS)
        self.wqkv = nn.Linear(config.vt_hidden_size, 3 * config.vt_hidden_size)
        self.wo = nn.Linear(config.vt_hidden_size, config.vt_hidden_size)
        self.mlp = KimiK26VisionMLP(config)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """`(patches, width)` → the same; `lengths` are the patches of each clip."""
        # A hook is for all rows: it may bring the weights, or look at what passes.
        step = ROWS if x.device.type == "cpu" and all(map(is_plain, self.modules())) else len(x)
        query, key, value = in_blocks(self.heads_of, step, x, cos, sin)
        out = self.attention(query, key, value, lengths)
        return in_blocks(self.after_attention, step, x, out)[0]

    def heads_of(self, x, cos, sin):
        query, key, value = apply_linear(self.wqkv, self.norm0(x)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return rotate_pairs(query, cos, sin), rotate_pairs(key, cos, sin), value  # (rows, heads, head_dim)

    def after_attention(self, x, out):
        x = apply_linear(self.wo, out, residual=x)
        return (x + self.mlp(self.norm1(x)),)

    def attention(self, query, key, value, lengths):
        """`(patches, heads, head_dim)` each → `(patches, width)`."""
        implementation = self.config._attn_implementation
        if implementation not in (None, "eager", "sdpa"):
            return self.library_attention(implementation, query, key, value, lengths)
        attend = eager_attention
        if implementation == "sdpa":
            attend = native_attention if serves(query) else F.scaled_dot_product_attention
        clips = []
        for qkv in zip(query.split(lengths), key.split(lengths), value.split(lengths)):
            out = attend(*(part.transpose(0, 1).unsqueeze(0) for part in qkv), scale=self.scaling)
            clips.append(out.squeeze(0).transpose(0, 1).flatten(1))  # from (1, heads, patches, head_dim)
        return clips[0] if len(clips) == 1 else torch.cat(clips)

    def library_attention(self, implementation, query, key, value, lengths):
        """Attention over clips of any length in one call, as the flash attention functions of the library take it."""
        ends = torch.tensor([0, *lengths], device=query.device).cumsum(0).to(torch.int32)
        out, _ = ALL_ATTENTION_FUNCTIONS[implementation](
            self,
            *(part.transpose(0, 1).unsqueeze(0) for part in (query, key, value)),
            attention_mask=None,
            scaling=self.scaling,
            dropout=0.0,
            cu_seq_lens_q=ends,
            cu_seq_lens_k=ends,
            max_length_q=max(lengths),
            max_length_k=max(lengths),
            is_causal=False,
        )
        return out.reshape(query.shape[0], -1)


def in_blocks(function: Callable, step: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The results of `function` on `step` rows of all `tensors` at a time, joined: a list, as it gives a tuple."""
    results = zip(*(function(*rows) for rows in zip(*(tensor.split(step) for tensor in tensors))))
    return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in results]


def eager_attention(query, key, value, scale):
    """Attention written out: `softmax(q k^T * scale) v`, the softmax in float32. `(1, heads, patches, head_dim)` each."""
    outs = []
    for some in query.split(max(1, SCORES // (key.shape[1] * key.shape[2])), dim=2):
        weights = (some @ key.transpose(-1, -2) * scale).softmax(-1, dtype=at_least_float32(query.dtype))
        outs.append(weights.to(value.dtype) @ value)
    return torch.cat(outs, dim=2)


def native_attention(query, key, value, scale):
    """As `eager_attention`, by the kernel of causal attention: queries that come after all keys see every one of them."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))  # (1, patches, heads, head_dim)
    none = key[..., :0]  # no part of queries and keys stands apart
    return attention(query, none, key, none[:, :, 0], value, key.shape[1], None, scale).transpose(1, 2)


class KimiK26VisionEncoder(nn.Module):
    def __init__(self, config: KimiK26VisionConfig):
        super().__init__()
        self.head_dim = config.vt_hidden_size // config.vt_num_attention_heads
        self.blocks = nn.ModuleList(KimiK26VisionBlock(config) for _ in range(config.vt_num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.vt_hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, x: torch.Tensor, grids: list[Grid]) -> torch.Tensor:
        """`(patches, width)` → the same, normed; `grids` of the clips that they are."""
        cos, sin = rotary_2d(grids, self.head_dim, x.device)
        lengths = [prod(grid) for grid in grids]
        for block in self.blocks:
            x = block(x, cos, sin, lengths)
        return self.final_layernorm(x)


def some_at_a_time(grids: list[Grid]) -> list[list[Grid]]:
    """Neighbouring clips together, as many as have `PATCHES`, or one that has more."""
    parts, room = [], 0
    for grid in grids:
        if prod(grid) > room:
            parts.append([])
            room = PATCHES
        parts[-1].append(grid)
        room -= prod(grid)
    return parts


class KimiK26VisionTower(nn.Module):
    """Patches → merged patches: attention within a clip, the mean over its frames, and the patches of a `merge_kernel_size` side by side."""

    def __init__(self, config: KimiK26VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = KimiK26PatchEmbed(config)
        self.encoder = KimiK26VisionEncoder(config)

    def forward(self, pixel_values: torch.Tensor, grid_thws: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(patches, 3, patch_size, patch_size)`, floating point).
            grid_thws (`torch.Tensor` of shape `(clips, 3)`, int64): frames, patch rows, patch columns of each clip.

        Returns:
            `torch.Tensor` of shape `(tokens, merged patches, vt_hidden_size)`: for each clip rows · columns / merged patches
            tokens, whatever its number of frames.

        Raises:
            ValueError: naming the clip, for sizes the tower cannot take or that do not fit the patches.
        """
        grids = self.check(pixel_values, grid_thws)
        parts = some_at_a_time(grids)
        pixels = pixel_values.split([sum(map(prod, part)) for part in parts])
        return torch.cat([self.see(*some) for some in zip(pixels, parts)])

    def see(self, pixel_values: torch.Tensor, grids: list[Grid]) -> torch.Tensor:
        """The same for some of the clips, of these frames, rows and columns."""
        x = self.patch_embed(pixel_values.to(self.patch_embed.proj.weight.dtype), grids)
        return self.merge(self.encoder(x, grids), grids)

    def check(self, pixel_values: torch.Tensor, grid_thws: torch.Tensor) -> list[Grid]:
        size = self.config.patch_size
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(f"pixel_values must be (patches, 3, {size}, {size}), got {tuple(pixel_values.shape)}")
        if grid_thws.dim() != 2 or grid_thws.shape[-1] != 3 or len(grid_thws) == 0:
            raise ValueError(f"grid_thws must be (clips, 3), one clip or more, got {tuple(grid_thws.shape)}")
        grids = [tuple(grid) for grid in grid_thws.tolist()]
        row_step, column_step = self.config.merge_kernel_size
        for index, (frames, rows, columns) in enumerate(grids):
            if not 1 <= frames <= self.config.init_pos_emb_time:
                raise ValueError(
                    f"grid_thws[{index}] has {frames} frames; a clip has 1 to {self.config.init_pos_emb_time}"
                )
            if rows < 1 or columns < 1 or rows % row_step or columns % column_step:
                raise ValueError(
                    f"grid_thws[{index}] is {rows} x {columns} patches; rows must be a positive multiple of "
                    f"{row_step} and columns of {column_step}"
                )
        patches = sum(frames * rows * columns for frames, rows, columns in grids)
        if patches != pixel_values.shape[0]:
            raise ValueError(f"grid_thws describes {patches} patches, but pixel_values has {pixel_values.shape[0]}")
        return grids

    def merge(self, x: torch.Tensor, grids: list[Grid]) -> torch.Tensor:
        """`(patches, width)` → `(tokens, merged patches, width)`."""
        row_step, column_step = self.config.merge_kernel_size
        merged = []
        for clip, (frames, rows, columns) in zip(x.split([t * h * w for t, h, w in grids]), grids):
            clip = clip.unflatten(0, (frames, rows // row_step, row_step, columns // column_step, column_step))
            clip = clip.mean(0).transpose(1, 2)  # (rows / step, columns / step, row step, column step, width)
            merged.append(clip.flatten(2, 3).flatten(0, 1))
        return torch.cat(merged)


class KimiK26Projector(nn.Module):
    """Merged patches → features of the text model's width: each patch is normed, then those of a token go side by side."""

    def __init__(self, config: KimiK26VisionConfig):
        super().__init__()
        rows, columns = config.merge_kernel_size
        width = config.mm_hidden_size * rows * columns
        self.pre_norm = nn.LayerNorm(config.mm_hidden_size, eps=config.projector_ln_eps)
        self.proj = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.text_hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(tokens, merged patches, width)` → `(tokens, text_hidden_size)`."""
        return self.proj(self.pre_norm(x).flatten(1))
