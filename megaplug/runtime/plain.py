"""Our layers under Megatron-LM's own ``pretrain_gpt.py``: ``--spec megaplug.runtime.plain layer_spec``.

The frozen job that the environment names says which layers they are. Nothing else of megaplug is in such a
run: no stand-in for CUDA, no repairs, no supervisor. ``python -m megaplug.runtime.plain`` names them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from megaplug.errors import UserError
from megaplug.job.attention import attention_layers
from megaplug.job.experts import experts_choice
from megaplug.job.freeze import FrozenJob, read_frozen
from megaplug.job.plain_command import JOB_VARIABLE


def layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """The layers of one (virtual) pipeline stage, as the frozen job names them.

    Args:
        config: Megatron's ``GPTModelConfig``.
        vp_stage: The virtual pipeline stage, or None without virtual stages.

    Raises:
        UserError: The environment names no frozen job, or a layer cannot be had.
    """
    from megaplug.layers.spec import transformer_layer_spec

    frozen = frozen_job()
    job, backend = frozen.job, frozen.derived.backend
    build = transformer_layer_spec(attention_layers(job.attention), backend, experts_choice(job, backend))
    return build(config, vp_stage=vp_stage)


def frozen_job() -> FrozenJob:
    """The job that the environment names.

    Raises:
        UserError: There is none.
    """
    named = os.environ.get(JOB_VARIABLE)
    if not named:
        raise UserError(
            f"{JOB_VARIABLE} is not set, so that it is not known which layers to build",
            hint=f"{JOB_VARIABLE}=<run>/job.yaml; the run's command.sh sets it",
        )
    return read_frozen(Path(named))


def main() -> int:
    """Say which layers a plain run would build, or why it could not."""
    try:
        frozen = frozen_job()
        from megaplug.layers.spec import transformer_layer_spec

        layers = attention_layers(frozen.job.attention)
        backend = frozen.derived.backend
        transformer_layer_spec(layers, backend, experts_choice(frozen.job, backend))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    described = layers.described(frozen.job.model.num_layers)
    print(f"megaplug: {frozen.derived.backend} layers, {described}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
