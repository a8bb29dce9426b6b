"""The fields of requests: what each route reads, what it ignores, and that it refuses everything else.

A field that changes the answer is read or refused. Those in `IGNORED` change nothing here: they are for a client's own
records, for a vendor's accounts and caches, or say what this server does anyway.
"""

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graftlm.serve.errors import invalid
from graftlm.serve.limits import unknown_field

Count = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=100)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Tree = dict[str, Any]


RECORDS = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Fields of OpenAI's clients that change no answer."""


class Body(BaseModel):
    """A request. Types are exact: no text is read as a number."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())
    IGNORED: ClassVar[frozenset[str]] = frozenset()


B = TypeVar("B", bound=Body)


def read(kind: type[B], tree: Tree) -> B:
    """The request of this kind; ApiError (400) that names the first field that is wrong, and what is near it."""
    known = kind.model_fields
    if unknown := [name for name in tree if name not in known and name not in kind.IGNORED]:
        raise unknown_field(unknown[0], known)
    try:
        return kind.model_validate({name: value for name, value in tree.items() if name in known})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"][:1])
        if first["type"] == "missing":
            raise invalid(f"field {where!r} is needed", where, "missing_field") from None
        raise invalid(f"field {where!r}: {first['msg']}, this is {first['input']!r:.60}", where) from None


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: Literal[False] = False


class Sampled(Body):
    """What all routes that sample have. None of these fields given: as OpenAI has it, temperature 1."""

    model: Annotated[str, Field(max_length=512)]
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    stream: bool | None = None


class OpenAISampled(Sampled):
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    n: Count | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    stream_options: StreamOptions | None = None
    response_format: Tree | None = None


class ChatRequest(OpenAISampled):
    """POST /v1/chat/completions."""

    IGNORED: ClassVar[frozenset[str]] = RECORDS | {"prediction"}
    messages: list[Tree]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tree] | None = None
    tool_choice: str | Tree | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: Tree | None = None
    modalities: list[Literal["text"]] | None = None


class CompletionRequest(OpenAISampled):
    """POST /v1/completions."""

    IGNORED: ClassVar[frozenset[str]] = frozenset({"user"})
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Count | None = None
    suffix: str | None = None


class EmbeddingRequest(Body):
    """POST /v1/embeddings."""

    IGNORED: ClassVar[frozenset[str]] = frozenset({"user"})
    model: Annotated[str, Field(max_length=512)]
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None


class ResponsesRequest(Sampled):
    """POST /v1/responses."""

    IGNORED: ClassVar[frozenset[str]] = RECORDS | {"include", "stream_options"}
    input: str | list[Tree]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    tools: list[Tree] | None = None
    tool_choice: str | Tree | None = None
    parallel_tool_calls: bool | None = None
    text: Tree | None = None
    reasoning: Tree | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None


class CountRequest(Body):
    """POST /v1/messages/count_tokens."""

    IGNORED: ClassVar[frozenset[str]] = frozenset({"metadata", "service_tier", "cache_control", "inference_geo"})
    model: Annotated[str, Field(max_length=512)]
    messages: list[Tree]
    system: str | list[Tree] | None = None
    tools: list[Tree] | None = None
    tool_choice: Tree | None = None
    thinking: Tree | None = None
    output_config: Tree | None = None


class MessagesRequest(CountRequest, Sampled):
    """POST /v1/messages."""

    max_tokens: Count
    stop_sequences: list[str] | None = None


class TokenizeRequest(Body):
    """POST /tokenize: a text, or messages as the model reads them."""

    model: Annotated[str, Field(max_length=512)]
    prompt: str | None = None
    messages: list[Tree] | None = None
    tools: list[Tree] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: Annotated[str, Field(max_length=512)]
    tokens: list[Annotated[int, Field(ge=0)]]


class LoadRequest(Body):
    """POST /v1/load_lora_adapter, as vLLM has it."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadRequest(Body):
    """POST /v1/unload_lora_adapter."""

    IGNORED: ClassVar[frozenset[str]] = frozenset({"lora_int_id"})
    lora_name: str
