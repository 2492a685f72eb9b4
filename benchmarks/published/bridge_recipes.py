"""What Megatron-Bridge's recipes for performance set beside the layout that its tables print.

Read in ``scripts/performance`` of Megatron-Bridge: for release 25.09 at commit cac49dcd7, for 25.11 at tag
v0.2.0, for 26.02 at v0.3.0, for 26.02.01 at v0.3.1 and, where the table's layout is still the older one, at
v0.3.0, for 26.04 at v0.4.0. Of a table's row that no recipe of its release has the layout of, the nearest
recipe of the model on that GPU is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

EVERY = ("25.09", "25.11", "26.02", "26.02.01", "26.04")


@dataclass(frozen=True)
class Recipe:
    """Of one model on some GPUs in some releases.

    Attributes:
        recompute: Modules computed again, of ``recompute_modules``. ``mlp`` is that of dense layers.
        sent_once: DeepEP or HybridEP dispatch the tokens; otherwise Megatron's all-to-all does.
        overlap_ep: ``overlap_moe_expert_parallel_comm``.
    """

    recompute: tuple[str, ...] = ()
    sent_once: bool = False
    overlap_ep: bool = False


PLAIN = Recipe()
# The first line that has the model, GPU and release counts. "tokendrop" needs Megatron's all-to-all.
RECIPES: tuple[tuple[str, tuple[str, ...], tuple[str, ...], Recipe], ...] = (
    ("DeepSeekV3", ("h100",), EVERY, Recipe(("mla_up_proj", "mlp"), sent_once=True, overlap_ep=True)),
    ("DeepSeekV3", ("gb200",), ("25.09",), Recipe(("mla_up_proj", "mlp", "moe_act"))),
    ("DeepSeekV3", ("b200",), ("25.09",), PLAIN),
    ("DeepSeekV3", ("b200",), ("25.11",), Recipe(("mla_up_proj",))),
    ("DeepSeekV3", ("gb300",), ("25.11",), Recipe(("moe_act",), sent_once=True)),
    ("DeepSeekV3", ("gb200",), ("26.04",), Recipe(("mlp",), sent_once=True)),
    ("DeepSeekV3", ("b200", "b300", "gb200", "gb300"), EVERY, Recipe(("mla_up_proj",), sent_once=True)),
    ("Kimi_K2", ("gb300",), EVERY, Recipe(("mla_up_proj",), sent_once=True)),
    ("GPT OSS 120B", ("h100",), EVERY, Recipe(("layernorm", "moe_act"))),
    (
        "GPT OSS 120B",
        ("gb200",),
        ("26.04",),
        Recipe(("layernorm", "moe_act"), sent_once=True, overlap_ep=True),
    ),
    ("GPT OSS 120B", ("gb200",), EVERY, Recipe(("layernorm", "moe_act"))),
    ("GPT OSS 120B", ("b200",), ("25.11", "26.02"), Recipe(("layernorm", "moe_act"))),
    ("GPT OSS 120B", ("b200",), EVERY, Recipe(("layernorm", "moe_act"), sent_once=True)),
    ("GPT OSS 120B", ("b300",), ("26.02.01", "26.04"), Recipe(sent_once=True)),
    ("Qwen3_30B_a3B", ("b200", "b300", "h100", "gb200"), ("25.09",), PLAIN),
    ("Qwen3_30B_a3B", ("h100",), ("25.11",), Recipe(overlap_ep=True)),
    ("Qwen3_30B_a3B", ("h100",), ("26.02", "26.02.01"), Recipe(sent_once=True, overlap_ep=True)),
    ("Qwen3_30B_a3B", ("b200",), ("25.11", "26.02"), PLAIN),
    ("Qwen3_30B_a3B", ("h100", "b200", "b300", "gb200", "gb300"), EVERY, Recipe(sent_once=True)),
    ("Qwen3_235B_a22B", ("b200", "h100", "gb200"), ("25.09",), PLAIN),
    ("Qwen3_235B_a22B", ("h100",), EVERY, Recipe(overlap_ep=True)),
    ("Qwen3_235B_a22B", ("b200",), ("25.11",), Recipe(overlap_ep=True)),
    ("Qwen3_235B_a22B", ("b300",), ("26.02", "26.02.01"), Recipe(overlap_ep=True)),
    ("Qwen3_235B_a22B", ("gb200", "gb300"), EVERY, Recipe(sent_once=True)),
)


def recipe_of(model: str, gpu: str, release: str) -> Recipe:
    """The recipe of a table's row; the plain one where none says otherwise, as for all dense models.

    Args:
        model: As the tables write it, without what stands in parentheses.
        gpu: Preset of ``conf/cluster``.
        release: Of the table.
    """
    for name, gpus, releases, recipe in RECIPES:
        if name == model and gpu in gpus and release in releases:
            return recipe
    return PLAIN
