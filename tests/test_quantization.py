"""INT4 words against compressed-tensors, written-out arithmetic and the golden checkpoint."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from kimi_k26.quantization_kimi_k26 import (
    KimiK26Int4Linear,
    dequantize_int4,
    pack_int4,
    quantize_int4,
    unpack_int4,
)


def random_values(*shape, seed=0):
    return torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def layer(inputs=64, outputs=24, group_size=32, seed=0):
    made = KimiK26Int4Linear(inputs, outputs, group_size)
    generator = torch.Generator().manual_seed(seed)
    made.set_weight(torch.randn(outputs, inputs, generator=generator))
    return made


@pytest.mark.parametrize("shape", [(1, 8), (5, 64), (48, 256), (3, 2, 16)])
def test_pack_and_unpack_are_inverse(shape):
    values = random_values(*shape)
    words = pack_int4(values)
    assert words.dtype == torch.int32 and words.shape == (*shape[:-1], shape[-1] // 8)
    assert torch.equal(unpack_int4(words), values) and unpack_int4(words).dtype == torch.int8
    assert torch.equal(pack_int4(values.long()), words)


def test_order_of_bits():
    # Stored values 1, 2, … 8 from the lowest bits up; the eighth lies in the sign bit.
    stored = torch.arange(1, 9)
    assert pack_int4(stored - 8).tolist() == [0x87654321 - 2**32]
    assert unpack_int4(torch.tensor([0x87654321 - 2**32], dtype=torch.int32)).tolist() == [-7, -6, -5, -4, -3, -2, -1, 0]


def test_a_ragged_axis_is_refused():
    with pytest.raises(ValueError, match=r"multiple of 8.*\(2, 12\)"):
        pack_int4(random_values(2, 12))


def test_words_of_compressed_tensors():
    ct = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    values = random_values(40, 96)
    words = ct.pack_to_int32(values, 4)
    assert torch.equal(pack_int4(values), words)
    back = ct.unpack_from_int32(words, 4, torch.Size((40, 96)))
    assert torch.equal(unpack_int4(words), back)


def test_words_of_the_golden_checkpoint(golden):
    """Every weight by loops in Python integers, for one projection of the published layout."""
    tensors = {}
    for file in sorted((golden / "tiny-int4").glob("model-*.safetensors")):
        tensors |= load_file(file)
    name = "language_model.model.layers.1.mlp.experts.3.down_proj"
    words, scale = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"]
    outputs, inputs = tensors[f"{name}.weight_shape"].tolist()
    assert words.shape == (outputs, inputs // 8) and scale.shape == (outputs, inputs // 32)
    weight = dequantize_int4(words, scale, torch.float32)
    for row in (0, 1, outputs - 1):
        for column in range(inputs):
            word = int(words[row, column // 8]) & 0xFFFFFFFF
            stored = (word >> (4 * (column % 8))) & 0xF
            expected = torch.tensor(float(stored - 8)).bfloat16() * scale[row, column // 32]
            assert weight[row, column] == expected.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dequantized_weight_is_rounded_to_the_dtype_of_the_scale(dtype):
    made = layer()
    weight = made.dequantize(dtype)
    exact = unpack_int4(made.weight_packed).double().unflatten(-1, (-1, 32)) * made.weight_scale.double().unsqueeze(-1)
    assert weight.dtype == dtype and weight.shape == (24, 64)
    assert torch.equal(weight, exact.flatten(-2).bfloat16().to(dtype))


@pytest.mark.parametrize("group_size", [8, 32, 64])
def test_quantize(group_size):
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    words, scale = quantize_int4(weight, group_size)
    assert words.shape == (16, 8) and words.dtype == torch.int32
    assert scale.shape == (16, 64 // group_size) and scale.dtype == torch.bfloat16
    back = dequantize_int4(words, scale, torch.float32)
    step = scale.float().repeat_interleave(group_size, dim=1)
    # Half a step, but a full one at the top, where 7.5 scales are cut to 7; and the roundings of bfloat16.
    assert ((back - weight).abs() <= torch.where(weight.abs() / step > 7, 1.0, 0.5) * step + 0.01 * weight.abs()).all()
    largest = weight.unflatten(-1, (-1, group_size)).abs().amax(-1)
    assert torch.equal(scale, (largest / 7.5).bfloat16())


def test_quantize_gives_back_what_it_made():
    weight = layer(seed=2).dequantize(torch.float32)
    words, scale = quantize_int4(weight, 32)
    again = dequantize_int4(words, scale, torch.float32)
    assert (again - weight).abs().max() <= scale.float().max()


def test_a_group_of_zeros_stays_zero():
    weight = torch.randn(4, 16)
    weight[1, :8] = 0
    words, scale = quantize_int4(weight, 8)
    assert scale.float().min() > 0
    assert torch.equal(dequantize_int4(words, scale, torch.float32)[1, :8], torch.zeros(8))


def test_quantize_as_compressed_tensors_does():
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    from compressed_tensors.quantization import QuantizationArgs

    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    arguments = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    words, scale = quantize_int4(weight, 32)
    theirs = forward.quantize(
        weight, scale, torch.zeros_like(scale, dtype=torch.int8), arguments, dtype=torch.int8
    )
    assert torch.equal(unpack_int4(words), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_product(dtype):
    made, x = layer(), torch.randn(2, 5, 64, dtype=dtype)
    out = made(x)
    assert out.dtype == dtype and out.shape == (2, 5, 24)
    assert torch.equal(out, F.linear(x, made.dequantize(dtype)))


def test_gradient_of_the_product():
    made = layer(16, 6, 8)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(made, (x,))
    assert made.weight_scale.grad is None and not made.weight_packed.requires_grad


def test_gradient_needs_no_weight_between_the_passes():
    made, kept = layer(256, 256), []
    x = torch.randn(1, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        made(x).sum().backward()
    assert kept and max(kept) <= 256 * 256 // 8


CASTS = [lambda m: m.float(), lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.to(torch.float16)]


@pytest.mark.parametrize("cast", CASTS, ids=["float", "half", "bfloat16", "double", "to"])
def test_casts_leave_words_and_scales(cast):
    made = layer()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    cast(made)
    after = made.state_dict()
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        "weight_packed": torch.int32,
        "weight_scale": torch.bfloat16,
        "weight_shape": torch.int32,
    }
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert isinstance(made.weight_scale, torch.nn.Parameter)


def test_moves_still_move():
    made = layer().to("meta", torch.float16)
    assert {p.device.type for p in made.parameters()} == {"meta"} and made.weight_scale.dtype == torch.bfloat16
    filled = made.to_empty(device="cpu")
    assert filled.weight_scale.device.type == "cpu" and filled.weight_scale.dtype == torch.bfloat16
    assert "group_size=32" in repr(filled)


def test_set_weight():
    made, weight = layer(), torch.randn(24, 64)
    made.set_weight(weight)
    words, scale = quantize_int4(weight, 32)
    assert torch.equal(made.weight_packed, words) and torch.equal(made.weight_scale, scale)
    assert made.weight_shape.tolist() == [24, 64]
