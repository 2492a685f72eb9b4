"""The judgement on a job, without any process."""

from __future__ import annotations

import signal

import pytest

from megaplug.launchers.verdict import RankFacts, Stop, judge

_DONE = {"status": "finished"}


def _judge(*ranks: RankFacts, stop_signal=None, ended=None):
    return judge(ranks, stop_signal and Stop(stop_signal, 1.0), ended, 5.0)


def test_one_rank_without_an_end_spoils_a_finished_job():
    outcome = _judge(RankFacts(0, _DONE, 0, None), RankFacts(1, None, -11, 10.0))
    assert (outcome.status, outcome.rank, outcome.exit_code) == ("failed", 1, 1)
    assert "SIGSEGV" in outcome.reason


def test_stopped_outweighs_finished():
    assert (
        _judge(RankFacts(0, _DONE, 0, None), RankFacts(1, {"status": "stopped"}, 0, None)).status == "stopped"
    )


@pytest.mark.parametrize(
    ("code", "moment", "first"),
    [
        (-signal.SIGKILL, 10.5, 1),  # its peer saw the closed connection before we saw the death
        (-signal.SIGKILL, 12.0, 0),  # long after: a consequence
        (-signal.SIGABRT, 10.5, 0),  # how a collective says that its peer is gone
        (1, 10.5, 0),
        (1, 9.5, 1),
    ],
)
def test_the_first_failure(code, moment, first):
    outcome = _judge(RankFacts(0, {"status": "failed"}, 1, 10.0), RankFacts(1, None, code, moment))
    assert outcome.rank == first


def test_sigterm_is_no_failure_where_we_sent_it():
    facts = RankFacts(0, None, -signal.SIGTERM, 1.0)
    assert _judge(facts, stop_signal=signal.SIGINT).status == "stopped"
    assert _judge(facts).status == "failed"


def test_whoever_fails_because_sigterm_has_ended_a_starting_peer_has_not_failed():
    gone = RankFacts(1, None, -signal.SIGTERM, 3.0)  # seen after its peer has told of it
    assert _judge(RankFacts(0, None, 1, 2.0), gone, stop_signal=signal.SIGINT).status == "stopped"
    assert _judge(RankFacts(0, None, 1, 0.5), gone, stop_signal=signal.SIGINT).rank == 0
    lost = RankFacts(0, {"status": "failed", "kind": "peer"}, 1, 0.9)  # clocks differ a little
    assert _judge(lost, gone, stop_signal=signal.SIGINT).status == "stopped"
    assert _judge(RankFacts(0, None, -signal.SIGSEGV, 2.0), gone, stop_signal=signal.SIGINT).rank == 0


def test_a_rank_that_fails_while_stopping_is_a_failure():
    outcome = _judge(RankFacts(0, None, 3, 1.0), stop_signal=signal.SIGTERM)
    assert (outcome.status, outcome.exit_code) == ("failed", 1)
