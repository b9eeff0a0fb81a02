"""Flags that belong together, as one parameter of a command: run, chat and serve take a model in the same words."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

from ...config.launched import read_launched
from ...config.settings import OffloadConfig
from .checks import check_devices, live_or_default, settings_of_flags
from .flags import (
    Attention,
    Budget,
    Compile,
    Compute,
    ConfigFile,
    Context,
    DeviceMapOption,
    Dtype,
    Live,
    MaxMemory,
    MaxNewTokens,
    Policy,
    ProfileIn,
    Revision,
    Seed,
    Temperature,
    Threads,
    Token,
    TopK,
    TopP,
    TrustRemoteCode,
)


@dataclasses.dataclass(frozen=True)
class ModelFlags:
    """What a model is held in, and how it is loaded."""

    budget: Budget = None
    device_map: DeviceMapOption = None
    max_memory: MaxMemory = None
    context: Context = None
    profile: ProfileIn = None
    policy: Policy = None
    compile: Compile = None
    compute: Compute = None
    config_file: ConfigFile = None
    live: Live = None
    dtype: Dtype = "auto"
    attn_implementation: Attention = None
    revision: Revision = None
    token: Token = None
    trust_remote_code: TrustRemoteCode = False
    threads: Threads = None

    def settings(self) -> OffloadConfig:
        """The settings in force, for a model that is to run here. Raises ConfigError or UnsupportedModelError."""
        found = settings_of_flags(
            self.config_file,
            budget=self.budget,
            device_map=self.device_map,
            max_memory=self.max_memory,
            kv_tokens=self.context,
            profile=self.profile,
            policy=self.policy,
            compile=self.compile,
            compute=self.compute,
            live=live_or_default(self.live, self.config_file),
        )
        check_devices(found)
        return found

    def hub(self) -> dict[str, Any]:
        """What a tokenizer, a configuration and a model are all loaded with; only what was given."""
        asked = {"revision": self.revision, "token": self.token, "trust_remote_code": self.trust_remote_code or None}
        return {name: value for name, value in asked.items() if value is not None}

    def loading(self, model: str) -> dict[str, Any]:
        """Further arguments of `from_pretrained`, for this model."""
        asked: dict[str, Any] = {}
        if self.attn_implementation is not None:
            asked["attn_implementation"] = self.attn_implementation
        launched = read_launched()
        if launched is not None:
            from ...checkpoint.pretrained.arguments import Arguments
            from ...checkpoint.pretrained.skeleton import read_configuration
            from ...ranks.join import config_of_ranks

            hub = self.hub()
            said = Arguments(trust_remote_code=hub.pop("trust_remote_code", False))
            asked["distributed_config"] = config_of_ranks(launched.world, read_configuration(model, said, **hub))
        return {"dtype": self.dtype, **self.hub(), **asked}

    def set_threads(self) -> None:
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """How the next token is chosen, in transformers' words."""

    max_new_tokens: MaxNewTokens = 64
    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    seed: Seed = None

    def generate_kwargs(self) -> dict[str, Any]:
        """Arguments of `generate`: greedy, unless a flag asks for sampling. Its own defaults do for what is not given.

        `--temperature 0` is greedy, whatever else is given.
        """
        asked = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        given = {name: value for name, value in asked.items() if value is not None}
        if self.temperature == 0 or not (given or self.seed is not None):
            return {"do_sample": False}
        return {"do_sample": True, **given}

    @classmethod
    def parser(cls, name: str) -> Callable[[str], Any]:
        """What reads the text of the flag `name`; it raises typer.BadParameter, saying what would be right."""
        *_, option = get_args(get_type_hints(cls, include_extras=True)[name])
        read: Callable[[str], Any] = option.parser
        return read


def flatten_groups(command: Callable[..., Any]) -> Callable[..., Any]:
    """`command` as typer is to see it: a parameter whose type is a group of flags becomes one flag per field."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            types = get_type_hints(groups[name], include_extras=True)
            for field in dataclasses.fields(groups[name]):
                parameters.append(_keyword(field.name, field.default, types[field.name]))
        else:
            parameters.append(_keyword(name, parameter.default, hints[name]))

    def flat(**given: Any) -> Any:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
        return command(**given)

    flat.__name__, flat.__doc__, flat.__module__ = command.__name__, command.__doc__, command.__module__
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return flat


def summary_line(command: Callable[..., Any]) -> str:
    """What the list of commands says of one: the whole first line of its docstring, which typer would cut."""
    return (command.__doc__ or "").partition("\n")[0]


def _keyword(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
