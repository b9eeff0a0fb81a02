"""Every rank says what transformers' own expert parallelism says, to the bit, and the tokens of one process."""

import pytest
import torch
import transformers

from tests.ranks.checks import ONE, THREE


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
