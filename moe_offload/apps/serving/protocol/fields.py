"""What a request may say: each field is answered as it says, or refused with a 400 that names it.

    NEUTRAL       fields that are accepted where they ask for nothing, and refused where they ask for something
    Completion    the body of /v1/completions
    Chat          the body of /v1/chat/completions

Prompts and messages are looked at in `prompts.py`: pydantic would copy them, and report every wrong element.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from transformers import GenerationConfig

from ..generation import Sampling
from .failures import RequestError

MOST_CHOICES, MOST_STOPS, MOST_LOGPROBS, MOST_BIASES = 16, 16, 20, 1024
INT64, LONGEST_STOP = 2**63, 1024

TEXT_ONLY = "this server writes text and nothing else"
NOT_CONSTRAINED = "the answer cannot be constrained here; ask for the form in the prompt and check it"
NO_TOOLS = "describe the tools in the prompt"
NOT_KEPT = "nothing is kept here"
#: Field: the values that ask for nothing (null always does), and why any other is refused.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "suffix": (("",), "there is no text after the answer here: a model that fills in takes it in its prompt"),
    "best_of": ((1,), "answers are not ranked here: ask for n of them, with logprobs"),
    "response_format": (({"type": "text"},), NOT_CONSTRAINED),
    "tools": (([],), NO_TOOLS),
    "tool_choice": (("none", "auto"), NO_TOOLS),
    "parallel_tool_calls": ((True, False), NO_TOOLS),
    "functions": (([],), NO_TOOLS),
    "function_call": (("none", "auto"), NO_TOOLS),
    "modalities": ((["text"],), TEXT_ONLY),
    "audio": ((), TEXT_ONLY),
    "web_search_options": ((), TEXT_ONLY),
    "reasoning_effort": ((), "the model's chat template decides how it thinks: see chat_template_kwargs"),
    "verbosity": ((), "ask for it in the prompt"),
    "prediction": ((), "the answer cannot be given in part beforehand"),
    "store": ((False,), NOT_KEPT),
    "metadata": (({},), NOT_KEPT),
    "service_tier": (("auto", "default"), "there is one tier here"),
}
Count = Annotated[int, Field(ge=1, lt=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Common(BaseModel, ABC):
    """Fields of both APIs. `top_k`, `min_p` and `repetition_penalty` are those of vLLM and llama.cpp."""

    model_config = ConfigDict(strict=True, extra="forbid")
    model: str
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MOST_BIASES)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # these three say who asks, which changes no answer
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """How many log-probabilities to report beside each token's own; None: none at all."""


class Completion(Common):
    prompt: Any = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


class Chat(Common):
    messages: Any = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def parse_fields(body: bytes, kind: type[Common]) -> Any:
    """The fields of a body, an instance of `kind`. Raises RequestError for what is wrong or not supported."""
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise RequestError(400, "the body is not a JSON object", code="invalid_json")
    for name in NEUTRAL.keys() & fields.keys():
        neutral, reason = NEUTRAL[name]
        value = fields.pop(name)
        asks_nothing = value is None or value in neutral or (name == "best_of" and value == fields.get("n"))
        if not asks_nothing:
            raise RequestError(400, f"{name} is not supported: {reason}", param=name, code="unsupported_parameter")
    try:
        found = kind.model_validate(fields)
    except ValidationError as error:
        raise _wrong_field(error) from None
    if found.stream_options is not None and not found.stream:
        raise RequestError(400, "stream_options: only a request with stream has any", param="stream_options")
    if isinstance(found, Chat) and found.top_logprobs is not None and not found.logprobs:
        raise RequestError(400, "top_logprobs: it needs logprobs to be true", param="top_logprobs")
    if isinstance(found, Completion) and found.echo and found.logprobs is not None:
        raise RequestError(
            400,
            "logprobs with echo is not supported: there are none of the prompt's own tokens; ask for one of the two",
            param="logprobs",
            code="unsupported_parameter",
        )
    return found


def _wrong_field(error: ValidationError) -> RequestError:
    """The first finding of pydantic, without the value: it may be large, or a secret."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    name = str(first["loc"][0])[:64] if first["loc"] else "body"
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        message, code = f"{name!r} is no field that this server knows; leave it out", "unknown_parameter"
    elif first["type"] == "missing":
        message, code = f"{name} is missing", "missing_required_parameter"
    elif name == "stop":
        message = f"stop: it is a text, or a list of at most {MOST_STOPS}, each of 1 to {LONGEST_STOP} characters"
        code = "invalid_value"
    else:
        message, code = f"{name}: {first['msg'][:200]}", "invalid_value"
    return RequestError(400, message, param=name, code=code)


def choose_sampling(asked: Common, own: GenerationConfig, most_tokens: int, vocabulary: int) -> Sampling:
    """How to generate: what the request says, on top of the model's `own` settings.

    A request that says nothing about sampling is answered as `model.generate` would. One that gives a temperature,
    top_p, top_k or min_p samples from the whole distribution but for what it says, as OpenAI's does: transformers' own
    default, the 50 likeliest tokens, holds only for a model whose generation_config.json says so.
    """
    config = copy.deepcopy(own)
    if asked.temperature is not None and 0 < asked.temperature < 0.01:
        raise RequestError(400, "temperature: it is 0 (greedy) or from 0.01 to 2", param="temperature")
    given = {name: getattr(asked, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    given = {name: value for name, value in given.items() if value is not None}
    if asked.temperature == 0:
        config.do_sample = False
    elif given:
        config.do_sample = True
        config.top_k = config.top_k or 0
        for name, value in given.items():
            setattr(config, name, max(value, 0))
    if not config.do_sample:  # they have no effect, and transformers warns of each
        config.temperature = config.top_p = config.top_k = config.min_p = config.typical_p = None
        config.epsilon_cutoff = config.eta_cutoff = None
    if asked.repetition_penalty is not None:
        config.repetition_penalty = asked.repetition_penalty
    config.max_new_tokens, config.max_length, config.num_return_sequences = most_tokens, None, 1
    if config.pad_token_id is None:  # there is nothing to pad, and transformers says which it takes each time
        eos = config.eos_token_id
        config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    return Sampling(
        config=config,
        stop=tuple(stop),
        seed=asked.seed,
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        logit_bias=_logit_bias(asked.logit_bias or {}, vocabulary),
        top_logprobs=asked.alternatives,
    )


def _logit_bias(asked: dict[str, float], vocabulary: int) -> dict[int, float]:
    wrong = [key for key in asked if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocabulary)]
    if wrong:
        message = f"logit_bias: {wrong[0][:20]!r} is no token; its keys are ids below {vocabulary}"
        raise RequestError(400, message, param="logit_bias", code="invalid_value")
    return {int(key): bias for key, bias in asked.items()}
