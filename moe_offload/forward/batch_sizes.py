"""Decode steps of several sequences, where the device decides: one compiled function for each number of sequences.

Compiled once for all shapes, two sequences or more are a symbol, and the token-expert pairs of a layer no constant of
the graph; only the host can serve such a layer (`passes.waves`). So each number of sequences gets a function, and with
it code of its own, in which it is a constant. Dynamo counts recompilations per code, so none takes another's share.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("moe_offload")

SIZES = 8  # numbers of sequences with a function each: to compile one takes seconds, and its graph stays


class Steps:
    """The compiled functions, one for each number of sequences.

    `make` compiles the model's call anew. `most()` is the largest number of sequences whose experts fit the slots of
    every layer; for more, and for all where it is 0, the host decides.
    """

    def __init__(self, make: Callable[[], Callable[..., Any]], most: Callable[[], int]):
        self._make, self._most = make, most
        self._of: dict[int, Callable[..., Any]] = {}
        self._warned = False

    def find(self, sequences: int, tokens: int) -> Callable[..., Any] | None:
        """The function for a forward of so many sequences of so many tokens each; None where the shared one will do."""
        if tokens != 1 or not 1 < sequences <= self._most():
            return None
        if sequences not in self._of:
            if len(self._of) == SIZES:
                self._warn(sequences)
                return None
            self._of[sequences] = _with_constant_size(self._make())
        return self._of[sequences]

    def _warn(self, sequences: int) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "a decode step of %d sequences: %s already have graphs of their own, which is as many as there are; "
                "the host decides for all others, which is slower. Keep to a few sizes of batch",
                sequences, ", ".join(map(str, self._of)),
            )  # fmt: skip


def find_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments of a forward whose shapes say how many sequences it has, and of how many tokens each."""
    return [x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if isinstance(x, Tensor)]


def find_cache(kwargs: Mapping[str, Any]) -> Any:
    """The KV cache among the keywords of a forward; transformers calls it `cache` from 5.24 on."""
    found = kwargs.get("past_key_values")
    return kwargs.get("cache") if found is None else found


def _with_constant_size(compiled: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        # A view each: the mark is a property of the object, and the caller's own may go to other graphs as well.
        views = {id(x): x.detach() for x in find_inputs(args, kwargs)}
        for view in views.values():
            torch._dynamo.mark_static(view, 0)
        return compiled(
            *(views.get(id(x), x) for x in args), **{name: views.get(id(x), x) for name, x in kwargs.items()}
        )

    return call
