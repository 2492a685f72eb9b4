"""The machines of a plan: every preset is whole, `auto` is the GPU that is here, nonsense is refused."""

from __future__ import annotations

import pytest

from megaplug.errors import UserError
from megaplug.job.checks import check
from megaplug.job.compose import compose_job
from megaplug.plan import cluster as clusters
from megaplug.plan.cluster import cluster_of, cluster_preset, preset_names, preset_of_gpu


def test_the_machines_that_people_ask_for_are_there():
    known = {"a100_80gb", "h100", "h200", "b200", "gb200", "gb300", "b300", "rtx4090", "card_64gb", "cpu2"}
    assert known <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_the_same_with_hydra_and_without(name):
    job = compose_job([f"cluster={name}"])
    assert check(job) == []
    cluster = cluster_of(job.cluster)
    assert cluster == cluster_preset(name)
    assert cluster.name == cluster.constants == name
    assert 0 < cluster.usable_memory < cluster.memory
    assert min(cluster.memory_bandwidth, cluster.link_bandwidth, cluster.network_bandwidth) > 0


def test_figures_are_in_si_units():
    h100 = cluster_preset("h100")
    assert h100.memory == pytest.approx(81_559 * 2**20, rel=1e-3)
    assert h100.peak_flops["bf16"] == pytest.approx(989.4e12)
    assert h100.network_bandwidth * 8 == 400e9


@pytest.mark.parametrize(
    ("gpu", "preset"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100_80gb"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA GB300", "gb300"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_a_gpu_is_known_by_the_name_that_its_driver_gives(gpu, preset):
    assert preset_of_gpu(gpu) == preset
    assert cluster_of(compose_job([]).cluster, gpu) == cluster_preset(preset)


@pytest.mark.parametrize("gpu", ["NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "NVIDIA T4"])
def test_another_gpu_is_not_taken_for_one_of_them(gpu):
    with pytest.raises(UserError, match="no preset") as caught:
        cluster_of(compose_job([]).cluster, gpu)
    assert gpu in caught.value.message and "cluster=h100" in caught.value.hint


def test_without_a_gpu_it_is_two_cores_and_a_typed_key_holds():
    here = cluster_of(compose_job(["cluster.memory_gib=4", "cluster.peak_tflops={fp32: 1}"]).cluster)
    assert (here.name, here.device, here.memory) == ("cpu2", "cpu", 4 * clusters.GIB)
    assert here.peak_flops == {"fp32": 1e12, "bf16": cluster_preset("cpu2").peak_flops["bf16"]}


@pytest.mark.parametrize(
    ("words", "domain"),
    [
        (["cluster=h100"], 8),
        (["cluster=h100", "cluster.gpus_per_node=4"], 4),
        (["cluster=h100", "cluster.gpus_per_node=4", "cluster.link_domain=8"], 8),
        (["cluster=gb200", "cluster.gpus_per_node=8"], 72),
        (["cluster.gpus_per_node=16"], 16),
    ],
)
def test_links_join_the_gpus_of_a_machine_where_nothing_else_is_said(words, domain):
    assert cluster_of(compose_job(words).cluster).link_domain == domain


@pytest.mark.parametrize(
    ("name", "meant"), [("foo", ""), ("h10", "did you mean h100?"), ("h100_fp8", "did you mean h100_fp8_")]
)
def test_constants_that_are_nowhere_are_refused(name, meant):
    with pytest.raises(UserError, match="no constants") as caught:
        cluster_of(compose_job(["cluster=h100", f"cluster.constants={name}"]).cluster)
    assert meant in caught.value.hint and "a100_80gb" in caught.value.hint


@pytest.mark.parametrize("name", ["h200", "a100_80gb", "h100_fp8_bridge-25.09"])
def test_constants_of_a_gpu_or_of_a_set_are_taken(name):
    assert cluster_of(compose_job(["cluster=h100", f"cluster.constants={name}"]).cluster).constants == name


@pytest.mark.parametrize(
    ("word", "key", "said"),
    [
        ("cluster.memory_gib=0", "cluster.memory_gib", "above 0"),
        ("cluster.gpus_per_node=-8", "cluster.gpus_per_node", "above 0"),
        ("cluster.price_per_gpu_hour=-1", "cluster.price_per_gpu_hour", "not be negative"),
        ("cluster.link_gbps=null", "cluster.link_gbps", "cannot be null"),
        ("cluster.reserved_gib=90", "cluster.reserved_gib", "leave nothing"),
        ("cluster.device=gpu", "cluster.device", "cannot be 'gpu'"),
        ("cluster.peak_tflops.bf16=0", "cluster.peak_tflops.bf16", "above 0"),
        ("cluster.peak_tflops.fp4=9000", "cluster.peak_tflops.fp4", "no number format"),
    ],
)
def test_machines_that_cannot_be_are_refused(word, key, said):
    (problem,) = check(compose_job(["cluster=h100", word]))
    assert problem.key == key and said in problem.message
