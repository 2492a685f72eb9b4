"""The loss on each source of a validation or test set that is a blend.

Megatron's own ``--multiple-validation-sets`` asks for ``--full-validation``, which runs every set to its end.
It knows no test set beside them, and breaks on a pipeline stage that reads no data. Here the validation set
stays the blend that it is in plain Megatron-LM; each of its samples carries the number of its source, and the
losses are summed apart in the pass that is made anyway.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from megaplug.job.facts import DataFacts

KEY = "lm loss "
"""What the name of a source follows in Megatron's dictionary of losses."""


class SourceLosses:
    """Knows which sources the samples of the current evaluation come from.

    Args:
        facts: The data of the job.
    """

    def __init__(self, facts: DataFacts) -> None:
        self._names = {
            split: [part.name for part in facts.blends.get(split, [])] for split in ("valid", "test")
        }
        self._current: list[str] = []

    def watch(self, training: Any) -> None:
        """Stand before ``evaluate_and_print_results`` of ``megatron.training.training``."""
        real = training.evaluate_and_print_results

        @functools.wraps(real)
        def evaluate_and_print_results(prefix: str, *args: Any, **kwargs: Any) -> Any:
            self._current = self._names[evaluated_split(prefix)]
            try:
                return real(prefix, *args, **kwargs)
            finally:
                self._current = []

        training.evaluate_and_print_results = evaluate_and_print_results

    def report(
        self, dataset_id: torch.Tensor | None, losses: torch.Tensor, mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Sum of losses and number of tokens of each source, as Megatron adds them up; empty while training.

        Args:
            dataset_id: Number of the source of each sample ``[micro_batch]``; None where there is one.
            losses: ``[micro_batch, seq_length / cp]``, nats per token.
            mask: Of the same shape, 1 where a token counts.
        """
        if dataset_id is None:
            return {}
        by_sample = torch.stack([(losses * mask).sum(dim=1), mask.sum(dim=1)], dim=1)
        # Not picked out by a mask, which would make the host wait for a GPU, and fail in a CUDA graph.
        return {
            KEY + name: by_sample.where((dataset_id == number).unsqueeze(1), 0.0).sum(dim=0)
            for number, name in enumerate(self._current)
        }


def evaluated_split(prefix: str) -> str:
    """Whether Megatron evaluates the ``test`` or the ``valid`` set, by the prefix that it logs."""
    return "test" if "test set" in prefix else "valid"
