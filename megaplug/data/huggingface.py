"""A local Hugging Face ``tokenizer.json``, and the small folder from which Megatron reads the same one.

Megatron loads through transformers' ``AutoTokenizer``, which needs a ``tokenizer_config.json`` beside it and,
where that names a model's own class, may build another vocabulary than the file says. So a folder is laid
out in the cache: the file as it is used here, and a configuration that names the plain fast tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaplug.data.cache import write_cached
from megaplug.errors import UserError

if TYPE_CHECKING:
    import numpy as np

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Names under which well-known models end a text. Only asked when nothing beside the file says which it is.
_USUAL_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|end▁of▁sentence|>")


class HuggingFaceTokenizer:
    """A fast tokenizer from a ``tokenizer.json``. See `megaplug.data.tokenizers.Tokenizer`.

    Special tokens that the file's template puts around a text (such as one at its beginning) are kept, as
    Megatron keeps them. A name of a special token inside the text becomes that token, as in Megatron.

    Args:
        path: The file, or the folder that holds it.

    Raises:
        UserError: The file is missing, is not a tokenizer, or has no token for the end of a text.
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        file = path / "tokenizer.json" if path.is_dir() else path
        content = _read(file)
        special = _special_tokens(file, content)
        try:
            tokenizer = Tokenizer.from_str(content)
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(f"tokenizer.path: {file} is not a tokenizer: {error}") from error
        # A document is encoded whole, whatever the file says about some model's context.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        special = {key: token for key, token in special.items() if key == "eos_token" or token in vocab}
        if special["eos_token"] not in vocab:
            raise UserError(
                f"tokenizer.path: the end-of-text token {special['eos_token']!r} of {file.parent} is not in "
                f"its vocabulary of {len(vocab)} tokens",
                hint="mend eos_token in tokenizer_config.json",
            )
        tokenizer.add_special_tokens(sorted(set(special.values())))
        self.eod: int = vocab[special["eos_token"]]
        # As Megatron counts; ids may have holes, so the largest counts too.
        self.vocab_size: int = max(len(vocab), max(vocab.values()) + 1)
        self.fingerprint = hashlib.sha256(
            json.dumps(["huggingface", content, special], sort_keys=True).encode()
        ).hexdigest()[:32]
        self._special = special
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """See `Tokenizer`; dtype int32. An end that the file's template already put is not doubled."""
        import numpy as np

        encoded = []
        for one in self._tokenizer.encode_batch_fast([text.decode() for text in documents]):
            ids = one.ids
            if not ids or ids[-1] != self.eod:
                ids.append(self.eod)
            encoded.append(np.array(ids, dtype=np.int32))
        return encoded

    def megatron_arguments(self, cache: Path) -> list[str]:
        """See `Tokenizer`; writes ``<cache>/tokenizers/<fingerprint>/`` unless it is there."""
        folder = cache / "tokenizers" / self.fingerprint
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._special,
        }
        contents = {
            "tokenizer.json": self._tokenizer.to_str(),
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }
        for name, text in contents.items():
            if not (folder / name).is_file():
                write_cached(folder / name, text)
        return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder)]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        hint = "tokenizer.path=<a tokenizer.json, or the folder that holds it>"
        if file.parent.is_dir() and any(file.parent.glob("*token*")):
            hint = (
                "this folder holds a tokenizer of another form; convert it with transformers: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        raise UserError(f"tokenizer.path: {file} does not exist", hint=hint) from error
    except OSError as error:
        raise UserError(f"tokenizer.path: {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"tokenizer.path: {file} is not a tokenizer.json: it is not UTF-8 text") from error


def _special_tokens(file: Path, content: str) -> dict[str, str]:
    """Role to token, from ``tokenizer_config.json`` or ``special_tokens_map.json`` beside the file.

    A file that stands alone does not say which token ends a text; then the one usual name among its special
    tokens is taken, and none or several are an error.
    """
    special: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        beside = file.parent / name
        if beside.is_file():
            for role, token in _object(beside, _read(beside)).items():
                text = token.get("content") if isinstance(token, dict) else token
                if role in _SPECIAL and isinstance(text, str):
                    special[role] = text
    if "eos_token" in special:
        return special
    added = _object(file, content).get("added_tokens") or []
    there = {token.get("content") for token in added if isinstance(token, dict)}
    usual = [token for token in _USUAL_EOS if token in there]
    if len(usual) != 1:
        problem = f"which of {', '.join(usual)} ends a text" if usual else "which token ends a text"
        raise UserError(
            f"tokenizer.path: nothing says {problem} in {file}",
            hint='put a tokenizer_config.json beside it that says {"eos_token": "..."}',
        )
    return {**special, "eos_token": usual[0]}


def _object(file: Path, content: str) -> dict[str, Any]:
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
