"""Small models of real proportions, on the device of the tier and, as their own reference, in float64 on the CPU.

Needs torch, transformers, lm-eval[hf] and pytest: no registry, no notebook, nothing else of what the kit needs.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from gpu.report import Report
from hfprune_nb import models
from hfprune_nb.errors import UserError
from hfprune_nb.models import tiny as tokenizer_source

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.1,  # logits as far apart as those of a trained model, so that no criterion is near its flat start
}


def pytest_collection_finish(session):
    chosen = [item for item in session.items if item.get_closest_marker("cuda")]
    if not chosen or session.config.option.collectonly:
        return
    try:
        device = models.resolve_device(session.config.getoption("device"))
    except UserError as error:
        raise pytest.UsageError(f"the tests of the marker cuda need a GPU, or --device cpu: {error}") from None
    session.config.pluginmanager.register(Report(device, Path(session.config.getoption("cuda_report"))))


@pytest.fixture(scope="session")
def device(pytestconfig):
    """The device that is tested."""
    return models.resolve_device(pytestconfig.getoption("device"))


@pytest.fixture(scope="session")
def network(device):
    """Return a function that makes a frozen random model: network(dtype="float32", on=device, rounded=dtype, **changes).

    rounded : the dtype to whose precision the weights are rounded first: a reference in float64 has those of what it is held to.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    def make(dtype="float32", on=device, rounded=None, attention="sdpa", **changes):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(
                LlamaConfig(**SIZES | changes), dtype=torch.float32, attn_implementation=attention
            )
        for parameter in model.parameters():  # alone: rotary frequencies are float32 in every model
            parameter.data = parameter.data.to(getattr(torch, rounded or dtype)).to(getattr(torch, dtype))
        return model.to(on).eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def windows():
    """Six windows of 64 random tokens."""
    return np.random.default_rng(0).integers(0, SIZES["vocab_size"], (6, 64))


@pytest.fixture(scope="session")
def checkpoint(network, tmp_path_factory):
    """A folder with such a model, and a tokenizer for it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer_source.write(folder)
    network(on="cpu", vocab_size=len(models.tokenizer(folder))).save_pretrained(folder)
    return folder
