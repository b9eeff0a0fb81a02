"""Whether transformers takes the peft that is installed: 5.24 asks for 0.22, which was not out on 2026-11-29."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version


def need_peft_of_transformers() -> None:
    """Skip a test of `model.load_adapter` and adapters in a folder where transformers itself would refuse."""
    pytest.importorskip("peft")
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(version("peft")) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"transformers wants peft {MIN_PEFT_VERSION}")
