"""Fixtures that several test files share: tiny random models of every supported architecture, and the registry tier."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import of datasets or transformers: no test asks the hub
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import pytest

REGISTRY_ASSETS = ("smollm2-135m", "c4-calibration", "c4-held-out", "wikitext-2", "benchmarks", "crows-pairs", "truthfulqa")
# Several minutes each, and a file's tests stay on one worker: what starts last must not be the longest.
LONGEST_FILES = ("test_studies.py", "test_smoke_study.py", "test_faults.py", "test_extending.py")


GPU = Path(__file__).parent / "gpu"


def pytest_addoption(parser):
    group = parser.getgroup("cuda", "the tests of the marker cuda")
    group.addoption("--device", default="cuda", help="cuda, cuda:N or cpu (default: cuda)")
    group.addoption("--cuda-report", default="cuda_report.json", metavar="FILE", help="what they find (cuda_report.json)")


def pytest_ignore_collect(collection_path, config):
    # Where they run, what the other tests import need not be installed.
    if config.option.markexpr == "cuda" and not (collection_path.is_relative_to(GPU) or GPU.is_relative_to(collection_path)):
        return True
    return None


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST_FILES)


@pytest.fixture(scope="session")
def registry():
    """Fetch what the second tier of tests needs; skip, and say so in capitals, only where the registry is out of reach."""
    from hfprune_nb.errors import UserError
    from hfprune_nb.inputs import assets

    try:
        for name in REGISTRY_ASSETS:
            if not assets.is_cached(name):
                assets.fetch(name, progress=False)
    except UserError as error:
        pytest.skip(f"PACKAGE REGISTRY NOT REACHED, the real-model tests did not run: {error}")


def _configurations():
    from transformers import GemmaConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

    return {
        "llama": (LlamaConfig, {}),
        "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
        "llama-biases": (LlamaConfig, {"mlp_bias": True, "attention_bias": True}),
        "mistral": (MistralConfig, {"sliding_window": None}),
        "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
        "qwen3": (Qwen3Config, {"head_dim": 8}),
        "gemma": (GemmaConfig, {"head_dim": 8}),
        "phi3": (Phi3Config, {"pad_token_id": 0}),
    }


ARCHITECTURES = ("llama", "llama-tied", "llama-biases", "mistral", "qwen2", "qwen3", "gemma", "phi3")


@pytest.fixture
def tiny():
    """Return a function that makes a frozen tiny random model: tiny(architecture, dtype="float32", **changes)."""
    import torch
    from transformers import AutoModelForCausalLM

    def make(architecture="llama", dtype="float32", **changes):
        kind, extra = _configurations()[architecture]
        sizes = {
            "vocab_size": 61,
            "hidden_size": 16,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.3,
        }
        config = kind(**(sizes | extra | changes))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).float()
            for parameter in model.parameters():  # biases start at zero, which would hide a mistake in slicing them
                if parameter.ndim == 1:
                    parameter.data.add_(0.1 * torch.randn_like(parameter))
        return model.to(getattr(torch, dtype)).eval().requires_grad_(False)

    return make


@pytest.fixture
def token_windows():
    """Nine windows of twelve random tokens of the tiny models' vocabulary."""
    return np.random.default_rng(0).integers(0, 61, (9, 12))
