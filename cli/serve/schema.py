"""What a request to `/v1/chat/completions` may say: OpenAI's fields, both dialects of the thinking switch, and checks.

Fields that are not known here change nothing, as on other engines; in `chat_template_kwargs` they are refused.
"""

import json
import re
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from .errors import ApiError

FUNCTION_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,128}")


class Part(BaseModel):
    """Fields are of the JSON type they should be; nothing is turned into it."""

    model_config = ConfigDict(strict=True, extra="ignore")


# Members of unions have tags in `<>`, which are left out of the places in error messages.


def either(one, other, other_classes):
    """`other` for values of these classes, else `one`."""
    tell = Discriminator(lambda value: "<other>" if isinstance(value, other_classes) else "<one>")
    return Annotated[Union[Annotated[one, Tag("<one>")], Annotated[other, Tag("<other>")]], tell]


def by_type(*known: str) -> Discriminator:
    """Tells the members of a union by their `type`."""
    return Discriminator(
        lambda value: f"<{value.get('type') if isinstance(value, dict) else getattr(value, 'type', None)}>",
        custom_error_type="unknown_type",
        custom_error_message=f"'type' must be one of {', '.join(known)}",
    )


# -- messages ---------------------------------------------------------------------------------------------------------


class TextPart(Part):
    type: Literal["text"]
    text: str


class Url(Part):
    url: str


Address = either(str, Url, (dict, Url))


class ImagePart(Part):
    type: Literal["image_url"]
    image_url: Address


class VideoPart(Part):
    type: Literal["video_url"]
    video_url: Address


ContentPart = Annotated[
    Union[
        Annotated[TextPart, Tag("<text>")],
        Annotated[ImagePart, Tag("<image_url>")],
        Annotated[VideoPart, Tag("<video_url>")],
    ],
    by_type("text", "image_url", "video_url"),
]
Content = either(str, list[ContentPart], list)


class CalledFunction(Part):
    name: str
    arguments: Union[str, dict[str, Any], None] = None


class ToolCall(Part):
    id: Optional[str] = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Part):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Optional[Content] = None
    name: Optional[str] = None
    reasoning: Optional[str] = None
    reasoning_content: Optional[str] = None
    tool_calls: Optional[list[ToolCall]] = None
    tool_call_id: Optional[str] = None

    @model_validator(mode="after")
    def check(self):
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role} needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only the assistant makes tool_calls")
        return self

    def plain(self) -> dict:
        """The message as the chat template takes it."""
        message = self.model_dump(exclude_none=True)
        message["role"] = "system" if self.role == "developer" else self.role
        return message


# -- tools and forms --------------------------------------------------------------------------------------------------


class Function(Part):
    model_config = ConfigDict(strict=True, extra="allow")
    name: str
    description: Optional[str] = None
    parameters: Optional[dict[str, Any]] = None
    strict: Optional[bool] = None

    @field_validator("name")
    @classmethod
    def check_name(cls, name: str) -> str:
        if not FUNCTION_NAME.fullmatch(name):
            raise ValueError(f"must be 1 to 128 letters, digits, '_', '-' or '.', got {name[:140]!r}")
        return name

    @field_validator("parameters")
    @classmethod
    def check_parameters(cls, parameters: Optional[dict]) -> Optional[dict]:
        kind = (parameters or {}).get("type", "object")
        if kind != "object" and not (isinstance(kind, list) and "object" in kind):
            raise ValueError(f"must be the schema of an object, but its type is {kind!r:.80}")
        return parameters


class Tool(Part):
    model_config = ConfigDict(strict=True, extra="allow")
    type: Literal["function"]
    function: Function


class FunctionName(Part):
    name: str


class NamedTool(Part):
    type: Literal["function"]
    function: FunctionName


class Allowed(Part):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class AllowedTools(Part):
    type: Literal["allowed_tools"]
    allowed_tools: Allowed


OfTools = Annotated[
    Union[Annotated[NamedTool, Tag("<function>")], Annotated[AllowedTools, Tag("<allowed_tools>")]], by_type("function", "allowed_tools")
]
ToolChoice = either(Literal["none", "auto", "required"], OfTools, (dict, NamedTool, AllowedTools))


class JsonSchema(Part):
    name: str = "reply"
    schema_: Optional[dict[str, Any]] = Field(default=None, alias="schema")
    strict: Optional[bool] = None


class ResponseFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Optional[JsonSchema] = None

    @model_validator(mode="after")
    def check(self):
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("type json_schema needs json_schema.schema")
        return self

    @property
    def wanted(self) -> Optional[tuple[dict, bool]]:
        """The schema of the reply and whether all of it must be enforced; `None` for free text."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"type": "object"}, False
        return self.json_schema.schema_, bool(self.json_schema.strict)


class StreamOptions(Part):
    include_usage: Optional[bool] = None


# -- the thinking switch ----------------------------------------------------------------------------------------------


class Thinking(Part):
    type: Literal["enabled", "disabled"] = "enabled"
    keep: Optional[Literal["all"]] = None


class TemplateKwargs(Part):
    model_config = ConfigDict(strict=True, extra="forbid")
    thinking: Optional[bool] = None
    preserve_thinking: Optional[bool] = None


# -- the whole --------------------------------------------------------------------------------------------------------

Tokens = Annotated[int, Field(ge=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopText = Annotated[str, Field(min_length=1, max_length=1024)]
Stop = either(StopText, Annotated[list[StopText], Field(max_length=16)], list)


class ChatRequest(Part):
    messages: Annotated[list[Message], Field(min_length=1)]
    model: Optional[str] = None
    tools: Optional[list[Tool]] = None
    tool_choice: Optional[ToolChoice] = None
    parallel_tool_calls: Optional[bool] = None
    response_format: Optional[ResponseFormat] = None
    thinking: Optional[Thinking] = None
    chat_template_kwargs: Optional[TemplateKwargs] = None
    stream: Optional[bool] = None
    stream_options: Optional[StreamOptions] = None
    max_tokens: Optional[Tokens] = None
    max_completion_tokens: Optional[Tokens] = None
    stop: Optional[Stop] = None
    n: Optional[Annotated[int, Field(ge=1)]] = None
    seed: Optional[Annotated[int, Field(ge=-(2**63), lt=2**63)]] = None
    temperature: Optional[Annotated[float, Field(ge=0, le=2)]] = None
    top_p: Optional[Annotated[float, Field(gt=0, le=1)]] = None
    top_k: Optional[Annotated[int, Field(ge=-1)]] = None
    min_p: Optional[Annotated[float, Field(ge=0, le=1)]] = None
    presence_penalty: Optional[Penalty] = None
    frequency_penalty: Optional[Penalty] = None
    logit_bias: Optional[dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]] = None
    logprobs: Optional[bool] = None
    top_logprobs: Optional[Annotated[int, Field(ge=0, le=20)]] = None

    @model_validator(mode="after")
    def check(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        if self.forced and not names:
            raise ValueError("tool_choice asks for a call, but there are no tools")
        for name in self.chosen_names or ():
            if name not in names:
                raise ValueError(f"tool_choice names {name!r}, but the tools are {names}")
        if self.forced and self.response_format is not None and self.response_format.wanted:
            raise ValueError("response_format asks for an answer and tool_choice for a call: give one of them")
        other = self.chat_template_kwargs.thinking if self.chat_template_kwargs is not None else None
        if self.thinking is not None and other is not None and other != self.thinks:
            raise ValueError("thinking and chat_template_kwargs.thinking contradict each other")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are the same limit and differ")
        return self

    @property
    def thinks(self) -> bool:
        if self.thinking is not None:
            return self.thinking.type == "enabled"
        return not (self.chat_template_kwargs is not None and self.chat_template_kwargs.thinking is False)

    @property
    def keeps_thinking(self) -> bool:
        """Whether the reasoning of all earlier turns is shown to the model."""
        asked = self.chat_template_kwargs is not None and self.chat_template_kwargs.preserve_thinking
        return bool(asked) or (self.thinking is not None and self.thinking.keep == "all")

    @property
    def forced(self) -> bool:
        """Whether the reply must call."""
        if isinstance(self.tool_choice, AllowedTools):
            return self.tool_choice.allowed_tools.mode == "required"
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def chosen_names(self) -> Optional[list[str]]:
        """The functions to which `tool_choice` limits the calls; `None` where it names none."""
        if isinstance(self.tool_choice, NamedTool):
            return [self.tool_choice.function.name]
        if isinstance(self.tool_choice, AllowedTools):
            return [tool.function.name for tool in self.tool_choice.allowed_tools.tools]
        return None

    @property
    def callable_functions(self) -> list[Function]:
        """What the reply may call."""
        if self.tool_choice == "none":
            return []
        functions, chosen = [tool.function for tool in self.tools or ()], self.chosen_names
        return functions if chosen is None else [function for function in functions if function.name in chosen]

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def limit(self) -> Optional[int]:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


def parse_request(body: bytes) -> tuple[ChatRequest, Optional[list[dict]]]:
    """A request and its tools just as they were sent, for the template shows all of them.

    Raises:
        ApiError: 400, naming the first thing that is wrong.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = where(first["loc"])
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json") from error
        message = first["msg"].removeprefix("Value error, ")
        param = place or next((word for word in message.split()[:1] if word in ChatRequest.model_fields), None)
        raise ApiError(400, f"{place}: {message}" if place else message, param=param) from error
    tools = json.loads(body).get("tools") if request.tools else None
    return request, tools


def where(places: tuple) -> str:
    """`("messages", 0, "content", "<parts>", 1)` → `messages[0].content[1]`."""
    text = ""
    for place in places:
        if isinstance(place, int):
            text += f"[{place}]"
        elif not place.startswith("<"):
            text += f".{place}" if text else place
    return text
