"""`KimiK26ForConditionalGeneration`: where text model, vision tower and projector meet; the face for the Auto classes."""

from dataclasses import dataclass
from typing import Optional, Union

import psutil
import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, logging

from .attention_kimi_k26 import KimiK26RMSNorm
from .configuration_kimi_k26 import KimiK26Config
from .decoding_kimi_k26 import head_for, output_layer
from .experts_kimi_k26 import KimiK26Router
from .loading_kimi_k26 import (
    as_bytes,
    check_arguments,
    find_folder,
    load_mapped,
    maps_into_memory,
    pass_over_quantization,
    read_from_disk_as_stored,
    refuse_damage,
)
from .memory_kimi_k26 import release, unsettle
from .parallel_kimi_k26 import OF_EXPERTS, as_the_library_takes_it, gather, split_plan
from .placement_kimi_k26 import FREE_IN_MAIN_MEMORY
from .quantization_kimi_k26 import KeepDtype, KimiK26Int4Linear
from .store_kimi_k26 import ExpertStore
from .text_kimi_k26 import KimiK26LanguageModel
from .vision_kimi_k26 import KimiK26PositionTable, KimiK26Projector, KimiK26VisionTower

# Not used here: version 4 of the library copies from a local folder only what the entry modules import themselves.
from .attention_kernels_kimi_k26 import ATTENTION  # noqa: F401
from .avx2_kernels_kimi_k26 import AVX2  # noqa: F401
from .bfloat16_kernels_kimi_k26 import BFLOAT16  # noqa: F401
from .cache_kimi_k26 import LatentLayer  # noqa: F401
from .checkpoint_kimi_k26 import Checkpoint  # noqa: F401
from .compiling_kimi_k26 import compiled  # noqa: F401
from .expert_kernels_kimi_k26 import EXPERTS  # noqa: F401
from .graph_kernels_kimi_k26 import GRAPHS  # noqa: F401
from .graph_kimi_k26 import compiled_decode  # noqa: F401
from .integer_kernels_kimi_k26 import INTEGERS  # noqa: F401
from .kernels_kimi_k26 import COMMON  # noqa: F401
from .latent_kernels_kimi_k26 import LATENTS  # noqa: F401
from .native_kimi_k26 import library  # noqa: F401
from .prefill_kernels_kimi_k26 import PREFILL  # noqa: F401
from .soundness_kimi_k26 import findings_at_load  # noqa: F401
from .tile_kernels_kimi_k26 import TILES  # noqa: F401
from .triton_kernels_kimi_k26 import triton  # noqa: F401
from .triton_kimi_k26 import grouped_experts  # noqa: F401
from .vocabulary_kimi import read_ranks  # noqa: F401


try:  # transformers 5: the same functions, which leave alone what a checkpoint has filled
    from transformers import initialization as init
except ImportError:
    from torch.nn import init

logger = logging.get_logger(__name__)


@dataclass
class KimiK26CausalLMOutputWithPast(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*): next-token cross entropy, when labels are given.
        logits (`torch.FloatTensor` of shape `(batch, kept length, vocab_size)`).
        past_key_values ([`~transformers.Cache`], *optional*): per layer the latents `(batch, 1, length, kv_lora_rank)`
            as keys and the rotary keys `(batch, 1, length, qk_rope_head_dim)` as values.
        hidden_states (`tuple`, *optional*): embeddings, then each layer's output, the last one after the final norm.
        attentions (`tuple`, *optional*): per layer `(batch, heads, length, keys)`.
        router_logits (`tuple`, *optional*): per layer with experts `(batch * length, experts)`, float32.
        image_hidden_states (`torch.FloatTensor` of shape `(media tokens, hidden_size)`, *optional*): the features
            that were put in the place of the media tokens.
    """

    loss: Optional[torch.FloatTensor] = None
    logits: Optional[torch.FloatTensor] = None
    past_key_values: Optional[Cache] = None
    hidden_states: Optional[tuple[torch.FloatTensor, ...]] = None
    attentions: Optional[tuple[torch.FloatTensor, ...]] = None
    router_logits: Optional[tuple[torch.FloatTensor, ...]] = None
    image_hidden_states: Optional[torch.FloatTensor] = None


class KimiK26PreTrainedModel(PreTrainedModel):
    config_class = KimiK26Config
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["KimiK26DecoderLayer", "KimiK26VisionBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        std = self.config.text_config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, (KimiK26RMSNorm, nn.LayerNorm)):
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, KimiK26Router):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, KimiK26PositionTable):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, KimiK26Int4Linear):
            if not getattr(module.weight_packed, "_is_hf_initialized", False) and not module.weight_packed.is_meta:
                device = module.weight_packed.device
                module.set_weight(torch.randn(module.out_features, module.in_features, device=device) * std)

    def post_init(self):
        super().post_init()
        self._tp_plan = split_plan(self.config)

    @property
    def peers(self):
        """The processes that share the model's weights, or `None`."""
        return self.language_model.model.layers[0].self_attn.peers

    def _adjust_missing_and_unexpected_keys(self, *args, **kwargs):
        if self.peers is not None:  # experts of other processes are not missed by anyone
            known = self._keys_to_ignore_on_load_unexpected  # a set in transformers 5, a list or `None` before
            self._keys_to_ignore_on_load_unexpected = [OF_EXPERTS] if known is None else type(known)([*known, OF_EXPERTS])
        return super()._adjust_missing_and_unexpected_keys(*args, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """The library's `save_pretrained`. A model that is split over processes is gathered in the memory of the first,
        which writes it; all must call this."""
        for module in self.modules():
            if isinstance(module, KeepDtype):
                module.restore_dtypes()
        if self.peers is None:
            return super().save_pretrained(save_directory, *args, **kwargs)
        weights = gather(self)
        if self.peers.rank == 0:
            super().save_pretrained(save_directory, *args, **{**kwargs, "state_dict": weights})
        elif hasattr(self, "barrier_after_gathered_checkpoint_save"):  # in which transformers 5 lets the first one wait
            self.barrier_after_gathered_checkpoint_save(self.config.distributed_config)
        torch.distributed.barrier(group=self.peers.group)

    def freeze_packed(self):
        """Exclude from training what gradients do not reach: scales, and the router's correction bias."""
        for module in self.modules():
            if isinstance(module, KeepDtype):
                for name in module.kept:
                    getattr(module, name).requires_grad_(False)

    def enable_input_require_grads(self):
        """Let gradients reach adapters in checkpointed layers whose own weights are frozen: those of the vision tower, too."""
        super().enable_input_require_grads()
        if self.vision_tower is not None and "_vision_grads_hook" not in self.__dict__:
            embed = self.vision_tower.patch_embed
            self._vision_grads_hook = embed.register_forward_hook(lambda module, args, patches: patches.requires_grad_(True))

    def disable_input_require_grads(self):
        super().disable_input_require_grads()
        if hook := self.__dict__.pop("_vision_grads_hook", None):
            hook.remove()

    def requires_grad_(self, requires_grad: bool = True):
        """As on any module; INT4 words, their scales and the router's correction bias stay frozen."""
        for parameter in self.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(requires_grad)
        self.freeze_packed()
        return self

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """The library's `from_pretrained`; a folder of safetensors files goes into main memory in seconds, as memory maps.

        In main memory the routed experts are prepared for the CPU as they are used, up to a budget; the rest stays in
        the files. `model.expert_store` has the budget and the counts. On accelerators, `device_map="auto"` deals the
        experts of every layer to all of them, as many as they have room for; the others are fetched when they are
        routed to, and the most asked for stay. `model.expert_store.on(device)` has the counts there.

        Args:
            dtype (`str` or `torch.dtype`, *optional*): of the plain weights; the checkpoint's own by default.
            device_map (`str` or `dict`, *optional*): `"auto"`, `"balanced"`, `"balanced_low_0"`, `"sequential"`, or the
                place of each module. A map that names experts is carried out as `"auto"` is; one of whole layers by
                the library, which copies a layer that no accelerator holds as a whole each time.
            max_memory (`dict`, *optional*): as in the library; `"cpu"` bounds all weights held in main memory (70 % of
                what is free by default). What does not fit beside the other layers is read again when it is used.
            expert_budget (`int` or `str`, *optional*): bytes, or such as `"8GiB"`: bounds the prepared experts alone, in
                main memory or on each accelerator.
            tp_plan (`str`, *optional*): `"auto"` splits heads, networks and experts over the processes of `torchrun`.

        Raises:
            CheckpointError: listing every tensor and file that is damaged or does not fit the config.
            ValueError: for a device map that leaves out a part of the model, or names one that there is not.
            TypeError: for an argument that is one of `config.text_config`, or a dtype for a part.
        """
        if "dtype" not in kwargs:
            kwargs["dtype"] = kwargs.pop("torch_dtype", None) or "auto"
        expert_budget, kwargs = kwargs.pop("expert_budget", None), as_the_library_takes_it(kwargs)
        check_arguments(kwargs)
        pass_over_quantization(kwargs)
        folder = find_folder(pretrained_model_name_or_path, kwargs)
        if maps_into_memory(folder, model_args, kwargs):
            with torch.inference_mode(False):  # parameters that were made in it could not be followed
                return load_mapped(cls, folder, pretrained_model_name_or_path, expert_budget, kwargs)
        refuse_damage(cls, folder, kwargs)
        result = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        model.freeze_packed()  # transformers 5 makes every floating-point parameter trainable
        read_from_disk_as_stored(model)
        if expert_budget is not None:
            model.expert_store.budget = as_bytes(expert_budget, "expert_budget")
        return result


class KimiK26ForConditionalGeneration(KimiK26PreTrainedModel, GenerationMixin):
    """Kimi-K2.6: text, pictures and video in, text out. Without `vision_config` the same class is text only."""

    def __init__(self, config: KimiK26Config):
        super().__init__(config)
        for part in (config.text_config, config.vision_config):
            if part is not None and part._attn_implementation is None:  # the library settles it for the whole only
                part._attn_implementation = config._attn_implementation
        self.vision_tower = self.mm_projector = None
        if config.vision_config is not None:
            self.vision_tower = KimiK26VisionTower(config.vision_config)
            self.mm_projector = KimiK26Projector(config.vision_config)
        self.language_model = KimiK26LanguageModel(config.text_config)
        self.expert_store = self.language_model.model.share_store(ExpertStore())
        self.vocab_size = config.text_config.vocab_size
        self.post_init()

    def set_budget(self, memory=None, expert_budget=None):
        """Bound the weights held in main memory.

        Args:
            memory (`int` or `str`, *optional*): bytes, or such as `"16GiB"`, of all weights together. Where the layers
                outside the experts alone take more, they are read from their files at each use, and the experts get
                half. 70 % of the free memory by default.
            expert_budget (`int` or `str`, *optional*): bytes of the prepared experts, whatever the others take.
        """
        experts = sum(p.nbytes for n, p in self.language_model.named_parameters() if ".experts." in n)
        others = sum(p.nbytes for p in self.parameters()) - experts
        if memory is None:
            memory = int(psutil.virtual_memory().available * FREE_IN_MAIN_MEMORY)
        memory = as_bytes(memory, 'max_memory["cpu"]')
        streams = others > memory
        self.language_model.model.streams = streams
        if streams:
            unsettle(*(part for layer in self.language_model.model.layers for part in layer.dense()))
        self.expert_store.clear()
        self.expert_store.total = experts
        rest = memory // 2 if streams else memory - others
        self.expert_store.budget = rest if expert_budget is None else as_bytes(expert_budget, "expert_budget")

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

    def set_output_embeddings(self, value: nn.Module):
        self.language_model.lm_head = value

    def get_decoder(self, *args, **kwargs) -> nn.Module:
        return self.language_model.model

    def get_image_features(self, pixel_values: torch.Tensor, grid_thws: torch.Tensor) -> torch.Tensor:
        """Features of pictures and video clips.

        Args:
            pixel_values (`torch.Tensor` of shape `(patches, 3, patch_size, patch_size)`, floating point).
            grid_thws (`torch.Tensor` of shape `(clips, 3)`, int64): frames, patch rows, patch columns.

        Returns:
            `torch.Tensor` of shape `(media tokens, hidden_size)`, the clips one after the other.

        Raises:
            ValueError: for sizes that do not fit, or when the model has no vision part.
        """
        if self.vision_tower is None:
            raise ValueError("pixel_values were given, but this model has no vision part (config.vision_config is null)")
        if grid_thws is None:
            raise ValueError("pixel_values were given without grid_thws")
        features = self.mm_projector(self.vision_tower(pixel_values, grid_thws))
        if self.language_model.model.streams:
            release(self.vision_tower, self.mm_projector)
        return features

    def media_positions(self, input_ids: Optional[torch.Tensor], inputs_embeds: Optional[torch.Tensor]) -> torch.Tensor:
        """Where the media tokens stand, `(batch, length)` boolean; from the ids, else from their embedding."""
        token = self.config.media_placeholder_token_id
        if input_ids is not None:
            return input_ids == token
        embedding = self.get_input_embeddings()(torch.tensor(token, device=inputs_embeds.device))
        return (inputs_embeds == embedding).all(-1)

    def put_media(self, inputs_embeds: torch.Tensor, where: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """`inputs_embeds` with `features`, `(media tokens, hidden_size)`, in the places of `where`, in order."""
        tokens = int(where.sum())
        if tokens != features.shape[0]:
            raise ValueError(
                f"the input has {tokens} media tokens (id {self.config.media_placeholder_token_id}), but the pictures "
                f"and clips give {features.shape[0]} features"
            )
        features = features.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(where.unsqueeze(-1), features)

    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        pixel_values: Optional[torch.FloatTensor] = None,
        grid_thws: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Cache] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        media_features: Optional[torch.FloatTensor] = None,
        media_index: Optional[torch.LongTensor] = None,
        labels: Optional[torch.LongTensor] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        output_router_logits: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        logits_to_keep: Union[int, torch.Tensor] = 0,
        **kwargs,
    ) -> Union[tuple, KimiK26CausalLMOutputWithPast]:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): either these or `inputs_embeds`.
            pixel_values (`torch.FloatTensor` of shape `(patches, 3, patch_size, patch_size)`), grid_thws
                (`torch.LongTensor` of shape `(clips, 3)`): pictures and clips, in the order of their tokens in the
                flattened batch.
            attention_mask (`torch.Tensor` of shape `(batch, past + length)`): 0 for padding; or `(batch, 1, length,
                keys)`, boolean (true = visible) or added to the scores.
            position_ids (`torch.LongTensor` of shape `(batch or 1, length)`): counted from the padding where absent.
            past_key_values ([`~transformers.Cache`]): any cache class of the library.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden_size)`).
            media_features (`torch.FloatTensor` of shape `(media tokens, hidden_size)`): what `get_image_features`
                gives, instead of `pixel_values`.
            media_index (`torch.LongTensor` of shape `(batch, length)`): the row of `media_features` that takes the place
                of each token, or -1; by default the media tokens take the rows in order.
            labels (`torch.LongTensor` of shape `(batch, length)`): shifted inside; `config.ignore_index` is skipped.
            logits_to_keep (`int` or `torch.Tensor`): logits of the last so many positions (0: all), or of these.

        Raises:
            ValueError: when media tokens and features differ in number (with both), or inputs contradict.
        """
        config = self.config
        use_cache = config.text_config.use_cache if use_cache is None else use_cache
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if output_router_logits is None:
            output_router_logits = getattr(config.text_config, "output_router_logits", False)
        return_dict = config.return_dict if return_dict is None else return_dict
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if pixel_values is not None and media_features is not None:
            raise ValueError("give pixel_values or media_features, not both")
        if self._recomputes_layers:
            use_cache = False
            if past_key_values is not None and past_key_values.get_seq_length():
                raise ValueError("gradient checkpointing computes layers without a cache, and past_key_values holds tokens")

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            media_features = self.get_image_features(pixel_values, grid_thws)
        if media_features is not None and media_index is None:
            where = self.media_positions(input_ids, inputs_embeds)
            inputs_embeds = self.put_media(inputs_embeds, where, media_features)
        elif media_features is not None:
            where = media_index >= 0
            inputs_embeds = self.put_media(inputs_embeds, where, media_features[media_index[where]])
        self._warn_past_the_end(inputs_embeds.shape[1], position_ids, past_key_values)

        all_logits = isinstance(logits_to_keep, int) and (logits_to_keep == 0 or logits_to_keep >= inputs_embeds.shape[1])
        x, past_key_values, hidden_states, attentions, router_logits, logits = self.language_model.model(
            inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            cache_position=kwargs.pop("cache_position", None),
            head=head_for(inputs_embeds, self.language_model.lm_head) if all_logits else None,
            return_dict=False,
        )
        if logits is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
            kept = logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else kept
            logits = output_layer(self.language_model.lm_head, x[:, kept])
        if self.language_model.model.streams:
            release(self.get_input_embeddings(), self.language_model.lm_head)
        loss = None
        if labels is not None:
            kwargs.setdefault("ignore_index", config.ignore_index)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        result = KimiK26CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=hidden_states,
            attentions=attentions,
            router_logits=router_logits,
            image_hidden_states=media_features,
        )
        return result if return_dict else result.to_tuple()

    def _warn_past_the_end(self, length, position_ids, past_key_values):
        if torch.compiler.is_dynamo_compiling():
            return
        limit = self.config.max_position_embeddings
        if position_ids is not None and position_ids.device.type == "cpu":
            last = int(position_ids.max()) + 1
        else:  # counting tokens asks no device
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            last = past + length if isinstance(past, int) else length
        if last > limit:
            logger.warning_once(
                f"The input reaches position {last}, but the model knows {limit} (max_position_embeddings). Past "
                "that the answers are not to be relied upon."
            )

    @property
    def _recomputes_layers(self) -> bool:
        """Whether gradient checkpointing is at work: the layers then write no cache."""
        return self.training and self.language_model.model.layers[0].gradient_checkpointing

    # Generation. Pictures are encoded once, before the first token; `media_index` says which feature stands where, so
    # that a cache, a chunk of the prompt or a beam takes just the features of its own tokens.

    @torch.no_grad()
    def generate(self, inputs=None, *args, **kwargs):
        """The library's `generate`, with `pixel_values` and `grid_thws` of the prompt's pictures and clips."""
        if self._recomputes_layers:
            kwargs["use_cache"] = False
        kwargs.pop("mm_token_type_ids", None)  # say what the ids do
        kwargs = self._encode_media(inputs if inputs is not None else kwargs.get("input_ids"), kwargs)
        return super().generate(inputs, *args, **kwargs)

    def _encode_media(self, ids, kwargs: dict) -> dict:
        """Arguments of `generate` with the media encoded that no cache holds yet, and `media_index` to place them."""
        kwargs = dict(kwargs)
        features, pixel_values, grid_thws = (kwargs.pop(k, None) for k in ("media_features", "pixel_values", "grid_thws"))
        if kwargs.pop("media_index", None) is not None:
            # Called as the assistant of another model, whose features are not ours; without eyes we read on blindly.
            features, pixel_values = None, pixel_values if self.vision_tower is not None else None
        embeds, mask, cache = (kwargs.get(k) for k in ("inputs_embeds", "attention_mask", "past_key_values"))
        past = int(cache.get_seq_length()) if cache is not None else 0
        if pixel_values is None and features is None:
            return kwargs
        where = self.media_positions(ids if embeds is None else None, embeds)
        if mask is not None and mask.dim() == 2 and mask.shape[1] > where.shape[1]:  # only the new tokens were given
            where = nn.functional.pad(where, (mask.shape[1] - where.shape[1], 0))
        if past and not bool(where[:, past:].any()):
            return kwargs
        if features is None:
            features = self.get_image_features(pixel_values, grid_thws)
        if embeds is not None:
            kwargs["inputs_embeds"] = self.put_media(embeds, where, features)
            return kwargs
        settings = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("token_healing", getattr(settings, "token_healing", False)):
            raise ValueError("token_healing writes the prompt anew, without the tokens of its media: leave it out for prompts with pictures or clips")
        kwargs["media_features"], kwargs["media_index"] = features, self._media_index(where, features, past)
        if kwargs.get("assistant_model") is not None:  # it encodes them in its own way
            kwargs["pixel_values"], kwargs["grid_thws"] = pixel_values, grid_thws
        return kwargs

    def _media_index(self, where, features, past: int) -> torch.Tensor:
        """`(batch, tokens)` int64: the row of `features` that belongs to each token of the whole dialogue, else -1.

        With `past` tokens in a cache the features may be those of all pictures, or only of the new ones.
        """
        total, new = int(where.sum()), where.clone()
        if total != features.shape[0]:
            new[:, :past] = False
        if int(new.sum()) != features.shape[0]:
            raise ValueError(
                f"the prompt has {total} media tokens (id {self.config.media_placeholder_token_id}), but the pictures "
                f"and clips give {features.shape[0]} features"
            )
        index = new.flatten().long().cumsum(0).view_as(new) - 1
        return index.masked_fill(~new, -1)

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, inputs_embeds=None, media_features=None, media_index=None, **kwargs
    ):
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if kwargs.pop("proposes", False) and kwargs.get("is_first_iteration") and inputs_embeds is None and 0 < past < input_ids.shape[1]:
            kwargs["next_sequence_length"] = input_ids.shape[1] - past
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )
        if past > 0 or media_index is not None:
            model_inputs.pop("pixel_values", None)
            model_inputs.pop("grid_thws", None)
        if media_index is not None and past < media_index.shape[1]:
            length = model_inputs["input_ids"].shape[1]
            index = media_index[:, past : past + length]
            if bool((index >= 0).any()):
                # Tokens that were written or proposed since are words, whatever their id.
                index = nn.functional.pad(index, (0, length - index.shape[1]), value=-1)
                model_inputs["media_features"], model_inputs["media_index"] = media_features, index
        return model_inputs

    def _prefill_chunking(self, input_ids, generation_config, **model_kwargs):
        """Prefill in chunks, for transformers 4, whose own counts positions from the start of the padding and of a filled cache."""
        if "past_key_values" not in model_kwargs:
            raise ValueError("prefill_chunk_size needs a cache")
        past = int(model_kwargs["past_key_values"].get_seq_length())
        whole = {key: model_kwargs[key] for key in ("attention_mask", "position_ids") if model_kwargs.get(key) is not None}
        for chunk in input_ids[:, past:-1].split(generation_config.prefill_chunk_size, dim=-1):
            end = past + chunk.shape[1]
            places = torch.arange(past, end, device=input_ids.device)
            given = model_kwargs | {key: tensor[:, :end] for key, tensor in whole.items()} | {"cache_position": places}
            self(**self.prepare_inputs_for_generation(input_ids[:, :end], **given), return_dict=True)
            past = end
        last = torch.arange(past, input_ids.shape[1], device=input_ids.device)
        return model_kwargs | {"cache_position": last}

    def _assisted_decoding(self, *args, **kwargs):
        # Where tokens are proposed, transformers 5 forgets that a cache may hold the beginning of the first ids.
        return super()._assisted_decoding(*args, proposes=True, **kwargs)

    def _get_candidate_generator(self, *args, model_kwargs, **kwargs):
        given = {key: value for key, value in model_kwargs.items() if key != "proposes"}  # the assistant may be any model
        return super()._get_candidate_generator(*args, model_kwargs=given, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """Not there: the library's pages hold keys and values of heads, not latents."""
        raise NotImplementedError(
            "generate_batch and cache_implementation='paged' cannot hold this model's latents; `generate` takes batches, and "
            "`kimi-k26 serve` decodes requests together that come and go"
        )

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, num_new_tokens=1, **kwargs):
        before = model_kwargs.get("position_ids")
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, num_new_tokens=num_new_tokens, **kwargs
        )
        if before is not None and model_kwargs["position_ids"] is before:  # transformers 4 lets them stand still
            new = torch.arange(1, num_new_tokens + 1, dtype=before.dtype, device=before.device) + before[:, -1:]
            model_kwargs["position_ids"] = torch.cat((before, new), dim=-1)
        return model_kwargs

    def _expand_inputs_for_generation(self, expand_size=1, **model_kwargs):
        # One row of features is not one row of the batch: the repeated `media_index` points into the same rows.
        features = model_kwargs.pop("media_features", None)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(expand_size=expand_size, **model_kwargs)
        if features is not None:
            model_kwargs["media_features"] = features
        return input_ids, model_kwargs
