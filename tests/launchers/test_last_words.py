"""What ranks say of their memory and of their failure, and what the supervisor makes of it."""

from __future__ import annotations

import signal

from megaplug.launchers.verdict import RankFacts, judge
from megaplug.runs.state import read_state


def test_memory_that_was_told_is_kept_for_the_verdict_and_not_shown(job):
    outcome = job.run(
        """
events.write("memory", iteration=3, peak=5000)
events.write("memory", iteration=4, peak=7000)
os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    assert (outcome.kind, outcome.peak_bytes, outcome.rank) == ("killed", 7000, 0)
    assert outcome.reason == (
        "rank 0 was killed by signal 9 (SIGKILL), probably by the kernel's out-of-memory killer"
    )
    assert [event for event in job.events if event["event"] == "memory"] == []


def test_a_rank_tells_what_has_failed(job):
    outcome = job.run(
        """
events.write("end", status="failed", kind="memory", reason="out of memory", peak=9000, requested=1000)
sys.exit(1)
"""
    )
    assert (outcome.kind, outcome.peak_bytes, outcome.requested_bytes) == ("memory", 9000, 1000)
    assert outcome.reason == "rank 0 failed: out of memory"


def test_who_has_lost_a_connection_is_not_the_cause():
    lost = {"status": "failed", "kind": "peer", "reason": "lost its connection"}
    broken = {"status": "failed", "kind": "nan", "reason": "NaN"}
    ranks = [RankFacts(0, lost, 1, 10.0), RankFacts(1, broken, 1, 13.0)]
    assert judge(ranks, None, None, 5.0).rank == 1
    alone = [RankFacts(0, lost, 1, 10.0), RankFacts(1, None, None, None)]
    assert judge(alone, None, None, 5.0).rank == 0
    killed = [RankFacts(0, broken, 1, 10.0), RankFacts(1, lost, -signal.SIGKILL, 10.5)]
    assert judge(killed, None, None, 5.0).rank == 1


def test_the_log_of_a_rank_is_shown_only_where_the_cause_may_be_in_it(job):
    said = 'print("the last line", flush=True)\n'
    killed = job.run(said + "os.kill(os.getpid(), signal.SIGKILL)\n")
    assert (killed.kind, killed.log_tail) == ("killed", ())
    words = 'events.write("end", status="failed", kind="{kind}", reason="it failed"); sys.exit(1)\n'
    disk = job.run(said + words.format(kind="disk"))
    assert (disk.kind, disk.log_tail) == ("disk", ())
    error = job.run(said + words.format(kind="error"))
    assert error.log_tail[-1] == "the last line"


def test_a_full_disk_that_a_rank_names_is_hinted_at(job):
    reason = "no space left on /disk/__0_0.distcp while saving step 40"
    outcome = job.run(f'events.write("end", status="failed", kind="disk", reason="{reason}"); sys.exit(1)\n')
    assert outcome.reason == f"rank 0 failed: {reason}" and "is full: free some space" in outcome.hint


def test_a_rank_whose_log_somebody_has_removed_is_judged_like_any(job):
    outcome = job.run("""
for log in (here / "runs").rglob("rank*.log"):
    log.unlink()
sys.exit(3)
""")
    assert (outcome.status, outcome.reason, outcome.log_tail) == (
        "failed",
        "rank 0 ended with exit code 3",
        (),
    )
    assert read_state(job.folder.state_file).status == "failed"
