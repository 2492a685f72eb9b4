"""What the files beside a ``tokenizer.json`` say: which token ends a text, further tokens, chat template.

transformers reads the same from them. What is put around a text is for the ``tokenizer.json`` alone to say:
``add_bos_token`` beside it counts for nothing, there and here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaplug.data.tokenizer_files import read_file
from megaplug.errors import UserError

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

# Names under which well-known models end a text. Only asked when nothing beside the file says which it is.
_USUAL_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|end▁of▁sentence|>")


@dataclass
class FolderSays:
    """What was found beside the file.

    Attributes:
        special: Role such as ``eos_token`` to token.
        extra: Further special tokens, in their order.
        added: Id to token and its flags, of the tokens that were added to the vocabulary.
        chat_template: As it stands there; it decides nothing about text.
    """

    special: dict[str, str] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)
    added: dict[int, dict[str, Any]] = field(default_factory=dict)
    chat_template: Any = None

    def decides(self) -> list[Any]:
        """All of it that decides how text becomes ids, as plain values."""
        return [self.special, self.extra, sorted(self.added.items())]


def read_beside(file: Path) -> FolderSays:
    """Reads ``special_tokens_map.json``, ``tokenizer_config.json``, ``chat_template.jinja``, where they are.

    Raises:
        UserError: One of them cannot be read.
    """
    says = FolderSays()
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        beside = file.parent / name
        if beside.is_file():
            _take(says, json_object(beside, read_text(beside)), beside)
    template = file.parent / "chat_template.jinja"
    if template.is_file():
        says.chat_template = read_text(template)
    return says


def usual_end(file: Path, content: str) -> str:
    """The one usual name among the special tokens of a file that nothing else explains.

    Raises:
        UserError: There is none, or there are several.
    """
    added = json_object(file, content).get("added_tokens") or []
    there = {token.get("content") for token in added if isinstance(token, dict)}
    usual = [token for token in _USUAL_EOS if token in there]
    if len(usual) != 1:
        problem = f"which of {', '.join(usual)} ends a text" if usual else "which token ends a text"
        raise UserError(
            f"tokenizer.path: nothing says {problem} in {file}",
            hint="name it: tokenizer.eod='</s>', or put a tokenizer_config.json beside it that says "
            '{"eos_token": "..."}',
        )
    return usual[0]


def read_text(file: Path) -> str:
    """A file that must be UTF-8."""
    try:
        return read_file(file).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"tokenizer.path: {file} is not a tokenizer.json: it is not UTF-8 text") from error


def json_object(file: Path, content: str) -> dict[str, Any]:
    """The object that a JSON file holds."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"tokenizer.path: {file} is not JSON: {error}",
            hint="a tokenizer.json is what tokenizer.save_pretrained() of transformers writes",
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"tokenizer.path: {file} is not a tokenizer's file: it holds no object")
    return values


def _take(says: FolderSays, values: dict[str, Any], file: Path) -> None:
    says.special |= {role: text for role in _ROLES if (text := _text(values.get(role))) is not None}
    for key in _EXTRA:
        more = values.get(key) or []
        # transformers also writes them as an object: a name of its own for each.
        tokens = more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
        says.extra += [text for token in tokens if (text := _text(token)) and text not in says.extra]
    for number, token in _items(values.get("added_tokens_decoder"), file):
        flags = {flag: bool(token[flag]) for flag in _FLAGS if flag in token}
        says.added[number] = {"content": str(token.get("content")), **flags}
    says.chat_template = values.get("chat_template", says.chat_template)


def _items(decoder: Any, file: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        return [(int(number), dict(token)) for number, token in (decoder or {}).items()]
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"tokenizer.path: added_tokens_decoder of {file} is not an object of ids and tokens"
        ) from error


def _text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
