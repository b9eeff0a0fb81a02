"""Settings as text: the YAML and JSON of a configuration file, read as hostile input, and where the file lies.

    budget: 8GB                                   # $HF_HOME/moe_offload/default_config.yaml
    device_map: {"": cpu, "model.layers.*.mlp.experts": disk}
    policy: lru

Plain values in, plain values out: what a key means is not known here (`settings.py`, `rules.py`). accelerate keeps
its own default_config.yaml in a folder beside ours and refuses keys it does not know, so that file cannot be shared.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files.untrusted import read_bounded, refusing_file
from ..files.whole_file import save_whole

MAX_BYTES = 64 * 2**10  # a device map that names every module of a large model takes a tenth of it
DEFAULT_NAME = "default_config.yaml"
HEADER = "# Settings of moe_offload; `moe-offload config` writes this file, `moe-offload config --show` explains it.\n"


def default_path() -> Path:
    """Where the default file is looked for: `$HF_HOME/moe_offload/default_config.yaml`."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "moe_offload" / DEFAULT_NAME


def read_settings(path: Path) -> dict[str, Any]:
    """The keys and values of the file at `path`: JSON where its name ends in .json, else YAML.

    Raises ConfigError, naming the file, when it cannot be read, is larger than 64 KiB, or is no plain mapping.
    """
    remedy = "Check the path, or write one with `moe-offload config`"
    with refusing_file(path, "configuration file", remedy, ConfigError):
        text = read_bounded(path, MAX_BYTES).decode("utf-8")
        return (from_json if path.suffix == ".json" else from_yaml)(text)


def write_settings(path: Path, values: Mapping[str, Any]) -> None:
    """Put `values` at `path`, whole or not at all; folders that are missing are made. Raises ConfigError."""
    text = to_json(values) if path.suffix == ".json" else HEADER + to_yaml(values)
    with contextlib.suppress(OSError):  # which is then said of the file
        path.parent.mkdir(parents=True, exist_ok=True)
    save_whole(path, text.encode(), "configuration file", ConfigError)


def from_yaml(text: str) -> dict[str, Any]:
    """The mapping that `text` holds, of plain values only. Raises ConfigError."""
    return _mapping(parse_yaml(text))


def to_yaml(values: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(values), sort_keys=False, default_flow_style=False)) if values else "{}\n"


def from_json(text: str) -> dict[str, Any]:
    """The mapping that `text` holds. Raises ConfigError."""
    from ..files import strict_json

    try:
        return _mapping(strict_json.parse_json(text.encode(), format=""))
    except ValueError as error:
        raise ConfigError(f"it is not the JSON of a configuration: {error}") from error


def to_json(values: Mapping[str, Any]) -> str:
    return json.dumps(dict(values), indent=1) + "\n"


def parse_yaml(text: str) -> Any:
    """The value that `text` stands for: YAML without tags, anchors, aliases and repeated keys. Raises ConfigError.

    An alias can make a few lines stand for gigabytes, a tag names a Python object, and of a key that is there twice one
    would be lost.
    """
    import yaml

    class Plain(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise ConfigError(f"line {event.start_mark.line + 1} has an anchor or alias (& or *)")
            if getattr(event, "tag", None):
                line = event.start_mark.line + 1
                raise ConfigError(f"it is not plain YAML: line {line} has a tag (!); write the value without it")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            return _once(
                [(self.construct_object(k, deep=True), self.construct_object(v, deep=True)) for k, v in node.value]
            )

    try:
        return yaml.load(text, Plain)  # a SafeLoader, made stricter
    except yaml.YAMLError as error:
        raise ConfigError(f"it is not plain YAML: {re.sub(chr(10) + ' *', ' ', str(error))[:200]}") from error
    except ConfigError:
        raise
    except (ValueError, TypeError, RecursionError, LookupError, AttributeError, ArithmeticError) as error:
        # What PyYAML's constructors raise for a number or a date that only looks like one.
        raise ConfigError(f"it is not plain YAML: {type(error).__name__}: {str(error)[:200]}") from error


def _mapping(value: Any) -> dict[str, Any]:
    if value is None:  # an empty file says nothing, which is not wrong
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"expected settings, a line each as `budget: 8GB`, found {str(value)[:60]!r}")
    return value


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [key for key, _ in pairs]
        raise ConfigError(f"the key {next(k for k in names if names.count(k) > 1)!r} is there twice")
    return found
