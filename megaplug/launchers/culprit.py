"""Which rank of a job that hangs is the one that the others wait for, and what is said and written of it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from megaplug.launchers.hang import HangWatch
from megaplug.launchers.screen import duration
from megaplug.launchers.stacks import UNKNOWN, Stand
from megaplug.launchers.verdict import Outcome
from megaplug.runs.atomic import disk_errors
from megaplug.runs.folder import RunFolder

_KEYS = {
    "first step": "watch.first_step_s",
    "saving": "watch.save_s",
    "ending": "watch.save_s",
    "training": "watch.hang_s",
    "validating": "watch.hang_s",
}


def find_culprit(watch: HangWatch, stands: Mapping[int, Stand]) -> int:
    """The rank that is behind.

    One that is stopped comes first, then one that is not seen to wait for others, then the one that has done
    the fewest steps, and the least in its step.

    Args:
        watch: Knows every rank's progress.
        stands: Of every rank that lives.
    """

    def order(rank: int) -> tuple[bool, bool, int, int]:
        standing = watch.ranks[rank]
        return not stands[rank].stopped, stands[rank].waits, standing.iteration, standing.progress

    return min(sorted(stands), key=order)


def judge_hang(
    watch: HangWatch, stands: Mapping[int, Stand], written: list[int], reached: int = 0
) -> Outcome:
    """The outcome of a job that hangs, without iterations and log lines.

    Args:
        watch: Knows every rank's progress.
        stands: Of every rank that lives.
        written: The ranks whose stacks have been written.
        reached: The last step that any rank has told; a rank that is stopped tells its own no more, and has
            done it, since no other does one without it.
    """
    rank = find_culprit(watch, stands)
    stand, standing = stands[rank], watch.ranks[rank]
    still, limit = watch.stood_still(rank), watch.limit(rank)
    key = _KEYS.get(standing.phase, "watch.start_s")
    doing = standing.phase
    if doing in ("training", "validating", "saving"):
        doing += f" after step {max(standing.iteration, reached)}"
    reason = f"rank {rank} hangs: {doing}, it has got nothing done for {duration(still)}, {_place(stand)}"
    alone = [other for other in stands if not stands[other].waits]
    if not stand.stopped and len(stands) > 1 and rank not in alone:
        reason += "; all ranks wait for each other, and it has done least"
    files = f"where the ranks stand is in logs/rank*.stack ({_listed(written)})" if written else ""
    longer = f"if it was only slow, {key} gives it longer (it was {limit:,.0f})"
    return Outcome(
        "failed",
        reason=reason,
        rank=rank,
        exit_code=1,
        kind="hang",
        hint="; ".join(text for text in (files, longer) if text),
    )


def _place(stand: Stand) -> str:
    if stand.stopped:
        return "it is stopped (by SIGSTOP or its like: somebody has sent it a signal)"
    if stand.frames:
        return f"it stands in {stand.frames[0]}"
    if stand.state == "D":
        return "it waits for a disk or device in the kernel"
    if stand.state == UNKNOWN:
        return "and the launcher of its node does not answer"
    return "it gives no stack"


def _listed(ranks: list[int]) -> str:
    """As few words as will do for many ranks."""
    named = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'' if len(ranks) == 1 else 's'} {named}"


def write_stacks(folder: RunFolder, watch: HangWatch, stands: Mapping[int, Stand]) -> list[int]:
    """Write where each rank stands to ``logs/rank<N>.stack``, after what an earlier hang has left there.

    Returns:
        The ranks that gave a stack.

    Raises:
        UserError: If the disk is full or may not be written to.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for rank, stand in stands.items():
        standing = watch.ranks[rank]
        head = (
            f"=== {now} rank {rank}: {standing.phase}, {standing.iteration} steps done, nothing more for "
            f"{watch.stood_still(rank):.0f} s; process state {stand.state}\n"
        )
        with disk_errors(folder.stack_file(rank), "write"), folder.stack_file(rank).open("a") as file:
            file.write(head + (stand.text or "(it gave no stack)\n"))
    return [rank for rank, stand in stands.items() if stand.text]
