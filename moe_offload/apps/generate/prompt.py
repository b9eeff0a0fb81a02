"""From the prompt on the command line to token ids: the text, its chat template, and the room left for the answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ...errors import ConfigError, UnsupportedModelError

Messages = list[dict[str, str]]


def read_prompt(prompt: str | None, file: Path | None, default: str) -> str:
    """The text of `--prompt` ("-" is standard input) or of `--file`. Raises ConfigError for what is no text."""
    if prompt is not None and file is not None:
        raise ConfigError("give either --prompt or --file, not both")
    try:
        if file is not None:
            text = file.read_bytes().decode("utf-8")
        elif prompt == "-":
            text = sys.stdin.buffer.read().decode("utf-8")
        else:
            text = default if prompt is None else prompt
            text.encode("utf-8")  # what a shell hands over that is no UTF-8 is kept as lone surrogates
    except UnicodeError as error:
        where = f"--file {file}" if file is not None else "standard input" if prompt == "-" else "--prompt"
        raise ConfigError(f"{where}: it is not UTF-8 text ({error.reason}); convert it, as with iconv") from error  # type: ignore[attr-defined]
    except OSError as error:
        raise ConfigError(f"--file {file}: it cannot be read ({error.strerror}); check the path") from error
    if not text:
        raise ConfigError(f"the prompt is empty: give {'--file a file with' if file else '--prompt'} some text")
    return text


def encode_text(tokenizer: Any, text: str) -> Any:
    """Model inputs [1, T] of a plain text. Raises ConfigError if it has no token."""
    inputs = tokenizer(text, return_tensors="pt")
    if inputs["input_ids"].shape[-1] == 0:
        raise ConfigError(f"the tokenizer makes no token of the prompt {text[:32]!r}: give --prompt some other text")
    return inputs


def encode_chat(tokenizer: Any, messages: Messages) -> Any:
    """Model inputs [1, T] of a conversation, with the model's template. Raises UnsupportedModelError without one."""
    if tokenizer.chat_template is None:
        raise UnsupportedModelError(
            "the model has no chat template, so it was not made to chat: leave out --chat and --system, and it "
            "continues the prompt"
        )
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    except Exception as error:  # a template raises errors of its own: "system role not supported"
        raise ConfigError(f"the model's chat template refuses the conversation: {error}") from error


def room_for_answer(prompt_tokens: int, longest: int | None, max_new_tokens: int, context: int | None = None) -> int:
    """How many of `max_new_tokens` there is room for. Raises ConfigError if the prompt alone is too long.

    `longest` is the most tokens that the model takes; None where it does not say. `context` is what the KV cache has
    room for in the budget (--context, kv_tokens; reserve): longer texts would not stay inside it.
    """
    if longest is not None and prompt_tokens >= longest:
        raise ConfigError(
            f"the prompt has {prompt_tokens} tokens, and the model takes {longest} at most, with its answer; shorten it"
        )
    if context is not None and prompt_tokens >= context:
        raise ConfigError(
            f"the prompt has {prompt_tokens} tokens, and the budget has room for {context} with its answer; raise "
            "--context (MOE_OFFLOAD_KV_TOKENS) and any reserve (MOE_OFFLOAD_RESERVE), or shorten the prompt"
        )
    return min([max_new_tokens] + [most - prompt_tokens for most in (longest, context) if most is not None])
