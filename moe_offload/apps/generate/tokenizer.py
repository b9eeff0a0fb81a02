"""The tokenizer of a checkpoint, or one line that says why it cannot be loaded."""

from __future__ import annotations

from typing import Any

from ...errors import OffloadError


def load_tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise OffloadError(f"{model}: cannot load its tokenizer: {str(error).splitlines()[0]}") from error
