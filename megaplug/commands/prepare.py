"""``launch/prepare.py``: text to tokens, a look at prepared sets, and tokenizers of one's own."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaplug.commands import cli
from megaplug.commands.plan import choose
from megaplug.errors import UserError
from megaplug.job.compose import ConfigSource, compose_job, group_options
from megaplug.job.keys import top_level_keys
from megaplug.job.schema import Job, TokenizerConfig
from megaplug.job.suggest import closest

if TYPE_CHECKING:
    from megaplug.data.inspection import Inspection
    from megaplug.data.tokenizers import Tokenizer

_HELP = """\
Text to tokens, before a run or for other programs; a run does the same by itself where it is not done yet.

usage: {program} [action=...] [data=... data.path=... tokenizer=...] [key=value ...]

actions:
  prepare              tokenize the text of a job into Megatron's .bin/.idx (what is done without action=)
    out=my/prefix      also as named pairs outside the cache: my/prefix-train.bin, my/prefix-train.idx, ...
  inspect              documents, lengths, vocabulary use and a piece of text of what a job reads
    prefix=my/pair     of that .bin/.idx pair instead; with tokenizer= its text is shown, too
    picture=len.png    the lengths of documents as a picture (.png, .svg or .pdf)
  train_tokenizer      train a byte-level BPE on the text of a job
    vocab_size=8192    its tokens, bytes and end of document included
    out=my/tokenizer   the folder to write, for tokenizer=huggingface tokenizer.path=my/tokenizer

  overwrite=true       what out= names may be replaced
  output=json          the answer as JSON

flags:
  -h, --help [NAME ..] this page, or what a key of the job means, such as --help data.path
  --config-dir DIR     a folder of your own, laid beside the shipped one
  --completion SHELL   the completion of bash, zsh or fish, to be read by it
  --version            the versions of megaplug, Megatron-core and torch

The keys are those of launch/train.py; here data.* and tokenizer.* count."""
_MOST_IDS = 2**31  # an id is an int32 in Megatron's files
_FLAGS = "--help, --config-dir, --config-name, --completion, --version"
# The words that are no keys of a job, with the values that they can have.
OWN: dict[str, tuple[str, ...]] = {
    "action": ("prepare", "inspect", "train_tokenizer"),
    "output": ("table", "json"),
    "overwrite": ("false", "true"),
    "out": (),
    "prefix": (),
    "picture": (),
    "vocab_size": (),
}
# The action that each word is for; the others are for all.
_ONLY = {
    "out": ("prepare", "train_tokenizer"),
    "overwrite": ("prepare", "train_tokenizer"),
    "prefix": ("inspect",),
    "picture": ("inspect",),
    "vocab_size": ("train_tokenizer",),
}


@dataclass(frozen=True)
class Asked:
    """What was typed.

    Attributes:
        job: Its ``data`` and ``tokenizer`` count.
        own: The words that are no keys of a job.
        command: All of it.
        tokenizer_given: Whether any word names a tokenizer.
        data_given: The words that name data or what is done with it.
    """

    job: Job
    own: Mapping[str, str]
    command: cli.CommandLine
    tokenizer_given: bool
    data_given: Sequence[str]

    @property
    def talks(self) -> bool:
        """Whether a person is to be kept up to date."""
        return self.own.get("output", "table") == "table"

    def path(self, key: str) -> Path | None:
        """The path that a word names, absolute."""
        value = self.own.get(key)
        return None if not value else Path(value).expanduser().absolute()


def main(argv: Sequence[str] | None = None) -> int:
    """Does one thing with text.

    Args:
        argv: The words after the command; the process's own if not given.

    Returns:
        The exit code: 0 when it is done, 2 for a mistake or a disk that refused, 130 after Ctrl-C.
    """
    words = sys.argv[1:] if argv is None else argv
    return cli.guarded(lambda: _main(words))


def _main(words: Sequence[str]) -> int:
    if (code := cli.complete(words, OWN)) is not None:
        return code
    command = cli.parse(words, cli.program_name("megaplug-prepare"), flags=_FLAGS)
    if (code := cli.inform(command, lambda: _HELP.format(program=command.program))) is not None:
        return code
    if command.cfg is not None or command.multirun:
        raise UserError("--cfg and --multirun are flags of launch/train.py", hint="see --help")
    own, rest = _split(command.overrides, command.source)
    action = choose("action", own.get("action", "prepare"), OWN["action"])
    for key in ("output", "overwrite"):
        choose(key, own.get(key, OWN[key][0]), OWN[key])
    for key, actions in _ONLY.items():
        if key in own and action not in actions:
            raise UserError(
                f"{key}= means nothing with action={action}", hint=f"it is for {' and '.join(actions)}"
            )
        if key in own and not own[key]:
            raise UserError(f"{key}= has no value", hint="see --help")
    job = compose_job(rest, command.source)
    given = any(word.startswith(("tokenizer=", "tokenizer.")) for word in rest)
    data_given = [word for word in rest if word.lstrip("+~").startswith(("data=", "data."))]
    report, text = _ACTIONS[action](Asked(job, own, command, given, data_given))
    return cli.show(
        json.dumps({"action": action, **report}, indent=2) if own.get("output") == "json" else text
    )


def _split(words: Sequence[str], source: ConfigSource) -> tuple[dict[str, str], list[str]]:
    """The words that are this command's own, and those of the job; a misspelt own one is named."""
    known = {*top_level_keys(), *group_options(source)}
    own: dict[str, str] = {}
    rest: list[str] = []
    for word in words:
        key, _, value = word.partition("=")
        if key in OWN:
            own[key] = value
            continue
        if "." not in key and key.lstrip("+~") not in known and (meant := closest(key, OWN)):
            raise UserError(f"{key}: there is no such key or group", hint=f"did you mean {meant}?")
        rest.append(word)
    return own, rest


def _check(job: Job, *groups: str) -> None:
    from megaplug.job.checks_values import value_problems

    problems = [problem for problem in value_problems(job) if problem.key.startswith(groups)]
    if problems:
        raise UserError.from_problems(problems)


def _prepare(asked: Asked) -> tuple[dict[str, Any], str]:
    from megaplug.commands.prepared import prepared_json, prepared_text
    from megaplug.data.delivery import deliver, refuse_among_sources
    from megaplug.data.prepare import prepare

    _check(asked.job, "data.", "tokenizer.")
    out, overwrite = asked.path("out"), asked.own.get("overwrite") == "true"
    if out is not None:
        refuse_among_sources(out, asked.job.data)
    begun = time.monotonic()
    facts = prepare(asked.job, show_progress=None if asked.talks else False)
    places = deliver(facts, out, overwrite=overwrite) if out is not None else {}
    report = prepared_json(facts, places, time.monotonic() - begun)
    return report, prepared_text(report, facts, asked.command)


def _inspect(asked: Asked) -> tuple[dict[str, Any], str]:
    from megaplug.commands.prepared import inspected_text
    from megaplug.data.indexed import read_indexed
    from megaplug.data.inspection import inspect
    from megaplug.data.lengths_picture import check_ending, draw_lengths
    from megaplug.data.tokenizers import load_tokenizer

    prefix, picture = asked.path("prefix"), asked.path("picture")
    if picture is not None:
        check_ending(picture)
    if prefix is not None and asked.data_given:
        raise UserError(
            f"{asked.data_given[0]} means nothing with prefix=, which names what is looked at",
            hint="leave one of them away",
        )
    tokenizer: Tokenizer | None = None
    found: list[tuple[str, Inspection]]
    if prefix is None:
        from megaplug.data.prepare import prepare

        _check(asked.job, "data.", "tokenizer.")
        facts = prepare(asked.job, show_progress=None if asked.talks else False)
        tokenizer, title = load_tokenizer(asked.job.tokenizer), facts.source
        found = []
        for split in facts.num_tokens:
            parts = facts.parts(split)
            for part in parts:
                label = split if len(parts) == 1 else f"{split} {part.name}"
                found.append((label, inspect(read_indexed(Path(part.prefix)), tokenizer)))
    else:
        # Whoever names only a pair may not know its tokenizer; bytes are taken for it only when typed.
        if asked.tokenizer_given:
            _check(asked.job, "tokenizer.")
            tokenizer = load_tokenizer(asked.job.tokenizer)
        pair = read_indexed(prefix, "prefix")
        title, found = str(pair.prefix), [(pair.prefix.name, inspect(pair, tokenizer))]
    if picture is not None:
        draw_lengths(picture, title, found)
    report: dict[str, Any] = {
        "source": title,
        "tokenizer": asked.job.tokenizer.type if tokenizer is not None else None,
        "tokenizer_vocab_size": tokenizer.vocab_size if tokenizer is not None else None,
        "sets": {label: one.as_json() for label, one in found},
        "picture": None if picture is None else str(picture),
    }
    return report, inspected_text(report, found, tokenizer)


def _train_tokenizer(asked: Asked) -> tuple[dict[str, Any], str]:
    from megaplug.commands.prepared import trained_text
    from megaplug.data.cache import cache_root
    from megaplug.data.faults import Faults
    from megaplug.data.progress import progress
    from megaplug.data.sources import find_corpus
    from megaplug.data.train_bpe import train_tokenizer
    from megaplug.job.sources import sources

    _check(asked.job, "data.")
    folder, size = asked.path("out"), asked.own.get("vocab_size", "")
    if folder is None:
        raise UserError("out= is not given", hint="name the folder to write: out=my/tokenizer")
    number = _vocab_size(size)
    if asked.job.tokenizer != TokenizerConfig():
        raise UserError("tokenizer: one is trained here, and none is read", hint="leave tokenizer away")
    cache = cache_root(asked.job.data.cache_dir)
    corpora = [find_corpus(spec.path, spec.text_key, cache) for spec in sources(asked.job.data)]
    faults = Faults()
    with progress(None if asked.talks else False) as shown:
        trained = train_tokenizer(
            corpora,
            number,
            folder,
            shown,
            faults,
            overwrite=asked.own.get("overwrite") == "true",
            refuse_faults=asked.job.data.bad_lines == "refuse",
        )
    report = {**trained.as_json(), "asked_vocab_size": number, "num_bad": faults.bad}
    return report, trained_text(report, asked.command)


def _vocab_size(typed: str) -> int:
    hint = "the number of tokens: vocab_size=8192"
    if not typed:
        raise UserError("vocab_size= is not given", hint=hint)
    if not re.fullmatch("[0-9]+(_[0-9]+)*", typed):
        raise UserError(f"vocab_size: {typed!r} is not a whole number", hint=hint)
    if len(typed) > 20 or int(typed) >= _MOST_IDS:
        raise UserError(
            f"vocab_size: {typed[:30]} is not below {_MOST_IDS:,}, the ids that there are", hint=hint
        )
    return int(typed)


_ACTIONS: dict[str, Callable[[Asked], tuple[dict[str, Any], str]]] = {
    "prepare": _prepare,
    "inspect": _inspect,
    "train_tokenizer": _train_tokenizer,
}
