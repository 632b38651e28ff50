"""Messages, pictures and videos to model inputs: `KimiK26Processor`.

A prompt holds one `<|media_pad|>` per picture and one video placeholder per video, as the chat template writes them.
Here each video placeholder becomes one run of text per clip, the text is turned into ids, and the id of each
`<|media_pad|>` is repeated once per token of its picture or clip. `pixel_values` and `grid_thws` follow the order of
the prompt.
"""

import copy
import os
import re
from dataclasses import dataclass
from typing import Any, Optional, Union

from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessorMixin, TextKwargs, VideosKwargs
from transformers.utils import logging

from .chat_kimi import RenderedChat, check_messages, is_batch_of_chats, render_chats
from .image_processing_kimi_k26 import (
    MEDIA_KEYS,
    EncodedMedia,
    KimiK26ImageProcessor,
    is_image,
    is_video,
    join,
    located,
    nest,
    picture_of,
    spread_fps,
)
from .tokenization_kimi import TikTokenTokenizer, integers
from .vocabulary_kimi import MEDIA_PAD

# Version 4 of the library copies from a local folder only those modules that the loaded one names itself, and not what
# these import in turn; so all of them are named here.
from .compiling_kimi_k26 import compiled  # noqa: F401
from .media_kimi_k26 import MediaError  # noqa: F401
from .response_kimi import ResponseParser  # noqa: F401
from .scaling_kimi_k26 import scaled  # noqa: F401
from .text_ids_kimi import TextIds  # noqa: F401
from .token_bytes_kimi import TokenBytes  # noqa: F401
from .tool_declaration_kimi import tool_schemas  # noqa: F401
from .video_kimi_k26 import read_video  # noqa: F401


logger = logging.get_logger(__name__)

VIDEO_PLACEHOLDER = "<|kimi_k25_video_placeholder|>"
CLIP_TEXT = "{time}<|media_begin|>video<|media_content|>" + MEDIA_PAD + "<|media_end|>"
PLACEHOLDERS = re.compile(f"{re.escape(MEDIA_PAD)}|{re.escape(VIDEO_PLACEHOLDER)}")

# Arguments of a call that go to the tokenizer; those of `media_proc_cfg` go to the image processor.
PADDING_KEYS = ("padding", "pad_to_multiple_of", "padding_side", "return_attention_mask")
CUTTING_KEYS = ("truncation", "max_length")
TOKENIZER_KEYS = frozenset((
    "add_special_tokens", "return_special_tokens_mask", "return_token_type_ids", "verbose",
    "split_special_tokens", "allow_special_tokens", "return_offsets_mapping",
))  # fmt: skip
CALL_KEYS = frozenset((
    *PADDING_KEYS, *CUTTING_KEYS, *TOKENIZER_KEYS, *MEDIA_KEYS, "media_limits", "fps", "video_metadata", "images",
    "videos", "text_kwargs", "images_kwargs", "videos_kwargs", "common_kwargs", "return_mm_token_type_ids",
))  # fmt: skip
# Those that the library has for texts, and for other models' pictures and videos: none is a variable of a template, and none is passed over.
LIBRARY_KEYS = frozenset((*TextKwargs.__annotations__, *ImagesKwargs.__annotations__, *VideosKwargs.__annotations__)) - {"return_tensors"}


@dataclass
class MediaItem:
    """A picture or video to process: its source, how messages call it, and the rate of decoded frames."""

    kind: str  # "image" or "video"
    source: Any  # None: the message holds no data
    fps: Optional[float]
    place: str


class KimiK26Processor(ProcessorMixin):
    """Tokenizer and image processor in one.

    Args:
        image_processor: a `KimiK26ImageProcessor`; with the published values if not given.
        tokenizer: a `TikTokenTokenizer`.
        chat_template: a Jinja template, or a dict of them by name; else the tokenizer's is used.
    """

    # read by version 4 of the library; version 5 reads the names of the arguments of __init__
    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        image_processor = KimiK26ImageProcessor() if image_processor is None else image_processor
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token, self.video_token = MEDIA_PAD, VIDEO_PLACEHOLDER
        self.image_token_id = tokenizer.convert_tokens_to_ids(MEDIA_PAD)

    @property
    def media_processor(self) -> KimiK26ImageProcessor:
        """The image processor, by its published name."""
        return self.image_processor

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    # -- prompts and media -----------------------------------------------------------------------------------------

    def __call__(
        self,
        images: Any = None,
        text: Union[str, list[str], None] = None,
        videos: Any = None,
        audio: None = None,
        return_tensors: Optional[str] = None,
        medias: Optional[list[dict[str, Any]]] = None,
        **kwargs,
    ) -> BatchFeature:
        """Text with placeholders, and the pictures and videos they stand for.

        Args:
            images: one, a list, or a list per text. Any form `media_kimi_k26.load_image` takes.
            text: one prompt or several. Without media it is passed on as it is, placeholders and all.
            videos: as `images`, in any form `video_kimi_k26.read_video` takes.
            return_tensors: "pt", "np" or None (lists of ids; `pixel_values` and `grid_thws` are tensors all the same).
            medias: pictures in the published form, `{"type": "image", "image": picture}`, as other engines give them:
                the text holds `<|media_pad|>` once per token already and is taken as it is. `device`, which they give
                too, is where `pixel_values` will be.
            kwargs: `fps` (rate of decoded frames, one or one per video; `video_metadata` of the library also serves),
                `padding` (default: only where several texts become one tensor), `truncation`, `max_length` and other
                arguments of the tokenizer, values of `media_proc_cfg` and `media_limits` for this call; also grouped
                as `text_kwargs`, `images_kwargs`, `videos_kwargs`.

        Returns `input_ids`, `attention_mask` int64 (texts, length), with `return_mm_token_type_ids=True` also `mm_token_type_ids`
        of the same shape, 1 where a token stands for media, and, with media, `pixel_values` float32
        (patches, 3, patch, patch) and `grid_thws` int64 (clips, 3), in the order of the placeholders in the texts.

        Raises `MediaError` for a picture or video that cannot be used, and `ValueError` where the numbers of
        placeholders and media differ or truncation would cut media.
        """
        if audio is not None:
            raise ValueError("audio is not supported: Kimi-K2.6 takes text, pictures and videos")
        if text is None and images is None and videos is None:
            raise ValueError("give text, images or videos")
        if text is not None and not isinstance(text, str):
            if not isinstance(text, (list, tuple)) or not all(isinstance(one, str) for one in text):
                raise TypeError(f"text must be a string or a list of strings, got {type(text).__name__}")
        texts = None if text is None else [text] if isinstance(text, str) else list(text)

        if medias is not None:
            if text is None or images is not None or videos is not None:
                raise ValueError("medias go with text, and without images and videos")
            return self._as_published(texts, medias, kwargs, return_tensors)
        options = self._sort_options(kwargs, return_tensors)
        pictures, picture_counts = nest(images, is_image, len(texts or ()))
        films, film_counts = nest(videos, is_video, len(texts or ()))
        rates = spread_fps(_rates(options.fps, options.video_metadata), films)
        items = [MediaItem("image", one, None, f"images[{at}]") for at, one in enumerate(pictures)]
        items += [MediaItem("video", one, fps, f"videos[{at}]") for at, (one, fps) in enumerate(zip(films, rates))]
        counts = {"image": picture_counts, "video": film_counts}
        prompts = None if texts is None else [RenderedChat(one) for one in texts]
        return self._build(prompts, items, counts, options)

    def _as_published(self, texts, medias, kwargs, return_tensors) -> BatchFeature:
        """Texts as they are, and pictures, in the published form. `kwargs` of the call."""
        device = kwargs.pop("device", None)
        options = self._sort_options(kwargs, return_tensors)
        encoded = []
        for at, media in enumerate(medias):
            place = f"medias[{at}]"
            encoded.append(self._encode(MediaItem("image", picture_of(media, place), None, place), options))
        data = self._tokenize([RenderedChat(one) for one in texts], None, options)
        if encoded:
            data.update(join(encoded))
            data["pixel_values"] = data["pixel_values"].to(device)
        return BatchFeature(data, tensor_type=options.return_tensors)

    def _build(self, chats, items, counts, options: "_Options") -> BatchFeature:
        """Media items and prompts to one batch. `counts`: items per prompt by kind, where the caller said it."""
        if chats is None and not items:
            raise ValueError("give text, images or videos: these lists are empty")
        if chats is None:
            return BatchFeature(join([self._encode(item, options) for item in items]), tensor_type=options.return_tensors)
        places = [_placeholders(chat) if items else [] for chat in chats]
        if items:
            self._check_counts(places, items, counts)
        queues = {kind: iter([item for item in items if item.kind == kind]) for kind in ("image", "video")}
        encoded: list[EncodedMedia] = []
        prompts, repeats = [], []  # prompts with one pad per clip; tokens of each pad
        for chat, found in zip(chats, places):
            edits, tokens = [], []
            for span, kind in found:
                media = self._encode(next(queues[kind]), options)
                clips = "".join(CLIP_TEXT.format(time=time) for time in media.timestamps) or MEDIA_PAD
                edits.append((span, clips))
                tokens += media.tokens
                encoded.append(media)
            prompts.append(chat.replace(edits))
            repeats.append(tokens)
        data = self._tokenize(prompts, repeats if items else None, options)
        if encoded:
            data.update(join(encoded))
        return BatchFeature(data, tensor_type=options.return_tensors)

    def _encode(self, item: MediaItem, options: "_Options") -> EncodedMedia:
        with located(item.place):
            if item.kind == "image":
                return self.image_processor.encode_image(item.source, **options.images)
            return self.image_processor.encode_video(item.source, item.fps, **options.videos)

    def _check_counts(self, places: list[list], items: list[MediaItem], counts: dict[str, Optional[list[int]]]) -> None:
        for kind, token in (("image", MEDIA_PAD), ("video", VIDEO_PLACEHOLDER)):
            held = [sum(found == kind for _, found in places_of_text) for places_of_text in places]
            given = counts[kind] or [sum(item.kind == kind for item in items)]
            held = held if counts[kind] else [sum(held)]
            for at, (placeholders, number) in enumerate(zip(held, given)):
                if placeholders != number:
                    where = f"text[{at}]" if counts[kind] else "the text"
                    raise ValueError(f"{where} has {placeholders} {token} and {number} {kind}s were given for it")

    # -- ids --------------------------------------------------------------------------------------------------------

    def _tokenize(self, prompts: list[RenderedChat], repeats, options: "_Options") -> dict[str, Any]:
        """Ids, cut and padded. `repeats`: tokens for each pad of each prompt, or None to leave pads alone."""
        want_mask = any(prompt.spoken is not None for prompt in prompts)
        want_offsets = options.tokenizer.get("return_offsets_mapping")
        columns = dict(
            self.tokenizer(
                [prompt.text for prompt in prompts],
                control_texts=[prompt.control for prompt in prompts],
                **{**options.tokenizer, "return_offsets_mapping": want_mask or want_offsets},
            )
        )
        columns.pop("attention_mask", None)
        if want_mask:
            offsets = columns["offset_mapping"] if want_offsets else columns.pop("offset_mapping")
            columns["assistant_masks"] = [prompt.spoken_mask(row) for prompt, row in zip(prompts, offsets)]
        pad = self.image_token_id
        for at, ids in enumerate(columns["input_ids"]):
            expected = sum(repeats[at]) if repeats else 0
            if repeats and repeats[at]:
                if ids.count(pad) != len(repeats[at]):
                    raise ValueError(
                        f"text[{at}] has {ids.count(pad)} ids of {MEDIA_PAD} for {len(repeats[at])} pictures and clips:"
                        " the tokenizer must read it as one special token"
                    )
                widths = iter(repeats[at])
                times = [next(widths) if index == pad else 1 for index in ids]
                for rows in columns.values():
                    rows[at] = [value for value, count in zip(rows[at], times) for _ in range(count)]
            self._cut(columns, at, expected, options)
        if options.media_types:
            columns["mm_token_type_ids"] = [[int(index == pad) for index in ids] for ids in columns["input_ids"]]

        batch = {"input_ids": columns.pop("input_ids")}
        if options.padding["padding"] is None:
            several = options.return_tensors is not None and len({len(ids) for ids in batch["input_ids"]}) > 1
            options.padding["padding"] = several
        data = dict(self.tokenizer.pad(batch, max_length=options.max_length, **options.padding))
        side = options.padding["padding_side"] or self.tokenizer.padding_side
        for name, rows in columns.items():  # masks and types: padding is 1 in the mask of special tokens, else 0
            fill = {"special_tokens_mask": 1, "offset_mapping": (0, 0)}.get(name, 0)
            for at, row in enumerate(rows):
                extra = [fill] * (len(data["input_ids"][at]) - len(row))
                rows[at] = extra + row if side == "left" else row + extra
            data[name] = rows
        return data if options.return_tensors is None else integers(data)

    def _cut(self, columns: dict[str, list], at: int, media_tokens: int, options: "_Options") -> None:
        """Truncates one row of every column, in place."""
        ids = columns["input_ids"][at]
        if options.truncation in (None, False, "do_not_truncate"):
            return
        longest = self.tokenizer.model_max_length if options.max_length is None else options.max_length
        if len(ids) <= longest:
            return
        keep = slice(0, longest) if self.tokenizer.truncation_side == "right" else slice(len(ids) - longest, None)
        kept = ids[keep].count(self.image_token_id)
        if kept < media_tokens:
            raise ValueError(
                f"text[{at}]: truncation to max_length={longest} would keep {kept} of {media_tokens} media tokens;"
                f" the whole prompt has {len(ids)} tokens"
            )
        for rows in columns.values():
            rows[at] = rows[at][keep]

    # -- chats ------------------------------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        conversation,
        chat_template: Optional[str] = None,
        tools: Optional[list] = None,
        documents: Optional[list[dict]] = None,
        add_generation_prompt: Optional[bool] = None,
        continue_final_message: Union[bool, str] = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: Optional[str] = None,
        return_dict: bool = False,
        processor_kwargs: Optional[dict] = None,
        sanitize_control_tokens: bool = True,
        **kwargs,
    ):
        """Messages, with their pictures and videos, to a prompt (`tokenize=False`), its ids, or with `return_dict=True`
        to the whole input of the model. The messages are left as they are.

        Args:
            conversation: messages in OpenAI's form (`image_url`, `video_url`) or the library's (`image`, `video` with
                `url`, `path`, `base64` or the object; a `video` of decoded frames with `fps`), or a list of such lists.
                Parts without data take the next of `images` and `videos`.
            chat_template: a template, or the name of one of the processor's.
            tools, documents, add_generation_prompt, continue_final_message: as `TikTokenTokenizer.apply_chat_template`;
                a generation prompt is added by default.
            return_assistant_tokens_mask: also gives `assistant_masks`, 1 on what the assistant wrote.
            processor_kwargs: arguments of `__call__`, which may also be given directly.
            sanitize_control_tokens: only the template speaks control: special tokens and placeholders of media typed in
                the messages become ids of ordinary text. False reads them wherever they stand, as published.
            kwargs: `thinking`, `preserve_thinking` and variables of the template; arguments of `__call__`.

        Raises `MediaError`, `ValueError` and `TypeError` naming the conversation (in a batch), message and part.
        """
        conversations, is_batch = check_messages(conversation), is_batch_of_chats(conversation)
        call = {key: kwargs.pop(key) for key in list(kwargs) if key in CALL_KEYS or key in LIBRARY_KEYS}
        call.update(processor_kwargs or {})
        return_tensors = call.pop("return_tensors", return_tensors)
        return_tensors = None if return_tensors == "auto" else return_tensors  # version 5's "as the processor likes"
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise ValueError("return_assistant_tokens_mask=True needs tokenize=True and return_dict=True")

        light, items, counts = self._take_media(conversations, is_batch)
        if tokenize:
            pictures, films = call.pop("images", None), call.pop("videos", None)
            options = self._sort_options({"add_special_tokens": False, **call}, return_tensors)
            self._fill_empty(items, pictures, films, options)
        chats = render_chats(
            self.tokenizer,
            light if is_batch else light[0],
            chat_template=self._template(chat_template),
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=tokenize,
            sanitize_control_tokens=sanitize_control_tokens,
            want_spoken=return_assistant_tokens_mask,
            placeholders=(VIDEO_PLACEHOLDER,) if items else (),
            **kwargs,
        )
        if not tokenize:
            texts = [chat.text for chat in chats]
            return texts if is_batch else texts[0]
        output = self._build(chats, items, counts, options)
        return output if return_dict else output["input_ids"]

    def _template(self, name_or_template: Optional[str]) -> Optional[str]:
        """The template to hand to the tokenizer; None is its own."""
        ours = self.chat_template
        if isinstance(ours, dict):
            name = "default" if name_or_template is None else name_or_template
            if name_or_template is None and "default" not in ours:
                raise ValueError(f"say which chat_template to use: there is no default among {sorted(ours)}")
            return ours.get(name, name_or_template)
        return ours if name_or_template is None else name_or_template

    def _take_media(self, conversations, is_batch: bool):
        """Splits messages and media: (messages without the data, items in order, numbers per conversation)."""
        light, items, counts = [], [], {"image": [], "video": []}
        for c, messages in enumerate(conversations):
            clean, start = [], len(items)
            for m, message in enumerate(messages):
                parts = message.get("content") if hasattr(message, "get") else None
                if not isinstance(parts, (list, tuple)):
                    clean.append(message)
                    continue
                new_parts = []
                for p, part in enumerate(parts):
                    kind = _kind(part)
                    if kind is not None:
                        place = f"conversations[{c}]." * is_batch + f"messages[{m}].content[{p}]"
                        items.append(MediaItem(kind, *_source(part, kind, place)))
                        # the keys stay, as a template may look at them; the data does not travel through it
                        part = {key: value if key in ("type", "text") else None for key, value in part.items()}
                    new_parts.append(part)
                clean.append({**message, "content": new_parts})
            light.append(clean)
            for kind, numbers in counts.items():
                numbers.append(sum(item.kind == kind for item in items[start:]))
        return light, items, counts

    def _fill_empty(self, items: list[MediaItem], images: Any, videos: Any, options: "_Options") -> None:
        """Pictures and videos given beside the messages go, in order, to the parts that hold no data."""
        pictures, films = nest(images, is_image, 0)[0], nest(videos, is_video, 0)[0]
        rates = _rates(options.fps, options.video_metadata)
        if not films:  # then they are those of frames in the messages
            shown = [item for item in items if item.kind == "video" and item.source is not None]
            for item, fps in zip(shown, spread_fps(rates, [item.source for item in shown])):
                item.fps = fps if item.fps is None else item.fps
        rates = spread_fps(rates, films) if films else []
        for kind, given in (("image", [(one, None) for one in pictures]), ("video", list(zip(films, rates)))):
            empty = [item for item in items if item.kind == kind and item.source is None]
            if len(empty) != len(given):
                places = ", ".join(item.place for item in empty[:3]) or "none"
                raise ValueError(
                    f"{len(empty)} {kind} parts of the messages hold no data ({places}) and {len(given)} {kind}s were"
                    " given beside them"
                )
            for item, (source, fps) in zip(empty, given):
                item.source, item.fps = source, fps if item.fps is None else item.fps

    # -- the library's face -------------------------------------------------------------------------------------------

    def _sort_options(self, kwargs: dict[str, Any], return_tensors: Optional[str]) -> "_Options":
        """Distributes the arguments of a call; its own `return_tensors` goes before those of its groups. Raises `TypeError` for one
        that nothing takes."""
        flat = dict(kwargs)
        groups = {name: dict(flat.pop(name, None) or {}) for name in ("text_kwargs", "images_kwargs", "videos_kwargs")}
        flat.update(flat.pop("common_kwargs", None) or {})
        media = {key: flat.pop(key) for key in list(flat) if key in MEDIA_KEYS or key == "media_limits"}
        text = {**flat, **groups["text_kwargs"]}
        grouped = text.pop("return_tensors", None)
        fps, metadata = text.pop("fps", None), text.pop("video_metadata", None)
        fps = groups["videos_kwargs"].pop("fps", fps)
        metadata = groups["videos_kwargs"].pop("video_metadata", metadata)
        padding = {key: text.pop(key, None) for key in PADDING_KEYS}
        truncation, max_length = (text.pop(key, None) for key in CUTTING_KEYS)
        media_types = bool(text.pop("return_mm_token_type_ids", None))
        asked = {key for key, value in text.items() if value is not None and (value is not False or key not in TextKwargs.__annotations__)}
        unknown = asked - TOKENIZER_KEYS
        if unknown:
            for_generate = unknown & GenerationConfig().to_dict().keys()
            if for_generate:
                logger.warning(f"{sorted(for_generate)} are for `generate` and passed over; in a pipeline they go into `generate_kwargs`")
            unknown -= for_generate
        if unknown:
            raise TypeError(f"unknown argument {sorted(unknown)}, allowed are {sorted(CALL_KEYS)}")
        return _Options(
            tokenizer={key: value for key, value in text.items() if key in TOKENIZER_KEYS},
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            images={**media, **groups["images_kwargs"]},
            videos={**media, **groups["videos_kwargs"]},
            fps=fps,
            video_metadata=metadata,
            media_types=media_types,
            return_tensors=grouped if return_tensors is None else return_tensors,
        )

    def get_num_image_tokens(self, height: int, width: int, **overrides) -> int:
        """Media tokens of a picture of this size in pixels; `overrides` are values of `media_proc_cfg`."""
        return self.image_processor.get_num_image_tokens(height, width, **overrides)

    def get_num_video_tokens(self, height: int, width: int, num_frames: int, fps: float, **overrides) -> int:
        """Media tokens of a video, without the text around its clips. `num_frames` at `fps` is the whole video."""
        return self.image_processor.get_num_video_tokens(height, width, num_frames, fps, **overrides)

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs) -> MultiModalData:
        """The library's counter. `image_sizes`: (height, width) each; `video_sizes`: (frames, height, width) each, of
        frames already chosen, as the library has it."""
        config = self.image_processor.media_config(**kwargs)
        data: dict[str, list[int]] = {}
        if image_sizes is not None:
            targets = [config.fit_image(width, height) for height, width in image_sizes]
            data["num_image_tokens"] = [config.tokens(target) for target in targets]
            data["num_image_patches"] = [target.rows * target.columns for target in targets]
        if video_sizes is not None:
            data["num_video_tokens"] = [
                -(-frames // config.temporal_merge_kernel_size) * config.tokens(config.fit_frame(width, height, frames))
                for frames, height, width in video_sizes
            ]
        return MultiModalData(**data)

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, **kwargs) -> list[str]:
        """Ids that `generate` gave, (batch, length) or (length,), to texts."""
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def parse_response(self, response, schema=None, *, prefix=None, tools=None, thinking: Optional[bool] = None):
        """A reply, or several, as text or ids and without the prompt, to `reasoning`, `content` and `tool_calls`: see
        `TikTokenTokenizer.parse_response`."""
        return self.tokenizer.parse_response(response, schema, prefix=prefix, tools=tools, thinking=thinking)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs) -> list:
        # The library would go through its Auto classes, which need remote code to be trusted even when this very file
        # is an installed package. The two classes are known, so they load themselves.
        for part, auto_class in ((KimiK26ImageProcessor, "AutoImageProcessor"), (TikTokenTokenizer, "AutoTokenizer")):
            if cls._auto_class is not None and part._auto_class is None:
                part.register_for_auto_class(auto_class)  # so that saving copies the code of all three
        media = {key: kwargs.pop(key) for key in list(kwargs) if key in MEDIA_KEYS or key == "media_limits"}
        image_processor = KimiK26ImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs, **media)
        tokenizer = TikTokenTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return [image_processor, tokenizer]

    def to_dict(self, *args, **kwargs) -> dict[str, Any]:
        """The library's `to_dict`. Version 4 asks for it at each loading, and there copies the vocabulary to drop it."""
        bare = copy.copy(self)
        del bare.tokenizer
        return super(KimiK26Processor, bare).to_dict(*args, **kwargs)

    def save_pretrained(self, save_directory: Union[str, os.PathLike], push_to_hub=False, **kwargs) -> list[str]:
        """Writes the tokenizer's files, `preprocessor_config.json` in the published form and `chat_template.jinja`.

        No `processor_config.json` is written: version 5 of the library would hold the values there and not where other
        engines, and version 4, read them.
        """
        os.makedirs(save_directory, exist_ok=True)
        saved = list(self.tokenizer.save_pretrained(save_directory))
        if self._auto_class is not None:
            custom_object_save(self, save_directory, config=self.image_processor)
        saved += self.image_processor.save_pretrained(save_directory)
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        for name, template in templates.items():
            if template is None:
                continue
            path = os.path.join(save_directory, "chat_template.jinja")
            if name != "default":
                folder = os.path.join(save_directory, "additional_chat_templates")
                os.makedirs(folder, exist_ok=True)
                path = os.path.join(folder, f"{os.path.basename(name)}.jinja")
            with open(path, "w", encoding="utf-8") as file:
                file.write(template)
            saved.append(path)
        if push_to_hub:
            repo = kwargs.pop("repo_id", None) or os.path.basename(os.path.normpath(save_directory))
            self.push_to_hub(repo, **kwargs)
        return saved


@dataclass
class _Options:
    """The arguments of one call by whom they are for."""

    tokenizer: dict[str, Any]
    padding: dict[str, Any]
    truncation: Any
    max_length: Optional[int]
    images: dict[str, Any]
    videos: dict[str, Any]
    fps: Any
    video_metadata: Any
    media_types: bool
    return_tensors: Optional[str]


def _rates(fps: Any, metadata: Any) -> Any:
    """Rates of decoded frames, from `fps` or from the library's `video_metadata` (one or one per video)."""
    if fps is not None or metadata is None:
        return fps
    entries = metadata if isinstance(metadata, (list, tuple)) else [metadata]
    return [entry.get("fps") if isinstance(entry, dict) else getattr(entry, "fps", None) for entry in entries]


def _placeholders(chat: RenderedChat) -> list[tuple[tuple[int, int], str]]:
    """Where the pictures and videos of a prompt go, and which of the two; in a chat, where its template says."""
    if chat.control is None:
        spans = [match.span() for match in PLACEHOLDERS.finditer(chat.text)]
    else:
        spans = [(start, end) for start, end in chat.control.ranges if PLACEHOLDERS.fullmatch(chat.text, start, end)]
    return [((start, end), "image" if chat.text[start:end] == MEDIA_PAD else "video") for start, end in spans]


def _kind(part: Any) -> Optional[str]:
    """Whether a part of a message is a picture, a video or neither."""
    kind = part.get("type") if hasattr(part, "get") else None
    return {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}.get(kind)


def _source(part: Any, kind: str, place: str) -> tuple[Any, Optional[float], str]:
    """The data of a picture or video part (None where it holds none), the rate of decoded frames, and the place."""
    found = [key for key in (kind, f"{kind}_url", "url", "path", "base64") if part.get(key) is not None]
    if len(found) > 1:
        raise ValueError(f"{place}: give the {kind} once, not as {' and '.join(found)}")
    if not found:
        return None, part.get("fps"), place
    value = part[found[0]]
    if found[0] == f"{kind}_url" and isinstance(value, dict):
        if not isinstance(value.get("url"), str):
            raise ValueError(f"{place}.{kind}_url needs a string 'url', got {value.get('url')!r}")
        value = value["url"]
    return value, part.get("fps"), place
