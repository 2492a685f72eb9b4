"""What follows from what, and where a rank sits."""

from __future__ import annotations

import pytest

from megaplug.errors import UserError
from megaplug.job.schema import TopologyConfig
from megaplug.topology import ModelShape, coordinates, rank_groups, resolve
from megaplug.topology.shape import moe_pattern


def resolved(**request):
    topology, problems = resolve(TopologyConfig(**request))
    assert problems == []
    return topology


def test_dp_follows_from_the_world_size():
    assert resolved(tp=2, pp=2, cp=2, world_size=24).dp == 3


def test_the_world_size_follows_from_the_others():
    assert resolved(tp=2, pp=3, cp=2, dp=5).world_size == 60
    assert resolved(tp=2, pp=3).world_size == 6


def test_without_dp_and_world_size_the_smallest_world_that_holds_the_experts_is_taken():
    assert resolved(ep=4).dp == 4
    assert resolved(tp=2, ep=4).world_size == 8  # etp follows tp
    assert resolved(tp=2, ep=4, etp=1).world_size == 4
    assert resolved(tp=2, pp=2, cp=2, ep=2, etp=1).dp == 1


def test_giving_both_and_wrongly_shows_the_product():
    topology, problems = resolve(TopologyConfig(tp=2, pp=2, dp=3, world_size=8))
    assert [problem.key for problem in problems] == ["topology.world_size"]
    assert "tp 2 x pp 2 x cp 1 x dp 3 = 12, but the world size is 8" in problems[0].message
    assert "topology.dp=2" in problems[0].hint and "topology.world_size=12" in problems[0].hint
    assert topology.dp == 2  # so that the other rules can be judged


def test_a_world_that_cannot_be_cut_is_named_and_has_no_dp():
    topology, problems = resolve(TopologyConfig(tp=4, world_size=6))
    assert "tp 4 x pp 1 x cp 1 = 4 does not divide the world size 6" in problems[0].message
    assert "4 or 8" in problems[0].hint
    assert topology.dp == 0


def test_sizes_below_one_are_all_named():
    topology, problems = resolve(TopologyConfig(tp=0, pp=-1, dp=0))
    assert topology is None
    assert [problem.key for problem in problems] == ["topology.tp", "topology.pp", "topology.dp"]


def test_sequence_parallelism_follows_tp_unless_it_is_said():
    assert resolved(tp=2).sequence_parallel is True
    assert resolved(tp=1).sequence_parallel is False
    assert resolved(tp=2, sequence_parallel=False).sequence_parallel is False


def test_one_virtual_stage_is_no_interleaving():
    assert resolved(pp=2, vpp=1).vpp is None
    assert resolved(pp=2, vpp=2).vpp == 2


def test_coordinates_follow_the_default_order():
    topology = resolved(tp=2, cp=2, pp=2, dp=4, ep=4, etp=1)
    for rank in range(topology.world_size):
        at = coordinates(topology, rank)
        assert rank == at["tp"] + 2 * (at["cp"] + 2 * (at["dp"] + 4 * at["pp"]))
        assert rank == at["etp"] + (at["ep"] + 4 * (at["expert_dp"] + 4 * at["pp"]))
        for name, groups in rank_groups(topology).items():
            group = next(group for group in groups if rank in group)
            if name in at:
                assert group.index(rank) == at[name]
    with pytest.raises(ValueError, match="rank 32"):
        coordinates(topology, 32)


@pytest.mark.parametrize(
    ("freq", "layers"),
    [
        (None, "1111"),
        (2, "1010"),
        ("2", "1010"),
        ("[0]+[1]*3", "0111"),
        ("([1]*1+[0])*2", "1010"),
        ("2*[1,0]", "1010"),
    ],
)
def test_moe_layer_freq_is_read_as_megatron_reads_it(freq, layers):
    assert moe_pattern(freq, 4) == tuple(flag == "1" for flag in layers)


@pytest.mark.parametrize("freq", ["", "0", -1, "[1,2,0,1]", "[1]*3", "[1]*10**9", "open('x')", "[[1]]*4"])
def test_a_moe_layer_freq_that_cannot_be_meant_is_refused(freq):
    with pytest.raises(UserError):
        moe_pattern(freq, 4)


def test_the_vocabulary_is_padded_alike_for_every_tp_that_divides_the_multiple():
    shape = ModelShape(1, 8, 8, 1, 1, 8, 8, 32001)
    assert [shape.padded_vocab_size(tp) for tp in (1, 8)] == [32128, 32128]
    assert shape.padded_vocab_size(3) == 32256
