"""The model of a checkpoint on the meta device: every module and shape, no weights; the class that transformers runs.

config.json is refused here by name, before anything is loaded, where it asks for what is not done: weights quantised in
a way that is not read, and code that comes with the checkpoint and is not trusted.
"""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import CheckpointError, ConfigError, OffloadError, UnsupportedModelError
from ..quantised.methods import check_quantization
from ..quantised.quantizer import prepare_quantized, quantization_of, settle_quantization
from .arguments import Arguments
from .own_class import build_own
from .remote_code import FAILURES, check_remote_code, code_source, failed, find_remote_class

if TYPE_CHECKING:  # transformers takes seconds to import: functions do it, once there is something to load
    from transformers import PreTrainedModel

    from ..packed import Stored


#: While transformers makes a model, torch's default dtype is that model's, in every thread. In several at once the
#: models would be of each other's dtype.
ONE_AT_A_TIME = threading.RLock()


def read_configuration(place: Path | str, arguments: Arguments, **where: Any) -> Any:
    """The configuration of the checkpoint at `place`, a folder or a repository, with the overrides that were given.

    Raises `CheckpointError` for one that cannot be read, `ConfigError` for an override that names no field of it, and
    `UnsupportedModelError` for one quantised in a way that is not read, or that needs code of its own.
    """
    from huggingface_hub.errors import StrictDataclassError  # a field of another type
    from transformers import AutoConfig, PreTrainedConfig

    try:
        said, _ = PreTrainedConfig.get_config_dict(place, **where)
        check_quantization(place, said)
        check_remote_code(place, said, arguments.trust_remote_code)
        config, unknown = AutoConfig.from_pretrained(
            place,
            trust_remote_code=arguments.trust_remote_code,  # a word that was said: None would ask on the terminal
            return_unused_kwargs=True,
            **(code_source(arguments) if arguments.trust_remote_code else {}),
            **where,
            **arguments.overrides,
        )
    except ConfigError:
        raise
    except (OSError, ValueError, StrictDataclassError) as error:
        why = " ".join(str(error).split())  # a field of another type is told in two lines
        raise CheckpointError(f"{place}: cannot read the model's configuration: {why}") from error
    except ImportError as error:
        raise UnsupportedModelError(f"{place}: its configuration needs what is not installed: {error}") from error
    except FAILURES as error:
        if isinstance(error, OffloadError):
            raise
        if not arguments.trust_remote_code:  # no object, or values that nobody expects
            raise CheckpointError(
                f"{place}: cannot read the model's configuration: {type(error).__name__}: {str(error)[:300]}"
            ) from error
        raise failed(place, "its configuration", error) from error
    unknown = {name for name in unknown if name in arguments.overrides}
    if unknown:
        raise ConfigError(
            f"from_pretrained({sorted(unknown)[0]}=...) is neither a parameter nor a field of {type(config).__name__}; "
            "settings of moe_offload go into config={...}"
        )
    if "attn_implementation" in arguments.overrides:  # some composite configurations lose it, transformers says
        config._attn_implementation = arguments.overrides["attn_implementation"]
    if getattr(config, "fusion_config", None) is not None:
        raise UnsupportedModelError(f"{place}: config.json has a fusion_config; fused layers are not supported yet")
    check_quantization(place, {"text_config": config.get_text_config(decoder=True).to_dict()})
    settle_quantization(config)
    return config


def build_skeleton(place: Path | str, config: Any, stored: Stored | None, arguments: Arguments) -> PreTrainedModel:
    """The model of `config`, which was read at `place`, on the meta device; the headers in `stored` say its dtype where
    nothing else does. Of a class that the checkpoint brings along only the parameters are there: see `own_class.py`."""
    remote = find_remote_class(place, config, arguments)
    if remote is not None:
        with ONE_AT_A_TIME:
            return build_own(place, remote, config, _choose_dtype(config, stored, arguments.dtype))
    model_class, config = _choose_class(config)
    dtype = _choose_dtype(config, stored, arguments.dtype)
    try:
        with ONE_AT_A_TIME, torch.device("meta"):
            model: PreTrainedModel = model_class._from_config(config, dtype=dtype)
    except Exception as error:  # any, of values of the configuration that its code does not expect
        raise _unbuildable(error, config, arguments) from error
    with torch.device("meta"):
        prepare_quantized(model)
    _keep_in_float32(model, dtype)
    return model


def _unbuildable(error: Exception, config: Any, arguments: Arguments) -> OffloadError:
    """What transformers says of a package that is missing, or of a part that the model does not have."""
    kind = "" if isinstance(error, (ImportError, ValueError)) else f"{type(error).__name__}: "
    said = kind + " ".join(str(error).split())[:400]
    attention = arguments.overrides.get("attn_implementation")
    if attention is not None:
        return ConfigError(
            f"attn_implementation={attention!r}: transformers cannot build {config.model_type!r} with it: {said}"
        )
    return UnsupportedModelError(f"transformers cannot build a {config.model_type!r}: {said}")


def _choose_class(config: Any) -> tuple[Any, Any]:
    """The class that the configuration names, as pipelines choose it, else what AutoModelForCausalLM takes; and the
    part of the configuration that it takes.

    A class that the user registered for this configuration comes first, as in transformers.
    """
    import transformers

    mapping: Mapping[Any, Any] = transformers.AutoModelForCausalLM._model_mapping
    auto = mapping[type(config)] if type(config) in mapping else None
    found = auto if auto is not None and not auto.__module__.startswith("transformers.") else None
    named = config.architectures or []
    if not isinstance(named, (list, tuple)) or not all(isinstance(name, str) for name in named):
        raise CheckpointError(f"config.json has {named!r} as architectures, which is no list of names; repair it")
    for name in [] if found is not None else named:
        found = _class_named(name, config)
        if found is not None:
            break
    found = auto if found is None else found
    if found is None:
        raise UnsupportedModelError(
            f"config.json names {config.architectures or 'no architecture'}, which the installed transformers "
            f"({transformers.__version__}) does not have. Install a version that has it"
        )
    text = config.sub_configs.get("text_config")
    if text is not None and type(config) is not text and getattr(found, "config_class", None) is text:
        said, config = quantization_of(config), config.get_text_config()
        if said is not None:
            config.quantization_config = said
    return found, config


def _class_named(name: str, config: Any) -> Any:
    """The model class of that name for `config` (or for its text part); not every class is exported at the top."""
    import transformers
    from transformers import PreTrainedModel

    module = type(config).__module__.replace("configuration_", "modeling_")
    found = getattr(transformers, name, None)
    if found is None and module.startswith("transformers."):
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError:
            found = None
    made_for = found.config_class if isinstance(found, type) and issubclass(found, PreTrainedModel) else None
    return found if made_for in (type(config), config.sub_configs.get("text_config", type(config))) else None


def _choose_dtype(config: Any, stored: Stored | None, dtype: Any) -> torch.dtype:
    """By transformers' rule: what was said; for "auto" the configuration's, the index's, or the first file's first
    floating tensor's."""
    if isinstance(dtype, Mapping):
        dtype = dtype.get("", torch.get_default_dtype())
    if dtype == "auto":
        dtype = config.dtype
        if dtype is None and stored is not None:
            dtype = stored.metadata.get("dtype") or _first_dtype(stored)
        dtype = torch.float32 if dtype is None else dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype {dtype!r} is no torch dtype; use 'auto', 'bfloat16', 'float32' or a torch.dtype")
    return dtype


def _first_dtype(stored: Stored) -> torch.dtype | None:
    headers = stored.headers
    first = next(iter(headers.opened.items()), None)
    keys = [key for key in first[1].keys() if key in headers] if first else list(headers)
    floating = [headers[key].dtype for key in keys if headers[key].dtype.is_floating_point]
    return next((dtype for dtype in floating if dtype.itemsize > 1), None)  # a model has no float8 as its own dtype


def _keep_in_float32(model: Any, dtype: torch.dtype) -> None:
    """Some parameters are loaded in float32 whatever the model's dtype: their bytes are to be planned for."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kept = next((kind for pattern, kind in plan.items() if re.search(pattern.replace("*", ".*"), name)), None)
        if kept is not None:
            tensor.data = tensor.data.to(kept)
