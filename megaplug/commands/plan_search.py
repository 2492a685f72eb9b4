"""``action=search``: the best topologies of a model on a cluster, with the words that reproduce each."""

from __future__ import annotations

import dataclasses
import json

from megaplug.commands import cli
from megaplug.commands.plan_words import Asked
from megaplug.commands.searched import search
from megaplug.job.elsewhere import remarks
from megaplug.plan.plan_json import lacking_json
from megaplug.plan.search.answer_json import answer_json
from megaplug.plan.search.text import answer_text


def answer(asked: Asked) -> int:
    """Show them.

    Raises:
        UserError: Nothing is legal or nothing fits.
    """
    job, typed = asked.job, asked.job_words
    found = search(job, typed, top=asked.count("top") or 10, tokens=asked.count("tokens"))
    if asked.as_json:
        content = answer_json(found.answer, job) | {"lacking_here": lacking_json(found.lacking)}
        return cli.show(json.dumps(content, indent=2))
    # On a machine without GPUs the same command would start on its cores.
    device = ["device=cuda"] if found.cluster.device == "cuda" and "device=cuda" not in typed else []
    kept = [word for word in typed if word != "topology=auto"] + device
    program = cli.sibling(asked.command.program, "train")
    command = dataclasses.replace(asked.command, program=program, overrides=kept)
    text = answer_text(found.answer, job, found.cluster, command.typed(), kept)
    return cli.show("\n\n".join([text, *(["\n".join(remarks(found.lacking))] if found.lacking else [])]))
