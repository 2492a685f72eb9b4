"""``python -m megaplug.runtime runs/<name>-<hash>/job.yaml``: one rank, told by its environment which."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megaplug.errors import UserError
from megaplug.runs import watchdog


def main() -> int:
    """Run the rank; its exit code only says whether it ended in good order."""
    watchdog.start_from_environment()
    # Read by torch at import: helpers that Megatron compiles are plain functions on the CPU.
    if not Path("/proc/driver/nvidia/version").exists():
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    from megaplug.runtime.pretrain import run

    try:
        run(Path(sys.argv[1]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
