"""A local SentencePiece ``.model``, as Llama 1 and 2, Mistral, T5 and Gemma have."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megaplug.data.libraries import optional
from megaplug.data.tokenizer_files import SENTENCEPIECE, find_file, lay_out, read_file
from megaplug.data.tokenizers import null_tokenizer
from megaplug.errors import UserError

if TYPE_CHECKING:
    import numpy as np


class SentencePieceTokenizer:
    """See `megaplug.data.tokenizers.Tokenizer`.

    As Megatron's tokenizer of the same name, it puts no token at the beginning of a text, and the name of a
    control piece inside the text is text.

    Args:
        path: The file, or the folder that holds it.
        eod: The piece that ends a document; the model's own end of a sentence if None.

    Raises:
        UserError: The package or the file is missing, or it is no model with such a piece.
    """

    def __init__(self, path: Path, eod: str | None = None) -> None:
        file = find_file(path, SENTENCEPIECE)
        library = optional("sentencepiece", "tokenizer=sentencepiece")
        content = read_file(file)
        model = library.SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(content)
        except RuntimeError as error:  # what its parser throws
            raise UserError(
                f"tokenizer.path: {file} is not a SentencePiece model",
                hint="give the .model that spm_train wrote",
            ) from error
        self.vocab_size: int = model.vocab_size()
        self.eod: int = model.eos_id() if eod is None else self._id(model, eod, file)
        if self.eod < 0:
            raise UserError(
                f"tokenizer.eod: {file} was trained without a piece for the end of a sentence",
                hint="name the piece that ends a document: tokenizer.eod='<sep>'",
            )
        said = json.dumps([SENTENCEPIECE, self.eod]).encode()
        self.fingerprint = hashlib.sha256(said + content).hexdigest()[:32]
        self._content = content
        self._model = model

    @staticmethod
    def _id(model: object, piece: str, file: Path) -> int:
        number: int = model.piece_to_id(piece)  # type: ignore[attr-defined]
        if model.id_to_piece(number) != piece:  # type: ignore[attr-defined]
            raise UserError(f"tokenizer.eod: {piece!r} is not a piece of {file}")
        return number

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        ids: list[int] = self._model.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        left_out = {self.eod}
        text: str = self._model.decode([int(i) for i in ids if i not in left_out and i < self.vocab_size])
        return text

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """See `Tokenizer`; dtype int32."""
        import numpy as np

        # One thread: whoever has many texts gives them to several processes.
        encoded = self._model.encode([text.decode() for text in documents], num_threads=1)
        return [np.array([*ids, self.eod], dtype=np.int32) for ids in encoded]

    def megatron_arguments(self, cache: Path) -> list[str]:
        """See `Tokenizer`; a copy of the model is kept, so that ranks read what was read here."""
        if self.eod != self._model.eos_id():
            # Megatron's own always ends a document with the model's end of a sentence.
            return null_tokenizer(self.vocab_size, self.eod)
        folder = lay_out(cache, self.fingerprint, {"tokenizer.model": self._content})
        model = str(folder / "tokenizer.model")
        return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
