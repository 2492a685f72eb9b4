"""What our core attentions have not, refused by name: nothing of a config is left out in silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megaplug.errors import UserError


def refuse_mask(what: str, mask_type: AttnMaskType) -> None:
    """Only causal masks and none are known.

    Args:
        what: The attention, for the message.
        mask_type: The mask that is asked for.

    Raises:
        UserError: It is another.
    """
    if mask_type not in (AttnMaskType.causal, AttnMaskType.no_mask):
        raise UserError(
            f"{what} has no {mask_type.name} mask",
            hint="it has causal and no_mask; attention=local has more",
        )


def refuse_unsupported(
    what: str, config: TransformerConfig, foreign: Mapping[str, Any], more: Mapping[str, bool], hint: str
) -> None:
    """Name every feature of the config that would be left out.

    Args:
        what: The attention, for the message.
        config: Of the whole model.
        foreign: Arguments that other backends' attentions take.
        more: What this attention has not beside, and whether it is asked for.
        hint: What to do in place of it.

    Raises:
        UserError: Any of it is asked for.
    """
    wanted = {
        **more,
        "window_size": config.window_size is not None,
        f"softmax_type={config.softmax_type}": config.softmax_type != "vanilla",
        "qk_clip": config.qk_clip,
        "log_max_attention_logit": config.log_max_attention_logit,
        "batch_invariant_mode": config.batch_invariant_mode,
        **{name: value is not None for name, value in foreign.items()},
    }
    if refused := [name for name, is_wanted in wanted.items() if is_wanted]:
        raise UserError(f"{what} does not support {', '.join(refused)}", hint=hint)
