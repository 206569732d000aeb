"""What a model can read: texts up to its context, tokens of its embedding."""

import numpy as np

from hfprune_nb.errors import UserError


def context_length(config) -> int | None:
    """Return how many tokens the model of `config` was made to read at once, None where its configuration does not say.

    Where rotary positions are stretched (YaRN), `max_position_embeddings` may be the length before or after.
    """
    config = config.get_text_config()
    context, rotary = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None) or {}
    if context and rotary.get("rope_type") in ("yarn", "linear", "dynamic"):
        context = max(context, int(rotary.get("factor", 1) * (rotary.get("original_max_position_embeddings") or context)))
    return context


def check_context(config, seq_len: int) -> None:
    """Raise UserError for windows longer than the model's context: what it says beyond that means nothing."""
    context = context_length(config)
    if context and seq_len > context:
        raise UserError(f"seq_len={seq_len} is longer than the model's context of {context} tokens: lower seq_len")


def check_tokens(config, token_ids) -> None:
    """Raise UserError for numbers that are no token ids, and for token ids that the model's embedding does not have."""
    token_ids, rows = np.asarray(token_ids), config.get_text_config().vocab_size
    if token_ids.size and token_ids.dtype.kind not in "iu":
        raise UserError(f"windows: {token_ids.dtype} values are no token ids: give whole numbers")
    if token_ids.size and int(token_ids.min()) < 0:
        raise UserError(f"windows: token id {int(token_ids.min())} is no token: leave out what is padding, or mask it")
    if token_ids.size and int(token_ids.max()) >= rows:
        raise UserError(
            f"model: its tokenizer gives token id {int(token_ids.max())} and its embedding has {rows} rows: use the tokenizer "
            "that it was trained with, or enlarge the model with resize_token_embeddings"
        )
