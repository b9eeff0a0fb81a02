"""docs/quantised.md has the tables that the command writes, for the formats, families and refusals of the code."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_offload.apps.cli import app
from moe_offload.apps.families.quantised import page
from moe_offload.apps.families.quantised.check import QuantisedResult, check_quantised
from moe_offload.apps.families.quantised.kinds import FORMATS, KINDS, SIZES
from moe_offload.checkpoint.quantised.methods import PACKED, REFUSED
from moe_offload.errors import ConfigError
from tests.paths import ROOT

DOCS = ROOT / "docs" / "quantised.md"
LINES = DOCS.read_text(encoding="utf-8").splitlines()
CELLS = {cells[0]: cells for line in LINES if line.startswith("| ") for cells in [line.strip("| ").split(" | ")]}


def test_every_format_stands_there_with_every_family():
    assert CELLS["format"][3:] == list(SIZES)
    assert [format for format in FORMATS if len(CELLS.get(format, ())) != 3 + len(SIZES)] == []
    assert {CELLS[format][1].strip("`") for format in FORMATS} == set(PACKED)


def test_every_pair_is_exact_or_has_no_layout():
    for format, kind in FORMATS.items():
        for family, status in zip(SIZES, CELLS[format][3:], strict=True):
            stacked = (KINDS[kind].family == "gpt_oss", family == "gpt_oss")
            assert status == ("exact" if stacked[0] == stacked[1] else "no layout"), (format, family)


def test_every_refusal_stands_there_with_its_reason():
    found = dict(page.refusals())
    assert {**found, **REFUSED} == found and len(found) > len(REFUSED)
    assert [name for name, why in found.items() if CELLS.get(name, [""])[-1] != why] == []


def test_the_command_writes_between_the_marks(tmp_path: Path):
    rows = [
        QuantisedResult("MXFP4", "gpt_oss", "exact", "", "mxfp4", 0.27),
        QuantisedResult("MXFP4", "qwen3_moe", "refused", "because", "mxfp4"),
    ]
    file = tmp_path / "page.md"
    file.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    for _ in range(2):
        page.write_tables(file, rows)
        text = file.read_text()
        assert (
            text.startswith(f"before\n{page.BEGIN}\n") and text.endswith(f"{page.END}\nafter\n") and "old" not in text
        )
        assert "| MXFP4 | `mxfp4` | 0.27 | exact | refused (1) |" in text and "(1) because." in text


@pytest.mark.parametrize("text", ["no marks", f"{page.END}\n{page.BEGIN}"])
def test_a_page_without_marks_is_refused_before_anything_is_tried(text: str, tmp_path: Path):
    file = tmp_path / "page.md"
    file.write_text(text)
    result = CliRunner().invoke(app, ["families", "--quantised", "--into", str(file)])
    assert result.exit_code == 2 and "no line" in result.output and file.read_text() == text
    with pytest.raises(ConfigError, match="cannot be read"):
        page.check_page(tmp_path / "absent.md")


@pytest.mark.parametrize("flags", [["--quantised", "--matrix"], ["--into", "page.md"], ["--quantised", "aria"]])
def test_flags_that_mean_nothing_together_are_refused(flags: list[str]):
    assert CliRunner().invoke(app, ["families", *flags]).exit_code == 2


def pairs():
    for format, family in page.pairs([]):
        fast = (format, family) == ("FP8 by channel", "mixtral")
        yield pytest.param(format, family, marks=[] if fast else [pytest.mark.long])


@pytest.mark.parametrize(("format", "family"), pairs())
def test_it_is_as_the_page_says(format: str, family: str):
    row = check_quantised(format, family)
    said = CELLS[format][3 + list(SIZES).index(family)]
    assert row.status in (said, "not tried"), row.reason


def test_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch):
    from moe_offload.packed import mxfp4

    for unpack in ("unpack", "unpack_turned"):  # which of them is used depends on the processor
        monkeypatch.setattr(mxfp4.MXFP4, unpack, lambda self, tensors, out: out.fill_(1.0))
    monkeypatch.setattr("moe_offload.checkpoint.quantised.verify._agrees", lambda *_: True)
    row = check_quantised("MXFP4", "gpt_oss")
    assert row.status == "different" and "logits differ" in row.reason
