"""llama.cpp as a side: its file has the numbers of the checkpoint, and it chooses the tokens that the model chooses."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moe_offload.apps.bench.llama.gguf_file import FILE, write_gguf
from moe_offload.apps.bench.llama.side import LlamaSide
from moe_offload.apps.bench.request import random_prompt
from moe_offload.apps.bench.roofs import disk, memory
from moe_offload.apps.bench.synthetic import make_synthetic
from moe_offload.apps.cli import app

pytest.importorskip("gguf")
llama = pytest.importorskip("ik_llama_cpp")
PROMPT, FORCED = random_prompt(1024, 40, 1), random_prompt(1024, 25, 2)


@pytest.mark.parametrize("experts", [None, "int4", "mxfp4"])
def test_the_file_has_the_numbers_of_the_checkpoint(tmp_path, experts):
    folder = make_synthetic("tiny", None, tmp_path, experts)
    write_gguf(folder, tmp_path / FILE)
    side = LlamaSide(folder=str(folder), scratch=str(tmp_path), tokens=64, side="llama.cpp")
    side.load()
    answer = side.ask(PROMPT, 24, row=0, forced=FORCED)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT + FORCED[:-1]])).logits[0, len(PROMPT) - 1 :].argmax(-1)
    alike = sum(a == b for a, b in zip(answer["tokens"], expected.tolist(), strict=True))
    assert len(answer["tokens"]) == 25 and alike >= 23, "it rounds otherwise, which may change a near tie"
    assert len(answer["steps_s"]) == 24 and sum(answer["steps_s"]) == pytest.approx(answer["decode_s"])


@pytest.mark.timeout(300)
def test_it_stands_in_the_table_beside_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "SECONDS", 0.05)
    monkeypatch.setattr(memory, "BYTES", 2**22)
    arguments = ["--layers", "1", "--residency", "50%", "--prompt-tokens", "24", "--new-tokens", "6", "--requests", "1"]
    arguments += ["--sides", "ours,llama.cpp", "--cache", str(tmp_path), "--out", str(tmp_path / "result.json")]
    done = CliRunner().invoke(app, ["bench", "synthetic:tiny", *arguments])
    assert done.exit_code == 0, done.output
    ours, rival = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert not ours["failed"] and not rival["failed"], done.output
    assert ours["speedup_over_llama_cpp"] > 0 and ours["decode_over_memory"] > 0
    low, middle, high = rival["token_s_p5_p50_p95"]
    assert 0 < low <= middle <= high and rival["bytes_per_token"] >= 0
    assert "whose products round otherwise: llama.cpp" in done.output or "all sides gave the tokens" in done.output


REFUSED = {
    ("synthetic:gpt-oss-20b",): "its GGUF file is written of synthetic:qwen3-30b-a3b or synthetic:tiny",
    ("synthetic:tiny", "--experts", "fp8"): "in bfloat16, int4 or mxfp4, not of synthetic:tiny in fp8",
    ("synthetic:tiny", "--routing", __file__): "leave out one of them",
}


@pytest.mark.parametrize(("arguments", "wrong"), REFUSED.items())
def test_what_it_cannot_be_asked_is_refused_at_once(arguments, wrong):
    done = CliRunner().invoke(app, ["bench", *arguments, "--sides", "ours,llama.cpp"])
    assert done.exit_code == 2 and wrong in done.output.replace("\n", " ")


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["bench", "synthetic:tiny", "--sides", "llama.cpp"])
    assert done.exit_code == 2 and "pip install gguf ik-llama-cpp-python" in done.output
