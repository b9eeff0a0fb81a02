"""`Family`, an entry of the table of MoE families, and short functions that make the usual kinds of entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# What a model is fed and what it returns:
#   lm           token ids, a KV cache; returns logits, or hidden states where the class has no head
#   embeds       embeddings, a KV cache
#   encdec       token ids on both sides, a KV cache on the decoder's
#   encoder      token ids, no cache
#   vision_grid  flattened image patches and their grids, no cache
#   vitpose      images and the dataset each belongs to, no cache
Kind = Literal["lm", "embeds", "encdec", "encoder", "vision_grid", "vitpose"]


@dataclass(frozen=True)
class Family:
    """One model class with routed experts, how to make it tiny, and what transformers cannot do with it."""

    folder: str  # transformers/models/<folder>
    config: str
    model: str
    kind: Kind
    overrides: Mapping[str, Any]
    no_static_cache: str = ""  # why it cannot run with a StaticCache; empty where it can

    @property
    def config_path(self) -> str:
        return f"transformers.models.{self.folder}.configuration_{self.folder}.{self.config}"

    @property
    def model_path(self) -> str:
        return f"transformers.models.{self.folder}.modeling_{self.folder}.{self.model}"


def causal_lm(folder: str, prefix: str, no_static_cache: str = "", **overrides: Any) -> Family:
    return Family(folder, f"{prefix}Config", f"{prefix}ForCausalLM", "lm", overrides, no_static_cache)


def text_lm(folder: str, prefix: str, **overrides: Any) -> Family:
    """The language model of a multimodal family, with its head."""
    return Family(folder, f"{prefix}TextConfig", f"{prefix}ForCausalLM", "lm", overrides)


def text_model(folder: str, prefix: str, **overrides: Any) -> Family:
    """The language model of a multimodal family whose head belongs to the multimodal class: returns hidden states."""
    return Family(folder, f"{prefix}TextConfig", f"{prefix}TextModel", "lm", overrides)


def encoder_decoder(folder: str, prefix: str, **overrides: Any) -> Family:
    reason = "an encoder-decoder keeps two caches, of different lengths"
    return Family(folder, f"{prefix}Config", f"{prefix}ForConditionalGeneration", "encdec", overrides, reason)


def no_cache(folder: str, config: str, model: str, kind: Kind, **overrides: Any) -> Family:
    return Family(folder, config, model, kind, overrides, "it has no KV cache")
