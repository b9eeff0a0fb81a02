"""What ranks cannot do is refused by name before any group is formed."""

import socket

import pytest

from moe_offload.config.settings import OffloadConfig
from moe_offload.errors import ConfigError, UnsupportedModelError
from moe_offload.ranks import group
from moe_offload.ranks.join import config_of_ranks, form_ranks
from moe_offload.ranks.names import in_a_line


def test_a_transformers_that_splits_experts_as_of_old_is_refused(monkeypatch):
    from transformers.distributed.configuration_utils import DistributedConfig

    fields = {name: field for name, field in DistributedConfig.__dataclass_fields__.items() if name != "ep_size"}
    monkeypatch.setattr(DistributedConfig, "__dataclass_fields__", fields)
    with pytest.raises(UnsupportedModelError, match=r"5\.19 or newer"):
        form_ranks(config_of_ranks(2), OffloadConfig())


def test_a_process_that_is_alone_is_told_how_to_start_several(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="torchrun"):
        form_ranks(config_of_ranks(2), OffloadConfig())


def test_an_address_that_is_none_is_refused(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="MASTER_PORT"):
        form_ranks(config_of_ranks(2), OffloadConfig())


def test_a_launcher_that_has_ended_is_not_waited_for(monkeypatch):
    """Its store is there before any rank is started, so `rank_timeout` is not for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True", **where}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(group, "LAUNCHER_S", 1.0)
    with pytest.raises(ConfigError, match=r"within 1 s: .*where the launcher is"):
        form_ranks(config_of_ranks(2), OffloadConfig(rank_timeout=20.0))


@pytest.mark.parametrize(
    ("error", "told"),
    [(KeyboardInterrupt(), "KeyboardInterrupt"), (ConfigError("two\nlines"), "ConfigError: two lines")],
)
def test_an_error_is_told_in_a_line(error, told):
    assert in_a_line(error) == told
