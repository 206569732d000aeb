"""Models: loading, what can be removed from them, their head, and hooks."""

from hfprune_nb.models.limits import check_context, check_tokens, context_length
from hfprune_nb.models.lm_head import Head, final_hidden, head, matmul_precision
from hfprune_nb.models.loading import (
    ATTENTIONS,
    DTYPES,
    TINY,
    aliases,
    configuration,
    from_pretrained,
    load,
    notes,
    resolve_device,
    resolve_dtype,
    tokenizer,
)
from hfprune_nb.models.probe import agree, check_groups, check_neurons, check_recomputation, reads_packed, widened
from hfprune_nb.models.units import (
    AttentionGroups,
    GatedMLP,
    attention_groups,
    count_parameters,
    gated_mlps,
    kept_indices,
    set_groups,
    weights_digest,
)

__all__ = [
    "ATTENTIONS",
    "DTYPES",
    "TINY",
    "AttentionGroups",
    "GatedMLP",
    "Head",
    "agree",
    "aliases",
    "attention_groups",
    "check_context",
    "check_groups",
    "check_neurons",
    "check_recomputation",
    "check_tokens",
    "configuration",
    "context_length",
    "count_parameters",
    "final_hidden",
    "from_pretrained",
    "gated_mlps",
    "head",
    "kept_indices",
    "load",
    "matmul_precision",
    "notes",
    "reads_packed",
    "resolve_device",
    "resolve_dtype",
    "set_groups",
    "tokenizer",
    "weights_digest",
    "widened",
]
