"""Local rank files of tiktoken: ``.tiktoken``, the ``tokenizer.model`` of Llama 3, and Megatron's own JSON.

tiktoken's named encodings are downloaded, so none is loaded by name; only their patterns are known here.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megaplug.data.libraries import optional
from megaplug.data.tiktoken_patterns import PATTERNS, lost_text
from megaplug.data.tokenizer_files import TIKTOKEN, find_file, lay_out, read_file
from megaplug.data.tokenizers import null_tokenizer
from megaplug.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from megaplug.job.schema import TokenizerConfig

_USUAL_SPECIAL = ("<|endoftext|>",)
# Those that Megatron's TikTokenizer insists on; they come first, then fillers, then the ranks.
_MEGATRON_SPECIAL = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
_MEGATRON_EOD = "</s>"


class TiktokenTokenizer:
    """See `megaplug.data.tokenizers.Tokenizer`.

    A name of a special token inside the text becomes that token, as in Megatron.

    Args:
        path: The file, or the folder that holds it.
        config: Pattern, special tokens and the one that ends a document.

    Raises:
        UserError: The package or the file is missing, or file, pattern and special tokens make no tokenizer.
    """

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        file = find_file(path, TIKTOKEN)
        library = optional("tiktoken", "tokenizer=tiktoken")
        self._content = read_file(file)
        self._config = config
        self._of_megatron = self._content.lstrip().startswith(b"[")
        if self._of_megatron:
            ranks, special = _megatron_ranks(file, self._content, config)
            default_eod, default_pattern = _MEGATRON_EOD, "v2"
        else:
            ranks = _ranks(file, self._content)
            special = _special_ids(config.special_tokens or _USUAL_SPECIAL, ranks)
            default_eod, default_pattern = _USUAL_SPECIAL[0], "o200k_base"
        eod = config.eod or default_eod
        if eod not in special:
            shown = ", ".join(list(special)[:5])
            raise UserError(
                f"tokenizer.eod: {eod!r} is not among the special tokens ({shown})",
                hint="name one of tokenizer.special_tokens",
            )
        self._pattern = config.tiktoken_pattern or default_pattern
        pattern = PATTERNS.get(self._pattern, self._pattern)
        try:
            encoding = library.Encoding(
                name=file.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
            )
        except ValueError as error:
            known = ", ".join(PATTERNS)
            raise UserError(
                f"tokenizer.tiktoken_pattern: {pattern!r} is not a regular expression: {error}",
                hint=f"write one as tiktoken has it, or one of: {known}",
            ) from error
        if lost := lost_text(encoding):
            raise UserError(
                f"tokenizer.tiktoken_pattern: text such as {lost!r} matches no part of {pattern!r} "
                "and would be lost",
                hint=r"let the pattern end with |\s+|. or take one of: " + ", ".join(PATTERNS),
            )
        self.eod: int = special[eod]
        self.vocab_size: int = encoding.n_vocab
        said = json.dumps([TIKTOKEN, pattern, special, self.eod])
        self.fingerprint = hashlib.sha256(said.encode() + self._content).hexdigest()[:32]
        self._special_ids = frozenset(special.values())
        self._encoding = encoding

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        ids: list[int] = self._encoding.encode(text, allowed_special="all")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`; bytes that are not UTF-8 are shown as replacement characters."""
        text: str = self._encoding.decode([int(i) for i in ids if i not in self._special_ids])
        return text

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """See `Tokenizer`; dtype int32. An end that the text already names is not doubled."""
        import numpy as np

        encoded = []
        for text in documents:
            ids = self._encoding.encode_to_numpy(text.decode(), allowed_special="all")
            is_ended = ids.size and ids[-1] == self.eod
            encoded.append(ids.astype(np.int32) if is_ended else np.append(ids, self.eod).astype(np.int32))
        return encoded

    def megatron_arguments(self, cache: Path) -> list[str]:
        """See `Tokenizer`; Megatron itself reads only its own JSON, and knows two patterns by name."""
        config = self._config
        is_theirs = self._of_megatron and self._pattern in ("v1", "v2")
        if not is_theirs or (config.eod or _MEGATRON_EOD) != _MEGATRON_EOD:
            return null_tokenizer(self.vocab_size, self.eod)
        folder = lay_out(cache, self.fingerprint, {"tokenizer.json": self._content})
        return [
            *("--tokenizer-type", "TikTokenizer", "--tokenizer-model", str(folder / "tokenizer.json")),
            *("--tiktoken-pattern", self._pattern, "--vocab-size", str(self.vocab_size)),
            *("--tiktoken-num-special-tokens", str(config.tiktoken_num_special_tokens)),
            *("--tokenizer-special-tokens", *(config.special_tokens or _MEGATRON_SPECIAL)),
        ]


def _ranks(file: Path, content: bytes) -> dict[bytes, int]:
    """Bytes to rank, from lines of base64 and a number."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        parts = line.split()
        try:
            token, rank = base64.b64decode(parts[0], validate=True), int(parts[1])
        except (ValueError, IndexError, binascii.Error) as error:
            raise _not_a_rank_file(f"{file}:{number} is not base64 and a number: {line[:40]!r}") from error
        if token in ranks:
            raise _not_a_rank_file(f"{file}:{number} has {token!r} a second time")
        ranks[token] = rank
    return _checked(file, ranks)


def _megatron_ranks(
    file: Path, content: bytes, config: TokenizerConfig
) -> tuple[dict[bytes, int], dict[str, int]]:
    """Ranks and special tokens of Megatron's JSON: special tokens first, fillers after them, then the ranks.

    Source: ``megatron/core/tokenizers/text/libraries/tiktoken_tokenizer.py``.
    """
    first = config.tiktoken_num_special_tokens
    named = list(config.special_tokens or _MEGATRON_SPECIAL)
    if missing := [token for token in _MEGATRON_SPECIAL if token not in named]:
        raise UserError(
            f"tokenizer.special_tokens: Megatron's form needs {', '.join(missing)} among them",
            hint=f"begin with {', '.join(_MEGATRON_SPECIAL)}",
        )
    if len(set(named)) != len(named) or len(named) > first:
        raise UserError(
            f"tokenizer.special_tokens: {len(named)} names, {len(set(named))} of them different, for "
            f"tokenizer.tiktoken_num_special_tokens={first} places"
        )
    try:
        entries = json.loads(content)
        tokens = [base64.b64decode(entry["token_bytes"], validate=True) for entry in entries]
        in_order = [entry["rank"] for entry in entries] == list(range(len(entries)))
    except (ValueError, TypeError, KeyError, RecursionError, binascii.Error) as error:
        raise _not_a_rank_file(f"{file} is not a list of ranks with token_bytes ({error})") from error
    ranks = {token: first + number for number, token in enumerate(tokens)}
    if not in_order or any(token != bytes([byte]) for byte, token in enumerate(tokens[:256])):
        raise _not_a_rank_file(f"{file} does not count its ranks from 0, beginning with the 256 bytes")
    if len(ranks) != len(tokens):
        raise _not_a_rank_file(f"{file} has {len(tokens) - len(ranks)} tokens a second time")
    fillers = [f"<SPECIAL_{number}>" for number in range(len(named), first)]
    return _checked(file, ranks), {token: number for number, token in enumerate([*named, *fillers])}


def _checked(file: Path, ranks: dict[bytes, int]) -> dict[bytes, int]:
    """What tiktoken takes for granted, and otherwise answers with a panic or lost text."""
    if len(set(ranks.values())) != len(ranks):
        raise _not_a_rank_file(f"{file} gives {len(ranks) - len(set(ranks.values()))} ranks a second time")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise _not_a_rank_file(f"{file} lacks {len(missing)} of the 256 bytes, such as {missing[0]:#04x}")
    return ranks


def _special_ids(names: Sequence[str], ranks: dict[bytes, int]) -> dict[str, int]:
    """Special token to id: ``name=id`` as it says, and a bare name the id after the last one."""
    special: dict[str, int] = {}
    following = max(ranks.values()) + 1
    taken = {*ranks.values()}
    for text in names:
        name, is_placed, number = text.rpartition("=")
        if is_placed and name and number.isdecimal():
            place = int(number)
        else:
            name, place = text, following
        if name in special or place in taken:
            fault = f"{name!r} is given twice" if name in special else f"the id {place} of {name!r} is taken"
            raise UserError(
                f"tokenizer.special_tokens: {fault}",
                hint=f"the ranks of the file go up to {max(ranks.values())}; a name alone takes the next id",
            )
        special[name] = place
        taken.add(place)
        following = place + 1
    return special


def _not_a_rank_file(what: str) -> UserError:
    return UserError(
        f"tokenizer.path: {what}",
        hint="a rank file of tiktoken has a line of base64, a space and a rank for each of its tokens",
    )
