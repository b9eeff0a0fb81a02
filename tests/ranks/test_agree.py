"""What one rank cannot do none does, and all may try again; a request that rank 0 answers, the others generate too."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from moe_offload.apps.serving.generation import Sampling, generate_answer
from tests.paths import MODEL_NAME as MODEL
from tests.ranks.checks import TEXT


def test_a_budget_that_one_rank_cannot_hold_is_refused_by_all_and_may_be_mended(pair, folder):
    for rank, (errors, same) in enumerate(pair.run("agrees_and_tries_again", folder=folder)):
        assert same and len(errors) == 2
        for error in errors:
            assert error.startswith(("RankError: rank 1 (process", "BudgetError: ")[rank]) and "100.00 KB" in error


@pytest.mark.parametrize("refused", [0, 1])
def test_what_a_rank_refuses_before_they_meet_is_told_to_all_and_may_be_mended(pair, folder, refused):
    """Without it the others wait for `rank_timeout`, and do not hear why."""
    found = pair.run("is_refused_before_they_meet", folder=folder, refused=refused)
    for rank, (errors, timeouts, same) in enumerate(found):
        assert same and timeouts == [45.0, 45.0, 45.0]
        for error, word in zip(errors, ("plenty", "no_such_argument", "plenty", "plenty"), strict=True):
            assert word in error and error.startswith(
                f"RankError: rank {refused} (process" if rank != refused else "Conf"
            )


def test_every_rank_generates_what_rank_0_answers(pair):
    """Greedy, with a stop string, sampled with and without a seed, one that is refused, one whose client leaves."""
    length = {"max_new_tokens": 6, "do_sample": False}
    sampled = {**length, "do_sample": True, "temperature": 0.9}
    requests = [
        {"config": length},
        {"config": length, "stop": ["e"]},
        {"config": sampled, "seed": 3, "logit_bias": {7: -5.0}, "frequency_penalty": 0.5},
        {"config": sampled},
        {"config": length, "logit_bias": {-1: 5.0}},
        {"config": {**length, "max_new_tokens": 30}, "gone_after": 3},
        {"config": length},
    ]
    (texts, tokens), followed = pair.run("answers_as_one_process", requests=requests)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)

    def alone(config, stop=(), seed=None, **more):
        pieces = []
        sampling = Sampling(GenerationConfig(**config, pad_token_id=0), tuple(stop), seed, **more)
        generate_answer(
            model, tokenizer, tokenizer(TEXT)["input_ids"], sampling, lambda: None, pieces.append, lambda: False
        )
        return "".join(piece.text for piece in pieces)

    assert texts[:3] == [alone(**request) for request in requests[:3]]
    assert texts[4] == "ValueError" and texts[6] == texts[0] != texts[1] and texts[3]
    assert 0 < len(texts[5]) < len(alone({**length, "max_new_tokens": 30}))
    assert followed == tokens
