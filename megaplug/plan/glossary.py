"""The words of a plan, for a person who has never used Megatron: ``--help plan`` shows them."""

from __future__ import annotations

GLOSSARY: tuple[tuple[str, str], ...] = (
    ("rank", "one process with one GPU; a job of N GPUs has the ranks 0 to N-1"),
    ("TP", "tensor parallel: the ranks that cut every matrix among them; keep them inside a node"),
    ("PP", "pipeline parallel: each stage holds some of the layers, and batches pass from stage to stage"),
    (
        "VPP",
        "virtual stages: each rank holds several pieces of the pipeline in turn, so that less of it waits",
    ),
    ("CP", "context parallel: the ranks that cut every sequence among them"),
    ("EP", "expert parallel: the ranks that share out the experts of a mixture of experts"),
    ("ETP", "expert tensor parallel: the ranks that cut every expert among them; TP where it is not given"),
    ("DP", "data parallel: whole copies of the above, each with other sequences"),
    (
        "microbatch",
        "what a rank computes at once; a step has several, and the optimizer's step ends it",
    ),
    ("weights", "the parameters that a rank holds, in the number format that it computes in"),
    ("gradients", "one number a parameter, summed over the microbatches"),
    ("optimizer", "Adam's two moments, and an fp32 copy of the weights under bf16; shared out over DP ranks"),
    ("activations", "what forward keeps for backward, of all microbatches that are under way at once"),
    ("logits", "the scores of every word of the vocabulary, on the last stage only"),
    ("workspace", "buffers that live for a moment: gathered inputs, communication, kernels"),
    ("usable", "memory of the device less what its driver and libraries hold"),
    ("computing", "forward and backward of the busiest stage, with what recomputation computes again"),
    (
        "bubble",
        "waiting while the pipeline fills and empties: (PP-1)/(VPP*microbatches+PP-1) if all stages were "
        "equal; the time's own share is that of the stages as they are",
    ),
    ("tokens to experts", "traffic between the ranks of EP, which send each token to its experts and back"),
    ("traffic", "only what nothing hides; communication beside computing costs no time"),
    ("MFU", "model FLOPs a second as a part of what the GPU can do at most; recomputation does not count"),
    (
        "causal",
        "attention counts as a causal mask leaves it; `full` counts the whole square, as many papers do",
    ),
    ("modelled", "computed from formulas whose constants are fitted to published measurements"),
    ("counted", "exact"),
)
"""Word and meaning, in the order of the plan."""
