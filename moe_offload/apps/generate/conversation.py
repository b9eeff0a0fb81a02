"""What was said so far, the commands that change it, and the next answer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import typer
from transformers import set_seed

from ...config.sizes import format_size
from ...errors import ConfigError, OffloadError
from ...files.whole_file import save_whole
from ...plan.weights import longest_context
from ..options.groups import SamplingFlags
from ..prompt_cache.cache import PromptCache
from .clock import Clock
from .first_answer import FirstAnswer, compare_starts
from .prompt import Messages, encode_chat, encode_text, room_for_answer
from .speed import speed_line
from .streaming import Streamer

HELP = """\
Type a message. Ctrl-C ends an answer.
  !clear            forget what was said       !status           speed, hit rate and budget
  !system TEXT      tell the model first       !save FILE        write what was said (.json)
  !set NAME=VALUE   max_new_tokens, temperature, top_p, top_k or seed
  !help             these lines                !exit or Ctrl-D   end"""


class Conversation:
    """Turns between a person and `model`. Answers go to standard output, all else to standard error.

    `context` is for how many tokens of all that is said the plan has a KV cache; None where it was told to have none.
    `prompts` keeps the KV caches of what was said, so that only what is new is read.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sampling: SamplingFlags,
        system: str | None,
        context: int | None = None,
        prompts: PromptCache | None = None,
    ):
        self._context, self._told_of_context, self._prompts = context, False, prompts
        self._model, self._tokenizer, self._sampling, self._system = model, tokenizer, sampling, system
        self.messages: Messages = []
        self._last, self._compared = "nothing was said yet", False

    def take(self, line: str) -> bool:
        """One line of a person: a message or a command. False when it ends the conversation."""
        line = line.strip()
        name, _, rest = line.partition(" ")
        if name in ("!exit", "!quit"):
            return False
        if not line.startswith("!"):
            if line:
                self._answer(line)
            return True
        try:
            _say(self._command(name, rest.strip()))
        except ConfigError as error:
            _say(str(error))
        return True

    def _command(self, name: str, rest: str) -> str:
        if name == "!help":
            return HELP
        if name == "!status":
            return f"{self._last}\n{self._model.moe_offload}\n{self._how()}"
        if name == "!clear":
            self.messages.clear()
            if self._prompts is not None:
                self._prompts.forget()
            return "forgotten"
        if name == "!system":
            self._system = rest or None
            return "told first from now on" if rest else "nothing is told first from now on"
        if name == "!set":
            self._sampling = _changed(self._sampling, rest)
            return f"set: {rest}"
        if name == "!save":
            return f"saved to {self._save(rest)}"
        raise ConfigError(f"{name} is no command; !help lists them")

    def _how(self) -> str:
        """What !set has changed, and what it could."""
        known = dataclasses.asdict(self._sampling)
        return "set: " + ", ".join(f"{n} {'as the model has it' if v is None else v}" for n, v in known.items())

    def _answer(self, text: str) -> None:
        """Ask the model. An answer that Ctrl-C has ended is kept in the conversation; after an error nothing is."""
        self.messages.append({"role": "user", "content": text})
        handle, before = self._model.moe_offload, self._model.moe_offload.stats()
        with Clock() as clock:
            streamer = Streamer(self._tokenizer, _write, clock, skip_prompt=True, look=handle.stats)
            try:
                self._generate(streamer)
            except KeyboardInterrupt:
                streamer.end()
                _write(" ...")
            except OffloadError as error:
                self.messages.pop()
                _write("\n" if streamer.text else "")
                advice = "; !clear forgets what was said" if isinstance(error, ConfigError) else ""
                _say(f"{str(error).rstrip('.')}{advice}")
                return
        _write("\n")
        self.messages.append({"role": "assistant", "content": streamer.text})
        known = 0 if self._prompts is None else self._prompts.known_tokens
        self._last = speed_line(streamer, before, handle.stats(), known)
        _say(f"[{self._last}; budget {format_size(handle.plan.budget_bytes)}]")
        if not self._compared and (first := FirstAnswer.of(streamer, before, known)) is not None:
            self._compared = True
            if line := compare_starts(handle, first):
                _say(f"[{line}]")

    def _generate(self, streamer: Streamer) -> None:
        inputs, sampling = self._inputs(), self._sampling
        tokens, longest = inputs["input_ids"].shape[-1], longest_context(self._model)
        room = room_for_answer(tokens, longest, sampling.max_new_tokens, self._context)
        if room < sampling.max_new_tokens and not self._told_of_context:
            self._told_of_context = True
            _say(
                f"moe-offload: this answer ends after {room} tokens at most: with {tokens + room} the context is full. "
                "!clear forgets what was said; another time, --context keeps room for more"
            )
        if sampling.seed is not None:
            set_seed(sampling.seed)
        how = {**_own_or_asked(sampling), "max_new_tokens": room, "streamer": streamer}
        if self._prompts is None:
            self._model.generate(**inputs, **how)
        else:
            self._prompts.generate(**inputs, **how)

    def _inputs(self) -> Any:
        told = [] if self._system is None else [{"role": "system", "content": self._system}]
        if self._tokenizer.chat_template is None:
            return encode_text(self._tokenizer, "\n".join(message["content"] for message in [*told, *self.messages]))
        return encode_chat(self._tokenizer, [*told, *self.messages])

    def _save(self, name: str) -> Path:
        if not name:
            raise ConfigError("!save needs the name of a file")
        said = json.dumps(self.messages, indent=1, ensure_ascii=False).encode() + b"\n"
        return save_whole(Path(name), said, "conversation", ConfigError)


def _own_or_asked(sampling: SamplingFlags) -> dict[str, Any]:
    """Arguments of `generate`: none, and so the model's own settings, unless sampling was asked for."""
    asked = (sampling.temperature, sampling.top_p, sampling.top_k)
    return {} if all(value is None for value in asked) else sampling.generate_kwargs()


def _changed(sampling: SamplingFlags, assignment: str) -> SamplingFlags:
    """`sampling` after "NAME=VALUE". Raises ConfigError, saying what would be right."""
    name, _, text = (part.strip() for part in assignment.partition("="))
    known = {field.name: field for field in dataclasses.fields(sampling)}
    if name not in known:
        raise ConfigError(f"!set {assignment}: write NAME=VALUE, of {', '.join(known)}")
    parse = SamplingFlags.parser(name)
    try:
        return dataclasses.replace(sampling, **{name: parse(text)})
    except typer.BadParameter as error:
        raise ConfigError(f"!set {name}: {error}") from error


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _say(text: str) -> None:
    typer.echo(text, err=True)
