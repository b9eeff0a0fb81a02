"""Code that comes with a checkpoint: run where transformers would run it, and nowhere else.

config.json names it (`auto_map`), and `trust_remote_code=True` allows it. Then the folder's own class runs, whatever
class transformers has of that name. Without that word nothing of it is run, nobody is asked on the terminal, and what
exists only as such code is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, UnsupportedModelError
from ..folder import unknown_model_type
from .arguments import Arguments

CONFIG, MODEL = "AutoConfig", "AutoModelForCausalLM"  # the entries of auto_map that are about a language model
FAILURES = (Exception, SystemExit)  # what code of a checkpoint may raise: sys.exit() is not meant for who runs it here


def check_remote_code(place: Path | str, said: Mapping[str, Any], trusted: bool) -> None:
    """Raise `UnsupportedModelError` for a config.json (`said`) whose model is unknown, or not trusted."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    named, model_type = _named(said), str(said.get("model_type"))
    known = model_type in CONFIG_MAPPING
    if CONFIG in named and not known and not trusted:
        raise UnsupportedModelError(
            f"{place}: model type {model_type[:64]!r} exists only as code that comes with the checkpoint "
            f"({named[CONFIG]}), which is run only with trust_remote_code=True (--trust-remote-code). Say so if you "
            "trust where it comes from"
        )
    if "model_type" in said and not known and not (trusted and CONFIG in named):
        raise unknown_model_type(place, model_type)
    if trusted and said.get("quantization_config") and MODEL in named:
        raise UnsupportedModelError(
            f"{place}: a quantised checkpoint with code of its own ({named[MODEL]}); how that code unpacks its weights "
            "is not known here. "
            + ("Leave trust_remote_code out to run transformers' own class" if known else "Use one in bfloat16")
        )
    if trusted and isinstance(place, Path) and (place / "custom_generate" / "generate.py").is_file():
        raise UnsupportedModelError(
            f"{place}: with trust_remote_code=True transformers would replace generate() by custom_generate/generate.py"
            ", which is not supported yet. Leave the argument out to use the ordinary generate()"
        )


def find_remote_class(place: Path | str, config: Any, arguments: Arguments) -> Any:
    """The model class that the checkpoint at `place` brings along, if that is the one to run; else None.

    A class that the user registered for this configuration comes first, as in transformers.
    """
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

    named = _named({"auto_map": getattr(config, "auto_map", None)})
    if MODEL not in named or not arguments.trust_remote_code:
        return None
    mapping: Mapping[Any, Any] = transformers.AutoModelForCausalLM._model_mapping
    if type(config) in mapping and not mapping[type(config)].__module__.startswith("transformers."):
        return None
    try:
        found: Any = get_class_from_dynamic_module(named[MODEL], str(place), **code_source(arguments))
    except ImportError as error:
        raise UnsupportedModelError(f"{place}: its own code needs what is not installed: {error}") from error
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{place}: its own code ({named[MODEL]}) cannot be loaded: {type(error).__name__}: {error}. Download the "
            "checkpoint again, with its .py files"
        ) from error
    except FAILURES as error:
        raise failed(place, named[MODEL], error) from error
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{place}: auto_map in config.json names {named[MODEL]} as the model, which is no PreTrainedModel. Name "
            "the class that is"
        )
    found.register_for_auto_class(MODEL)  # so that save_pretrained writes the code, too
    return add_generation_mixin_to_remote_model(found)


def failed(place: Path | str, name: str, error: BaseException) -> UnsupportedModelError:
    """For code of a checkpoint that raised `error`."""
    return UnsupportedModelError(
        f"{place}: its own code ({name}) fails under the installed transformers: {type(error).__name__}: "
        f"{(str(error).splitlines() or [''])[0][:300]}. Use a version that it was written for"
    )


def code_source(arguments: Arguments) -> dict[str, Any]:
    """What transformers is told of where code comes from, in case that it is not in the folder."""
    given = {key: value for key, value in arguments.hub.items() if key in ("token", "cache_dir", "local_files_only")}
    return {**given, "code_revision": arguments.code_revision}


def _named(said: Mapping[str, Any]) -> dict[str, str]:
    """The entries of auto_map that are about a language model."""
    entries = said.get("auto_map")
    if not isinstance(entries, Mapping):
        return {}
    return {name: entries[name] for name in (CONFIG, MODEL) if isinstance(entries.get(name), str)}
