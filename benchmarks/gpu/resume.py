"""In deterministic mode a run that was stopped and goes on is, bit for bit, the run that was not."""

from __future__ import annotations

import sys

from jobs import Jobs, curve
from setting import ended, read_setting

STEPS, HALF = 6, 3


def main() -> int:
    """Train both ways in fp32 and bf16, compare, store."""
    setting = read_setting(__doc__)
    jobs = Jobs(setting)
    failures, rows = [], {}
    words = {
        name: [f"train.iters={STEPS}", "train.deterministic_mode=true", f"precision={name}"]
        for name in ("fp32", "bf16")
    }
    whole = {name: jobs.start(f"whole_{name}", *given) for name, given in words.items()}
    half = {
        name: jobs.start(f"halved_{name}", *given, f"train.stop_at={HALF}") for name, given in words.items()
    }
    for running in half.values():
        jobs.finish(running)
    rest = {name: jobs.start(f"halved_{name}", *given) for name, given in words.items()}
    for name in words:
        wanted, found = curve(jobs.finish(whole[name])), curve(jobs.finish(rest[name]))
        same = wanted == found and len(found) == STEPS
        rows[name] = {"equal_bit_for_bit": same, "undisturbed": wanted, "resumed": found}
        print(f"{name}: {len(found)} steps, {'equal bit for bit' if same else 'NOT equal'}")
        if not same:
            failures.append(f"{name}: resumed {found[HALF:]} is not {wanted[HALF:]}")
    setting.write("resume", {"what": __doc__, "stopped_at": HALF, "results": rows})
    return ended(failures)


if __name__ == "__main__":
    sys.exit(main())
