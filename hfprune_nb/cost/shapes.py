"""Random models and windows in the shapes of the paper's models: cost depends on shapes only."""

import numpy as np
import torch

from hfprune_nb.errors import UserError

# Architectures by name, for measurements without a hub: cost depends on shapes, not on weights. From public configurations.
_LLAMA = {"rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2}
_QWEN = {"rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2}
_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)
SHAPES = {
    "tiny": ("llama", (384, 32, 64, 3, 4, 2, True), _LLAMA),
    "smollm2-135m": ("llama", (49152, 576, 1536, 30, 9, 3, True), _LLAMA),
    "llama-3.2-1b": ("llama", (128256, 2048, 8192, 16, 32, 8, True), _LLAMA),
    "llama-3.2-3b": ("llama", (128256, 3072, 8192, 28, 24, 8, True), _LLAMA | {"head_dim": 128}),
    "llama-2-7b": ("llama", (32000, 4096, 11008, 32, 32, 32, False), _LLAMA),
    "qwen2.5-1.5b": ("qwen2", (151936, 1536, 8960, 28, 12, 2, True), _QWEN),
    "qwen2.5-7b": ("qwen2", (152064, 3584, 18944, 28, 28, 4, False), _QWEN),
    "qwen3-1.7b": ("qwen3", (151936, 2048, 6144, 28, 16, 8, True), _QWEN | {"head_dim": 128}),
}


def random_model(shape: str, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0):
    """Return a frozen model of the architecture `shape` (a name in SHAPES) with random weights.

    Raises UserError for an unknown name.
    """
    if shape not in SHAPES:
        raise UserError(f"shape '{shape}' is unknown: choose one of {', '.join(SHAPES)}.")
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, sizes, others = SHAPES[shape]
    config = AutoConfig.for_model(kind, **dict(zip(_FIELDS, sizes, strict=True)), **others, max_position_embeddings=4096)
    with torch.random.fork_rng(range(torch.cuda.device_count())), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def random_windows(model, n_windows: int, seq_len: int, seed: int = 0) -> np.ndarray:
    """Return windows of random tokens of the model's vocabulary, (n_windows, seq_len): cost does not depend on the text."""
    return np.random.default_rng(seed).integers(0, model.config.get_text_config().vocab_size, (n_windows, seq_len))
