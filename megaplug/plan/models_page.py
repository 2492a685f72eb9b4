"""Writes docs/models.md, every model with its true size: ``python -m megaplug.plan.models_page``.

The table is counted from ``conf/model``; a test compares it with the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from megaplug.job.checks import job_shape
from megaplug.job.compose import ConfigSource, compose_job, conf_dir, group_options
from megaplug.plan.parameters import active_parameters, total_parameters
from megaplug.runs.atomic import write_text_atomic

RENEW = "python -m megaplug.plan.models_page"
# For models that leave the vocabulary to the tokenizer: that of Llama 2.
_ASSUMED_VOCABULARY = 32000

_HEAD = f"""\
# Models

Written by `{RENEW}`; the table is counted from the files.

Every file of `conf/model`, chosen with `model=<name>`. Parameters are counted with the vocabulary as it is,
before Megatron pads it; of a mixture of experts, *active* are those that one token passes. *Tokens* is
`model.seq_length`, the length of a training sequence; a longer context that a model was published for stands
in its file.

A model with experts brings them: `model=mixtral_8x7b` takes `moe=mixtral` by itself, and a typed `moe=...`
takes its place.

```bash
python launch/train.py model=mixtral_8x7b topology=tp2_ep2 train.micro_batch_size=1 --cfg job
```

| model | parameters | active | tokens | vocabulary | what it is |
|---|--:|--:|--:|--:|---|
"""

_FOOT = f"""
\\* The tokenizer decides; counted with {_ASSUMED_VOCABULARY:,}.

## RoPE scaling

One of three, each with logits equal to those of Hugging Face's implementation by test:

* Llama 3.1: `use_rope_scaling` and `rope_scaling_factor`; 8,192 original tokens and the bounds 1 and 4 are
  built into Megatron.
* Linear: `rotary_seq_len_interpolation_factor`.
* YaRN: `model.position_embedding_type=yarn`, `rotary_scaling_factor`, `yarn_...`, `mscale` and
  `mscale_all_dim`.

Under latent attention it is `model.rope_type=rope` or `model.rope_type=yarn`, the latter with 4,096 original
tokens and the bounds 32 and 1, which is what DeepSeek was published with; Megatron has no argument for
others.

## Latent attention

`model.multi_latent_attention=true` builds DeepSeek's attention (arXiv 2405.04434) from Megatron's own, with
torch's fused kernels. They take heads of one size only, so the values are filled up with zeros to the size
of the keys: half as many operations again in their product at 192 and 128 channels. `attention=local` has
no such heads and is refused.

Not built: DeepSeek-V3's multi-token prediction; GPT-OSS's sinks and its clamped gate (its sizes are there to
be planned with); hybrids with Mamba layers such as Nemotron 3 Nano and Super, which are no `GPTModel`. A
sliding window (`megatron.window_size`, as in Mistral v0.1) is refused by `attention=flash`; `attention=te`
has it on CUDA.
"""


def page() -> str:
    """The whole page."""
    return _HEAD + "".join(f"{row}\n" for row in _rows()) + _FOOT


def _rows() -> Iterator[str]:
    for name in group_options(ConfigSource())["model"]:
        job = compose_job([f"model={name}"])
        known = job.model.vocab_size
        shape = job_shape(job, known or _ASSUMED_VOCABULARY)
        total, active = total_parameters(shape), active_parameters(shape)
        cells = (
            f"`{name}`",
            f"{total:,}" if known else f"{total:,}*",
            f"{active:,}" if active != total else "",
            f"{shape.seq_length:,}",
            f"{known:,}" if known else "*",
            _what_it_is(name),
        )
        yield f"| {' | '.join(cells)} |"


def _what_it_is(name: str) -> str:
    """The beginning of a file's first comment, up to a colon or a full stop."""
    lines = (conf_dir() / "model" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    text = " ".join(line.removeprefix("#").strip() for line in lines[:end])
    return re.split(r"[:.](?:\s|$)", text)[0]


if __name__ == "__main__":
    write_text_atomic(conf_dir().parent / "docs" / "models.md", page())
