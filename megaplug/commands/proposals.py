"""What Optuna would try next, from what is known of the points before; nothing is kept between two calls.

So a sweep that was broken off proposes what it would have proposed; what it has tried stands in its files.
"""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megaplug.errors import UserError
from megaplug.job.schema import SweepConfig
from megaplug.job.sweep_space import Dimension, Space

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Tried:
    """A point that was proposed.

    Attributes:
        chosen: Its values by key, as typed.
        value: What is to be low. None where there is none, or none yet: the point counts as worse than all
            others, so that neither what is not possible nor what is being tried is proposed again.
    """

    chosen: dict[str, str]
    value: float | None = None


def need_optuna() -> None:
    """Be sure that it is installed.

    Raises:
        UserError: It is not.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UserError("sweep=optuna: Optuna is not installed", hint='pip install "optuna>=4"')


def propose(space: Space, tried: Sequence[Tried], config: SweepConfig) -> dict[str, str]:
    """The values of the next point, by Optuna's tree-structured Parzen estimator.

    The first ``config.startup_trials`` are drawn at random. What is drawn depends on ``config.seed``, on the
    number of points before and on what has come of them.

    Args:
        space: What may be chosen.
        tried: The points before, in their order.
        config: How it is chosen.

    Returns:
        A value for every key that is open, as it would be typed.
    """
    import optuna
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {each.key: _distribution(each) for each in space.dimensions}
    seed = zlib.crc32(f"{config.seed} {len(tried)}".encode())
    sampler = optuna.samplers.TPESampler(n_startup_trials=config.startup_trials, seed=seed)
    study = optuna.create_study(sampler=sampler)
    for each in tried:
        # To Optuna a pruned trial without a report is the worst there is; one that failed it forgets.
        state = TrialState.PRUNED if each.value is None else TrialState.COMPLETE
        params = {one.key: _inner(one, each.chosen[one.key]) for one in space.dimensions}
        study.add_trial(
            create_trial(state=state, params=params, distributions=distributions, value=each.value)
        )
    found = study.ask(distributions).params
    return {each.key: _typed(each, found[each.key]) for each in space.dimensions}


def _distribution(dimension: Dimension) -> BaseDistribution:
    from optuna import distributions as known

    if dimension.is_interval:
        low, high, log = dimension.low, dimension.high, dimension.is_log
        if dimension.is_whole:
            return known.IntDistribution(int(low), int(high), log=log)
        return known.FloatDistribution(low, high, log=log)
    if dimension.is_ordered:
        return known.IntDistribution(0, len(dimension.options) - 1)
    return known.CategoricalDistribution(dimension.options)


def _typed(dimension: Dimension, value: Any) -> str:
    if dimension.is_interval:
        return dimension.typed(value)
    return dimension.options[value] if dimension.is_ordered else str(value)


def _inner(dimension: Dimension, text: str) -> Any:
    """A typed value as the distribution knows it."""
    if dimension.is_interval:
        return int(text) if dimension.is_whole else float(text)
    return dimension.options.index(text) if dimension.is_ordered else text
