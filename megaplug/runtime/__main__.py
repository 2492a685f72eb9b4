"""``python -m megaplug.runtime runs/<name>-<hash>/job.yaml``: one rank, told by its environment which."""

from __future__ import annotations

import sys
from pathlib import Path

from megaplug.errors import UserError
from megaplug.job.freeze import read_frozen
from megaplug.runs import watchdog
from megaplug.runtime import environment, heartbeat, stopping


def main() -> int:
    """Run the rank; its exit code only says whether it ended in good order."""
    stopping.begin()
    watchdog.start_from_environment()
    heartbeat.start_from_environment()
    job_file = Path(sys.argv[1])
    try:
        environment.prepare(read_frozen(job_file))

        from megaplug.runtime.pretrain import run

        run(job_file)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
