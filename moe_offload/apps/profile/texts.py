"""A profile of texts on disk: `moe-offload profile record`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config.settings import OffloadConfig
from ...config.usage import measured_with
from ...errors import ProfileError
from ...observe.profile import Profile

if TYPE_CHECKING:
    from torch import Tensor


def profile_texts(
    model: str,
    texts: Sequence[Path],
    *,
    max_tokens: int | None,
    meta: dict[str, str],
    config: OffloadConfig,
    trust_remote_code: bool = False,
) -> Profile:
    """Run `model` over the texts ("-" is standard input), in pieces of 512 tokens, and count.

    Within the budget of `config`, or without one as plain transformers with counters in the compiled graph (code that
    comes with a checkpoint always within a budget: transformers leaves buffers of such models undefined). Raises
    ProfileError for a file that is no UTF-8 text, and what loading raises.
    """
    contents = [_read(path) for path in texts]
    from ...api import from_pretrained  # seconds of torch come after what may be wrong with the texts
    from ...checkpoint.pretrained.download import get_folder
    from ...record import record_profile
    from ..generate.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    pieces = list(_pieces(tokenizer, contents, max_tokens))
    if not pieces:
        raise ProfileError(f"{', '.join(map(str, texts))}: no text in it; a profile needs some")
    if config.budget is None and not config.max_memory and not trust_remote_code:
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(
            get_folder(model), dtype="auto", trust_remote_code=False
        ).eval()
        return record_profile(loaded, pieces, **meta)
    config = replace(config, profile=measured_with(config.profile))
    offloaded: Any = from_pretrained(model, config=config, trust_remote_code=trust_remote_code)
    with offloaded.moe_offload as handle:
        return record_profile(handle.model, pieces, **meta)


def _pieces(tokenizer: Any, contents: Sequence[str], max_tokens: int | None) -> Iterator[Tensor]:
    import torch

    from ...plan.weights import RESERVED_PROMPT_TOKENS

    left = max_tokens if max_tokens is not None else sys.maxsize
    for content in contents:
        ids = tokenizer(content, verbose=False)["input_ids"][:left]  # it warns of long texts; ours go in pieces
        left -= len(ids)
        for begin in range(0, len(ids), RESERVED_PROMPT_TOKENS):
            yield torch.tensor([ids[begin : begin + RESERVED_PROMPT_TOKENS]])


def _read(path: Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: cannot be read as text: {error}. Give UTF-8 text files") from error
