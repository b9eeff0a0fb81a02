"""Load a checkpoint's dense weights and nothing of its experts.

transformers' own loader does the work (renaming, conversion, tying, casting). It is handed a state dict of lazy
entries: dense tensors are read when it asks for them, with `pread` into memory of our own (a mapped file that is
truncated later would kill the process), and expert tensors answer with their shape on the meta device. So the
conversion of experts runs too, on shapes alone, and a checkpoint that does not fit the model fails before a byte of it
has been read. What transformers would do because of the folder is done afterwards: generation defaults, an adapter.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, OffloadError
from ..headers import DTYPE_NAMES, Headers
from ..origins import find_origins, own_key
from ..outline import Outline
from ..quantised.blocks import unpack_uneven
from ..quantised.misfits import refuse_dense_faults
from ..quantised.quantizer import quantization_of, unpack_dense
from .arguments import Arguments
from .file_entry import FileEntries
from .own_class import is_own, load_own
from .skeleton import ONE_AT_A_TIME

logger = logging.getLogger("moe_offload")


class Absent:
    """An entry of a state dict in place of an expert tensor: it has a shape and a dtype, and no bytes."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self.shape, self.dtype = shape, dtype

    def __getitem__(self, part: Any) -> Absent:
        """All of it, or the slices of it that one process of several loads."""
        if not isinstance(part, tuple):
            return self
        sizes = (len(range(*one.indices(size))) for one, size in zip(part, self.shape, strict=True))
        return Absent(tuple(sizes), self.dtype)

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return DTYPE_NAMES[self.dtype]

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")


def load_dense(found: Outline, arguments: Arguments | None = None, name: str | Path = "") -> Any:
    """The model of `found`, with its dense weights loaded and every tensor of an expert left on the meta device.

    `name` is what the checkpoint was asked for by; the configuration keeps it, as transformers' does.
    """
    arguments = arguments or Arguments()
    if found.stored is None or found.index is None or found.folder is None:
        raise CheckpointError(f"{found.source}: there are no weights to load; download the checkpoint's shards")
    if is_own(found.model):
        experts = {f"{name}.{place.key}" for moe in found.moe_layers for name in moe.names for place in moe.own_places}
        model = _fill_own_class(found.model, experts, found.stored.headers, found.folder)
        for option, value in arguments.model.items():  # there is one: generation_config
            setattr(model, option, value)
    else:
        model = load_tensors(
            found.model, found.model.config, found.stored.headers, found.index.keys, found.folder, **arguments.model
        )
    if model.can_generate() and "generation_config" not in arguments.model:
        model.generation_config = read_generation_defaults(found.folder)
    model.config.name_or_path = str(name or found.folder)
    return model.eval()


def load_tensors(
    like: Any, config: Any, headers: Headers, absent: Collection[str], folder: Path, **options: Any
) -> Any:
    """A model of the class and dtype of `like`, with the tensors of `headers`; those in `absent` stay on meta.

    `config` may be written to; `options` are for transformers' from_pretrained, `folder` is for messages. Raises
    `CheckpointError` for tensors that are missing, that transformers cannot load by the configuration, or whose codes
    mean no number.
    """
    entries = FileEntries(headers)
    state: Mapping[str, Any] = {
        key: Absent(range_.shape, range_.dtype) if key in absent else entries[key] for key, range_ in headers.items()
    }
    state = unpack_uneven(config, headers, state)
    try:
        with ONE_AT_A_TIME:
            model, info = type(like).from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=config.dtype or like.dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told, and refused below; transformers' own error names none
                **options,
            )
    except OffloadError:
        raise
    except (RuntimeError, ValueError, AttributeError, AssertionError, KeyError, TypeError) as error:  # of any format
        if quantization_of(config) is None:
            raise
        raise CheckpointError(
            f"{folder}: transformers cannot load the dense weights by its config.json's quantization_config "
            f"({type(error).__name__}: {str(error).splitlines()[0][:300]}); the files may be of another format. "
            "Download the checkpoint again, or use one in bfloat16"
        ) from error
    finally:
        entries.close()
    _refuse_mismatched(folder, sorted(info.get("mismatched_keys", ())))
    _refuse_missing(folder, sorted(info["missing_keys"]))
    unpack_dense(model)
    refuse_dense_faults(model, headers, absent)
    return model


def load_whole(found: Outline) -> Any:
    """The plain model of `found`, whose class comes with the checkpoint: that class by itself, with its state dict."""
    if found.stored is None or found.folder is None:
        raise CheckpointError(f"{found.source}: there are no weights to load; download the checkpoint's shards")
    return _fill_own_class(found.model, (), found.stored.headers, found.folder).eval()


def _fill_own_class(model: Any, experts: Collection[str], headers: Headers, folder: Path) -> Any:
    """`model`, of a class that comes with the checkpoint: it has real buffers. The tensors of `experts` stay empty."""
    saved = model.state_dict(keep_vars=True)
    origins = find_origins(model, headers, set(saved).difference(experts))
    keys = {name: own_key(name, origin) for name, origin in origins.items()}
    load_own(model, ((name, headers.opened[headers[key].file].get_tensor(key)) for name, key in keys.items()))
    absent = [name for name, param in model.named_parameters() if param.is_meta and name not in experts]
    absent += [name for name, _ in model.named_buffers() if name in saved and name not in keys]
    _refuse_missing(folder, absent)
    return model


def _refuse_missing(folder: Path, missing: Sequence[str]) -> None:
    if missing:
        raise CheckpointError(
            f"{folder}: the checkpoint lacks {len(missing)} tensors that the model needs: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}; it is incomplete, or of another model"
        )


def _refuse_mismatched(folder: Path, mismatched: Sequence[tuple[str, Sequence[int], Sequence[int]]]) -> None:
    if mismatched:
        key, stored, wanted = mismatched[0]
        others = f", and {len(mismatched) - 1} more tensors have another shape" if len(mismatched) > 1 else ""
        raise CheckpointError(
            f"{folder}: {key} is {list(stored)} in the checkpoint, and {list(wanted)} by its config.json{others}. Use "
            "the configuration that belongs to the weights"
        )


def read_generation_defaults(folder: Path) -> Any:
    """generation_config.json, and without it the defaults that stand in config.json, as older checkpoints have them."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


def find_adapter(folder: Path, subfolder: str) -> Path | None:
    """The folder of an adapter that lies beside the model: transformers applies it without being asked."""
    from transformers.utils.import_utils import is_peft_available

    for place in (folder, folder / subfolder):
        if (place / "adapter_config.json").is_file():
            if is_peft_available():
                return place
            logger.warning("%s holds an adapter; it is not applied, as in transformers without the package peft", place)
    return None


def load_adapter(model: Any, folder: Path, arguments: Arguments) -> None:
    """Put the adapter in `folder` on an offloaded model. Raises what `model.load_adapter` raises."""
    kwargs = dict(arguments.adapter.get("adapter_kwargs") or {})
    if "token" in arguments.hub:
        kwargs["token"] = arguments.hub["token"]
    name = arguments.adapter.get("adapter_name", "default")
    model.load_adapter(str(folder), adapter_name=name, adapter_kwargs=kwargs)
