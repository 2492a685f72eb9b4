"""One checkpoint, trained on for five steps on the CPU and on the GPU: the same numbers.

Tolerances, relative, over loss and gradient norm of every step. fp32: 1e-4, since a GPU adds in another
order and exp and rsqrt differ in the last digit (matrix products are full fp32: torch leaves TF32 off). bf16
against the CPU's fp32: 3e-2, since weights and activations carry 8 bits, and a gradient norm adds up all
their roundings.
"""

from __future__ import annotations

import sys

from jobs import Jobs, curve, kernels, largest_difference
from setting import ended, read_setting

TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2}
STEPS = 5


def main() -> int:
    """Train, compare, store."""
    setting = read_setting(__doc__)
    jobs = Jobs(setting)
    first = jobs.run("first", "train.iters=2", device="cpu")
    go_on = [f"train.iters={STEPS}", f"load={first}"]
    on_cpu = jobs.start("cpu", *go_on, device="cpu")
    on_gpu = {name: jobs.start(name, *go_on, f"precision={name}") for name in TOLERANCES}
    wanted = curve(jobs.finish(on_cpu))
    rows, failures = {}, []
    for name, tolerance in TOLERANCES.items():
        folder = jobs.finish(on_gpu[name])
        found = curve(folder)
        difference = largest_difference(found, wanted)
        rows[name] = {
            "largest_relative_difference": difference,
            "tolerance": tolerance,
            "losses": [loss for loss, _ in found],
            "kernels": kernels(folder),
        }
        print(f"{name}: largest relative difference {difference:.1e}, tolerance {tolerance:.0e}")
        if not difference < tolerance:
            failures.append(f"{name} on {setting.device} differs by {difference:.1e} from fp32 on the CPU")
    setting.write(
        "cuda_parity", {"what": __doc__, "losses_of_the_cpu": [loss for loss, _ in wanted], "results": rows}
    )
    return ended(failures)


if __name__ == "__main__":
    sys.exit(main())
