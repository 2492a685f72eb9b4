"""The plan's closed form of memory against rehearsals of random jobs.

The jobs are those of ``random_jobs.py``, always the same for one seed; of each one rank is rehearsed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.random_jobs import random_jobs
from megaplug.plan.rehearsal import compare, rehearse_all

SEED, JOBS = 20, 50


def main() -> int:
    """Print one line a job, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=JOBS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", type=int, help="the number of one job")
    parser.add_argument("--json", action="store_true", help="everything that was counted, a line a job")
    parser.add_argument(
        "--origins", type=int, default=0, help="lines about who made what is there at the peak"
    )
    given = parser.parse_args()
    jobs = list(enumerate(random_jobs(given.jobs, given.seed)))
    if given.only is not None:
        jobs = [jobs[given.only]]
    worst = 0.0
    rehearsals = rehearse_all([(job, rank) for _, (_, job, rank) in jobs], origins=given.origins > 0)
    for (number, (words, job, rank)), rehearsed in zip(jobs, rehearsals, strict=True):
        figures = {figure.name: figure for figure in compare(job, rehearsed)}
        peak = figures["peak"]
        worst = max(worst, abs(peak.relative))
        if given.json:
            values: dict[str, object] = {
                name: [found.planned, found.rehearsed] for name, found in figures.items()
            }
            values["at_peak"] = rehearsed.at_peak
            print(json.dumps({"job": number, "rank": rank, "words": words, **values}))
            continue
        shares = " ".join(
            f"{name[:6]} {found.relative:+7.2%}" for name, found in figures.items() if found.unit == "bytes"
        )
        wrong = figures["parameters"].difference
        print(f"{number:3} rank {rank:3} {peak.rehearsed / 2**20:9.1f} MiB  {shares}  parameters {wrong:+d}")
        print("    " + " ".join(word.split(".", 1)[-1] for word in words), flush=True)
        print("".join(f"    {line}\n" for line in rehearsed.origins[: given.origins]), end="", flush=True)
    sys.stdout.flush()
    print(f"\nlargest difference of the peak: {worst:.2%}", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
