"""``action=prune``: what a policy does not keep is shown, and with ``yes=true`` deleted."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from megaplug.commands.actions import Answer
from megaplug.commands.checkpoint_list import policy_of, policy_text
from megaplug.commands.checkpoint_words import Asked, Place
from megaplug.commands.reading import bytes_of, reading
from megaplug.errors import UserError
from megaplug.runs.atomic import size_text
from megaplug.runs.checkpoints import Checkpoint, delete, faults_of, list_checkpoints, tidy
from megaplug.runs.lock import RunLock
from megaplug.runs.retention import Retention, kept, validation_losses


def answer(asked: Asked) -> Answer:
    """What goes, of each run that is named."""
    if "run" not in asked.typed:
        raise UserError("no run is named: nothing is deleted unless its run is", hint="name one: run=FOLDER")
    sure = asked.typed.get("yes") == "true"
    runs, lines, freed = [], [], 0
    for place in asked.places():
        policy = _policy(asked, place)
        with _held(asked, place, sure):
            newest, damaged, going = _going(asked, place, policy)
            sizes = {one: bytes_of(one.path) for one in going}
            for one in going if sure else []:
                delete(one)
            if sure and going:
                tidy(place.directory)
        freed += sum(sizes.values())
        runs.append(_report(place, policy, newest, damaged, sizes))
        lines += _text(place, policy, newest, damaged, sizes, sure)
    number = sum(len(run["going"]) for run in runs)
    several = "1 checkpoint" if number == 1 else f"{number} checkpoints"
    if sure:
        lines.append(f"deleted: {several}, {size_text(freed)}")
    elif number:
        lines.append(f"would be deleted: {several}, {size_text(freed)}; nothing was")
        lines.append(f"  to delete them  {asked.command.typed('yes=true')}")
    else:
        lines.append("nothing to delete")
    return Answer({"runs": runs, "deleted": sure, "num_bytes": freed}, "\n".join(lines))


def _policy(asked: Asked, place: Place) -> Retention:
    """What was typed, over what the run's own job says."""
    own = policy_of(place)
    typed = [word for word in ("keep", "keep_every", "keep_best") if word in asked.typed]
    if own is None and not typed:
        raise UserError(
            f"{place.given} does not say what it keeps: it has no job.yaml that can be read",
            hint="give keep=, keep_every= or keep_best=",
        )
    own = own or Retention(1)
    return Retention(
        asked.count("keep") or own.keep,
        asked.count("keep_every") if "keep_every" in typed else own.keep_every,
        (asked.count("keep_best", least=0) or 0) if "keep_best" in typed else own.keep_best,
    )


def _held(asked: Asked, place: Place, sure: bool) -> contextlib.AbstractContextManager[Any]:
    """The run's lock, so that no job starts or saves there meanwhile; nothing is locked to look."""
    if not sure or place.run is None:
        return contextlib.nullcontext()
    return RunLock.acquire(place.run, asked.command.typed())


def _going(
    asked: Asked, place: Place, policy: Retention
) -> tuple[Checkpoint | None, list[Checkpoint], list[Checkpoint]]:
    """The newest whole checkpoint, the damaged ones that are newer, and those that go.

    The newest whole one is looked for by reading it, and always stays. What is newer is left for the run,
    which sets it aside.
    """
    present = list_checkpoints(place.directory)
    newest, damaged = None, []
    with reading(not asked.as_json) as shown:
        for found in reversed(present):
            if not faults_of(found.path, functools.partial(shown.tell, found.path)):
                newest = found
                break
            damaged.append(found)
    if newest is None:
        return None, damaged, []
    candidates = [found for found in present if found not in damaged]
    losses = {} if place.run is None else validation_losses(place.run.metrics_file)
    staying = {newest, *kept(candidates, losses, policy)}
    return newest, damaged, [found for found in candidates if found not in staying]


def _report(
    place: Place,
    policy: Retention,
    newest: Checkpoint | None,
    damaged: list[Checkpoint],
    sizes: dict[Checkpoint, int],
) -> dict[str, Any]:
    going = [
        {"iteration": one.iteration, "path": str(one.path), "num_bytes": size} for one, size in sizes.items()
    ]
    return {
        "run": str(place.given),
        "policy": vars(policy),
        "newest_whole": None if newest is None else newest.iteration,
        "damaged": [one.iteration for one in damaged],
        "going": going,
    }


def _text(
    place: Place,
    policy: Retention,
    newest: Checkpoint | None,
    damaged: list[Checkpoint],
    sizes: dict[Checkpoint, int],
    sure: bool,
) -> list[str]:
    one_only = policy == Retention(1)
    lines = [f"{place.given}: {policy_text(policy)} {'stays' if one_only else 'stay'}"]
    lines += [f"  step {one.iteration:,} is damaged, and left for the run to set aside" for one in damaged]
    if newest is None:
        return [*lines, "  no checkpoint is whole: none is deleted"]
    lines.append(f"  step {newest.iteration:,} is whole and the newest, and stays in any case")
    word = "deleted" if sure else "would go"
    return [
        *lines,
        *(f"  step {one.iteration:,} {word}: {one.path}, {size_text(size)}" for one, size in sizes.items()),
    ]
