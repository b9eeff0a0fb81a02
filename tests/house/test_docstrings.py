"""What a user calls says what it takes, gives and raises, and shows it: every part that applies, every example run."""

from __future__ import annotations

import inspect
import json
import re
from types import SimpleNamespace

import pytest
import torch

import moe_offload
from moe_offload.handle import Handle
from tests.paths import MODEL_NAME as MODEL

PARTS = ("Args", "Returns", "Raises", "Example")


def is_error(value) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)


DOORS = {name: getattr(moe_offload, name) for name in moe_offload.__all__}
DOORS = {name: value for name, value in DOORS.items() if not is_error(value) and name != "Forecast"}
METHODS = {
    f"Handle.{name}": value
    for name, value in inspect.getmembers(Handle, inspect.isfunction)  # those of the classes that make it up, too
    if not name.startswith("_")
}
DOCUMENTED = {**DOORS, "Handle": Handle, **METHODS}


def parts_of(doc: str) -> dict[str, str]:
    """The parts of a docstring by their heading, which stands alone on its line."""
    pieces = re.split(r"^(\w+):$", inspect.cleandoc(doc), flags=re.M)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def arguments_of(value) -> list[str]:
    fixed = ("self", "format", "version")  # what a file says of itself is nobody's argument
    return [name for name in inspect.signature(value).parameters if name not in fixed]


def lacking(name: str, value) -> list[str]:
    """What the docstring of `value` does not say."""
    doc, missing = inspect.getdoc(value) or "", []
    parts = parts_of(doc)
    if not doc.partition("\n")[0].strip():
        missing.append("a first line")
    documented = re.findall(r"^ {4}\**(\w+): \S", parts.get("Args", ""), flags=re.M)
    if value is not Handle and arguments_of(value) != documented:
        missing.append(f"Args for {arguments_of(value)}, not {documented}")
    returns = inspect.signature(value).return_annotation if inspect.isfunction(value) else None
    if returns not in (None, "None", inspect.Signature.empty) and not parts.get("Returns", "").strip():
        missing.append("Returns")
    if name in DOORS and not re.search(r"^ {4}\w+Error: \S", parts.get("Raises", ""), flags=re.M):
        missing.append("Raises")
    if (name in DOORS or arguments_of(value)) and "```python" not in parts.get("Example", ""):
        missing.append("Example")
    return missing


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_part_that_applies_is_there(name):
    assert not lacking(name, DOCUMENTED[name])


def test_what_is_missing_is_found():
    def bare(budget: int, **more: int) -> int:
        """Something."""

    found = lacking("optimize", bare)
    assert [part.partition(" ")[0] for part in found] == ["Args", "Returns", "Raises", "Example"], found


@pytest.mark.parametrize("name", DOCUMENTED)
def test_errors_that_are_named_are_ours(name):
    for error in re.findall(r"^ {4}(\w+Error): ", parts_of(inspect.getdoc(DOCUMENTED[name])).get("Raises", ""), re.M):
        assert is_error(getattr(moe_offload, error, None)), error


@pytest.fixture(scope="module")
def names():
    """What the examples take for granted: an offloaded model, a prompt, and what is imported."""
    import transformers

    model = moe_offload.from_pretrained(MODEL, "8GB")
    model.moe_offload.start_trace()
    model.moe_offload.start_timeline()
    yield {
        "json": json,
        "moe_offload": moe_offload,
        "transformers": transformers,
        "prometheus_client": pytest.importorskip("prometheus_client"),
        "app": SimpleNamespace(mount=lambda path, app: None),
        "inputs": {"input_ids": torch.tensor([[5, 6, 7]])},
        "loaded": model,
    }
    model.moe_offload.close()


@pytest.mark.parametrize("name", [name for name, value in DOCUMENTED.items() if "```python" in (value.__doc__ or "")])
def test_every_example_runs(name, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", inspect.getdoc(DOCUMENTED[name]), flags=re.S)
    program = program.replace('"Qwen/Qwen3-30B-A3B"', repr(MODEL)).replace("(9100)", "(0)")
    space = {**names, "model": names["loaded"]}
    exec(compile(inspect.cleandoc(program), name, "exec"), space)  # our own docstrings
    if space["model"] is not names["loaded"] and hasattr(space["model"], "moe_offload"):
        space["model"].moe_offload.close()
