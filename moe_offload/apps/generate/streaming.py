"""Text as it comes: a streamer for `generate` that writes words as soon as they are settled, and clocks the tokens.

transformers' TextStreamer decodes line by line, and the parts it prints are not always the text that decoding all
tokens at once gives (a tokenizer may drop a space where a line begins). Here each part is the difference of two
decodings that begin at the same token, as vLLM and TGI do it, so that the parts add up to that text.

The first token comes once the graph of the prompt is compiled, the second once that of decoding is. Text that is
written in between would be overwritten by the progress bar of the second compilation, so it waits for the second token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.generation.streamers import BaseStreamer

from .clock import Clock

UNSETTLED = "\ufffd"  # the tokens so far end within a character


class Streamer(BaseStreamer):
    """Writes the text of one sequence through `write`; with `skip_prompt` only what is new.

    Afterwards `prompt_tokens`, `new_tokens` and the times of the first and the last of them, by `clock`, are known, and
    what `look` said when the first came.
    """

    def __init__(
        self,
        tokenizer: Any,
        write: Callable[[str], object],
        clock: Clock,
        *,
        skip_prompt: bool = False,
        look: Callable[[], Any] = lambda: None,
    ):
        self._tokenizer, self._write, self._skip_prompt = tokenizer, write, skip_prompt
        self.clock = clock
        self._ids: list[int] = []
        self._begin, self._read = 0, 0  # ids before _begin are forgotten; the text of those before _read is written
        self._prompt_seen = False
        self.text = ""  # what has been written
        self.prompt_tokens, self.new_tokens = 0, 0
        self.begun_s = clock()
        self.first_s: float | None = None
        self.last_s: float | None = None
        self._look, self.at_first = look, None

    def put(self, value: Any) -> None:
        """`generate` calls this with the prompt's ids, then with each new id."""
        ids = value.flatten().tolist()
        if not self._prompt_seen:
            self._prompt_seen, self.prompt_tokens = True, len(ids)
            if self._skip_prompt:
                self._begin, self._read = len(ids), len(ids)
        else:
            self.new_tokens += len(ids)
            self.last_s = self.clock()
            if self.first_s is None:
                self.first_s, self.at_first = self.last_s, self._look()
        self._ids += ids
        if self.new_tokens > 1:
            self._flush(whole=False)

    def end(self) -> None:
        self._flush(whole=True)

    def _flush(self, whole: bool) -> None:
        before, now = self._decode(self._begin, self._read), self._decode(self._begin, len(self._ids))
        if not whole and (now.endswith(UNSETTLED) or len(now) <= len(before)):
            return
        self._begin, self._read = self._read, len(self._ids)
        new = now[len(before) :]
        self.text += new
        if new:
            self._write(new)

    def _decode(self, begin: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[begin:end], skip_special_tokens=True))
