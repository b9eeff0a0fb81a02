"""The form of error messages: no full stop at the end, as most of Python's own; what follows is often appended."""

from __future__ import annotations

import ast

import pytest

from tests.paths import ROOT

FILES = sorted(path for package in ("passes", "moe_offload") for path in (ROOT / package).rglob("*.py"))


def messages(source: str) -> list[ast.expr]:
    """The first argument of every call of something that ends in Error."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args]
    return [call.args[0] for call in calls if _name(call.func).endswith("Error")]


def ends_with_a_stop(message: ast.expr) -> bool:
    """Whether the text of a message, as far as it is written in the source, ends with one full stop."""
    if isinstance(message, ast.BinOp):
        return ends_with_a_stop(message.right)
    last = message.values[-1] if isinstance(message, ast.JoinedStr) and message.values else message
    text = last.value if isinstance(last, ast.Constant) else ""
    return isinstance(text, str) and text.endswith(".") and not text.endswith("...")


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in FILES])
def test_no_message_ends_with_a_full_stop(path):
    found = [f"line {m.end_lineno}" for m in messages(path.read_text(encoding="utf-8")) if ends_with_a_stop(m)]
    assert found == []


@pytest.mark.parametrize("source", ['raise XError("no.")', 'XError(f"{x} no.")', 'a.XError("n" f"{x}" "o.")'])
def test_a_full_stop_is_found(source):
    assert [ends_with_a_stop(message) for message in messages(source)] == [True]
