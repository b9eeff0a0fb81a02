"""Two ranks that all tests of this folder share, and the folders of the models that they run."""

import pytest

from moe_offload.apps.families.tiny import build
from tests.fakes.ranks import Ranks


@pytest.fixture(scope="session")
def pair():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A checkpoint of 8 experts in 2 layers, 2 a token."""
    path = tmp_path_factory.mktemp("ranks") / "qwen"
    build("qwen3_moe", num_hidden_layers=2).save_pretrained(path)
    return str(path)
