"""Decoder layers and the text model."""

from typing import Optional, Union

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast

from .attention_kimi_k26 import AttentionSpan, KimiK26Attention, KimiK26RMSNorm, KimiK26RotaryEmbedding
from .configuration_kimi_k26 import KimiK26TextConfig
from .decoding_kimi_k26 import decode
from .experts_kimi_k26 import KimiK26Experts, KimiK26MLP, KimiK26MoE
from .graph_kimi_k26 import compiled_decode, look_again
from .memory_kimi_k26 import release
from .native_kimi_k26 import is_plain
from .store_kimi_k26 import ExpertStore


class KimiK26DecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward network, each over a norm and beside a residual path."""

    def __init__(self, config: KimiK26TextConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.self_attn = KimiK26Attention(config, layer_idx)
        if config.is_moe_layer(layer_idx):
            self.mlp = KimiK26MoE(config)
        else:
            self.mlp = KimiK26MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = KimiK26RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = KimiK26RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.native = None  # what the native kernels know of this layer, once they have served it

    def forward(self, x: torch.Tensor, rotary, span: AttentionSpan, past_key_values=None, output_attentions=False):
        """`(batch, length, hidden_size)` → the same, the attention weights or `None`, the router logits or `None`."""
        native = None if output_attentions else decode(self, x, rotary, span, past_key_values)
        if native is not None:
            x, router_logits, _ = native
            return x, None, router_logits[0] if len(router_logits) else None
        out, weights = self.self_attn(self.input_layernorm(x), rotary, span, past_key_values, output_attentions)
        x = x + out
        out, router_logits = self.mlp(self.post_attention_layernorm(x)), None
        if isinstance(out, tuple):
            out, router_logits = out
        return x + out, weights, router_logits

    def _apply(self, *args, **kwargs):
        self.native = None  # it would keep the memory of weights that move
        return super()._apply(*args, **kwargs)

    def dense(self) -> list[nn.Module]:
        """Everything but the routed experts, which have a store of their own."""
        networks = [self.mlp]
        if isinstance(self.mlp, KimiK26MoE):
            networks = [part for name, part in self.mlp.named_children() if name != "experts"]
        return [self.self_attn, self.input_layernorm, self.post_attention_layernorm, *networks]


class KimiK26TextModel(nn.Module):
    """Embeddings, decoder layers and the final norm."""

    def __init__(self, config: KimiK26TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(KimiK26DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = KimiK26RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = KimiK26RotaryEmbedding(config)
        self.streams = False  # whether layers give their memory back after use, as they do not all fit
        self.native = None  # what the native kernels know of all layers together
        self._chain()

    def _apply(self, *args, **kwargs):
        self.native = None  # it would keep the memory of weights that move
        return super()._apply(*args, **kwargs)

    def __setstate__(self, state):
        super().__setstate__(state)
        self._chain()

    def _chain(self):
        """Tell the experts of each layer which come next."""
        routing = [layer.mlp for layer in self.layers if isinstance(layer.mlp, KimiK26MoE)]
        for mlp, following in zip(routing, routing[1:]):
            mlp.experts.following = following.gate, following.experts

    def share_store(self, store: ExpertStore) -> ExpertStore:
        """Let the experts of all layers be kept in one store; give it back."""
        for layer in self.layers:
            if isinstance(layer.mlp, KimiK26MoE):
                layer.mlp.experts.store = store
        return store

    def in_one_go(self, x, rotary, span, past_key_values, head):
        """What a [`NativeDecoder`] gives of all layers; `None` where the kernels cannot serve, where somebody looks at single
        layers, or where weights must be read or given back between them."""
        if torch.compiler.is_dynamo_compiling():
            return compiled_decode(self, x, rotary, span, past_key_values, head)
        if x.shape[1] > 1:
            look_again(self)
        routing = next((layer.mlp for layer in self.layers if isinstance(layer.mlp, KimiK26MoE)), None)
        resident = routing is None or isinstance(routing.experts, KimiK26Experts) and not routing.experts.store.bounded
        if self.streams or not resident or not all(is_plain(layer) for layer in self.layers):
            return None
        return decode(self, x, rotary, span, past_key_values, head)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.Tensor] = None,
        past_key_values: Optional[Cache] = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        output_router_logits: bool = False,
        cache_position: Optional[torch.Tensor] = None,
        head: Optional[torch.Tensor] = None,
        return_dict: bool = True,
    ) -> Union[MoeModelOutputWithPast, tuple]:
        """
        Args:
            inputs_embeds (`torch.Tensor` of shape `(batch, length, hidden_size)`).
            attention_mask: see [`AttentionSpan`].
            position_ids (`torch.Tensor` of shape `(batch or 1, length)`, int64, *optional*): counted from the padding
                where absent. Where neither a mask nor a cache is given, positions that restart begin a new packed
                sequence, as the library has it.
            cache_position (`torch.Tensor` of shape `(length,)`, *optional*): place of the tokens in the cache.
            head (`torch.Tensor` of shape `(vocab_size, hidden_size)`, *optional*): weight of an output layer that may be computed with
                the layers, where that is faster.
            return_dict (`bool`): without it a tuple of the hidden state, the cache, the hidden states, attention weights and router
                logits that were asked for, and the logits of `head`, or `None` where it is yet to be applied.
        """
        if torch.compiler.is_exporting() and (torch.compiler.is_dynamo_compiling() or isinstance(inputs_embeds, FakeTensor)):
            raise NotImplementedError("torch.export cannot take this model, as routing picks modules by number; torch.compile can")
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != self.config.hidden_size or not inputs_embeds.numel():
            given = f"{tuple(inputs_embeds.shape)}, not (batch, length, {self.config.hidden_size})"
            raise ValueError(f"the input has the shape {given} with at least one of each")
        if attention_mask is not None and attention_mask.dim() not in (2, 4):
            raise ValueError(f"attention_mask has {attention_mask.dim()} axes; it must be (batch, keys) or (batch, 1, queries, keys)")
        may_be_packed = attention_mask is None and past_key_values is None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        length, device = inputs_embeds.shape[1], inputs_embeds.device
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if cache_position is None:
            cache_position = torch.arange(length, device=device) + past
        padding = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        if padding is not None and isinstance(past, int) and padding.shape[1] < past + length:
            raise ValueError(
                f"attention_mask covers {padding.shape[1]} tokens, but there are {past + length}: "
                f"{past} in the cache and {length} new ones"
            )
        documents = None
        if position_ids is None and padding is not None:
            # The mask may be longer than what came so far (a static cache): the places say which columns are ours.
            position_ids = (padding.long().cumsum(-1) - 1).clamp(min=0)[:, cache_position]
        elif position_ids is None:
            position_ids = cache_position.unsqueeze(0)
        elif may_be_packed:
            documents = packed_documents(position_ids)
        if padding is not None and not torch.compiler.is_dynamo_compiling() and bool(padding.all()):
            attention_mask = None
        span = AttentionSpan(cache_position, past if isinstance(past, int) else None, attention_mask, documents)

        x, rotary = inputs_embeds, self.rotary_emb(position_ids)
        hidden_states, attentions, router_logits, logits_of_head = (x,), (), (), None
        closely = output_hidden_states or output_attentions
        whole = None if closely else self.in_one_go(x, rotary, span, past_key_values, head)
        if whole is not None:
            x, logits, scores = whole
            logits_of_head = scores if scores.shape[-1] else None
            router_logits = tuple(logits) if output_router_logits else ()
        else:
            for layer in self.layers:
                x, weights, logits = layer(
                    x, rotary, span, past_key_values=past_key_values, output_attentions=output_attentions
                )
                if self.streams:
                    release(*layer.dense())
                hidden_states += (x,) if output_hidden_states else ()
                attentions += (weights,) if output_attentions else ()
                router_logits += (logits,) if output_router_logits and logits is not None else ()
            x = self.norm(x)
        hidden_states = (*hidden_states[:-1], x) if output_hidden_states else None
        attentions = attentions if output_attentions else None
        router_logits = router_logits if output_router_logits else None
        if not return_dict:
            return x, past_key_values, hidden_states, attentions, router_logits, logits_of_head
        return MoeModelOutputWithPast(x, past_key_values, hidden_states, attentions, router_logits)


def packed_documents(position_ids: torch.Tensor) -> Optional[torch.Tensor]:
    """Number of the packed sequence each token belongs to, `(batch, length)`; `None` where each row is one sequence."""
    restarts = F.pad(position_ids.diff(dim=-1) != 1, (1, 0), value=False)
    if not torch.compiler.is_dynamo_compiling() and not bool(restarts.any()):
        return None
    return restarts.long().cumsum(-1)


class KimiK26LanguageModel(nn.Module):
    """The text model and its output layer, under the names of the checkpoint."""

    def __init__(self, config: KimiK26TextConfig):
        super().__init__()
        self.model = KimiK26TextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
