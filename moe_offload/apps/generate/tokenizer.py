"""The tokenizer and the context length of a checkpoint, read before its weights are."""

from __future__ import annotations

from typing import Any

from ...checkpoint.folder import is_folder
from ...checkpoint.pretrained.arguments import Arguments
from ...checkpoint.pretrained.remote_code import FAILURES
from ...errors import CheckpointError


def load_tokenizer(model: str, *, trust_remote_code: bool = False, **hub: Any) -> Any:
    """The tokenizer of a folder or Hub repository; `hub` are `revision` and `token`.

    Raises CheckpointError, saying why it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code, **hub)
    except FAILURES as error:  # its own code's, or whatever the parser of a damaged tokenizer.json raises
        raise CheckpointError(f"{model}: its tokenizer cannot be loaded: {_reason(model, error)}") from error


def read_longest_context(model: str, *, trust_remote_code: bool = False, **hub: Any) -> int | None:
    """The most tokens that the model takes, where its configuration says. Raises as `read_configuration`."""
    from ...checkpoint.pretrained.skeleton import read_configuration

    config = read_configuration(model, Arguments(trust_remote_code=trust_remote_code), **hub)
    return getattr(config.get_text_config(), "max_position_embeddings", None) or None


def _reason(model: str, error: BaseException) -> str:
    """The first line of transformers' message, and of a Hub repository what to look at."""
    first = (str(error).splitlines() or ["?"])[0].rstrip(".")
    if is_folder(model):
        return first
    return f"{first}. Check the name and the connection (HF_HUB_OFFLINE, HF_TOKEN), or give the path of a folder"
