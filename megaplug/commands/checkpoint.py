"""``launch/checkpoint.py``: what a run has saved is listed, shown, verified, pruned and copied."""

from __future__ import annotations

from megaplug.commands.actions import Action, Tool
from megaplug.commands.checkpoint_words import WORDS, Asked

_HELP = """\
The checkpoints of runs: what there is, what is in it, whether it is whole. Nothing of it is run, and no
torch is imported.

usage: {program} [action=NAME] [run=FOLDER | path=FOLDER] [word=value ...]

actions:
{actions}

words:
{words}

flags:
  -h, --help [NAME ..]  this page, or what an action or a word means, such as --help prune
  --completion SHELL    the completion of bash, zsh or fish, to be read by it
  --version             the versions of megaplug, Megatron-core and torch

Without run= and path=, list and verify take all runs in runs/.
Ends with 0, with 2 for a mistake or a disk that refuses; list, show, verify and copy with 1 if a checkpoint
is damaged, which list and show see by names and sizes, and verify and copy by every byte."""

ACTIONS: dict[str, Action] = {
    "list": Action(
        "megaplug.commands.checkpoint_list",
        "step, date, size and validation loss of each, and what the run keeps of them (the default)",
        ("run",),
    ),
    "show": Action(
        "megaplug.commands.checkpoint_show",
        "of one: the model and topology that wrote it, its files, the shapes and formats of its tensors",
        ("run", "path", "iteration", "tensors"),
    ),
    "verify": Action(
        "megaplug.commands.checkpoint_verify",
        "read every file and compare its SHA-256; ends with 1 if one is damaged, and names it",
        ("run", "path", "iteration"),
    ),
    "prune": Action(
        "megaplug.commands.checkpoint_prune",
        "show which would go under keep, keep_every and keep_best; yes=true deletes them",
        ("run", "keep", "keep_every", "keep_best", "yes"),
    ),
    "copy": Action(
        "megaplug.commands.checkpoint_copy",
        "copy one to another folder, verified on the way; broken off, the same command goes on",
        ("run", "path", "iteration", "to"),
    ),
}
"""Every action by its name; ``list`` is the default."""


TOOL = Tool(
    program="megaplug-checkpoint",
    page=_HELP,
    actions=ACTIONS,
    default="list",
    words=WORDS,
    chosen=("tensors", "yes"),
    asked=Asked,
    names_by="run",
)
main = TOOL.main
