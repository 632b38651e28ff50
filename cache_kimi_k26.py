"""Latents in the library's caches: one latent and one rotary key for each token and layer, as keys and values of one head."""

import math
from collections.abc import Iterator
from typing import Optional

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer

from .memory_kimi_k26 import new_room


SCALE_GROUP = 64  # numbers of a latent that share one scale, where so many divide it
BLOCK = 1024  # tokens that are rounded or restored at once, so that little is held meanwhile


class GrowingLayer(DynamicLayer):
    """A dynamic layer with room ahead, so that one more token is written in its place instead of copying all.

    `keys` and `values` are views of what is held, made when somebody asks; whoever replaces them (beam search, repeating)
    finds a new room made for them at the next token. After cropping the tokens that come next take the place of those that
    were cut off, in views from before, too: clone what is to be kept.
    """

    def __init__(self, *args, **kwargs):
        self._room: Optional[tuple[torch.Tensor, torch.Tensor]] = None
        self._length = 0  # tokens that stand at the beginning of the room
        self._views: list[Optional[torch.Tensor]] = [None, None]
        self._replaced = False  # whether somebody has put others in the place of the views
        super().__init__(*args, **kwargs)

    def _view(self, which: int) -> Optional[torch.Tensor]:
        if self._views[which] is None and self._room is not None:
            self._views[which] = self._room[which].narrow(2, 0, self._length)
        return self._views[which]

    def _replace(self, which: int, tensor: Optional[torch.Tensor]):
        self._views[which], self._replaced = tensor, True

    keys = property(lambda self: self._view(0), lambda self, tensor: self._replace(0, tensor))
    values = property(lambda self: self._view(1), lambda self, tensor: self._replace(1, tensor))

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self._replaced else self._length

    def _holds(self, sequences: int, widths: tuple[int, int]) -> bool:
        held = (self.keys, self.values) if self._replaced else self._room
        return all((part.size(0), part.size(1), part.size(3)) == (sequences, 1, width) for part, width in zip(held, widths))

    def extend(self, like: torch.Tensor, widths: tuple[int, int], new: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Let `keys` and `values` cover `new` more tokens, which the caller writes.

        Args:
            like (`torch.Tensor` of shape `(batch, …)`): of the dtype and on the device of what is held.
            widths: of what is held of a latent and of a rotary key.

        Returns:
            Two tensors `(batch, 1, length or more, width)`, which begin with what is held of the first token, and how many
            tokens there were.

        Raises:
            ValueError: it holds other sequences or widths.
        """
        if not self.is_initialized:
            self.dtype, self.device = like.dtype, like.device
            self.keys, self.values = (like.new_empty(like.shape[0], 1, 0, width) for width in widths)
            self.is_initialized = True
        elif not self._holds(like.shape[0], widths):
            shapes = f"{tuple(self.keys.shape)} and {tuple(self.values.shape)}"
            raise ValueError(f"the cache holds {shapes}: no tokens of {like.shape[0]} sequences, {widths[0]} and {widths[1]} wide, can follow")
        before = self.keys.size(2) if self._replaced else self._length
        if not self._fits(before + new):
            size = before + new + max(64, (before + new) // 8)
            rooms = tuple(new_room(like, (like.shape[0], 1, size, width)) for width in widths)
            for room, held in zip(rooms, (self.keys, self.values)):
                room[:, :, :before] = held
            self._room = rooms
        self._length, self._views, self._replaced = before + new, [None, None], False
        return *self._room, before

    def _fits(self, length: int) -> bool:
        """Whether what is held still stands at the beginning of a room with space for `length` tokens."""
        if self._room is None or length > self._room[0].size(2) or not is_writable(self._room[0]):
            return False
        return not self._replaced or all(
            held.data_ptr() == room.data_ptr() and held.stride() == room.stride() and held.shape[0] == room.shape[0]
            for held, room in zip((self.keys, self.values), self._room)
        )

    def __copy__(self):
        """With the same tokens, and a room of its own for those that come."""
        copied = type(self).__new__(type(self))
        copied.__dict__ |= self.__dict__ | {"_room": None, "_views": [self.keys, self.values], "_replaced": True}
        return copied

    def reset(self):
        """Forget all tokens."""
        self.keys = self.values = self._room = None
        self.is_initialized = False


def is_writable(tensor: torch.Tensor) -> bool:
    """Whether PyTorch lets this be written in place here: what was made in inference mode only there."""
    return torch.is_inference_mode_enabled() or not tensor.is_inference()


class LatentLayer(GrowingLayer):
    """Latents as keys and rotary keys as values, in the dtype of the model."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append latents `(batch, 1, new, rank)` and rotary keys `(batch, 1, new, rope)`; give back all there are."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)  # gradients need what was, untouched
        new = key_states.shape[2]
        latents, rotary_keys, before = self.extend(key_states, (key_states.shape[3], value_states.shape[3]), new)
        latents[:, :, before : before + new] = key_states
        rotary_keys[:, :, before : before + new] = value_states
        return self.keys, self.values


class Scratch:
    """One stretch of memory on each device that the layers of a cache use in turn, made longer when it must be."""

    def __init__(self):
        self._held: dict[torch.device, torch.Tensor] = {}

    def take(self, like: torch.Tensor, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
        """Tensors of these shapes, of the dtype and on the device of `like`. They hold what was left there, and are good
        until the next call."""
        sizes = [math.prod(shape) for shape in shapes]
        held = self._held.get(like.device)
        if held is None or held.dtype != like.dtype or held.numel() < sum(sizes) or not is_writable(held):
            held = self._held.pop(like.device, None)  # given back before more is asked for
            held = self._held[like.device] = new_room(like, (sum(sizes) + sum(sizes) // 4,))
        parts = held[: sum(sizes)].split(sizes)
        return [part.view(shape) for part, shape in zip(parts, shapes)]


class QuantizedLatentLayer(GrowingLayer):
    """Latents as int8 with a scale of 16 bits for each group of numbers, rotary keys in 16 bits.

    `keys`, int8 `(batch, 1, length, width)`, holds for each token the bytes of its scales, then its latent; `values`, int8
    `(batch, 1, length, 2 * rope)`, the bytes of its rotary key. So whatever the library does to keys and values does it
    to all there is. 16 bits are those of the model's dtype, or of bfloat16 where that is wider.

    Args:
        scratch: what the layers of one cache use in turn.
    """

    def __init__(self, scratch: Scratch):
        super().__init__()
        self.scratch, self.half = scratch, torch.bfloat16

    @torch.no_grad()
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append latents `(batch, 1, new, rank)` and rotary keys `(batch, 1, new, rope)`; give back all there are.

        New ones are given back as they came, earlier ones as they are held, in memory that the next layer uses again.
        No gradient flows through the earlier ones.
        """
        batch, _, new, rank = key_states.shape
        rope = value_states.shape[3]
        if not self.is_initialized:
            self.half = key_states.dtype if key_states.dtype.itemsize == 2 else torch.bfloat16
        half = self.half
        groups = rank // math.gcd(rank, SCALE_GROUP)
        # Scales first, and rows of an even length: views as 16 bits must begin at an even byte.
        width = 2 * groups + rank + rank % 2
        *_, before = self.extend(key_states.new_empty(batch, dtype=torch.int8), (width, 2 * rope), new)
        scales, latents = self.keys[..., : 2 * groups].view(half), self.keys[..., 2 * groups : 2 * groups + rank]
        rotary_keys = self.values.view(half)
        for block, source in zip(blocks(before, before + new), blocks(0, new)):
            round_to_int8(key_states[:, :, source], latents[:, :, block], scales[:, :, block])
        rotary_keys[:, :, before:] = value_states
        if not before:
            return key_states, value_states
        length = before + new
        latent, rotary_key = self.scratch.take(key_states, (batch, 1, length, rank), (batch, 1, length, rope))
        for block in blocks(0, before):
            restore(latents[:, :, block], scales[:, :, block], latent[:, :, block])
        rotary_key[:, :, :before] = rotary_keys[:, :, :before]
        latent[:, :, before:], rotary_key[:, :, before:] = key_states, value_states
        return latent, rotary_key


def blocks(start: int, stop: int) -> Iterator[slice]:
    return (slice(at, min(at + BLOCK, stop)) for at in range(start, stop, BLOCK))


def round_to_int8(numbers: torch.Tensor, integers: torch.Tensor, scales: torch.Tensor):
    """Write `numbers` `(…, n)` as `integers`, int8 `(…, n)`, times `scales` `(…, groups)`: the largest of a group is ±127."""
    grouped = numbers.float().unflatten(-1, (scales.shape[-1], -1))
    smallest = torch.finfo(scales.dtype).tiny  # a group of zeros has a scale too
    scales.copy_((grouped.abs().amax(-1) / 127).clamp(min=smallest))
    integers.copy_((grouped / scales.float().unsqueeze(-1)).round_().flatten(-2))


def restore(integers: torch.Tensor, scales: torch.Tensor, into: torch.Tensor):
    """Write the numbers that `round_to_int8` has rounded, in the dtype of `into` `(…, n)`."""
    into.copy_(integers)
    into.unflatten(-1, (scales.shape[-1], -1)).mul_(scales.unsqueeze(-1))


class QuantizedLatentCache(Cache):
    """A growing cache that holds latents in int8: 656 bytes for a token and layer of the published model, not 1,152.

    ```python
    model.generate(**inputs, past_key_values=QuantizedLatentCache(model.config))
    ```

    512 numbers in int8, a scale for every 64 of them and 64 rotary numbers in 16 bits. A rounded number is within a
    half of 1/127 of the largest of its group. All operations of a cache of the library work: batches with padding,
    beams, cropping, prefill in chunks. The latents of one layer at a time are restored to the model's dtype in memory
    that all layers share.

    Args:
        config: of the model, or of its text part.
    """

    def __init__(self, config: PretrainedConfig):
        scratch = Scratch()
        layers = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[QuantizedLatentLayer(scratch) for _ in range(layers)])


def layer_of(cache: Cache, index: int):
    """The layer of a cache, or `None` where the cache makes its own later. A fresh dynamic one gets room ahead."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        return None
    if type(cache) is DynamicCache and not getattr(cache, "offloading", False):
        while len(layers) <= index:
            layers.append(LatentLayer())
        if type(layers[index]) is DynamicLayer and not layers[index].is_initialized:
            layers[index] = LatentLayer()
    return layers[index] if index < len(layers) else None


def write_latents(cache: Cache, layer_idx: int, latent, rotary_key, query_index):
    """Append to a cache of the library; give back what it holds now.

    Args:
        latent (`torch.Tensor` of shape `(batch, 1, queries, kv_lora_rank)`), rotary_key (`(…, qk_rope_head_dim)`).
    """
    layer = layer_of(cache, layer_idx)
    if isinstance(layer, StaticLayer) and not layer.is_initialized and not hasattr(layer, "cumulative_length"):
        # transformers 4 allocates values as wide as keys; ours are not.
        layer.lazy_initialization(latent)
        layer.values = rotary_key.new_zeros(*layer.values.shape[:-1], rotary_key.shape[-1])
        torch._dynamo.mark_static_address(layer.values)
    return cache.update(latent, rotary_key, layer_idx, {"cache_position": query_index})
