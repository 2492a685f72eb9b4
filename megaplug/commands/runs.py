"""``launch/runs.py``: what has become of runs; they are compared, followed, stopped, resumed and removed."""

from __future__ import annotations

from megaplug.commands.actions import Action, Tool
from megaplug.commands.runs_words import WORDS, Asked

_HELP = """\
Runs: which there are, how they stand, how they differ. What is told comes from their folders, and is right
after a crash, too. No torch is imported, except by resume.

usage: {program} [action=NAME] [run=FOLDER] [word=value ...]

actions:
{actions}

words:
{words}

flags:
  -h, --help [NAME ..]  this page, or what an action or a word means, such as --help compare
  --completion SHELL    the completion of bash, zsh or fish, to be read by it
  --version             the versions of megaplug, Megatron-core and torch

A run is named by its folder, by its name in runs_dir, or by a pattern; [a,b] are several.
Ends with 0, with 2 for a mistake or a disk that refuses; resume ends as the training command does."""

ACTIONS: dict[str, Action] = {
    "list": Action(
        "megaplug.commands.runs_list",
        "state, step, losses, tokens a second, and what differs between their configs (the default)",
        ("run", "runs_dir"),
    ),
    "compare": Action(
        "megaplug.commands.runs_compare",
        "a table with a column for each key that differs, and a picture of the losses",
        ("run", "runs_dir", "picture"),
    ),
    "follow": Action(
        "megaplug.commands.runs_follow",
        "its steps as they come, or what a rank writes, until it ends",
        ("run", "runs_dir", "rank"),
    ),
    "stop": Action(
        "megaplug.commands.runs_stop",
        "have it save and end, as SIGTERM does, and wait for that",
        ("run", "runs_dir"),
    ),
    "resume": Action(
        "megaplug.commands.runs_resume",
        "go on with it, by the command that started it, where that was typed",
        ("run", "runs_dir"),
    ),
    "remove": Action(
        "megaplug.commands.runs_remove",
        "show what would go, checkpoints and all; yes=true deletes it",
        ("run", "runs_dir", "yes"),
    ),
}
"""Every action by its name; ``list`` is the default."""

TOOL = Tool(
    program="megaplug-runs",
    page=_HELP,
    actions=ACTIONS,
    default="list",
    words=WORDS,
    chosen=("yes",),
    asked=Asked,
    names_by="run",
)
main = TOOL.main
