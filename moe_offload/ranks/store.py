"""`Answers`: the store in which the ranks meet, asked with a time limit.

torch's `TCPStore` waits for an answer without one, even to connect: where whoever holds it is stopped (SIGSTOP, a
machine that lost its network), a call never returns, and Ctrl-C is not heard. So a thread asks, and is left behind when
nothing comes.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

EVERY_S = 1.0
#: Looks without an answer after which the store counts as lost. Looks and not seconds: a job that was stopped as a
#: whole, or a laptop that was asleep, has missed one.
PATIENCE = 15


class StoreSilentError(RuntimeError):
    """Nobody answers where the ranks met. `Group.store_answers` makes a `RankError` of it, as of torch's own errors."""


Asked = tuple[int, str, tuple[Any, ...]]  # its number, the store's method, what it is given


class Answers:
    """A connection of its own to a store. Any thread may use it; who waits in one holds up nobody in another."""

    def __init__(self, store: Any, silent: threading.Event | None = None):
        self._store = store
        self._silent = threading.Event() if silent is None else silent  # of all connections
        self._asked: queue.SimpleQueue[Asked | None] = queue.SimpleQueue()
        self._answered: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._numbers, self._turn = itertools.count(), threading.Lock()
        queues = (self._asked, self._answered)
        threading.Thread(target=_answer, args=(store, *queues), name="moe_offload_store", daemon=True).start()
        weakref.finalize(self, self._asked.put, None)

    def another(self) -> Answers:
        """Another connection to the same store."""
        return Answers(self._store, self._silent)

    @property
    def silent(self) -> bool:
        """Whether the store is known not to answer any more."""
        return self._silent.is_set()

    def set(self, key: str, value: str) -> None:
        """Write. Raises `StoreSilentError`, as all of these, and what torch raises where the connection is closed."""
        self._ask("set", key, value)

    def get(self, key: str) -> bytes | None:
        """What is there; None where nothing is yet."""
        found: bytes | None = self._ask("get", key)
        return found

    def delete(self, key: str) -> None:
        self._ask("delete_key", key)

    def _ask(self, what: str, *given: Any) -> Any:
        with self._turn:
            number = next(self._numbers)
            if not self.silent:
                self._asked.put((number, what, given))
            for _ in range(PATIENCE):
                if self.silent:
                    break
                with contextlib.suppress(queue.Empty):
                    answered, answer = self._answered.get(timeout=EVERY_S)
                    while answered != number:  # the answer to a question that Ctrl-C has ended
                        answered, answer = self._answered.get(timeout=EVERY_S)
                    if isinstance(answer, BaseException):
                        raise answer
                    return answer
            self._silent.set()
        raise StoreSilentError(f"it has not answered for {PATIENCE * EVERY_S:.0f} s: it was stopped, or hangs")


def connect_within(timeout_s: float, connect: Callable[[], Any]) -> Any:
    """What `connect` returns. Raises what it raises, and `TimeoutError` where it does neither in time."""
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def try_it() -> None:
        try:
            done.put(connect())
        except Exception as error:
            done.put(error)

    threading.Thread(target=try_it, name="moe_offload_connect", daemon=True).start()
    try:
        found = done.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError("whoever holds the store in which ranks meet does not answer") from None
    if isinstance(found, Exception):
        raise found
    return found


def _answer(store: Any, asked: queue.SimpleQueue[Asked | None], answered: queue.SimpleQueue[tuple[int, Any]]) -> None:
    """What the thread does until nobody is left to ask. To connect is a question, too."""
    own: Any = None
    while (one := asked.get()) is not None:
        number, what, given = one
        answer: Any = None
        try:
            own = own or store.clone()
            if what != "get" or own.check(list(given)):  # else it would wait until somebody writes it
                answer = getattr(own, what)(*given)
        except Exception as error:  # whoever asked is to have it
            answer = error
        answered.put((number, answer))
