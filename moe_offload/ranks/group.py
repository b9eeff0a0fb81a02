"""`Group`: the ranks of this run, what they tell each other, and a time limit for each wait.

What ranks compute goes through transformers' collectives. What they tell each other goes through the store in which
torch's process group was formed, as JSON: it takes no part in the order of collectives, so a rank that is late, or
never comes, is found out and named.

    said/<what>/<n>/<rank>    the n-th time that the ranks tell each other this
"""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist

from ..config.launched import read_launched
from ..errors import ConfigError, RankError
from .names import RankName
from .watch import Watch

PREFIX = "moe_offload"
POLL_S = 0.02


class Group:
    """All processes of torch's default process group, this one among them.

    `timeout_s` is how long any of them may keep the others waiting: the longest honest wait is for a rank that reads
    all its experts of a layer from a slow disk.
    """

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.formed_in = cast(Any, dist.distributed_c10d._get_default_store())
        self._store: Any = self.formed_in.clone()  # a wait in one holds up whoever else uses the same
        self._said: dict[str, int] = {}
        self.names: tuple[RankName, ...] = ()
        self.watch: Watch | None = None
        # transformers forms it with two hours, for which a rank that does not answer would hang all others.
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), dist.group.WORLD)
        told = self.exchange("name", RankName.of_this_process(self.rank).to_dict(), "start")
        self.names = tuple(RankName.from_dict(one) for one in told)
        self.watch = Watch(self.formed_in.clone(), PREFIX, self.names, self.rank)

    def exchange(self, what: str, value: Any, why: str) -> list[Any]:
        """What every rank says of `what`, a JSON value each, by rank. All of them call it, equally often.

        Raises `RankError` where one does not come within the time limit, or has ended; `why` says what they were to do.
        """
        n = self._said[what] = self._said.get(what, -1) + 1
        keys = [f"{PREFIX}/said/{what}/{n}/{rank}" for rank in range(self.world)]
        self._store.set(keys[self.rank], json.dumps(value))
        ends_s = time.monotonic() + self.timeout_s
        for rank, key in enumerate(keys):
            while not self._store.check([key]):
                if self.watch is not None:
                    self.watch.check()
                if time.monotonic() > ends_s:
                    who = str(self.names[rank]) if self.names else f"rank {rank}"
                    raise RankError(
                        f"waited {self.timeout_s:.0f} s for {who} to {why}, which every rank has to do; see what that "
                        "process does, or allow more time (rank_timeout)"
                    )
                time.sleep(POLL_S)
        return [json.loads(self._store.get(key)) for key in keys]


_formed: list[Group] = []  # that of this process; one for each process group that torch has formed


def join_group(timeout_s: float) -> Group:
    """The group of this process, which torch has formed. Every rank calls it."""
    if not _formed or _formed[0].formed_in is not dist.distributed_c10d._get_default_store():
        _formed[:] = [Group(timeout_s)]
    return _formed[0]


def form_group(timeout_s: float) -> None:
    """Let torch form its process group, as transformers would, but with a time limit of ours.

    Raises `ConfigError` where this process was not started as one of several, or the others do not come.
    """
    if dist.is_initialized():
        return
    launched = read_launched()
    if launched is None:
        raise ConfigError(
            "distributed_config asks for several processes, and this one is alone: start the program with `torchrun "
            "--nproc-per-node N` or `accelerate launch`"
        )
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"rank {launched.rank} of {launched.world} could not form a group with the others within {timeout_s:.0f} "
            f"s: {str(error).splitlines()[0][:300]}. Start as many processes as WORLD_SIZE says, with one MASTER_ADDR"
        ) from error
