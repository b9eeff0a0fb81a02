"""Load a checkpoint's dense weights and nothing of its experts.

transformers' own loader does the work (renaming, conversion, tying, casting). It is handed a state dict of lazy
entries: dense tensors are read when it asks for them, with `pread` into memory of our own (a mapped file that is
truncated later would kill the process), and expert tensors answer with their shape on the meta device. So the
conversion of experts runs too, on shapes alone, and a checkpoint that does not fit the model fails before a byte of it
has been read.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UnsupportedModelError
from .folder import is_folder
from .headers import Headers, TensorRange
from .packed import checkpoint_headers

if TYPE_CHECKING:  # transformers takes seconds to import: functions do it, once there is something to load
    from transformers import PreTrainedModel

#: What we need of a Hub repository; never .bin or any other pickle.
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


class Absent:
    """Stands in a state dict for an expert tensor: it has a shape and a dtype, and no bytes."""

    def __init__(self, range_: TensorRange):
        self.shape, self.dtype = range_.shape, range_.dtype

    def __getitem__(self, _: Any) -> Absent:
        return self

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")


def resolve_folder(path_or_id: str | Path, **hub: Any) -> Path:
    """A local checkpoint folder: the given one, or the Hub repository of that name, downloaded without .bin files."""
    if is_folder(path_or_id):
        return Path(path_or_id)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=HUB_FILES, **hub))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path_or_id}: neither a local folder nor a repository that can be reached on the Hub ({error})"
        ) from error


def skeleton(
    folder: Path | str, dtype: str | torch.dtype = "auto", stored: Headers | None = None, **config_kwargs: Any
) -> PreTrainedModel:
    """The model of `folder` (or of a Hub repository) on the meta device: every module and shape, no weights.

    `stored` are the checkpoint's headers, where they are not to be read from the folder.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, **config_kwargs)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: cannot read the model's configuration: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{folder}: the checkpoint is quantised ({config.quantization_config}); quantised expert rows are not "
            f"supported yet"
        )
    model_class = _model_class(config)
    with torch.device("meta"):
        model: PreTrainedModel = model_class._from_config(config, dtype=_dtype(config, folder, dtype, stored))
    return model


def load_dense(folder: Path, meta: Any, expert_keys: frozenset[str], **kwargs: Any) -> nn.Module:
    """The model of `folder` with its dense weights loaded and every tensor of `expert_keys` left on the meta device."""
    from safetensors import safe_open
    from transformers import GenerationConfig

    headers = checkpoint_headers(folder)
    files = {range_.file for key, range_ in headers.items() if key not in expert_keys}
    opened = {file: safe_open(file, framework="pt", backend="pread") for file in files}
    state: Mapping[str, Any] = {
        key: Absent(range_) if key in expert_keys else opened[range_.file].get_slice(key)
        for key, range_ in headers.items()
    }
    if (folder / "generation_config.json").exists():
        kwargs.setdefault("generation_config", GenerationConfig.from_pretrained(folder))
    config, dtype = meta.config, meta.dtype
    model, info = type(meta).from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, **kwargs
    )
    missing = sorted(set(info["missing_keys"]) | {key for key, *_ in info.get("mismatched_keys", [])})
    if missing:
        raise CheckpointError(
            f"{folder}: the checkpoint lacks {len(missing)} tensors that the model needs (or has them in another "
            f"shape): "
            f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; it is incomplete, or of another model"
        )
    model.config._name_or_path = str(folder)
    loaded: nn.Module = model
    return loaded


def _model_class(config: Any) -> Any:
    """The class named in the configuration, else what AutoModelForCausalLM would choose."""
    import transformers

    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if found is None:  # not every class is exported at the top
            module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
            found = getattr(module, name, None)
        if found is not None:
            return found
    mapping = transformers.AutoModelForCausalLM._model_mapping
    if type(config) in mapping:
        return mapping[type(config)]
    raise UnsupportedModelError(
        f"config.json names {config.architectures or 'no architecture'}, which the installed transformers does not have"
    )


def _dtype(config: Any, folder: Path | str, dtype: str | torch.dtype, stored: Headers | None) -> torch.dtype:
    """'auto' is what the configuration says, else the first floating tensor of the checkpoint; without one, float32."""
    if dtype == "auto" or dtype is None:
        dtype = config.dtype
    if dtype is None:
        stored = checkpoint_headers(Path(folder)) if stored is None else stored
        dtype = next((r.dtype for r in stored.values() if r.dtype.is_floating_point), torch.float32)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"dtype {dtype!r} is no torch dtype; use 'auto', 'bfloat16', 'float32' or a torch.dtype")
    return dtype
