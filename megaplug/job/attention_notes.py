"""What a person may not have meant by the attention of a job that is not wrong."""

from __future__ import annotations

from megaplug.job.attention import attention_layers, params_key
from megaplug.job.checks_attention import attention_problems
from megaplug.job.checks_values import value_problems
from megaplug.job.schema import Job
from megaplug.layers import registry
from megaplug.layers.registry.sequence_cost import SequenceSizes


def attention_notes(job: Job) -> list[str]:
    """A line for what each plugin says of its parameters, and one where no layer reads the whole sequence.

    Of a job whose sizes or parameters are wrong there is nothing to say but that.
    """
    model, layers = job.model, attention_layers(job.attention)
    notes = _position_notes(job)
    if value_problems(job) or attention_problems(job, sizes_hold=False):
        return notes
    if model.num_attention_heads % model.num_query_groups:
        return notes
    sizes = SequenceSizes(model.seq_length, model.num_attention_heads, model.num_query_groups)
    furthest = 0
    for name in layers.counts(model.num_layers):
        plugin = registry.lookup(registry.CORE_ATTENTION, name)
        params, key = layers.params_of(name), params_key(job.attention, name)
        notes += plugin.notes(sizes, params, key) if plugin.notes else ()
        furthest = max(furthest, plugin.reach(sizes.num_tokens, params) if plugin.reach else sizes.num_tokens)
    if furthest < sizes.num_tokens:
        notes.append(
            f"no layer reads further back than {furthest:,} of the {sizes.num_tokens:,} tokens: "
            "no segment is as long as model.seq_length"
        )
    return notes


def _position_notes(job: Job) -> list[str]:
    kind = job.model.position_embedding_type
    if job.megatron.get("reset_position_ids") and kind != "learned_absolute":
        return [f"megatron.reset_position_ids does nothing: only learned_absolute reads these, not {kind}"]
    return []
