"""Sizes: what people write, to bytes and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_offload.config.sizes import format_size, parse_size
from moe_offload.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        (2**63 - 1, 2**63 - 1),
        ("8192", 8192),
        ("7 B", 7),
        ("8KB", 8_000),
        ("8KiB", 8_192),
        ("8MB", 8_000_000),
        ("8MiB", 8 * 2**20),
        ("8GB", 8_000_000_000),
        ("8 GB", 8_000_000_000),
        ("  8GB\n", 8_000_000_000),
        ("8GiB", 8 * 2**30),
        ("8g", 8 * 2**30),
        ("8G", 8 * 2**30),
        ("8192M", 8 * 2**30),
        ("64k", 2**16),
        ("1.5 T", 3 * 2**39),
        ("1e9", 10**9),
        ("2.5E+9", 2_500_000_000),
        ("1e3 KB", 10**6),
        ("8 GiB", 8 * 2**30),
        ("2TB", 2 * 10**12),
        ("2TiB", 2 * 2**40),
        ("1.5GB", 1_500_000_000),
        ("0.1TiB", 2**40 // 10),
        ("80%", 800),
        ("12.5 %", 125),
        ("100%", 1000),
        ("auto", 900),
        ("AUTO", 900),
    ],
)
def test_accepted(text, size):
    assert parse_size(text, total=1000) == size


def test_always_bytes_whatever_the_case():
    # accelerate reads "8gb" and "8Gb" as bits.
    assert {parse_size(text) for text in ("8GB", "8gb", "8Gb", "8gB")} == {8_000_000_000}
    assert {parse_size(text) for text in ("8GiB", "8gib", "8GIB", "8Gib")} == {8 * 2**30}


@pytest.mark.parametrize(
    "nonsense",
    [
        *(
            "",
            " ",
            "GB",
            "eight",
            "8 bits",
            "8GBit",
            "8 G B",
            "1,5GB",
            "1.GB",
            ".5GB",
            "1e",
            "1e-3",
            "1e400GB",
            "e9",
            "+8GB",
            "0x10",
            "٨GB",
        ),
        *("-1", "-8GB", "0", "0GB", "0.4", "0%", "-5%", "101%", "nan", "NaN", "inf", "infGB", "%", "auto%", "8GB\x00"),
        *(0, -1, 2**63, True, False, 8.0, float("nan"), None, b"8GB", ["8GB"], "9" * 40 + "TB", "9" * 5000),
    ],
)
def test_refused(nonsense):
    with pytest.raises(ConfigError) as error:
        parse_size(nonsense, total=1000)
    message = str(error.value)
    assert repr(str(nonsense)[:64]) in message, "names what was given"
    assert '"8GiB"' in message and '"80%"' in message, "names what is accepted"
    assert len(message) < 400


@pytest.mark.parametrize("text", ["80%", "auto"])
def test_a_part_needs_a_total(text):
    with pytest.raises(ConfigError, match="total"):
        parse_size(text)


def test_a_part_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="0 bytes hold nothing"):
        parse_size("auto", total=0)


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 KB"),
        (999_994, "999.99 KB"),
        (999_999, "1.00 MB"),
        (8_000_000_000, "8.00 GB"),
        (-1_500_000, "-1.50 MB"),
        (5 * 10**15, "5000.00 TB"),
    ],
)
def test_format(n, text):
    assert format_size(n) == text


def test_format_both_units():
    assert format_size(8_000_000_000, both=True) == "8.00 GB (7.45 GiB)"
    assert format_size(8 * 2**30, both=True) == "8.59 GB (8.00 GiB)"
    assert format_size(512, both=True) == "512 B (512 B)"


@given(st.integers(1, 10**14))
def test_what_is_printed_can_be_read_back(n):
    assert parse_size(format_size(n)) == pytest.approx(n, rel=0.006)


@given(st.text() | st.integers() | st.floats() | st.none() | st.booleans())
def test_a_size_or_a_config_error(text):
    try:
        size = parse_size(text, total=10**9)
    except ConfigError:
        return
    assert type(size) is int and 1 <= size < 2**63
