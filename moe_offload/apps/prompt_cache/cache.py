"""`PromptCache`: the KV caches of prompts and answers, for requests that begin as one of them did.

Only the rest of such a request is computed, as plain transformers' `generate` computes it when it is handed the same
`past_key_values`. All caches together, that of the running request among them, take no more than the KV cache that the
plan has in its reserve: the least recently used one gives way.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from ...patch.generation.kv_kinds import why_not_continued
from ...plan.weights import kv_bytes
from .folder import PromptFolder, common
from .kv_slices import begin, lengths, nbytes

#: What `generate` may be given beside its settings: with it, keys and values are still of the tokens alone.
HARMLESS = {
    "attention_mask",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "streamer",
    "tokenizer",
}
LEAST_TOKENS = 16  # in common: a first token or two are in common with every prompt, and save nothing


@dataclass
class Entry:
    """The tokens that were read or said, and their KV cache."""

    ids: list[int]
    cache: Any

    @property
    def nbytes(self) -> int:
        return nbytes(self.cache)


class PromptCache:
    """The caches of one model, used by one request after the other.

    Args:
        model: An offloaded model.
        tokens: For how many tokens the plan has a KV cache, in all.

    Attributes:
        folder: Where caches are kept from one process to the next; None: nowhere.
        known_tokens: Of the last prompt: those that were not read again.
        why_off: Why every prompt is read whole; empty where it is not.
    """

    def __init__(self, model: Any, tokens: int):
        self._model = model
        self.folder: PromptFolder | None = None
        self._token_bytes = kv_bytes(model, 1)
        self.most_bytes = tokens * self._token_bytes
        self._entries: list[Entry] = []  # the least recently used first
        self.known_tokens = 0
        self.why_off = _why_off(model, self.most_bytes)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries)

    def generate(self, input_ids: Tensor, **asked: Any) -> Any:
        """`model.generate`, whose prompt is read as far as it is not known; what was read and said is kept.

        An answer that an interrupt or an error has ended is kept as far as it came.
        """
        self.known_tokens = 0
        if self.why_off or not _goes_on(self._model, input_ids, asked):
            return self._model.generate(input_ids, **asked)
        ids, config = input_ids[0].tolist(), _config_of(self._model, asked)
        more = config.max_new_tokens or max(0, (config.max_length or 0) - len(ids))
        cache, self.known_tokens = self._lend(ids, more)
        seen, whole = _Seen(input_ids), False
        criteria = StoppingCriteriaList([*asked.pop("stopping_criteria", ()), seen])
        try:
            out = self._model.generate(input_ids, past_key_values=cache, stopping_criteria=criteria, **asked)
            whole = True
            return out
        finally:
            self._keep(seen.ids_1T[0].tolist(), cache, whole)

    def forget(self) -> None:
        """Let go of all caches in memory."""
        self._entries.clear()

    def save(self) -> None:
        """Write what is in memory into the folder, if there is one."""
        if self.folder is not None:
            for entry in self._entries:
                self.folder.save(entry.ids, entry.cache)

    def _lend(self, ids: Sequence[int], more: int) -> tuple[Any, int]:
        """A cache of as many of the first `ids` as are known, all but the last at most, and how many they are.

        There is room for the others and for `more` tokens then.
        """
        self._load(ids)
        need_bytes = (len(ids) + more) * self._token_bytes
        cache, known = None, 0
        for entry in sorted(self._entries, key=lambda entry: common(entry.ids, ids), reverse=True):
            known = min(common(entry.ids, ids), len(ids) - 1)
            if known < LEAST_TOKENS:
                break
            if known == len(entry.ids):
                self._entries.remove(entry)  # it grows in place of being copied
                cache = entry.cache
                break
            cache = begin(entry.cache, known)
            if cache is not None:
                self._entries.remove(entry)
                self._entries.append(entry)
                break
        self._trim(self.most_bytes - need_bytes)
        return (new_cache(self._model), 0) if cache is None else (cache, known)

    def _load(self, ids: Sequence[int]) -> None:
        """Take from the folder what knows more of `ids` than what is in memory does."""
        if self.folder is None:
            return
        known = max((common(entry.ids, ids) for entry in self._entries), default=0)
        found = self.folder.find(ids, known + LEAST_TOKENS)
        if found is not None:
            self._entries.append(Entry(*found))

    def _keep(self, ids: list[int], cache: Any, whole: bool) -> None:
        """The `cache` of a request that has ended, and all its tokens, of which the last may not be in it. Where it was
        interrupted some layers may have one more than others; states that sum up what was read do not tell."""
        found = lengths(cache)
        tokens = min(found, default=0)
        if not whole or len(found) != 1 or tokens > len(ids):
            cache = begin(cache, min(tokens, len(ids))) if tokens else None
        if cache is None or not tokens:
            return
        ids = ids[: min(tokens, len(ids))]
        self._entries = [entry for entry in self._entries if entry.ids != ids[: len(entry.ids)]]
        self._entries.append(Entry(ids, cache))
        self._trim(self.most_bytes)

    def _trim(self, most_bytes: int) -> None:
        while self._entries and self.nbytes > most_bytes:
            gone = self._entries.pop(0)
            if self.folder is not None:
                self.folder.save(gone.ids, gone.cache)


class _Seen(StoppingCriteria):
    """Remembers the tokens of a request as they come; it stops nothing."""

    def __init__(self, ids_1T: Tensor):
        self.ids_1T = ids_1T

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.ids_1T = input_ids
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def new_cache(model: Any) -> Any:
    """An empty cache of the kind that `generate` makes for itself."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _why_off(model: Any, most_bytes: int) -> str:
    """Why every prompt of `model` is read whole; empty where it is not."""
    if most_bytes <= 0:
        return "the budget keeps no room for a KV cache"
    if model.device.type != "cpu":
        return f"decode steps on {model.device} are recorded for KV caches of one place in memory"
    if getattr(getattr(model, "moe_offload", None), "ranks", None) is not None:
        return "several processes read it in step"
    if model.config.is_encoder_decoder or not model._supports_default_dynamic_cache():
        return f"{type(model).__name__} has a KV cache of its own kind"
    return why_not_continued(model, new_cache(model))


def _goes_on(model: Any, input_ids: Tensor, asked: dict[str, Any]) -> bool:
    """Whether this request is for one sequence, of which the tokens tell all, with a KV cache that grows. Padding,
    positions, embeddings or a cache of the caller's own would be kept for tokens that are read without them."""
    config, mask = _config_of(model, asked), asked.get("attention_mask")
    others = {name for name, value in asked.items() if value is not None and not hasattr(config, name)} - HARMLESS
    if others or len(input_ids) != 1 or not (mask is None or bool((mask == 1).all())):
        return False
    plain = config.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    one = (config.num_return_sequences or 1) == 1 and config.cache_implementation is None
    return bool(plain and one and config.use_cache is not False)


def _config_of(model: Any, asked: dict[str, Any]) -> GenerationConfig:
    config: GenerationConfig = copy.deepcopy(asked.get("generation_config") or model.generation_config)
    config.update(**{name: value for name, value in asked.items() if hasattr(config, name)})
    return config
