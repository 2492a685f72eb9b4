"""Why there is no plan of a job, or none that works, and the nearest jobs of which there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megaplug.errors import Problem, UserError
from megaplug.plan.cluster import Cluster
from megaplug.plan.plan_json import problems_json
from megaplug.plan.remedies import Remedy


@dataclass(frozen=True)
class Refused:
    """What is wrong with a job, and what would be right.

    Attributes:
        problems: All of it.
        remedies: The nearest jobs that work, none where nothing near does.
        cluster: The machines.
        here: Whether they are those of this machine, since none were named.
        notes: What a person should know besides.
    """

    problems: Sequence[Problem]
    remedies: Sequence[Remedy]
    cluster: Cluster
    here: bool
    notes: Sequence[str] = ()

    @property
    def error(self) -> UserError:
        """For a person."""
        lines = [str(UserError.from_problems(self.problems))]
        if self.remedies:
            several = len(self.remedies) > 1 and self.remedies[0].seconds is not None
            many = ", the least GPU time a token first" if several else ""
            lines.append(f"  the nearest that work (modelled{many}), to be added to the command:")
            lines += [f"    {found}" for found in self.remedies]
        lines += [f"  note: {line}" for line in self.notes]
        if self.here:
            lines.append(f"  {planned_here(self.cluster)}")
        return UserError("\n".join(lines))

    def as_json(self) -> dict[str, Any]:
        """For a program."""
        return {
            "possible": False,
            "problems": problems_json(self.problems),
            "nearest_that_work": [remedy_json(found) for found in self.remedies],
        }


def planned_here(cluster: Cluster) -> str:
    """That a plan is for this machine, and how one for others is had."""
    return f"planned for this machine ({cluster.name}); cluster=h100 plans for others: --help cluster"


def remedy_json(remedy: Remedy) -> dict[str, Any]:
    """A job that works, as plain values."""
    return {
        "overrides": list(remedy.words),
        "world_size": remedy.world_size,
        "layout": remedy.label,
        "memory_bytes_per_rank_modelled": remedy.memory,
        "seconds_per_step_modelled": remedy.seconds,
        "us_dollars_per_billion_tokens_modelled": remedy.dollars,
        "trains_otherwise": remedy.result,
    }
