"""The pipeline's order is Megatron's own, its times obey what waits for what, closed forms follow."""

from __future__ import annotations

from itertools import pairwise, product, takewhile
from types import SimpleNamespace

import pytest

from megaplug.plan.in_flight import held_microbatches
from megaplug.plan.schedule import Pass, forward_order, passes, simulate, warmup_passes
from megaplug.plan.workload import Workload
from megaplug.topology import Batch, ModelShape, Topology

# Stages, microbatches, chunks; interleaving needs a multiple of the group.
PLAIN = list(product((1, 2, 3, 4, 8, 16), (1, 2, 3, 7, 16, 32)))
INTERLEAVED = [(p, m * p, v) for p, m, v in product((2, 3, 4, 8), (1, 2, 5), (2, 3, 5))]


def uniform(kind, num_stages, num_microbatches, num_chunks=1, group=None, forward=1.0, backward=2.0):
    return simulate(
        kind,
        [[forward / num_chunks] * num_chunks] * num_stages,
        [[backward / num_chunks] * num_chunks] * num_stages,
        num_microbatches,
        group=group,
    )


def megatron_counts(num_stages, stage, num_microbatches, num_chunks, group):
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    communicator = SimpleNamespace(
        pp_group=SimpleNamespace(size=lambda: num_stages, rank=lambda: stage),
        virtual_pipeline_model_parallel_size=num_chunks if num_chunks > 1 else None,
    )
    return get_pp_rank_microbatches(num_microbatches, num_chunks, group, p2p_communicator=communicator)


def groups_of(num_stages, num_microbatches):
    """Legal group sizes: the last group is whole or no smaller than the pipeline."""
    return [
        group
        for group in range(num_stages, num_microbatches + 1)
        if num_microbatches % group == 0 or num_microbatches % group >= num_stages
    ]


def test_the_order_of_every_stage_is_megatrons_own():
    from megatron.core.pipeline_parallel.schedules import get_schedule_table
    from megatron.core.transformer.cuda_graphs import convert_schedule_table_to_order

    compared = 0
    for num_stages, num_microbatches, num_chunks in INTERLEAVED + [(p, m, 1) for p, m in PLAIN if p > 1]:
        for group in groups_of(num_stages, num_microbatches) if num_chunks > 1 else [num_stages]:
            table = get_schedule_table(num_microbatches, num_chunks, group)
            assert forward_order(num_microbatches, num_chunks, group) == table
            for stage in range(num_stages):
                sizes = (num_stages, stage, num_microbatches, num_chunks, group)
                _, _, warmup, _ = megatron_counts(*sizes)
                assert warmup_passes(*sizes) == warmup
                kind = "interleaved" if num_chunks > 1 else "1f1b"
                ours = passes(kind, *sizes)
                # Megatron writes chunk c forward as c + 1 and backward as -(c + 1).
                written = [(done.chunk + 1) * (1 if done.forward else -1) for done in ours]
                assert written == convert_schedule_table_to_order(warmup, num_chunks, table)
                for forward in (True, False):
                    own = [done.microbatch for done in ours if done.forward == forward]
                    assert own == [microbatch for microbatch, _ in table]
                compared += 1
    assert compared > 1000


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("1f1b", (4, 8)),
        ("1f1b", (8, 3)),
        ("interleaved", (4, 8, 3)),
        ("interleaved", (3, 8, 2, 4)),
        ("gpipe", (4, 6)),
    ],
)
def test_events_never_overlap_on_a_stage_and_wait_for_what_they_need(kind, sizes):
    num_stages, num_microbatches, num_chunks, *group = (*sizes, 1) if len(sizes) == 2 else sizes
    forward = [
        [1.0 + 0.1 * stage + 0.3 * chunk for chunk in range(num_chunks)] for stage in range(num_stages)
    ]
    backward = [[2.0 * duration for duration in of_stage] for of_stage in forward]
    ran = simulate(
        kind, forward, backward, num_microbatches, group=group[0] if group else None, transfer=0.25
    )
    ends = {(event.stage, event.done): event.end for events in ran.events for event in events}
    assert len(ends) == 2 * num_stages * num_microbatches * num_chunks
    for stage, events in enumerate(ran.events):
        assert all(before.end <= after.start for before, after in pairwise(events))
        for event in events:
            done = event.done
            duration = (forward if done.forward else backward)[stage][done.chunk]
            assert event.end - event.start == pytest.approx(duration)
            # The model's layers in order: chunk by chunk over the stages.
            place = done.chunk * num_stages + stage
            before = place - 1 if done.forward else place + 1
            if not done.forward:
                assert event.start >= ends[stage, Pass(done.microbatch, done.chunk, True)]
            if 0 <= before < num_stages * num_chunks:
                chunk, neighbour = divmod(before, num_stages)
                wait = 0.25 if neighbour != stage else 0.0
                assert (
                    event.start >= ends[neighbour, Pass(done.microbatch, chunk, done.forward)] + wait - 1e-9
                )


@pytest.mark.parametrize("backward", [1.0, 2.0, 3.0])
def test_bubbles_of_equal_stages_are_the_closed_forms(backward):
    for num_stages, num_microbatches in PLAIN:
        expected = (num_stages - 1) / num_microbatches
        for kind in ("1f1b", "gpipe"):
            ran = uniform(kind, num_stages, num_microbatches, backward=backward)
            assert ran.bubble_of_ideal == pytest.approx(expected)
            assert ran.idle == pytest.approx((num_stages - 1) / (num_microbatches + num_stages - 1))
    for num_stages, num_microbatches, num_chunks in INTERLEAVED:
        ran = uniform("interleaved", num_stages, num_microbatches, num_chunks, backward=backward)
        waited = (num_stages - 1) / (num_chunks * num_microbatches)
        assert ran.bubble_of_ideal == pytest.approx(waited)


def test_microbatches_in_flight_are_the_closed_forms():
    for num_stages, num_microbatches in PLAIN:
        plain, gpipe = (uniform(kind, num_stages, num_microbatches) for kind in ("1f1b", "gpipe"))
        for stage in range(num_stages):
            assert plain.in_flight(stage) == min(num_microbatches, num_stages - stage)
            assert gpipe.in_flight(stage) == num_microbatches
    for num_stages, num_microbatches, num_chunks in INTERLEAVED:
        ran = uniform("interleaved", num_stages, num_microbatches, num_chunks)
        for stage in range(num_stages):
            behind = 2 * (num_stages - stage - 1)
            expected = behind + (num_chunks - 1) * num_stages + 1
            assert ran.in_flight(stage) == min(expected, num_chunks * num_microbatches)


def test_one_slow_stage_is_what_all_wait_for():
    ran = simulate("1f1b", [[1.0], [3.0], [1.0]], [[2.0], [6.0], [2.0]], 10)
    # The first stage fills and empties; while the third has a microbatch the slow one runs the next forward.
    assert ran.makespan == pytest.approx(1 + 10 * 9 + 2)
    assert ran.busy == pytest.approx([30, 90, 30])


def test_a_transfer_is_waited_for_while_the_pipeline_fills_and_empties():
    without, with_transfer = (
        simulate("gpipe", [[1.0]] * 4, [[2.0]] * 4, 8, transfer=transfer) for transfer in (0.0, 0.5)
    )
    assert with_transfer.makespan - without.makespan == pytest.approx(2 * 3 * 0.5)


def test_an_order_that_cannot_end_says_who_waits():
    # A group below the number of stages: the last stage's first backward pass comes before its turn.
    with pytest.raises(ValueError, match="wait for each other"):
        uniform("interleaved", 4, 8, 2, group=1)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="none of 1f1b"):
        passes("zigzag", 2, 0, 4)
    with pytest.raises(ValueError, match="one chunk"):
        passes("1f1b", 2, 0, 4, 2)


@pytest.mark.parametrize(
    ("kind", "cases"), [("1f1b", [(p, m, 1) for p, m in PLAIN]), ("interleaved", INTERLEAVED)]
)
def test_the_memory_model_holds_the_microbatches_that_the_schedule_does(kind, cases):
    """`held_microbatches` is a closed form; here every pass before the first backward one is counted."""
    for num_stages, num_microbatches, num_chunks in cases:
        vpp = num_chunks if kind == "interleaved" else None
        mesh = Topology(1, num_stages, vpp, 1, 1, 1, 1, num_stages)
        shape = ModelShape(num_stages * num_chunks, 64, 64, 4, 4, None, 64, 128)
        load = Workload(mesh, shape, Batch(1, num_microbatches))
        for stage in range(num_stages):
            order = passes(kind, num_stages, stage, num_microbatches, num_chunks)
            before = list(takewhile(lambda done: done.forward, order))
            held = [sum(done.chunk == chunk for done in before) for chunk in range(num_chunks)]
            assert held_microbatches(load, stage) == held
