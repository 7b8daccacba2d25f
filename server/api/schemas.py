"""The wire: every field a request may carry, with its range and default, and the shapes of the answers.

The request models parse; the answer models only describe (answers are rendered without them). Limits that an
operator can set are not known here: parsing.py checks them, and `completion_schema` writes them into the document.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from server.api.limits import Limits

INT64_MAX = 2**63 - 1


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 16.0 is 16. Booleans and text stay what they are, and are refused."""
    if type(value) is float and value.is_integer() and abs(value) <= INT64_MAX:
        return int(value)
    return value


Integer = Annotated[int, BeforeValidator(_whole)]
TokenId = Annotated[int, Field(ge=0)]
TokenIds = list[TokenId]
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
Prompts = Annotated[
    Any, WithJsonSchema({"anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "array", "items": _IDS, "minItems": 1}]})
]
Stops = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, {**_TEXTS, "minItems": 0}]})]

_OBJECT = {"type": "object"}
_TEXT = {"type": "string", "minLength": 1}
_WORDS = {"type": "array", "items": _TEXT, "minItems": 1}
_SCHEMA = {"anyOf": [_OBJECT, _TEXT]}
_OUTPUTS = {"json": _SCHEMA, "regex": _TEXT, "choice": _WORDS, "grammar": _TEXT, "json_object": {"type": "boolean"}}
_HOW = {"whitespace_pattern": _TEXT, "disable_any_whitespace": {"type": "boolean"}}
_FORMATS = {"type": "string", "enum": ["text", "json_object", "json_schema"]}
ResponseFormat = Annotated[
    Any,
    WithJsonSchema({
        "type": "object",
        "properties": {
            "type": _FORMATS,
            "json_schema": {"type": "object", "properties": {"schema": _OBJECT}, "required": ["schema"]},
            "schema": _OBJECT,
        },
        "required": ["type"],
    }),
]  # fmt: skip
StructuredOutputs = Annotated[Any, WithJsonSchema({"type": "object", "properties": {**_OUTPUTS, **_HOW}})]
Schema = Annotated[Any, WithJsonSchema(_SCHEMA)]
Choices = Annotated[Any, WithJsonSchema(_WORDS)]
Text = Annotated[Any, WithJsonSchema({"type": "string"})]
Phrase = Annotated[str, Field(min_length=1)]


class Wire(BaseModel):
    """Strictly typed: no text for numbers, no booleans for integers. null was dropped before: it means omitted."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=(), allow_inf_nan=False)


class StreamOptions(Wire):
    include_usage: bool = Field(default=False, description="send one last chunk with the usage of the whole request")
    include_obfuscation: bool = Field(default=False, description="accepted; this server adds no padding")
    continuous_usage_stats: bool = Field(default=False, description="with include_usage: usage so far, in every chunk")


class CompletionBody(Wire):
    """POST /v1/completions."""

    model: str = Field(default="", description="name of the model; none means the one being served")
    prompt: Prompts = Field(default=None, description="text, texts, token ids or lists of them; none: a new document")
    suffix: str = Field(default="", description="refused unless empty: GPT-2 does not insert")
    max_tokens: Integer | None = Field(default=None, ge=0, le=INT64_MAX, description="default 16; 0 is legal with echo")
    temperature: float = Field(default=1.0, ge=0, le=2, description="0 takes the most likely token")
    top_p: float = Field(default=1.0, ge=0, le=1)
    n: Integer = Field(default=1, ge=1, description="choices for each prompt")
    best_of: Integer | None = Field(default=None, ge=1, description="candidates for each prompt; the n best return")
    stream: bool = False
    stream_options: StreamOptions | None = Field(default=None, description="only with stream")
    logprobs: Integer | None = Field(default=None, ge=0, description="0 is on: the sampled token's alone")
    echo: bool = False
    stop: Stops = Field(default=None, description="texts that end the completion; they are not part of it")
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default={}, description="token id to bias")
    seed: Integer | None = Field(
        default=None,
        ge=-INT64_MAX - 1,
        le=INT64_MAX,
        description="same seed, same answer, of equal prompts too; without one, or with -1, each prompt draws its own",
    )
    user: str = ""
    # vLLM's extensions
    top_k: Integer = Field(default=-1, ge=-1, le=INT64_MAX, description="0 or -1: all tokens")
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    repetition_penalty_range: Integer = Field(
        default=0, ge=0, le=INT64_MAX, description="latest tokens that the three penalties look at; 0 is all"
    )
    temperature_last: bool = Field(default=False, description="temper what the filters leave, as llama.cpp does")
    min_tokens: Integer = Field(default=0, ge=0, le=INT64_MAX, description="nothing ends the completion before it")
    ignore_eos: bool = False
    stop_token_ids: TokenIds = Field(default=[], fail_fast=True, description="tokens that end the completion")
    include_stop_str_in_output: bool = False
    allowed_token_ids: TokenIds | None = Field(
        default=None, fail_fast=True, description="no other token can be sampled"
    )
    priority: Integer = Field(default=0, ge=-(2**31), le=2**31 - 1, description="lower runs first, of one key")
    cache_salt: str | None = Field(
        default=None, min_length=1, max_length=256, description="cached prompts are shared within it only"
    )
    request_id: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9._-]{1,64}$", description="the answer's id: cmpl-<it>"
    )
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = Field(default=False, description="logprobs name tokens token_id:N")
    truncate_prompt_tokens: Integer | None = Field(
        None, ge=-1, le=INT64_MAX, description="keep a prompt's last N tokens; -1 keeps as many as fit"
    )
    truncation_side: Literal["left", "right"] = Field(
        default="left", description="with truncate_prompt_tokens: which end is cut off"
    )
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = Field(default=True, description="accepted; this tokenizer puts none")
    prompt_logprobs: Integer | None = Field(default=None, ge=0, description="score the prompt too; not with stream")
    add_special_tokens: bool = Field(default=True, description="what the tokenizer puts around a text; GPT-2's nothing")
    logprob_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = Field(
        default=None, fail_fast=True, description="with logprobs: score these in place of the likeliest tokens"
    )
    bad_words: list[Phrase] = Field(default=[], description="texts that are never generated, as whole runs of tokens")
    use_beam_search: bool = Field(
        default=False, description="search for the likeliest of best_of (else n) beams; a stream has them at its end"
    )
    length_penalty: float = Field(
        default=1.0, ge=-10, le=10, description="of beams: log-probability / length ^ this; above 0 favours long ones"
    )
    early_stopping: bool | Literal["never"] = Field(
        default=False, description="of beams: true stops once enough have ended, never when none can become better"
    )
    # llama.cpp's samplers
    typical_p: float = Field(default=1.0, gt=0, le=1, description="locally typical sampling; 1 is off")
    xtc_probability: float = Field(default=0.0, ge=0, le=1, description="how often the top choices are excluded")
    xtc_threshold: float = Field(default=0.1, ge=0, le=1, description="what makes a top choice; above 0.5 xtc is off")
    dry_multiplier: float = Field(default=0.0, ge=0, le=100, description="penalty for going on repeating; 0 is off")
    dry_base: float = Field(default=1.75, ge=1, le=100, description="how fast it grows with the repetition's length")
    dry_allowed_length: Integer = Field(default=2, ge=1, le=INT64_MAX, description="repetitions this long are free")
    dry_penalty_last_n: Integer = Field(
        default=-1, ge=-1, le=INT64_MAX, description="tokens looked back at; -1 is all, 0 is off"
    )
    dry_sequence_breakers: list[Phrase] = Field(
        default=["\n", ":", '"', "*"], description="texts that no repetition reaches across"
    )
    # what the answer looks like: one of these
    response_format: ResponseFormat = Field(default=None, description="OpenAI's: any JSON object, or by a schema")
    structured_outputs: StructuredOutputs = Field(default=None, description="vLLM's: exactly one kind of output")
    guided_json: Schema = Field(default=None, description="a JSON schema, as an object or as text")
    guided_regex: Text = Field(
        default=None, description="the whole answer matches it; Rust syntax, no look-around, \\d \\w \\s are ASCII"
    )
    guided_choice: Choices = Field(default=None, description="the answer is one of them")
    guided_grammar: Text = Field(default=None, description="Lark (llguidance's dialect) or llama.cpp's GBNF")
    guided_whitespace_pattern: str | None = Field(
        default=None, min_length=1, max_length=256, description="what may stand between the tokens of JSON, as a regex"
    )
    grammar: Text = Field(default=None, description="llama.cpp's name for guided_grammar; empty is none")
    json_schema: Schema = Field(default=None, description="llama.cpp's name for guided_json")


class EmbeddingBody(Wire):
    """POST /v1/embeddings."""

    model: str = Field(default="", description="name of the model; none means the one being served")
    input: Prompts = Field(description="text, texts, token ids or lists of them; none may be empty")
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="base64: little-endian float32, as the clients ask by default"
    )
    user: str = ""


class TokenizeBody(Wire):
    model: str = ""
    prompt: str | None = Field(default=None, description="the text; `content` and `text` are other names for it")
    content: str | None = None
    text: str | None = None
    add_special_tokens: bool = Field(default=True, description="what the tokenizer puts around a text; GPT-2's nothing")
    return_token_strs: bool = False


class DetokenizeBody(Wire):
    model: str = ""
    tokens: TokenIds = Field(fail_fast=True)


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorDetail


class LogprobsAnswer(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class ChoiceAnswer(BaseModel):
    text: str
    index: int
    logprobs: LogprobsAnswer | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None


class UsageAnswer(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class CompletionAnswer(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[ChoiceAnswer]
    system_fingerprint: str
    usage: UsageAnswer


class TokenizeAnswer(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(BaseModel):
    prompt: str


def request_schema(body: type[Wire]) -> dict[str, Any]:
    """A body as OpenAPI shows it: self-contained, and null is as good as omitted everywhere."""
    raw = body.model_json_schema()
    schema: dict[str, Any] = _inlined(raw, raw.pop("$defs", {}))
    for name, shape in schema["properties"].items():
        if name not in schema.get("required", ()):
            schema["properties"][name] = _nullable(shape)
    return schema


def _inlined(shape: Any, definitions: dict[str, Any]) -> Any:
    """With what a reference means in place of it. None of ours refers to itself."""
    if isinstance(shape, list):
        return [_inlined(each, definitions) for each in shape]
    if not isinstance(shape, dict):
        return shape
    if "$ref" in shape:
        return _inlined(definitions[shape["$ref"].rsplit("/", 1)[1]], definitions)
    return {name: _inlined(value, definitions) for name, value in shape.items()}


def _nullable(shape: dict[str, Any]) -> dict[str, Any]:
    about: dict[str, Any] = {key: shape.pop(key) for key in ("title", "description", "default") if key in shape}
    options = shape.pop("anyOf", None) or [shape]
    for option in options:  # pydantic leaves these as they are on a nullable integer
        for name, standard in (("ge", "minimum"), ("le", "maximum")):
            if name in option:
                option[standard] = option.pop(name)
    if {"type": "null"} not in options:
        options = [*options, {"type": "null"}]
    return {**about, "anyOf": options}


def completion_schema(limits: Limits) -> dict[str, Any]:
    schema = request_schema(CompletionBody)
    maxima = {
        "n": limits.max_choices,
        "best_of": limits.max_best_of,
        "logprobs": limits.max_logprobs,
        "prompt_logprobs": limits.max_logprobs,
    }
    for name, maximum in maxima.items():
        schema["properties"][name]["anyOf"][0]["maximum"] = maximum
    _bound_prompts(schema["properties"]["prompt"], limits)
    for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
        _bound_ids(schema["properties"][name]["anyOf"][0], limits)
    schema["properties"]["logprob_token_ids"]["anyOf"][0]["maxItems"] = limits.max_logprobs
    schema["properties"]["stop"]["anyOf"][1]["maxItems"] = limits.max_stop_strings
    schema["properties"]["logit_bias"]["anyOf"][0]["maxProperties"] = limits.max_logit_bias
    for name in ("bad_words", "dry_sequence_breakers"):
        words = schema["properties"][name]["anyOf"][0]
        words["maxItems"] = limits.max_bad_words if name == "bad_words" else limits.max_breakers
        words["items"]["maxLength"] = limits.max_stop_length if name == "bad_words" else limits.max_breaker_length
    return schema


def tokenize_schema() -> dict[str, Any]:
    """The text goes by one of three names."""
    one = [{"required": [name], "properties": {name: {"type": "string"}}} for name in ("prompt", "content", "text")]
    return {**request_schema(TokenizeBody), "oneOf": one}


def detokenize_schema(limits: Limits) -> dict[str, Any]:
    schema = request_schema(DetokenizeBody)
    _bound_ids(schema["properties"]["tokens"], limits)
    return schema


def embedding_schema(limits: Limits) -> dict[str, Any]:
    schema = request_schema(EmbeddingBody)
    field = schema["properties"]["input"]
    _bound_prompts(field, limits)
    text, texts, ids, lists = field["anyOf"] = deepcopy(field["anyOf"])
    for option in (text, texts["items"]):
        option["minLength"] = 1
    for option in (ids, lists["items"]):
        option["maxItems"] = limits.max_model_len
    return schema


def _bound_prompts(field: dict[str, Any], limits: Limits) -> None:
    """The four forms, with what the operator and the vocabulary make of them."""
    text, texts, ids, lists, *null = deepcopy(field["anyOf"])
    texts["maxItems"] = lists["maxItems"] = limits.max_prompts
    _bound_ids(ids, limits)
    _bound_ids(lists["items"], limits)
    field["anyOf"] = [text, texts, ids, lists, *null]


def _bound_ids(array: dict[str, Any], limits: Limits) -> None:
    array["items"]["maximum"] = limits.vocab_size - 1
