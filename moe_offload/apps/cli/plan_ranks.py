"""What each of several ranks would hold, before any of them is started: `moe-offload plan --ranks N`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...config.launched import read_launched
from ...errors import BudgetError, ConfigError

if TYPE_CHECKING:
    from ...checkpoint.outline import Outline
    from ...config.settings import OffloadConfig
    from ...plan.forecast import Forecast


class NoPlanError(Exception):
    """There is no plan, for `error`; `facts` are the keys of one that there are all the same."""

    def __init__(self, error: BudgetError, facts: dict[str, Any]):
        super().__init__(str(error))
        self.error, self.facts = error, facts


@dataclass(frozen=True)
class RankPlans:
    """What each rank would hold. `print` it: ranks that hold the same are told together."""

    forecasts: tuple[Forecast, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"ranks": [one.to_dict() for one in self.forecasts]}

    def __str__(self) -> str:
        return self._told(str)

    def explain(self) -> str:
        return self._told(lambda one: one.explain())

    def _told(self, text_of: Callable[[Forecast], str]) -> str:
        texts: dict[str, list[int]] = {}
        for rank, one in enumerate(self.forecasts):
            texts.setdefault(text_of(one), []).append(rank)
        return "\n\n".join(f"{_named(ranks, len(self.forecasts))}:\n{text}" for text, ranks in texts.items())


def world_to_plan(ranks: int | None) -> int:
    """For how many ranks a plan is made: what was asked for, else as many as were started. Raises `ConfigError`."""
    launched = read_launched()
    if launched is not None and ranks not in (None, launched.world):
        raise ConfigError(f"--ranks {ranks}: {launched.world} processes were started; leave it out, or start {ranks}")
    return ranks or (1 if launched is None else launched.world)


def budgets_of_ranks(budget: str | None, world: int) -> list[str | None]:
    """The budget of each rank: one for all, or one for each by commas. Raises `ConfigError`."""
    parts: list[str | None] = [None] if budget is None else [part.strip() for part in budget.split(",")]
    if world == 1:
        return [budget]
    if len(parts) not in (1, world):
        raise ConfigError(f"--budget {budget}: that is {len(parts)} budgets for {world} ranks; give one, or {world}")
    return parts * world if len(parts) == 1 else parts


def plan_ranks(
    read: Callable[[], Outline],
    settings: Sequence[OffloadConfig],
    without: Callable[[Outline, OffloadConfig], dict[str, Any]],
) -> RankPlans:
    """The plan of each rank, whose `settings` these are; `read` makes a new outline, `without` the keys of no plan.

    Raises `NoPlanError`, and what planning raises.
    """
    from ...checkpoint.pretrained.split import split_outline
    from ...plan.forecast import of_outline
    from ...ranks.join import config_of_ranks
    from ...ranks.pretend import pretended_rank
    from ...ranks.settings import check_settings

    found = []
    for rank, wanted in enumerate(settings):
        with pretended_rank(rank, len(settings)):
            outline = read()
            outline = split_outline(outline, config_of_ranks(len(settings), outline.model.config))
            check_settings(outline.moe_layers, wanted, "cpu")
            try:
                found.append(of_outline(outline, wanted))
            except BudgetError as error:
                told = BudgetError(f"rank {rank} of {len(settings)}: {error}")
                raise NoPlanError(told, {**without(outline, wanted), "rank": rank}) from error
    return RankPlans(tuple(found))


def _named(ranks: Sequence[int], world: int) -> str:
    if len(ranks) == world:
        return f"each of {world} ranks"
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
