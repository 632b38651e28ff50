"""Latents in the library's caches: one latent and one rotary key for each token and layer, as keys and values of one head."""

from typing import Optional

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer


class LatentLayer(DynamicLayer):
    """A dynamic layer with room ahead, so that one more token is written in its place instead of copying all.

    `keys` and `values` are views of what is held, as in the library; whoever replaces them (beam search, cropping,
    repeating) finds a new room made for them at the next token.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._room: Optional[tuple[torch.Tensor, torch.Tensor]] = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append latents `(batch, 1, new, rank)` and rotary keys `(batch, 1, new, rope)`; give back all there are."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)  # gradients need what was, untouched
        before = self.extend(key_states, (key_states.shape[3], value_states.shape[3]), key_states.shape[2])
        self.keys[:, :, before:] = key_states
        self.values[:, :, before:] = value_states
        return self.keys, self.values

    def extend(self, like: torch.Tensor, widths: tuple[int, int], new: int) -> int:
        """Let `keys` and `values` cover `new` more tokens, which the caller writes; give back how many there were.

        Args:
            like (`torch.Tensor` of shape `(batch, …)`): of the dtype and on the device of the latents.
            widths: of a latent and of a rotary key.
        """
        if not self.is_initialized:
            self.dtype, self.device = like.dtype, like.device
            self.keys, self.values = (like.new_empty(like.shape[0], 1, 0, width) for width in widths)
            self.is_initialized = True
        before = self.keys.shape[2]
        if not self._fits(before + new):
            size = before + new + max(64, (before + new) // 4)
            rooms = tuple(like.new_empty(like.shape[0], 1, size, width) for width in widths)
            for room, held in zip(rooms, (self.keys, self.values)):
                room[:, :, :before] = held
            self._room = rooms
        self.keys, self.values = (room[:, :, : before + new] for room in self._room)
        return before

    def _fits(self, length: int) -> bool:
        """Whether what is held still stands at the beginning of a room with space for `length` tokens."""
        return self._room is not None and all(
            held.data_ptr() == room.data_ptr()
            and held.stride() == room.stride()
            and held.shape[0] == room.shape[0]
            and length <= room.shape[2]
            for held, room in zip((self.keys, self.values), self._room)
        )

    def reset(self):
        """Forget all tokens."""
        self.keys = self.values = self._room = None
        self.is_initialized = False


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
