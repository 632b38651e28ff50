"""INT4 words ⇄ weights: the `pack-quantized` format of compressed-tensors, as the published experts use it.

Eight 4-bit values lie in one int32 word along the input axis, lowest bits first. A stored value minus 8, times the
scale of its group of inputs, is the weight. The words stay packed in memory; a product unpacks what it needs.
"""

import torch
from torch import nn
from torch.nn import functional as F


VALUES_PER_WORD = 8
BITS = 4
ZERO = 8  # a stored 8 is the weight 0


def stored_int4(words: torch.Tensor) -> torch.Tensor:
    """Words → stored values, 0 … 15.

    Args:
        words (`torch.Tensor` of shape `(..., inputs / 8)`, int32).

    Returns:
        `torch.Tensor` of shape `(..., inputs)`, uint8.
    """
    # Bytes of a word lie lowest first in memory, as its values do: byte arithmetic is the shortest way.
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & (2**BITS - 1), pairs >> BITS), dim=-1).flatten(-2)


def unpack_int4(words: torch.Tensor) -> torch.Tensor:
    """Words → values -8 … 7 (the zero point is taken off), `(..., inputs)` int8; see [`stored_int4`]."""
    return stored_int4(words).view(torch.int8) - ZERO


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Stored values → words; the inverse of [`unpack_int4`].

    Args:
        values (`torch.Tensor` of shape `(..., inputs)`, any integer dtype, values -8 … 7, inputs a multiple of 8).

    Returns:
        `torch.Tensor` of shape `(..., inputs / 8)`, int32.
    """
    if values.shape[-1] % VALUES_PER_WORD:
        raise ValueError(f"the last axis must be a multiple of {VALUES_PER_WORD}, got shape {tuple(values.shape)}")
    shifts = torch.arange(0, VALUES_PER_WORD * BITS, BITS, dtype=torch.int32, device=values.device)
    nibbles = (values.to(torch.int32) + ZERO).unflatten(-1, (-1, VALUES_PER_WORD)) & (2**BITS - 1)
    # Bits do not overlap, so the sum is the union; int32 wraps the eighth value into the sign bit as intended.
    return (nibbles << shifts).sum(-1, dtype=torch.int32)


def dequantize_int4(words: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight that words and scales stand for: `value * scale`, rounded to bfloat16, which scales are stored in.

    That rounding is part of the format: the checkpoint stands for bfloat16 weights, whatever they are multiplied in.

    Args:
        words (`torch.Tensor` of shape `(outputs, inputs / 8)`, int32).
        scale (`torch.Tensor` of shape `(outputs, groups)`): bfloat16 values, whatever dtype somebody cast them to.
        dtype (`torch.dtype`): of the result.

    Returns:
        `torch.Tensor` of shape `(outputs, inputs)`.
    """
    scale = scale.to(torch.bfloat16)
    grouped = unpack_int4(words).to(scale.dtype).unflatten(-1, (scale.shape[-1], -1))  # (outputs, groups, group size)
    return grouped.mul_(scale.unsqueeze(-1)).flatten(-2).to(dtype)


def quantize_int4(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to words and scales: symmetric, scale = largest magnitude of the group / 7.5.

    The arithmetic is done in the weight's own dtype, and the values are rounded (half to even) against the scale as
    it is stored: what compressed-tensors does for symmetric 4-bit groups of a bfloat16 weight.

    Args:
        weight (`torch.Tensor` of shape `(outputs, inputs)`, floating point).
        group_size (`int`): inputs per scale.

    Returns:
        words `(outputs, inputs / 8)` int32, and scales `(outputs, inputs / group_size)` bfloat16.
    """
    grouped = weight.unflatten(-1, (-1, group_size))
    scale = (grouped.abs().amax(-1) / ((2**BITS - 1) / 2)).to(torch.bfloat16)
    # A group of zeros has no scale of its own: any positive one gives its zeros back.
    scale = torch.where(scale == 0, torch.finfo(torch.bfloat16).eps, scale)
    values = torch.round(grouped / scale.to(weight.dtype).unsqueeze(-1)).clamp_(-ZERO, 2**BITS - 1 - ZERO)
    return pack_int4(values.to(torch.int8).flatten(-2)), scale


class _Int4Product(torch.autograd.Function):
    """`x @ weight.T` whose backward pass unpacks the words again instead of keeping the weight alive."""

    @staticmethod
    def forward(ctx, x, words, scale):
        ctx.save_for_backward(words, scale)
        return F.linear(x, dequantize_int4(words, scale, x.dtype))

    @staticmethod
    def backward(ctx, grad):
        words, scale = ctx.saved_tensors
        return grad @ dequantize_int4(words, scale, grad.dtype), None, None


def int4_linear(x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T`, `(..., inputs)` → `(..., outputs)`; gradients flow to `x`.

    Args:
        x (`torch.Tensor`, floating point), words, scale: as [`dequantize_int4`] takes them.
    """
    return _Int4Product.apply(x, words, scale)


class CpuInt4:
    """A weight in the layout of PyTorch's own INT4 product for CPUs: for few rows, bounded by reading the words.

    Args:
        words, scale: as [`dequantize_int4`] takes them; outputs a multiple of 16, inputs of the group size, which must
            be 32, 64, 128 or 256 (see `fits`).
    """

    GROUP_SIZES = (32, 64, 128, 256)

    def __init__(self, words: torch.Tensor, scale: torch.Tensor):
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(stored_int4(words).to(torch.int32), 1)
        # The product computes (stored - 8) * scale + zero: our zero is the 8 itself.
        scale = scale.transpose(0, 1)  # (groups, outputs)
        self.scale_and_zero = torch.stack((scale, torch.zeros_like(scale)), dim=-1).contiguous()
        self.group_size = words.shape[1] * VALUES_PER_WORD // scale.shape[0]

    @classmethod
    def fits(cls, outputs: int, group_size: int) -> bool:
        return outputs % 16 == 0 and group_size in cls.GROUP_SIZES

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale_and_zero.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ weight.T`, `(rows, inputs)` bfloat16 → `(rows, outputs)` bfloat16."""
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, self.group_size, self.scale_and_zero)


class KeepDtype(nn.Module):
    """A module of which the parameters named in `kept` stay in their checkpoint's dtype when the model is cast."""

    kept: dict[str, torch.dtype] = {}

    def _apply(self, fn, recurse=True):
        before = {name: getattr(self, name).data for name in self.kept}
        super()._apply(fn, recurse)
        for name, dtype in self.kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != dtype:
                parameter.data = before[name].to(parameter.device, dtype)
        return self

    def restore_dtypes(self):
        """Undo what others do to parameters one by one, as `peft.prepare_model_for_kbit_training` does."""
        for name, dtype in self.kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)


class KimiK26Int4Linear(KeepDtype):
    """A linear layer without bias whose weight is INT4 words, and stays so.

    Args:
        in_features (`int`), out_features (`int`): as in `nn.Linear`.
        group_size (`int`): inputs per scale.

    Parameters (frozen; gradients flow through to the input):
        weight_packed `(out_features, in_features / 8)` int32, weight_scale `(out_features, in_features / group_size)`
        bfloat16, weight_shape `(2,)` int32 = out_features, in_features.
    """

    kept = {"weight_scale": torch.bfloat16}

    def __init__(self, in_features: int, out_features: int, group_size: int):
        super().__init__()
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size

        def frozen(*shape, dtype):
            return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)

        self.weight_packed = frozen(out_features, in_features // VALUES_PER_WORD, dtype=torch.int32)
        self.weight_scale = frozen(out_features, in_features // group_size, dtype=torch.bfloat16)
        self.weight_shape = frozen(2, dtype=torch.int32)

    @torch.no_grad()
    def set_weight(self, weight: torch.Tensor):
        """Round `weight`, `(out_features, in_features)` floating point, into this layer's words and scales."""
        words, scale = quantize_int4(weight, self.group_size)
        self.weight_packed.copy_(words)
        self.weight_scale.copy_(scale)
        self.weight_shape.copy_(torch.tensor([self.out_features, self.in_features]))

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight, `(out_features, in_features)` in `dtype`."""
        return dequantize_int4(self.weight_packed, self.weight_scale, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return int4_linear(x, self.weight_packed, self.weight_scale)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"
