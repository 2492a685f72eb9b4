"""Who is told of a run's events: names that can be, an address that is nowhere written down."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from megaplug.errors import Problem
from megaplug.job.schema import Job
from megaplug.job.suggest import did_you_mean

EVENTS = ("start", "failure", "stall", "restart", "end")
WEBHOOK_PREFIX = "env:"
_VARIABLE = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)")


def alert_problems(job: Job) -> Iterator[Problem]:
    """Everything that is wrong with ``alerts``; no message holds an address, which may be a secret."""
    for name in job.alerts.events:
        if name not in EVENTS:
            yield Problem("alerts.events", f"there is no event {name!r}", did_you_mean(name, EVENTS))
    if job.alerts.command is not None and not job.alerts.command.strip():
        message = "is empty: nobody would be told anything"
        yield Problem("alerts.command", message, "alerts.command=null for none")
    webhook = job.alerts.webhook
    if webhook is None:
        return
    found = _VARIABLE.fullmatch(webhook)
    if found is None:
        message = "is not of the form env:NAME; an address here would stand in job.yaml and on the screen"
        hint = "export MEGAPLUG_WEBHOOK=https://... and write alerts.webhook=env:MEGAPLUG_WEBHOOK"
        yield Problem("alerts.webhook", message, hint)
        return
    name = found[1]
    if name not in os.environ:
        message = f"the environment variable {name} is not set"
        yield Problem("alerts.webhook", message, f"export {name}=https://...", lacks=name)
    elif not os.environ[name].startswith(("http://", "https://")):
        message = f"the environment variable {name} holds no address that begins with http:// or https://"
        yield Problem("alerts.webhook", message, f"export {name}=https://...", lacks=name)
