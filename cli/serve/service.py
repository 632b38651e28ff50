"""From the body of a request to replies in the engine: everything between HTTP and tokens."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Optional

from jinja2 import TemplateError

from ...media_kimi_k26 import MediaError, MediaLimits
from .. import TEMPERATURE, TOP_P
from .engine import Clip, Engine, Prompt, Sequence, prompt_keys
from .errors import ApiError
from .guides import Guides, SchemaError
from .media import MediaPolicy, load_media
from .replies import Answer, Event, Reply
from .sampling import Sampler, Settings
from .schema import ChatRequest, NamedTool, parse_request


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    max_body: bytes. max_media: pictures and videos. max_length: tokens of prompt and reply together.
    default_tokens: of a reply whose length the request leaves open. max_choices: `n`.
    seconds: from the request to the end of its answer. body_seconds: until its body has come.
    memory: bytes of bodies and decoded pictures and videos of all requests together.
    fixed_sampling: refuse values of temperature, top_p, n and the penalties other than the model's own, as Moonshot's API does.
    """

    max_body: int = 64 * 2**20
    max_media: int = 32
    max_length: int = 262_144
    default_tokens: int = 32_768
    max_choices: int = 8
    seconds: float = 600.0
    body_seconds: float = 60.0
    memory: int = 2 * 2**30
    fixed_sampling: bool = False
    media: MediaLimits = MediaLimits(max_bytes=64 * 2**20, max_image_pixels=64_000_000, max_video_seconds=120.0)


@dataclass
class Draft:
    """A request that has been read and is well formed. `tools` are as they were sent."""

    request: ChatRequest
    messages: list[dict]
    tools: Optional[list[dict]]

    @property
    def has_media(self) -> bool:
        contents = [message["content"] for message in self.messages if isinstance(message.get("content"), list)]
        return any(part["type"] != "text" for content in contents for part in content)


@dataclass
class Prepared:
    """What the engine needs for a request."""

    request: ChatRequest
    prompt: Prompt
    settings: Settings
    max_tokens: int
    deadline: float
    guides: list  # one for each choice


class Service:
    """One model with its tokenizer, its engine and its limits.

    Args:
        names: under which the model can be asked for.
    """

    def __init__(self, model, processor, engine: Engine, names: list[str], policy: MediaPolicy, limits: Limits):
        self.model, self.processor, self.engine = model, processor, engine
        self.tokenizer = processor.tokenizer
        self.names, self.policy, self.limits = names, policy, limits
        self.guides = Guides(self.tokenizer, engine.end_ids)
        self.max_length = min(limits.max_length, engine.cache_tokens)
        self.created = int(time.time())

    def read(self, body: bytes) -> Draft:
        """The body of a request. Raises `ApiError`."""
        request, tools = parse_request(body)
        self._check(request)
        return Draft(request, [message.plain() for message in request.messages], tools)

    def prepare(self, draft: Draft, deadline: float) -> Prepared:
        """A request's prompt and settings; takes as long as its pictures and videos need. Raises `ApiError`."""
        request = draft.request
        guides = self._make_guides(request, draft.messages)
        prompt = self._prompt(draft)
        room = self.max_length - len(prompt.ids)
        wanted = request.limit or min(room, self.limits.default_tokens)
        if room < 1 or wanted > room:
            asked = f"{len(prompt.ids)} tokens in the messages"
            asked += f" and {request.limit} for the reply" if request.limit else ""
            message = f"the model's limit is {self.max_length} tokens, but there are {asked}; shorten one of them"
            raise ApiError(400, message, param="messages" if room < 1 else "max_tokens", code="context_length_exceeded")
        return Prepared(request, prompt, self._settings(request), wanted, deadline, guides)

    def begin(self, prepared: Prepared, send: Callable[[Event], None]) -> Answer:
        """Hands the request to the engine, whose events go to `send`. Raises `QueueFull` or `Stopped`."""
        request, replies, sequences = prepared.request, [], []
        for index, guide in enumerate(prepared.guides):
            one_call = request.parallel_tool_calls is False
            stops = request.stops
            reply = Reply(index, self.tokenizer, request.thinks, send, stops, one_call, bool(request.logprobs))
            seed = None if request.seed is None else request.seed + index
            sampler = Sampler(prepared.settings, seed)
            replies.append(reply)
            sequences.append(
                Sequence(prepared.prompt, reply, sampler, prepared.max_tokens, prepared.deadline, guide)
            )
        self.engine.submit(sequences)
        with_usage = request.stream_options is not None and bool(request.stream_options.include_usage)
        return Answer(request.model or self.names[0], replies, sequences, with_usage)

    # -- checks and settings ------------------------------------------------------------------------------------------

    def _check(self, request: ChatRequest) -> None:
        if request.model is not None and request.model not in self.names:
            message = f"the model {request.model!r:.200} does not exist; there is {', '.join(self.names)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        if (request.n or 1) > min(self.limits.max_choices, self.engine.rows):
            raise ApiError(400, f"n: at most {min(self.limits.max_choices, self.engine.rows)}, got {request.n}", param="n")
        vocabulary = self.model.config.text_config.vocab_size
        for index in request.logit_bias or ():
            if int(index) >= vocabulary:
                raise ApiError(400, f"logit_bias: ids are 0 to {vocabulary - 1}, got {index}", param="logit_bias")
        if self.limits.fixed_sampling:
            fixed = {"temperature": TEMPERATURE[request.thinks], "top_p": TOP_P, "n": 1}
            fixed |= {"presence_penalty": 0, "frequency_penalty": 0}
            for name, value in fixed.items():
                if getattr(request, name) not in (None, value):
                    raise ApiError(400, f"{name}: only {value} is allowed for this model", param=name)

    def _settings(self, request: ChatRequest) -> Settings:
        temperature = request.temperature
        return Settings(
            temperature=TEMPERATURE[request.thinks] if temperature is None else temperature,
            top_p=TOP_P if request.top_p is None else request.top_p,
            top_k=max(0, request.top_k or 0),
            min_p=request.min_p or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias={int(index): bias for index, bias in (request.logit_bias or {}).items()},
            top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        )

    def _make_guides(self, request: ChatRequest, messages: list[dict]) -> list:
        """A guide for each choice. Raises `ApiError` for a schema that cannot be enforced and must be."""
        functions = request.callable_functions
        parallel = request.parallel_tool_calls is not False and not isinstance(request.tool_choice, NamedTool)
        called = sum(len(message.get("tool_calls") or ()) for message in messages)
        form = request.response_format.wanted if request.response_format is not None else None

        def make():
            if request.forced:
                return self.guides.calls(functions, called, request.thinks, parallel)
            if form is not None:
                return self.guides.json(*form, request.thinks, functions, called)
            if not functions:
                return self.guides.no_calls()
            return self.guides.optional_calls(functions, request.thinks, parallel)

        try:
            guide = make()
        except SchemaError as error:
            raise ApiError(400, str(error), param="response_format" if form else "tools", code="invalid_schema") from error
        return [guide, *(guide.copy() for _ in range((request.n or 1) - 1))]

    # -- prompts ------------------------------------------------------------------------------------------------------

    def _prompt(self, draft: Draft) -> Prompt:
        request, messages, media = draft.request, draft.messages, {}
        if draft.has_media:
            if self.model.config.vision_config is None:
                raise ApiError(400, "this model takes text alone: no pictures, no videos", param="messages")
            messages = load_media(messages, self.policy, self.limits.max_media)
            media = {"media_limits": self.limits.media}
        try:
            inputs = self.processor.apply_chat_template(
                messages,
                tools=draft.tools,
                thinking=request.thinks,
                preserve_thinking=request.keeps_thinking,
                tokenize=True,
                return_dict=True,
                **media,
            )
        except MediaError as error:
            raise ApiError(400, str(error), param=str(error).partition(":")[0], code="invalid_media") from error
        except (ValueError, TypeError, TemplateError) as error:
            raise ApiError(400, f"the messages cannot be shown to the model: {error}", param="messages") from error
        return self._as_prompt(inputs)

    def _as_prompt(self, inputs) -> Prompt:
        ids = inputs["input_ids"]
        ids = list(ids[0] if isinstance(ids[0], list) else ids)
        if "pixel_values" not in inputs:
            return Prompt(ids, prompt_keys(ids, [], []))
        pad = self.processor.image_token_id
        runs, place = [], 0
        for index, group in groupby(ids):
            length = sum(1 for _ in group)
            if index == pad:
                runs.append((place, length))
            place += length
        grids = inputs["grid_thws"]
        patches = inputs["pixel_values"].split(grids.prod(-1).tolist())
        clips, digests = [], []
        for (start, tokens), grid, pixels in zip(runs, grids, patches, strict=True):
            clips.append(Clip(pixels.to(self.model.dtype), grid.unsqueeze(0), start, tokens))
            content = hashlib.blake2b(pixels.numpy().data, digest_size=8, key=repr(grid.tolist()).encode())
            digests.append(int.from_bytes(content.digest(), "big") >> 2)
        return Prompt(ids, prompt_keys(ids, clips, digests), clips)
