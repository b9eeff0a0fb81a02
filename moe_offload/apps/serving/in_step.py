"""Requests on several ranks: rank 0 answers them, and the others generate the same beside it, token by token.

    rank 0   Leader.generate   gives the others what is to be generated, and generates it
    others   follow            take that and generate it, until rank 0 says that it ends

Whether an answer ends early, because its client has left, rank 0 alone knows: after each token it tells the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from transformers import GenerationConfig

from ...errors import OffloadError, RankError
from ...handle import Handle
from ...ranks.call import exchanging, leave
from ...ranks.group import Group
from ...ranks.orders import Orders
from .generation import Piece, Sampling, generate_answer

WHICH = "serve"
ALIKE_S = 30.0  # for all ranks to say that the same request failed; a rank that is computing on does not


class Leader:
    """What rank 0 generates with, in place of `generate_answer`."""

    def __init__(self, group: Group):
        self._group, self._orders = group, Orders(group, WHICH)

    def generate(
        self,
        model: Any,
        tokenizer: Any,
        prompt_ids: list[int],
        sampling: Sampling,
        on_token: Callable[[], None],
        on_piece: Callable[[Piece], None],
        gone: Callable[[], bool],
    ) -> None:
        """As `generate_answer`, on all ranks. Raises `RankError` where one has ended."""
        if sampling.seed is None:  # each rank would draw other tokens
            sampling = dataclasses.replace(sampling, seed=random.SystemRandom().getrandbits(63))
        self._orders.give({"ids": prompt_ids, "sampling": _to_json(sampling)})
        with _all_or_none(self._group):
            generate_answer(model, tokenizer, prompt_ids, sampling, on_token, on_piece, self._told(gone))

    def end(self, save_profile: str | None) -> None:
        """Let the others end; with a path they save a profile together with rank 0."""
        if not self._group.failed:
            self._orders.give({"end": save_profile})

    def _told(self, gone: Callable[[], bool]) -> Callable[[], bool]:
        return lambda: _first_says(self._group, gone())


def follow(model: Any, tokenizer: Any, check: Callable[[], None]) -> None:
    """Generate what rank 0 gives until it ends; save the profile with it. `check` is called while there is nothing to
    do, and may raise. Raises `RankError` where another rank has ended."""
    handle: Handle = model.moe_offload
    group = handle.ranks
    if group is None:
        raise AssertionError("a model in one process follows nobody")
    orders = Orders(group, WHICH)
    while "end" not in (order := orders.take(check)):
        with contextlib.suppress(_FailedAlikeError), _all_or_none(group):
            generate_answer(
                model,
                tokenizer,
                order["ids"],
                _from_json(order["sampling"]),
                lambda: None,
                lambda _: None,
                lambda: _first_says(group, False),
            )
    if order["end"] is not None:
        handle.save_profile(order["end"])


class _FailedAlikeError(OffloadError):
    """A request failed on all ranks in the same way: they are in step, and the next one may follow."""


@contextlib.contextmanager
def _all_or_none(group: Group) -> Iterator[None]:
    """An error inside is every rank's or the end of this one. Raises `RankError`, or the error where all have it."""
    try:
        yield
    except RankError:
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {error}"[:200]
        if group.failed:  # within the model
            raise
        try:
            group.exchange("failed", told, f"fail as this one has ({told})", ALIKE_S)
        except RankError:
            group.failed = told
            leave(group)
            raise
        if group.rank:
            raise _FailedAlikeError(told) from error
        raise


def _first_says(group: Group, value: bool) -> bool:
    """Rank 0's `value`, on all ranks."""
    with exchanging(group):
        said = torch.tensor([value])
        dist.broadcast(said, 0)
        return bool(said)


def _to_json(sampling: Sampling) -> dict[str, Any]:
    return {**vars(sampling), "config": sampling.config.to_dict()}


def _from_json(found: dict[str, Any]) -> Sampling:
    biases = {int(token): bias for token, bias in found["logit_bias"].items()}
    config = GenerationConfig.from_dict(found["config"])
    return Sampling(**{**found, "config": config, "stop": tuple(found["stop"]), "logit_bias": biases})
