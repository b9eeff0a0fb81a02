"""JSON from files that may be hostile (profiles, records of runs): no repeated key, no NaN, no deep nesting."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

MAX_DEPTH = 6
#: What an object of ours says in "format", and what others have as a key.
OURS = {
    "moe_offload.profile": "an activation profile (moe-offload profile inspect reads it)",
    "moe_offload.run": "the record of a run (moe-offload report reads it)",
}
OTHERS = {
    "traceEvents": "a timeline (ui.perfetto.dev opens it)",
    "weight_map": "the index of a checkpoint",
    "architectures": "the configuration of a model",
}


def parse_json(data: bytes, format: str) -> object:
    """The value that `data` holds. A file of our `format` must be of version 1, and one of another known kind is
    refused by what it is. Raises ValueError."""
    if data.startswith((b"\x80", b"PK\x03\x04")):
        raise ValueError("this is a zip, pickle or torch file, which is never opened; JSON is")
    text = data.decode("utf-8")
    _check_depth(text)
    if not text.strip():
        raise ValueError("it is empty")
    try:
        parsed = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        cut_off = error.pos >= len(text.rstrip())
        raise ValueError(f"it is cut off after {error.pos} characters" if cut_off else str(error)) from None
    if isinstance(parsed, dict) and parsed.get("format") == format:
        version = parsed.get("version")
        if type(version) is not int or version != 1:  # True == 1.0 == 1, and a Literal would let all three in
            raise ValueError(
                f"its version is {shorten_repr(version)}, this moe_offload reads version 1; upgrade moe_offload"
            )
    elif format and isinstance(parsed, dict) and (other := _other_kind(parsed)):
        raise ValueError(f"it is {other}")
    return parsed


def _other_kind(parsed: dict[str, Any]) -> str | None:
    """What a JSON object is that is easily taken for one of ours."""
    if parsed.get("format") in OURS:
        return OURS[parsed["format"]]
    return next((kind for key, kind in OTHERS.items() if key in parsed), None)


def describe_problems(error: ValidationError) -> str:
    """The first few findings of pydantic, without the (untrusted, possibly huge) values it would print."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    lines = [f"{shorten_repr('.'.join(map(str, e['loc'])) or error.title)}: {e['msg']}" for e in found[:3]]
    return "; ".join(lines) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")


def shorten_repr(value: object) -> str:
    """`repr(value)`, cut to 80 characters: the value may be untrusted, and huge."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_depth(text: str) -> None:
    """Refuse deep nesting before the parser recurses into it. Escapes are one token, so a quote in a string is none."""
    depth, in_string = 0, False
    for token in re.finditer(r'\\.|["\[\]{}]', text, re.DOTALL):
        mark = token[0]
        if mark == '"':
            in_string = not in_string
        elif not in_string and mark in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        elif not in_string and mark in "]}":
            depth -= 1


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:  # readers disagree on which one counts
            raise ValueError(f"the key {shorten_repr(key)} is there twice")
        result[key] = value
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
