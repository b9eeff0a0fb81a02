"""`Orders`: what rank 0 gives the other ranks to do, one thing after the other; they wait as long as it takes.

    <group>/order/<which>/<n>   the n-th order, a JSON value

Through the store, not by a collective: that would give up after the time limit, and a server may have nothing to do
for a night.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from ..errors import RankError
from .group import Group

POLL_S = 0.005  # of each token's time nothing: only the first step of an order waits for it
LOOK_S = 1.0  # between two looks whether rank 0 is still there


class Orders:
    """Every rank makes one; `which` tells several from each other."""

    def __init__(self, group: Group, which: str):
        self._group, self._which, self._n = group, which, 0
        self._store = group.store.another()

    def give(self, order: Any) -> None:
        """Rank 0's: the next order. Those before the last one were taken."""
        with self._group.store_answers():
            self._store.set(self._key(self._n), json.dumps(order))
            if self._n >= 2:
                self._store.delete(self._key(self._n - 2))
        self._n += 1

    def take(self, check: Callable[[], None] = lambda: None) -> Any:
        """The next order; `check` is called while it waits, and may raise. `RankError` where another rank has ended."""
        key, looked_s = self._key(self._n), 0.0
        with self._group.store_answers():
            while (order := self._store.get(key)) is None:
                check()
                if time.monotonic() - looked_s > LOOK_S:
                    try:
                        self._group.check()
                    except RankError:  # one that has ended may have given it before
                        if (order := self._store.get(key)) is None:
                            raise
                        break
                    looked_s = time.monotonic()
                time.sleep(POLL_S)
        self._n += 1
        return json.loads(order)

    def _key(self, n: int) -> str:
        return f"{self._group.prefix}/order/{self._which}/{n}"
