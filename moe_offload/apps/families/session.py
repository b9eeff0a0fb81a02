"""Drive one model as a user would, and keep everything it returns.

    outputs = run_session(model, "lm", batch=3)     # [3, 16, V], then 31 times [3, 1, V]
    tokens(outputs)                                 # [3, 32]: what greedy generation would say

Two runs are the same if and only if their outputs are equal bit for bit, so a session is how an offloaded model is
compared with a plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache

from ...errors import OffloadError
from .family import Family, Kind
from .table import FAMILIES

FIRST_ID = 3  # below it are the special ids: padding, begin, end


class NotSupported(OffloadError):
    """transformers itself cannot run this family that way; there is nothing to compare."""


def run_session(
    model: PreTrainedModel,
    kind: Kind,
    *,
    batch: int = 1,
    prompt: int = 16,
    new_tokens: int = 32,
    static_cache: bool = False,
    seed: int = 0,
) -> list[torch.Tensor]:
    """The output of every forward of one session, as float32 copies: logits, or hidden states without a head.

    With a KV cache: the prefill of `prompt` positions, then `new_tokens - 1` steps of one position each, on the model's
    own greedy tokens; where it has no head, on ids or embeddings drawn from `seed`, as the prompt is.
    Without one: two forwards, of different sizes.

    `static_cache` takes a `StaticCache` of `prompt + new_tokens` positions, and raises `NotSupported` where the family
    cannot run with one. Compare like with like: a model that picks its keys by top-k breaks ties by the cache's length.
    """
    family = family_of(model)
    if static_cache and family is not None and family.no_static_cache:
        raise NotSupported(f"{type(model).__name__} cannot run with a StaticCache: {family.no_static_cache}.")
    inputs = _Inputs(model, batch, seed)
    with torch.no_grad():
        if kind == "encoder":
            return [_output(model(**inputs.ids(n))) for n in (prompt, 1)]
        if kind == "vision_grid":
            return [_output(model(**inputs.patches(*grid))) for grid in ((4, 4), (2, 6))]
        if kind == "vitpose":
            return [_output(model(**inputs.images(n))) for n in (batch, batch + 1)]
        if kind == "encdec":
            return _translate(model, inputs, prompt, new_tokens)
        draw = inputs.ids if kind == "lm" else inputs.embeds
        cache = StaticCache(config=model.config, max_cache_len=prompt + new_tokens) if static_cache else None
        return _decode(model, draw, prompt, new_tokens, cache)


def greedy_tokens(outputs: list[torch.Tensor]) -> torch.Tensor:
    """The greedy token after each step of a session, [batch, steps]; images give none, [0, steps]."""
    if len({output.shape[0] for output in outputs}) > 1:  # forwards of different images, not of the same sequences
        return torch.empty(0, len(outputs), dtype=torch.long)
    return torch.stack([output[:, -1].argmax(dim=-1) for output in outputs], dim=1)


def family_of(model: PreTrainedModel) -> Family | None:
    """The table's entry for a model, by the class of its configuration; None for one that is not in the table."""
    return _BY_CONFIG.get(type(model.config).__name__)


_BY_CONFIG = {entry.config: entry for entry in FAMILIES.values()}


def _decode(
    model: PreTrainedModel, draw: Callable[[int], dict[str, torch.Tensor]], prompt: int, new_tokens: int, cache: Any
) -> list[torch.Tensor]:
    outputs = []
    step = draw(prompt)
    for _ in range(new_tokens):
        out = model(**step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        outputs.append(_output(out))
        step = {"input_ids": _greedy(out)} if "logits" in out else draw(1)
    return outputs


def _translate(model: PreTrainedModel, inputs: _Inputs, prompt: int, new_tokens: int) -> list[torch.Tensor]:
    """As `_decode`, on the decoder; as in `generate`, the encoder runs once, here on a sentence a quarter shorter."""
    source = inputs.ids(prompt - prompt // 4)["input_ids"]
    mask = torch.ones_like(source)
    encoded = model.get_encoder()(input_ids=source, attention_mask=mask)
    step, cache = inputs.ids(prompt)["input_ids"], None
    outputs = []
    for _ in range(new_tokens):
        out = model(
            encoder_outputs=encoded,
            attention_mask=mask,
            decoder_input_ids=step,
            past_key_values=cache,
            use_cache=True,
        )
        step, cache = _greedy(out), out.past_key_values
        outputs.append(_output(out))
    return outputs


def _greedy(out: Any) -> torch.Tensor:
    ids: torch.Tensor = out.logits[:, -1:].argmax(dim=-1)
    return ids


def _output(out: Any) -> torch.Tensor:
    """The tensor a user would look at; copied, because a compiled model may write the next step over it."""
    for name in ("logits", "last_hidden_state"):
        if name in out:
            found: torch.Tensor = out[name]
            return found.to(torch.float32, copy=True)
    return out.feature_maps[-1].to(torch.float32, copy=True)  # type: ignore[no-any-return]


class _Inputs:
    """Draws a model's inputs: from one seed the same ones in the same order, on every device and in every dtype."""

    def __init__(self, model: PreTrainedModel, batch: int, seed: int) -> None:
        self.config = model.config
        self.device, self.dtype = model.device, model.dtype
        self.batch = batch
        self.generator = torch.Generator().manual_seed(seed)

    def ids(self, length: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(FIRST_ID, self.config.vocab_size, (self.batch, length), generator=self.generator)
        return {"input_ids": ids.to(self.device)}

    def embeds(self, length: int) -> dict[str, torch.Tensor]:
        return {"inputs_embeds": self._normal(self.batch, length, self.config.hidden_size)}

    def patches(self, height: int, width: int) -> dict[str, torch.Tensor]:
        """`batch` images of `height` x `width` patches, one after the other."""
        patch = self.config.num_channels * self.config.patch_size**2
        grid = torch.tensor([[1, height, width]] * self.batch, device=self.device)
        return {"pixel_values": self._normal(self.batch * height * width, patch), "grid_thw": grid}

    def images(self, count: int) -> dict[str, torch.Tensor]:
        """`count` images, each of the next dataset: that is what the experts of ViTPose are chosen by."""
        dataset = torch.arange(1, count + 1, device=self.device) % self.config.num_experts
        pixels = self._normal(count, self.config.num_channels, *self.config.image_size)
        return {"pixel_values": pixels, "dataset_index": dataset}

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)
