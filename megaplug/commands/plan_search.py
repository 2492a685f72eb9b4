"""``action=search``: the best topologies of a model on a cluster, with the words that reproduce each."""

from __future__ import annotations

import json
import shlex

from megaplug.commands import cli
from megaplug.commands.plan_words import Asked
from megaplug.commands.searched import search
from megaplug.plan.search.text import answer_json, answer_text


def answer(asked: Asked) -> int:
    """Show them.

    Raises:
        UserError: Nothing is legal or nothing fits.
    """
    job, overrides = asked.job, asked.command.overrides
    typed = [word for word in overrides if word.partition("=")[0] not in ("action", *asked.typed)]
    found = search(job, typed, top=asked.count("top") or 10)
    if asked.as_json:
        content = answer_json(found.answer, job, found.cluster) | {"lacking_here": list(found.lacking)}
        return cli.show(json.dumps(content, indent=2))
    kept = [word for word in typed if word != "topology=auto"]
    command = f"python launch/train.py {shlex.join(kept)}".strip()
    text = answer_text(found.answer, job, found.cluster, command)
    return cli.show("\n\n".join([text, *(["\n".join(found.lacking)] if found.lacking else [])]))
