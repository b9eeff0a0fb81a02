"""`Group`: the ranks of this run, what they tell each other, and a time limit for each wait.

What ranks compute goes through transformers' collectives. What they tell each other goes through the store in which
torch's process group was formed, as JSON: it takes no part in the order of collectives, so a rank that is late, or
never comes, is found out and named.

    <group>/said/<what>/<n>/<rank>    the n-th time that the ranks tell each other this
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..config.launched import Launched, read_launched
from ..errors import ConfigError, OffloadError, RankError
from .names import RankName
from .store import Answers, connect_within
from .watch import FIND_S, GRACE_S, Watch

PREFIX = "moe_offload"
POLL_S = 0.02
LAUNCHER_S = 15.0  # for the launcher's store to answer: it is there before any rank is started
_numbers = itertools.count()  # of groups in this process; ranks that are in step count alike


class Group:
    """All processes that met in `store`, this one among them.

    `timeout_s` is how long any of them may keep the others waiting: the longest honest wait is for a rank that reads
    all its experts of a layer from a slow disk.
    """

    def __init__(self, store: Any, rank: int, world: int, timeout_s: float):
        self.rank, self.world, self.timeout_s = rank, world, timeout_s
        self.prefix = f"{PREFIX}/{next(_numbers)}"  # a store may outlive a group: torchrun's does
        self.store = Answers(store)
        self._said: dict[str, int] = {}
        self.failed = ""  # how a call ended after which this rank takes no further part
        self.names: tuple[RankName, ...] = ()
        self.watch: Watch | None = None
        told = self.exchange("name", RankName.of_this_process(rank).to_dict(), "start")
        self.names = tuple(RankName.from_dict(one) for one in told)
        holder = None if launcher_has_store() else 0
        self.watch = Watch(self.store.another(), self.prefix, self.names, rank, holder)

    def check(self) -> None:
        """Raise `RankError` where another rank is known to have ended, or this one takes no further part."""
        if self.failed:
            raise RankError(
                f"an earlier call failed on this rank ({self.failed}), so the ranks are no longer in step; start all "
                "of them anew"
            )
        if self.watch is not None:
            self.watch.check()

    def exchange(self, what: str, value: Any, why: str, within_s: float | None = None) -> list[Any]:
        """What every rank says of `what`, a JSON value each, by rank. All of them call it, equally often.

        Raises `RankError` where one does not come within the time limit (`within_s`, where it is another one), or has
        ended; `why` says what they were to do.
        """
        n = self._said[what] = self._said.get(what, -1) + 1
        keys = [f"{self.prefix}/said/{what}/{n}/{rank}" for rank in range(self.world)]
        gave_up = f"{self.prefix}/gave_up"
        within_s = self.timeout_s if within_s is None else within_s
        ends_s = time.monotonic() + within_s
        with self.store_answers():
            self.store.set(keys[self.rank], json.dumps(value))
            said: dict[int, bytes] = {}
            while missing := [rank for rank in range(self.world) if rank not in said]:
                # Before what they said is read: one whose program is over has got here, and so has everybody.
                ended = None if self.watch is None else self.watch.find_ended()
                found = {rank: self.store.get(keys[rank]) for rank in missing}
                said |= {rank: one for rank, one in found.items() if one is not None}
                if None not in found.values():
                    break
                if self.watch is not None and ended is not None:
                    raise self.watch.error(*ended)
                if self.watch is None and (reason := self.store.get(gave_up)):
                    raise RankError(reason.decode())
                if time.monotonic() > ends_s:
                    error = self._not_there(missing, within_s, why)
                    self.store.set(gave_up, str(error))
                    time.sleep(GRACE_S)  # the store may end with this rank, and the others are to know why
                    raise error
                time.sleep(POLL_S)
        return [json.loads(said[rank]) for rank in range(self.world)]

    def watching(self) -> contextlib.AbstractContextManager[None]:
        """While it is entered, this process waits for the others, and ends with one that is lost."""
        return contextlib.nullcontext() if self.watch is None else self.watch.calling()

    @contextlib.contextmanager
    def store_answers(self) -> Iterator[None]:
        """Where the store does not, it has ended with whoever held it: rank 0, or the launcher. Raises `RankError`."""
        try:
            yield
        except OffloadError:
            raise
        except RuntimeError as error:
            found = None if self.watch is None else self.watch.find_ended(FIND_S)
            if self.watch is not None and found is not None:
                raise self.watch.error(*found) from error
            raise RankError(
                f"rank {self.rank} cannot reach the store in which the ranks met ({str(error).splitlines()[0][:200]}): "
                "rank 0 or its launcher has ended, or the network has; start all ranks anew"
            ) from error

    def _not_there(self, ranks: list[int], within_s: float, why: str) -> RankError:
        who = ", ".join(str(self.names[rank]) if self.names else f"rank {rank}" for rank in ranks)
        return RankError(
            f"waited {within_s:.0f} s for {who} to {why}, which every rank has to do; see what that process does, or "
            "allow more time (rank_timeout)"
        )


def launcher_has_store() -> bool:
    """Whether the ranks meet in a store of the launcher's, which outlives each of them."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


_begun = threading.Event()
#: That of this process, and the store in which torch formed it: it is another one for each process group.
_formed: list[tuple[Any, Group]] = []


def has_begun() -> bool:
    """Whether this process has tried to meet others, whatever came of it."""
    return _begun.is_set() or dist.is_initialized()


def join_group(timeout_s: float) -> Group:
    """The group of this process, which torch has formed. Every rank calls it."""
    store = cast(Any, dist.distributed_c10d._get_default_store())
    # transformers forms it with two hours, for which a rank that does not answer would hang all others.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), dist.group.WORLD)
    if _formed and _formed[0][0] is store:
        _formed[0][1].timeout_s = timeout_s  # the model before this one may have had another
    else:
        _keep(store, Group(store, dist.get_rank(), dist.get_world_size(), timeout_s))
    return _formed[0][1]


def formed_group() -> Group | None:
    """The group of this process as it is, if there is one."""
    store = cast(Any, dist.distributed_c10d._get_default_store()) if dist.is_initialized() else None
    return _formed[0][1] if _formed and _formed[0][0] is store else None


def form_group(timeout_s: float) -> Group:
    """The group of this process; torch forms it here where it has not, as transformers would, with our time limit.

    Raises `ConfigError` where this process was not started as one of several, or the others do not come; `RankError`
    where one ends meanwhile.
    """
    if dist.is_initialized():
        return join_group(timeout_s)
    launched = read_launched()
    if launched is None:
        raise ConfigError(
            "distributed_config asks for several processes, and this one is alone: start the program with `torchrun "
            "--nproc-per-node N` or `accelerate launch`"
        )
    _begun.set()
    limit_s = min(timeout_s, LAUNCHER_S) if launcher_has_store() else timeout_s
    try:
        store, rank, world = connect_within(limit_s + GRACE_S, lambda: _meet(launched, timedelta(seconds=limit_s)))
        limit_s = timeout_s
        store.set_timeout(timedelta(seconds=timeout_s))
        group = Group(store, rank, world, timeout_s)
        with group.watching():  # torch waits for all of them, deaf to whether they still live
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
            )
    except OffloadError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        holder = "the launcher" if launcher_has_store() else "rank 0"
        raise ConfigError(
            f"rank {launched.rank} of {launched.world} could not form a group with the others within {limit_s:.0f} s: "
            f"{str(error).splitlines()[0][:300]}. They meet where {holder} is, at MASTER_ADDR and MASTER_PORT: it "
            "may have ended, or hang. Start as many processes as WORLD_SIZE says"
        ) from error
    return _keep(dist.distributed_c10d._get_default_store(), group)


def _meet(launched: Launched, timeout: timedelta) -> tuple[Any, int, int]:
    """The store that all ranks reach: the launcher's, or one that rank 0 holds."""
    if launcher_has_store():
        store, rank, world = next(rendezvous("env://", timeout=timeout))
        return store, rank, world
    where = {name: os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")}
    if not where["MASTER_ADDR"] or not where["MASTER_PORT"].isdecimal():
        raise ConfigError(f"the environment says {where}, and ranks meet there; start the processes with torchrun")
    host, port = where["MASTER_ADDR"], int(where["MASTER_PORT"])
    # Without waiting for the others: who does not come is then found out by name.
    store = cast(Any, dist).TCPStore(host, port, is_master=launched.rank == 0, timeout=timeout, wait_for_workers=False)
    return store, launched.rank, launched.world


def _keep(store: Any, group: Group) -> Group:
    for _, before in _formed:
        if before.watch is not None:
            before.watch.stop()
    _formed[:] = [(store, group)]
    return group
