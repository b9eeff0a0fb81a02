"""What people do with a model, done with packed experts: ways to generate, adapters, threads, other models beside."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_offload
from moe_offload.apps.families.session import run_session
from moe_offload.apps.families.tiny import build
from moe_offload.checkpoint.outline import outline_folder
from moe_offload.packed import formats
from moe_offload.plan.budget import budget_for
from moe_offload.plan.weights import layer_shapes, sum_costs
from tests.fakes.offloaded import SETTINGS
from tests.fakes.quantised_checkpoints import write

IDS = torch.stack([torch.arange(3, 20), torch.arange(60, 77)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write("mxfp4", tmp_path_factory.mktemp("quantised") / "model", num_hidden_layers=2)


def load_plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm").eval()


def load_ours(folder: Path, **settings: Any) -> Any:
    """At the floor."""
    found, chosen = outline_folder(folder), replace(SETTINGS, **settings)
    budget = budget_for(0.0, layer_shapes(found.moe_layers), sum_costs(found.model, found.moe_layers, chosen))
    return moe_offload.from_pretrained(folder, budget, config=chosen)


def run(model: Any) -> list[torch.Tensor]:
    return run_session(model, "lm", new_tokens=4, batch=2)


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def generate(model: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    torch.manual_seed(5)
    found: torch.Tensor = model.generate(ids, max_new_tokens=8, pad_token_id=0, **{"do_sample": False, **options})
    return found


def test_ways_to_generate(folder: Path) -> None:
    plain, ours = load_plain(folder), load_ours(folder)
    for options in ({"num_beams": 3}, {"do_sample": True, "top_k": 20}, {"use_cache": False}):
        assert torch.equal(generate(ours, **options), generate(plain, **options)), options
    assistant = build("gpt_oss", dtype=torch.bfloat16, seed=3, num_hidden_layers=1)
    assisted = {"assistant_model": assistant, "ids": IDS[:1]}
    assert torch.equal(generate(ours, **assisted), generate(plain, **assisted))
    ours.moe_offload.close()


def test_an_adapter_on_dense_layers(folder: Path, tmp_path: Path) -> None:
    """Merged, it is a part of the dense weights: they are saved with it, and not as the codes that came."""
    peft = pytest.importorskip("peft")
    found = []
    for model in (load_plain(folder), load_ours(folder)):
        torch.manual_seed(1)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, lora).eval()
        found.append((run(adapted), adapted.merge_and_unload()))
    (wanted, plain), (logits, ours) = found
    assert_same(logits, wanted)
    assert_same(run(ours), run(plain))
    with pytest.raises(moe_offload.OffloadError, match="2 weights of the model are others now"):
        ours.save_pretrained(tmp_path / "codes", packed=True)
    ours.moe_offload.close()


def test_beside_an_unpacked_model_on_threads(folder: Path, tmp_path: Path) -> None:
    build("qwen3_moe", dtype=torch.bfloat16, num_hidden_layers=2).save_pretrained(tmp_path / "bfloat16")
    pairs = [(run(load_plain(place)), load_ours(place)) for place in (folder, tmp_path / "bfloat16")]
    wrong: list[Any] = []

    def work(wanted: list[torch.Tensor], model: Any) -> None:
        try:
            for _ in range(3):
                assert_same(run(model), wanted)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in pairs * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    for _, model in pairs:
        model.moe_offload.close()


def test_without_numba(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole model through the formulas in torch, in its arithmetic and in ours."""
    wanted = run(load_plain(folder))
    monkeypatch.setattr(formats, "load_kernels", lambda: None)
    for module in ("fused._load_kernels", "ordered.load_ordered_kernels", "exact.load_dense_kernels"):
        monkeypatch.setattr(f"moe_offload.packed.{module}", lambda: None)
    with load_ours(folder).moe_offload as handle:
        assert_same(run(handle.model), wanted)
    with load_ours(folder, compute="packed").moe_offload as handle:
        errors = [(a - b).norm() / b.norm() for a, b in zip(run(handle.model), wanted, strict=True)]
        assert max(errors) < 0.02


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_what_inductor_changes_is_its_own_rounding(tmp_path: Path) -> None:
    """Told to round as the eager model does, it gives that model's bits, with packed experts and without."""
    import torch._inductor.config

    folder = write("fp8", tmp_path / "fp8", num_hidden_layers=1)
    wanted = run(load_plain(folder))
    with torch._inductor.config.patch(emulate_precision_casts=True):
        torch._dynamo.reset()
        with load_ours(folder, compile="inductor").moe_offload as handle:
            assert_same(run(handle.model), wanted)
    torch._dynamo.reset()
