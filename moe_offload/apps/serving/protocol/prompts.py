"""From the prompts or messages of a request to token ids, with the context's bounds: what is too long is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

from jinja2 import TemplateError

from .failures import RequestError
from .fields import Chat, Common, Completion

DEFAULT_TOKENS = 16  # of /v1/completions, by OpenAI's reference
UNBOUNDED_TOKENS = 1024  # of a chat, for a model whose configuration names no context
MOST_PROMPTS = 128
LONG_TOKEN = 16  # characters
ROLES = ("system", "developer", "user", "assistant")
RESERVED = frozenset(
    "conversation tokenize return_dict return_tensors add_generation_prompt tools chat_template".split()
)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Ids of one prompt; its text, if it is to be echoed."""

    ids: list[int]
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What the model takes: ids below `vocabulary`; `context` tokens of prompt and answer, `characters` of a prompt's
    text (None: it does not say)."""

    vocabulary: int
    context: int | None
    characters: int | None

    @classmethod
    def of(cls, vocabulary: int, context: int | None, tokenizer: Any) -> Bounds:
        """A text that only the longest of the tokens could spell within the context is not worth the seconds and the
        memory of splitting it."""
        longest = max(map(len, tokenizer.get_vocab()), default=0)
        return cls(vocabulary, context, None if context is None else context * max(longest, LONG_TOKEN))


def completion_prompts(asked: Completion, tokenizer: Any, bounds: Bounds) -> list[Prompt]:
    """The prompts of /v1/completions: a text, token ids, or a list of either."""
    given = asked.prompt
    if given is None:
        raise RequestError(400, "prompt is missing", param="prompt", code="missing_required_parameter")
    if isinstance(given, str) or (isinstance(given, list) and given and isinstance(given[0], int)):
        given = [given]
    if not isinstance(given, list) or not given or len(given) > MOST_PROMPTS:
        raise _wrong_prompt(f"it is a text, a list of token ids, or a list of 1 to {MOST_PROMPTS} of these")
    prompts = [_completion_prompt(one, tokenizer, bounds) for one in given]
    if asked.echo:
        texts = [one if isinstance(one, str) else tokenizer.decode(one) for one in given]
        prompts = [Prompt(prompt.ids, text) for prompt, text in zip(prompts, texts, strict=True)]
    return prompts


def _completion_prompt(given: Any, tokenizer: Any, bounds: Bounds) -> Prompt:
    if isinstance(given, str):
        ids = _tokens(tokenizer, given, bounds, "prompt")
    elif isinstance(given, list):
        _check_length(len(given), bounds, "prompt")
        if not all(type(id) is int and 0 <= id < bounds.vocabulary for id in given):
            raise _wrong_prompt(f"token ids are whole numbers from 0 to {bounds.vocabulary - 1}")
        ids = given
    else:
        raise _wrong_prompt("each of a list of prompts is a text or a list of token ids")
    if not ids:
        raise _wrong_prompt("the prompt is empty")
    _check_length(len(ids), bounds, "prompt")
    return Prompt(ids)


def chat_prompt(asked: Chat, tokenizer: Any, bounds: Bounds) -> Prompt:
    """The messages of /v1/chat/completions, as the model's chat template writes them."""
    if not isinstance(asked.messages, list) or not asked.messages:
        raise _wrong_messages("messages", "it is a list of at least one message")
    messages = [_message(i, given) for i, given in enumerate(asked.messages)]
    extra = asked.chat_template_kwargs or {}
    reserved = sorted(RESERVED & extra.keys())
    if reserved:
        raise RequestError(400, f"chat_template_kwargs: {reserved[0]} is the server's", param="chat_template_kwargs")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **extra)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise _wrong_messages("messages", f"the model's chat template refuses them: {str(error)[:200]}") from None
    ids = _tokens(tokenizer, text, bounds, "messages", add_special_tokens=False)  # the template has written them
    if not ids:
        raise _wrong_messages("messages", "they make an empty prompt")
    _check_length(len(ids), bounds, "messages")
    return Prompt(ids)


def _message(i: int, given: Any) -> dict[str, Any]:
    """One message, its content as text."""
    where = f"messages[{i}]"
    if not isinstance(given, dict):
        raise _wrong_messages(where, "a message is an object with role and content")
    message = {key: value for key, value in given.items() if value not in (None, [], {})}
    strange = sorted(message.keys() - {"role", "content", "name"})
    if strange:
        raise _wrong_messages(f"{where}.{strange[0][:64]}", "it is not supported here")
    role, content = message.get("role"), message.get("content", "")
    if role not in ROLES:
        raise _wrong_messages(f"{where}.role", f"it is one of {', '.join(ROLES)}")
    if isinstance(content, list):
        if not all(_is_text(part) for part in content):
            raise _wrong_messages(f"{where}.content", "each part is {'type': 'text', 'text': ...}")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or not isinstance(message.get("name", ""), str):
        raise _wrong_messages(f"{where}.content", "it is a text, or a list of parts of text")
    return {**message, "role": "system" if role == "developer" else role, "content": content}


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def most_tokens(asked: Common, prompt: Prompt, own: int | None, context: int | None) -> int:
    """How many tokens the answer may have, within the context; `own` is the model's setting.

    Raises RequestError if the request asks for more than there is room for.
    """
    wanted = asked.max_tokens
    name = "max_tokens"
    if isinstance(asked, Chat) and asked.max_completion_tokens is not None:
        wanted, name = asked.max_completion_tokens, "max_completion_tokens"
    room = UNBOUNDED_TOKENS if context is None else context - len(prompt.ids)
    if wanted is None:
        return min(own or (room if isinstance(asked, Chat) else DEFAULT_TOKENS), room)
    if context is not None and wanted > room:
        raise RequestError(
            400,
            f"the prompt has {len(prompt.ids)} tokens and {name} is {wanted}: the context takes {context} "
            f"together; ask for at most {room}, or shorten the prompt",
            param=name,
            code="context_length_exceeded",
        )
    return wanted


def _tokens(tokenizer: Any, text: str, bounds: Bounds, param: str, **options: Any) -> list[int]:
    if bounds.characters is not None and len(text) > bounds.characters:
        raise RequestError(
            400,
            f"the prompt has {len(text)} characters, and at most {bounds.characters} are taken for the context of "
            f"{bounds.context} tokens; shorten it",
            param=param,
            code="context_length_exceeded",
        )
    try:
        return list(tokenizer(text, verbose=False, **options)["input_ids"])
    except (UnicodeError, TypeError, ValueError):  # half of a surrogate pair, which JSON can hold
        raise _wrong_prompt("it is not valid Unicode text") from None


def _check_length(tokens: int, bounds: Bounds, param: str) -> None:
    if bounds.context is not None and tokens >= bounds.context:
        raise RequestError(
            400,
            f"the prompt has {tokens} tokens, and the context takes {bounds.context} with the answer; shorten it",
            param=param,
            code="context_length_exceeded",
        )


def _wrong_prompt(message: str) -> RequestError:
    return RequestError(400, f"prompt: {message}", param="prompt", code="invalid_value")


def _wrong_messages(where: str, message: str) -> RequestError:
    return RequestError(400, f"{where}: {message}", param=where, code="invalid_value")
