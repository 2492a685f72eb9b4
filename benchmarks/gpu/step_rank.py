"""One rank of a benchmarked job, with Megatron's local layers where asked for.

python benchmarks/gpu/step_rank.py JOB.yaml native|local|te
"""

from __future__ import annotations

import sys
from pathlib import Path

from megaplug.job.freeze import read_frozen
from megaplug.runtime import environment


def main() -> int:
    """Train the job; its steps are in the run's ``metrics.jsonl``."""
    job_file, kind = Path(sys.argv[1]), sys.argv[2]
    environment.prepare(read_frozen(job_file))

    from megaplug.runtime.pretrain import run

    run(job_file, plant=take_megatrons_local_layers if kind == "local" else None)
    import torch

    print(f"peak bytes {torch.cuda.max_memory_allocated()}")
    return 0


def take_megatrons_local_layers() -> None:
    """Megatron's ``get_gpt_layer_local_spec``: its attention keeps every score, its norm is torch's.

    Its cross-entropy goes with them: nothing of ours is left in the step.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megaplug.layers import spec
    from megaplug.runtime import batch

    def local_layers(*names: object) -> object:
        return lambda config, vp_stage=None: get_gpt_layer_local_spec(
            normalization=getattr(config, "transformer", config).normalization
        )

    spec.transformer_layer_spec = local_layers
    batch.end_of_model = lambda chunk: None


if __name__ == "__main__":
    sys.exit(main())
