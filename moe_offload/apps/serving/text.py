"""From tokens to text as they come: whole characters, and nothing of a stop string nor of what follows it.

Streamed and whole answers are both made here, so they have the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no whole character yet


class TextBuilder:
    """The text of one answer.

    Args:
        tokenizer: the model's; special tokens are not written.
        stop: strings that end the answer. They are not part of it, also where several tokens spell one.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._begin = self._read = 0  # ids from _begin on are decoded anew; those before _read are in the text
        self.text = ""  # whole characters, up to a stop string
        self.sent = 0  # characters of `text` that take() has handed out
        self.stopped = False

    def add(self, id: int) -> None:
        """One more token. After it, `stopped` says whether a stop string is there."""
        self._ids.append(id)
        before, now = self._decode(self._begin, self._read), self._decode(self._begin, len(self._ids))
        if len(now) > len(before) and not now.endswith(UNFINISHED):
            self._begin, self._read = self._read, len(self._ids)
            self._append(now[len(before) :])

    def take(self, last: bool = False) -> str:
        """What can be sent now and was not; at the `last` also what might have become a stop string."""
        if last and not self.stopped:
            before, now = self._decode(self._begin, self._read), self._decode(self._begin, len(self._ids))
            self._begin = self._read = len(self._ids)
            self._append(now[len(before) :])
        until = len(self.text) if last or self.stopped else len(self.text) - self._held()
        piece, self.sent = self.text[self.sent : until], max(until, self.sent)
        return piece

    def _append(self, piece: str) -> None:
        """Add to the text, and cut it before the first stop string that this completes."""
        longest = max(map(len, self._stop), default=0)
        begin = max(len(self.text) - longest + 1, self.sent, 0)
        self.text += piece
        found = [at for stop in self._stop if (at := self.text.find(stop, begin)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _held(self) -> int:
        """Characters at the end that a stop string begins with."""
        longest = max(map(len, self._stop), default=0)
        for length in range(min(longest - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stop):
                return length
        return 0

    def _decode(self, begin: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[begin:end], skip_special_tokens=True))
