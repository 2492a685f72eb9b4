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

from megaplug.data.huggingface_folder import FolderSays, read_beside, read_text, usual_end
from megaplug.data.tokenizer_files import HUGGINGFACE, find_file, lay_out
from megaplug.errors import UserError

if TYPE_CHECKING:
    import numpy as np


class HuggingFaceTokenizer:
    """A fast tokenizer from a ``tokenizer.json``. See `megaplug.data.tokenizers.Tokenizer`.

    Special tokens that the file's template puts around a text (such as one at its beginning) are kept, as
    Megatron keeps them. A name of a special token inside the text becomes that token, as in Megatron.

    Args:
        path: The file, or the folder that holds it.
        eod: The token that ends a document; the folder's ``eos_token`` if None.

    Raises:
        UserError: The file is missing, is not a tokenizer, or has no token for the end of a text.
    """

    def __init__(self, path: Path, eod: str | None = None) -> None:
        from tokenizers import Tokenizer

        file = find_file(path, HUGGINGFACE)
        content = read_text(file)
        says = read_beside(file)
        if eod is not None:
            says.special["eos_token"] = eod
        elif "eos_token" not in says.special:
            says.special["eos_token"] = usual_end(file, content)
        try:
            tokenizer = Tokenizer.from_str(content)
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(f"tokenizer.path: {file} is not a tokenizer: {error}") from error
        # A document is encoded whole, whatever the file says about some model's context.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _add_tokens(tokenizer, says, file)
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        special = _named(says.special, vocab)
        if special["eos_token"] not in vocab:
            raise UserError(
                f"tokenizer.{'path' if eod is None else 'eod'}: the end-of-text token "
                f"{special['eos_token']!r} of {file.parent} is not in its vocabulary of {len(vocab)} tokens",
                hint="mend eos_token in tokenizer_config.json" if eod is None else "name one that is",
            )
        tokenizer.add_special_tokens(sorted(set(special.values())))
        self.eod: int = vocab[special["eos_token"]]
        # As Megatron counts; ids may have holes, so the largest counts too.
        self.vocab_size: int = max(len(vocab), max(vocab.values()) + 1)
        self.fingerprint = hashlib.sha256(
            json.dumps([HUGGINGFACE, content, special, says.decides()], sort_keys=True).encode()
        ).hexdigest()[:32]
        self._special = special
        self._chat_template = says.chat_template
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        text: str = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
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
        """See `Tokenizer`; the chat template goes with it, for those who will serve the model."""
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._special,
        }
        name = self.fingerprint
        if self._chat_template is not None:
            config["chat_template"] = self._chat_template
            template = json.dumps(self._chat_template, sort_keys=True)
            name += "-" + hashlib.sha256(template.encode()).hexdigest()[:8]
        contents = {
            "tokenizer.json": self._tokenizer.to_str().encode(),
            "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
        }
        return [
            *("--tokenizer-type", "HuggingFaceTokenizer"),
            *("--tokenizer-model", str(lay_out(cache, name, contents))),
        ]


def _add_tokens(tokenizer: Any, says: FolderSays, file: Path) -> None:
    """Adds the tokens that the files beside ``tokenizer.json`` bring, as transformers does."""
    from tokenizers import AddedToken

    there = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    for number, token in sorted(says.added.items()):
        added = AddedToken(**token)
        if repr(added) not in there:
            tokenizer.add_tokens([added])
        if tokenizer.token_to_id(added.content) != number:
            raise UserError(
                f"tokenizer.path: tokenizer_config.json says that {added.content!r} has the id {number}, "
                f"but after {file} it is {tokenizer.token_to_id(added.content)}",
                hint="write both files anew with save_pretrained() of transformers",
            )
    if says.extra:
        tokenizer.add_special_tokens(says.extra)


def _named(special: dict[str, str], vocab: dict[str, int]) -> dict[str, str]:
    """The roles whose tokens are there; padding only where it is a token of its own.

    Megatron takes the padding token out of the loss and puts id 0 in its place wherever it stands in the
    text, so that a beginning or an end of text that pads as well would be lost.
    """
    found = {role: token for role, token in special.items() if role == "eos_token" or token in vocab}
    others = {token for role, token in found.items() if role != "pad_token"}
    return {role: token for role, token in found.items() if role != "pad_token" or token not in others}
