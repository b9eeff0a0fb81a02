"""Every rank says what transformers' own expert parallelism says, to the bit, and the tokens of one process."""

import pytest
import torch
import transformers

from moe_offload.apps.families.tiny import build
from tests.fakes.ranks import Ranks
from tests.ranks.checks import ONE, THREE

FAMILIES = ["deepseek_v3", "glm4_moe", "gpt_oss", "minimax_m2", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"]
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # what a configuration calls how many there are


@pytest.fixture(scope="module")
def alone(folder):
    """The tokens of plain transformers in one process."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm")
    return [model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0).tolist() for ids in (ONE, THREE)]


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("exchange", ["all_reduce", "all_to_all"])
def test_bits_of_transformers_and_tokens_of_one_process(pair, folder, alone, implementation, exchange):
    residencies = [0.0, 0.5, 1.0]
    answers = pair.run(
        "says_what_transformers_says",
        folder=folder, implementation=implementation, exchange=exchange, residencies=residencies,
    )  # fmt: skip
    for rank in answers:
        assert [found["same"] for found in rank] == [[True, True, True]] * 3
        assert [found["slots"] for found in rank] == [[2, 2], [2, 2], [4, 4]], "4 experts on each rank, 2 a token"
        assert all(found["tokens"] == alone and found["misses"] for found in rank)
    assert torch.tensor([found["hits"] for found in answers[0]]).diff().ge(0).all(), "more slots, more hits"


@pytest.fixture(scope="module", params=[2, 4])
def several(request):
    ranks = Ranks(request.param)
    yield ranks
    ranks.close()


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_families_on_two_and_four_ranks(several, tmp_path, family):
    """At the floor, 25 %, 50 %, all, and rank 0 at its floor where the others have all; 64 experts, 32 tokens."""
    config = build(family).config
    build(family, **{name: 64 for name in EXPERTS if hasattr(config, name)}).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="grouped_mm")
    alone = [model.generate(ids, max_new_tokens=32, do_sample=False, pad_token_id=0).tolist() for ids in (ONE, THREE)]
    own = 64 // several.world
    shares = [0.0, 0.25, 0.5, 1.0, [0.0, 1.0]]
    for rank, answer in enumerate(
        several.run(
            "says_what_transformers_says",
            folder=str(tmp_path), implementation="grouped_mm", exchange="auto", residencies=shares, new=32,
        )
    ):  # fmt: skip
        assert [found["same"] for found in answer] == [[True] * 3] * len(shares)
        slots = [found["slots"][0] for found in answer]
        assert slots == [2, own // 4, own // 2, own, own if rank else 2], "2 experts a token"
        assert all(found["tokens"] == alone for found in answer)
