"""Every keyword that transformers' from_pretrained takes, and what becomes of it here: one table, which is complete.

A keyword that is not in the table overrides a field of the configuration, as in transformers; one that names no such
field is refused (`skeleton.py`). `tests/checkpoint/test_arguments.py` reads transformers' source: a parameter that a
later version adds is missing here, and the test says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...errors import ConfigError, UnsupportedModelError

OWN = "a parameter of moe_offload.from_pretrained"
HUB = "handed to the download from the Hub"
FILES = "chooses files"
CODE = "which code may run"
MODEL = "handed to transformers with the model's class"
CONFIGURATION = "read with the configuration"
ADAPTER = "handed to load_adapter"
NOTHING = "has no effect, for the reason given"
REFUSED = "refused, with the reason given"


class Argument(NamedTuple):
    """What becomes of one keyword, and why; `why` of a refused one says what to do instead."""

    fate: str
    why: str = ""


_READ_IN_PLACE = "experts are read from the checkpoint's own files, and dense weights are held"
_BY_CONFIG = "several processes share a model's experts by distributed_config=DistributedConfig(tp_size=N, ep_size=N)"
_NO_QUANTIZATION = (
    "nothing is quantised while it is loaded, and of a checkpoint that is quantised its config.json says how: leave it "
    "out, and give a checkpoint in a format that is read (docs/quantised.md)"
)
_KERNELS = "kernels that replace a model's layers are not what the passes know: leave it out"
_RETIRED = "transformers takes it and ignores it"

ARGUMENTS: dict[str, Argument] = {
    "pretrained_model_name_or_path": Argument(OWN),
    "config": Argument(OWN, "moe_offload's settings; of the model's configuration, single fields are keywords"),
    "dtype": Argument(OWN),
    "torch_dtype": Argument(OWN, "the former name of dtype; dtype wins where both are given"),
    "device_map": Argument(OWN),
    "max_memory": Argument(OWN),
    "cache_dir": Argument(HUB),
    "force_download": Argument(HUB),
    "local_files_only": Argument(HUB),
    "revision": Argument(HUB),
    "token": Argument(HUB),
    "tqdm_class": Argument(HUB),
    "proxies": Argument(REFUSED, "huggingface_hub has no such argument: set HTTPS_PROXY in the environment"),
    "subfolder": Argument(FILES),
    "variant": Argument(FILES),
    "trust_remote_code": Argument(CODE),
    "code_revision": Argument(CODE),
    "attn_implementation": Argument(CONFIGURATION),
    "experts_implementation": Argument(OWN, "a setting: 'grouped_mm' or 'batched_mm', the two that the passes rewrite"),
    "generation_config": Argument(MODEL),
    "adapter_name": Argument(ADAPTER),
    "adapter_kwargs": Argument(ADAPTER),
    "state_dict": Argument(REFUSED, "experts are read from files: save the weights, and give their folder"),
    "gguf_file": Argument(REFUSED, "GGUF files are not read: give the original safetensors checkpoint"),
    "use_safetensors": Argument(FILES, "only safetensors are read; False asks for pickles"),
    "ignore_mismatched_sizes": Argument(REFUSED, "weights that do not fit would be random ones: use the right files"),
    "output_loading_info": Argument(REFUSED, "the model alone is returned, and what is missing raises: leave it out"),
    "key_mapping": Argument(
        REFUSED, "experts are found by transformers' own names: load with plain transformers and save once, renamed"
    ),
    "fusion_config": Argument(REFUSED, "fused layers may change what is computed: leave it out"),
    "quantization_config": Argument(REFUSED, _NO_QUANTIZATION),
    "load_in_4bit": Argument(REFUSED, _NO_QUANTIZATION),
    "load_in_8bit": Argument(REFUSED, _NO_QUANTIZATION),
    "distributed_config": Argument(MODEL, "expert parallelism; see ranks/"),
    "device_mesh": Argument(REFUSED, _BY_CONFIG),
    "tp_plan": Argument(REFUSED, _BY_CONFIG),
    "tp_size": Argument(REFUSED, _BY_CONFIG),
    "use_kernels": Argument(REFUSED, _KERNELS),
    "kernel_config": Argument(REFUSED, _KERNELS),
    "allow_all_kernels": Argument(REFUSED, _KERNELS),
    "use_auth_token": Argument(REFUSED, "transformers has dropped it: say token=..."),
    "weights_only": Argument(NOTHING, "it is about unpickling .bin files, which are never read"),
    "disable_mmap": Argument(NOTHING, "no file is ever memory-mapped"),
    "offload_folder": Argument(NOTHING, _READ_IN_PLACE),
    "offload_buffers": Argument(NOTHING, _READ_IN_PLACE),
    "low_cpu_mem_usage": Argument(NOTHING, _RETIRED),
    "offload_state_dict": Argument(NOTHING, _RETIRED),
    "mirror": Argument(NOTHING, _RETIRED),
    "from_tf": Argument(NOTHING, _RETIRED),
    "from_flax": Argument(NOTHING, _RETIRED),
    "_fast_init": Argument(NOTHING, _RETIRED),
    "_commit_hash": Argument(NOTHING, _RETIRED),
    "_from_auto": Argument(NOTHING, "part of what is told to the Hub about the caller"),
    "_from_pipeline": Argument(NOTHING, "part of what is told to the Hub about the caller"),
}


@dataclass(frozen=True)
class Arguments:
    """What was said to from_pretrained about the checkpoint, sorted by what becomes of it.

    `overrides` are fields of the model's configuration; `experts_implementation` goes into the settings.
    """

    dtype: Any = "auto"
    hub: Mapping[str, Any] = field(default_factory=dict)
    subfolder: str = ""
    variant: str | None = None
    trust_remote_code: bool = False
    code_revision: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    experts_implementation: str | None = None

    def __post_init__(self) -> None:
        if self.trust_remote_code not in (True, False):  # by its truth, "no" and "false" would let code run
            raise ConfigError(f"trust_remote_code={self.trust_remote_code!r} is neither True nor False: say which")


def sort_arguments(dtype: Any, said: Mapping[str, Any]) -> Arguments:
    """`said` are from_pretrained's keywords beside its own parameters.

    Raises `ConfigError` naming the first that is refused; `UnsupportedModelError` where it asks for quantisation.
    """
    _refuse(said)
    by_fate: dict[str, dict[str, Any]] = {}
    for name, value in said.items():
        fate = ARGUMENTS[name].fate if name in ARGUMENTS else CONFIGURATION
        if value is not None or fate == CONFIGURATION:
            by_fate.setdefault(fate, {})[name] = value
    own, files, code = by_fate.get(OWN, {}), by_fate.get(FILES, {}), by_fate.get(CODE, {})
    dtype = own.get("torch_dtype") if dtype is None else dtype
    return Arguments(
        dtype="auto" if dtype is None else dtype,
        hub=by_fate.get(HUB, {}),
        subfolder=str(files.get("subfolder", "")).strip("/"),
        variant=files.get("variant"),
        trust_remote_code=code.get("trust_remote_code", False),
        code_revision=code.get("code_revision"),
        overrides=by_fate.get(CONFIGURATION, {}),
        model=by_fate.get(MODEL, {}),
        adapter=by_fate.get(ADAPTER, {}),
        experts_implementation=own.get("experts_implementation"),
    )


def _refuse(said: Mapping[str, Any]) -> None:
    for name, value in said.items():
        argument = ARGUMENTS.get(name)
        if argument is not None and argument.fate == REFUSED and value is not None and value is not False:
            error = UnsupportedModelError if argument.why == _NO_QUANTIZATION else ConfigError
            raise error(f"from_pretrained({name}=...) is not supported here: {argument.why}")
    if said.get("use_safetensors") is False:
        raise ConfigError(
            "from_pretrained(use_safetensors=False) asks for .bin files (pickle), which are not read: leave it out, or "
            "convert them by loading the model with transformers and calling save_pretrained"
        )
    subfolder = str(said.get("subfolder") or "")
    if ".." in subfolder.split("/") or subfolder.startswith("/"):
        raise ConfigError(f"subfolder={subfolder!r} is not a folder inside the checkpoint's; name one that is")
