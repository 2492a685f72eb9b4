"""What is said of a run that has failed: who, with how much memory, what is saved, what would go on."""

from __future__ import annotations

from pathlib import Path

from megaplug.commands.advice import advise, size_text
from megaplug.commands.cli import CommandLine
from megaplug.commands.next_command import goes_on_from
from megaplug.commands.resolved import Resolved
from megaplug.launchers.machine import RANK_BASE_BYTES, detect_machine
from megaplug.launchers.verdict import Outcome
from megaplug.plan.memory import GIB
from megaplug.runs.folder import RunFolder
from megaplug.topology import coordinates

# What is aimed at where nothing is known of the memory that there was, and the part of it that may be filled.
_WITHOUT_A_PEAK, _FILLED = 0.8, 0.95


def failure_details(
    resolved: Resolved, folder: RunFolder, outcome: Outcome, way_on: str
) -> list[tuple[str, str]]:
    """Labels and values for the summary; nothing where no rank has failed.

    Args:
        resolved: The job.
        folder: The run.
        outcome: Its end.
        way_on: From `changed_command`, where that is not what comes next anyway.
    """
    if outcome.status != "failed" or outcome.rank is None:
        return []
    rows = [("rank", place_of(resolved, outcome.rank))]
    if outcome.kind in ("memory", "killed"):
        rows.append(("memory", _memory(resolved, outcome)))
        max_ranks = detect_machine().num_gpus if resolved.derived.device == "cuda" else None
        for advice in advise(resolved, fraction(resolved, outcome), max_ranks=max_ranks):
            # Of a killed rank it is not known that memory was the cause, nor how much was asked for.
            sure = advice.fits and outcome.kind == "memory"
            rows.append(("should fit" if sure else "needs less", str(advice)))
    saved = outcome.saved_iteration
    kept = (
        f"step {saved:,} in {_checkpoint(folder, outcome)}" if saved else "nothing: no checkpoint was due yet"
    )
    rows.append(("saved", kept))
    if way_on:
        rows.append(("to go on", way_on))
    return rows


def changed_command(resolved: Resolved, folder: RunFolder, outcome: Outcome, command: CommandLine) -> str:
    """What would get past the failure, with what it does; empty where no change is known that would."""
    begins = goes_on_from(outcome, folder)
    if outcome.kind in ("nan", "reproducible"):
        return f"{_gentler(resolved, folder, outcome, command)}   # half the learning rate; {begins}"
    if outcome.kind in ("unexplained", "persistent"):
        typed = command.typed("-resume", "resilience.rerun_mode=disabled")
        return f"{typed}   # without computing steps again; {begins}"
    return ""


def place_of(resolved: Resolved, rank: int) -> str:
    """A rank's number and where it stands in the grid."""
    topology = resolved.topology
    at = coordinates(topology, rank)
    sizes = {"tp": topology.tp, "cp": topology.cp, "dp": topology.dp, "ep": topology.ep}
    others = ", ".join(f"{name} {at[name]} of {size}" for name, size in sizes.items() if size > 1)
    stage = f"pipeline stage {at['pp']} of {topology.pp}"
    return f"{rank} of {topology.world_size}: {stage}" + (f", {others}" if others else "")


def _memory(resolved: Resolved, outcome: Outcome) -> str:
    a_rank = " a rank" if resolved.topology.world_size > 1 else ""
    planned = f"planned {size_text(resolved.memory.total)}{a_rank} (modelled"
    if resolved.derived.device == "cpu":
        planned += f"; without the {RANK_BASE_BYTES / GIB:.2f} GiB of a rank's libraries"
    if not outcome.peak_bytes:
        return f"{planned}); its peak is not known: it died before it could say"
    return f"{planned}); peak {outcome.peak_bytes / GIB:.2f} GiB (measured, when it was last heard of)"


def fraction(resolved: Resolved, outcome: Outcome) -> float:
    """To what fraction the modelled memory must come down for a job to fit where this one did not.

    The rank had reached its peak, and needed what it asked for on top; the model's part of that must shrink
    until the whole fills 95 % of the peak. A killed rank has asked for nothing that is known: it is to use
    0.8.
    """
    base = RANK_BASE_BYTES if resolved.derived.device == "cpu" else 0
    grown = outcome.peak_bytes + outcome.requested_bytes - base
    room = _FILLED * outcome.peak_bytes - base
    if not outcome.requested_bytes or grown <= 0 or room <= 0:
        return _WITHOUT_A_PEAK
    return min(_WITHOUT_A_PEAK, room / grown)


def _gentler(resolved: Resolved, folder: RunFolder, outcome: Outcome, command: CommandLine) -> str:
    """The command from the last checkpoint on, with half the learning rate."""
    lr = resolved.job.lr
    changes = ["-resume", f"lr.lr={lr.lr / 2:g}"]
    if resolved.job.resilience.rerun_mode != "disabled":
        # The checkpoint may hold a step that is to be computed again.
        changes.append("resilience.rerun_mode=disabled")
    if lr.min_lr > lr.lr / 2:
        changes.append(f"lr.min_lr={lr.lr / 2:g}")
    if outcome.saved_iteration:
        changes += [f"load={_checkpoint(folder, outcome)}", "load_state=all"]
    return command.typed(*changes)


def _checkpoint(folder: RunFolder, outcome: Outcome) -> Path:
    return folder.checkpoints / f"iter_{outcome.saved_iteration:07d}"
