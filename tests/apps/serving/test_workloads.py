"""A request may say what kind of text it is: "MODEL:italian". What it uses is remembered under that name."""

from __future__ import annotations

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")

import openai

from moe_offload.apps.serving import answering
from moe_offload.observe.profile import Profile

from .conftest import NAME, started


def test_usage_is_remembered_per_requested_name(tmp_path, monkeypatch, plain):
    monkeypatch.setattr("moe_offload.plan.prepare.usage_folder", lambda: tmp_path)
    monkeypatch.setattr(answering, "MOST_WORKLOADS", 2)
    with started() as served:
        client = openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=120)

        def ask(model: str) -> str:
            answer = client.completions.create(model=model, prompt="Il comando", max_tokens=8, temperature=0)
            assert answer.model == NAME
            return answer.choices[0].text

        names = [NAME, f"{NAME}:italian", f"{NAME}:italian", NAME, f"{NAME}:manual"]
        assert {ask(name) for name in names} == {plain.say("Il comando")}
        for wrong in (f"{NAME}:", f"{NAME}:../x", f"{NAME}italian", "other:italian"):
            with pytest.raises(openai.NotFoundError, match="is not here"):
                ask(wrong)
        with pytest.raises(openai.BadRequestError, match="2 names at most"):
            ask(f"{NAME}:more")
    tokens = {path.stem: Profile.load(path).tokens for path in tmp_path.glob("*/*.json")}
    assert tokens["italian"] == tokens["default"] == 2 * tokens["manual"]


def test_without_memory_there_are_no_such_names(served):
    client = openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=120)
    with pytest.raises(openai.NotFoundError, match="is not here"):
        client.completions.create(model=f"{NAME}:italian", prompt="Il", max_tokens=1)
