"""The tokenizer and the configuration of a checkpoint, read before its weights are."""

from __future__ import annotations

from typing import Any

from ...checkpoint.folder import is_folder
from ...errors import CheckpointError


def load_tokenizer(model: str, *, trust_remote_code: bool = False, **hub: Any) -> Any:
    """The tokenizer of a folder or Hub repository; `hub` are `revision` and `token`.

    Raises CheckpointError, saying why it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code, **hub)
    except Exception as error:  # a damaged tokenizer.json raises whatever its parser raises
        raise CheckpointError(f"{model}: its tokenizer cannot be loaded: {_reason(model, error)}") from error


def read_longest_context(model: str, **hub: Any) -> int | None:
    """The most tokens that the model takes, where its configuration says. Raises CheckpointError."""
    return getattr(read_config(model, **hub).get_text_config(), "max_position_embeddings", None) or None


def read_config(model: str, *, trust_remote_code: bool = False, **hub: Any) -> Any:
    """The configuration of a folder or Hub repository. Raises CheckpointError."""
    from huggingface_hub.errors import StrictDataclassError  # a field of another type
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code, **hub)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"{model}: its configuration cannot be read: {_reason(model, error)}") from error


def _reason(model: str, error: Exception) -> str:
    """The first line of transformers' message, and of a Hub repository what to look at."""
    first = (str(error).splitlines() or ["?"])[0].rstrip(".")
    if is_folder(model):
        return first
    return f"{first}. Check the name and the connection (HF_HUB_OFFLINE, HF_TOKEN), or give the path of a folder"
