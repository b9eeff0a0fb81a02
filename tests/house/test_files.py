"""A file is short enough to be read at once, or its docstring gives the reason why it is not."""

from __future__ import annotations

import ast

import pytest

from tests.house.imports import modules

LONGEST = 250
REASON = f"Longer than {LONGEST} lines"


def is_too_long(source: str) -> bool:
    doc = ast.get_docstring(ast.parse(source)) or ""
    return len(source.splitlines()) > LONGEST and REASON not in doc


def test_a_long_file_says_why():
    assert [module for module, path in modules().items() if is_too_long(path.read_text())] == []


@pytest.mark.parametrize(
    ("doc", "lines", "found"),
    [("An idea.", LONGEST, False), ("An idea.", LONGEST + 1, True), (f"{REASON}: a table.", LONGEST + 1, False)],
)
def test_a_long_file_is_found(doc, lines, found):
    assert is_too_long(f'"""{doc}"""\n' + "x = 1\n" * (lines - 1)) == found
