"""Floating-point operations of a forward and a backward pass."""


def forward_flops(config, tokens: int, seq_len: int) -> int:
    """Return the FLOPs of a forward pass over `tokens` tokens in windows of `seq_len`, logits included.

    Two per multiplication with a weight: per token and layer `2 (2 d q + 2 d k + 3 d f)`, d hidden_size, q and k the widths of
    queries and of keys, f the layer's intermediate_size; `4 s q` for attention over a window of s tokens, the masked half
    included, as FLOP counters have it; `2 d V` for the head. Norms and activation functions are left out.
    """
    layers, attention, head = _per_token(config, seq_len)
    return tokens * (sum(layers) + len(layers) * attention + head)


def backward_flops(config, tokens: int, seq_len: int) -> int:
    """Return the FLOPs of the gradients of all activations, from the logits back to the first layer's neurons.

    Once the forward products for linear maps, twice for attention; of the first layer only `down_proj` (2 d f per token).
    """
    layers, attention, head = _per_token(config, seq_len)
    first = 2 * config.hidden_size * config.per_layer_config[0].intermediate_size
    return tokens * (sum(layers[1:]) + (len(layers) - 1) * 2 * attention + first + head)


def _per_token(config, seq_len):
    d, widths = config.hidden_size, [layer.intermediate_size for layer in config.per_layer_config]
    head_dim = getattr(config, "head_dim", None) or d // config.num_attention_heads
    q, k = head_dim * config.num_attention_heads, head_dim * config.num_key_value_heads
    return [2 * (2 * d * q + 2 * d * k + 3 * d * f) for f in widths], 4 * seq_len * q, 2 * d * config.vocab_size
