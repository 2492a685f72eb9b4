"""Rehearsals: the real Megatron model of chosen ranks without numbers, in a process of its own."""

from __future__ import annotations

from megaplug.plan.rehearsal.compare import Figure, compare
from megaplug.plan.rehearsal.frozen import rehearsed_job
from megaplug.plan.rehearsal.result import RankRehearsal
from megaplug.plan.rehearsal.run import rehearse, rehearse_all

__all__ = ["Figure", "RankRehearsal", "compare", "rehearse", "rehearse_all", "rehearsed_job"]
