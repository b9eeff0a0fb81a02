"""The perplexity of a text under a model: exp of the mean negative log likelihood of its tokens.

The text is cut into pieces, each without the context of those before it, so that both models see the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config.settings import OffloadConfig
from ...config.usage import measured_with
from ...errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Perplexity:
    """The perplexity `value` over `tokens` tokens that were predicted, in `seconds`."""

    value: float
    tokens: int
    seconds: float

    def __str__(self) -> str:
        return f"perplexity {self.value:.4f} ({self.tokens} tokens, {self.seconds:.1f} s)"


def read_text(file: Path) -> str:
    """The text of `file`. Raises `ConfigError` for what is no UTF-8 text."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--measure {file}: cannot be read as text: {error}. Give a UTF-8 text file") from error


def tokenise_text(model: str | Path, text: str, trust_remote_code: bool = False) -> list[Tensor]:
    """The text as ids [1, T], in pieces of what a prompt has room for. Raises `ConfigError` for too short a text."""
    import torch

    from ...plan.weights import RESERVED_PROMPT_TOKENS
    from ..generate.tokenizer import load_tokenizer

    ids = load_tokenizer(str(model), trust_remote_code=trust_remote_code)(text, verbose=False)["input_ids"]
    cuts = range(0, len(ids), RESERVED_PROMPT_TOKENS)
    pieces = [torch.tensor([ids[begin : begin + RESERVED_PROMPT_TOKENS]]) for begin in cuts]
    pieces = [piece for piece in pieces if piece.shape[1] > 1]
    if not pieces:
        raise ConfigError(f"--measure: the text has {len(ids)} tokens; a perplexity needs two at least")
    return pieces


def measure_text(
    model: str | Path, pieces: Sequence[Tensor], config: OffloadConfig, trust_remote_code: bool = False
) -> Perplexity:
    """Run `model` over the pieces within the budget of `config`. Raises what loading and running raise."""
    import torch

    from ...api import from_pretrained

    config = replace(config, profile=measured_with(config.profile))
    offloaded: Any = from_pretrained(model, config=config, trust_remote_code=trust_remote_code)
    begun, loss, tokens = time.perf_counter(), 0.0, 0
    with offloaded.moe_offload, torch.no_grad():
        for piece in pieces:
            logits = offloaded(piece).logits[0, :-1].float()
            loss += float(torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum"))
            tokens += piece.shape[1] - 1
    return Perplexity(math.exp(loss / tokens), tokens, time.perf_counter() - begun)
