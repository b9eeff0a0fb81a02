"""The tiny models: the table is complete, every family runs, and the same session twice gives the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_offload.apps.families import tiny
from moe_offload.apps.families.session import NotSupported, family_of, greedy_tokens, run_session
from moe_offload.apps.families.table import FAMILIES
from moe_offload.apps.families.tiny import available_families, build, unlisted_families
from moe_offload.experts import is_experts

CACHED = [name for name in available_families() if FAMILIES[name].kind in ("lm", "embeds")]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_folder_with_decorated_experts_is_listed() -> None:
    assert unlisted_families() == []


def test_an_unlisted_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FAMILIES, "mixtral")
    assert unlisted_families() == ["mixtral"]


def test_a_family_that_transformers_lacks_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "no_folder", replace(FAMILIES["mixtral"], folder="no_such_family"))
    monkeypatch.setitem(FAMILIES, "no_class", replace(FAMILIES["mixtral"], model="MixtralForNothing"))
    assert "mixtral" in available_families()
    assert not {"no_folder", "no_class"} & set(available_families())


def test_a_configuration_class_tells_the_family() -> None:
    assert len({entry.config for entry in FAMILIES.values()}) == len(FAMILIES)
    assert family_of(build("qwen3_moe")) is FAMILIES["qwen3_moe"]


@pytest.mark.parametrize("name", available_families())
def test_every_family_runs_the_same_way_twice(name: str) -> None:
    first, second = (run_session(build(name), FAMILIES[name].kind, batch=2, new_tokens=3) for _ in range(2))
    assert same(first, second)
    assert all(output.isfinite().all() for output in first)
    assert greedy_tokens(first).shape == (0 if FAMILIES[name].kind in ("vision_grid", "vitpose") else 2, len(first))


@pytest.mark.parametrize("name", CACHED)
def test_every_family_takes_a_static_cache_or_says_why_not(name: str) -> None:
    entry = FAMILIES[name]
    if entry.no_static_cache:
        with pytest.raises(NotSupported, match=entry.no_static_cache):
            run_session(build(name), entry.kind, static_cache=True)
    else:
        outputs = run_session(build(name), entry.kind, batch=2, new_tokens=3, static_cache=True)
        assert [output.shape[:2] for output in outputs] == [(2, 16), (2, 1), (2, 1)]


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "mixtral", "qwen3_next"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_a_bfloat16_session_repeats_bit_for_bit(name: str, implementation: str) -> None:
    model = build(name, dtype=torch.bfloat16)
    for module in filter(is_experts, model.modules()):
        module.config._experts_implementation = implementation
    first, second = (run_session(model, "lm", batch=3, new_tokens=8) for _ in range(2))
    assert same(first, second)
    assert all(output.isfinite().all() for output in first)


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "qwen3_next"])
def test_a_session_says_what_generate_says(name: str) -> None:
    model = build(name)
    prompt = torch.randint(3, 128, (1, 16), generator=torch.Generator().manual_seed(0))
    said = model.generate(prompt, do_sample=False, max_new_tokens=12)[:, 16:]
    assert torch.equal(said, greedy_tokens(run_session(model, "lm", new_tokens=12)))
    assert said.unique().numel() > 3  # decided by the context, not by one dominant token


@pytest.mark.parametrize("name", ["deepseek_v4", "mixtral", "zaya"])
def test_routing_uses_most_experts(name: str) -> None:
    model = build(name)
    used = routed_experts(model)
    run_session(model, "lm", batch=3)
    assert used and all(len(ids) >= 6 for ids in used.values())


def routed_experts(model: PreTrainedModel) -> dict[str, set[int]]:
    """The expert ids that each experts module is called with from now on."""
    used: dict[str, set[int]] = {name: set() for name, module in model.named_modules() if is_experts(module)}
    for name, ids in used.items():
        model.get_submodule(name).register_forward_hook(
            lambda _, args, __, ids=ids: ids.update(args[1].flatten().tolist())
        )
    return used


def test_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a, b, other = build("mixtral", seed=5), build("mixtral", seed=5), build("mixtral", seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert same([*a.parameters()], [*b.parameters()])
    assert not same([*a.parameters()], [*other.parameters()])


def test_overrides_win_under_either_name_of_a_field() -> None:
    assert build("mixtral", num_local_experts=4).config.num_local_experts == 4
    assert build("dbrx", num_hidden_layers=1).config.n_layers == 1
    assert build("mixtral", num_key_value_heads=tiny.DEFAULT).config.num_key_value_heads == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_must_stay_float32_does(dtype: torch.dtype, tmp_path: Path) -> None:
    """Which tensors those are is transformers' to say, and differs between its versions: 5.24 keeps the router too."""
    build("deepseek_v3").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected, found = (
        {name: tensor.dtype for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        for model in (loaded, build("deepseek_v3", dtype=dtype))
    )
    assert found == expected
    assert set(found.values()) == {torch.float32, dtype}


def test_a_model_can_be_built_without_memory() -> None:
    with torch.device("meta"):
        model = build("gpt_oss")
    assert all(parameter.is_meta for parameter in model.parameters())
