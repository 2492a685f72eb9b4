"""A layout that names the layers of every virtual stage, as Megatron deals them out."""

from __future__ import annotations

import pytest

from megaplug.errors import UserError
from megaplug.topology import LaidOutTopology, layer_ids
from megaplug.topology.stages import layer_problems, layers_of_stage

# DeepSeek-V3 on two stages of eight chunks: the first chunk after the embedding, the last before the loss.
CHUNKS = (4, *[4] * 14, 1)


def topology(**changes) -> LaidOutTopology:
    values = {"tp": 1, "pp": 2, "vpp": 8, "cp": 1, "ep": 1, "etp": 1, "dp": 1, "world_size": 2}
    return LaidOutTopology(**{**values, "layout": CHUNKS, **changes})


def test_chunks_go_round_the_stages():
    laid_out = topology()
    assert layer_problems(laid_out, 61) == []
    assert layers_of_stage(laid_out, 61) == [32, 29]
    assert layer_ids(laid_out, 61, 0)[:2] == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert layer_ids(laid_out, 61, 1)[-2:] == [[52, 53, 54, 55], [60]]
    held = sorted(layer for stage in (0, 1) for chunk in layer_ids(laid_out, 61, stage) for layer in chunk)
    assert held == list(range(61))


def test_layers_lie_where_megatrons_layout_puts_them(monkeypatch):
    from megatron.core import parallel_state
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    monkeypatch.setattr(parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: 8)
    theirs = PipelineParallelLayerLayout("Et*4|(t*4|)*14tL", 2)
    for stage in range(2):
        for chunk, ours in enumerate(layer_ids(topology(), 61, stage)):
            assert ours == theirs.get_layer_id_list(LayerType.decoder, chunk, pp_rank=stage)


@pytest.mark.parametrize("changes", [{"pp": 4}, {"layout": (4,) * 16}])
def test_a_layout_of_another_model_or_pipeline_is_refused(changes):
    with pytest.raises(UserError, match=r"stages with 6[14] layers are named"):
        layers_of_stage(topology(**changes), 61)
