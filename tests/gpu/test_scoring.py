"""The scoring engine on the device, against itself in float64 on the CPU."""

import contextlib
import itertools

import numpy as np
import pytest
import torch

from gpu.conftest import SIZES
from hfprune_nb import criteria, models
from hfprune_nb.cost.memory import peak_memory
from hfprune_nb.cost.precision import rank_correlation
from hfprune_nb.errors import UserError
from hfprune_nb.method import scoring
from hfprune_nb.method.scoring.backward import Reader

pytestmark = pytest.mark.cuda

THREE = ["one_hot_ce", "self_distillation", "entropy"]


def specs():
    """Every criterion, with as many of the combinations that its settings allow as show each choice once."""
    for name in criteria.names():
        choices, seen = {key: each.choices for key, each in criteria.create(name).settings.items() if each.choices}, set()
        for values in itertools.product(*choices.values()):
            chosen = dict(zip(choices, values, strict=True))
            with contextlib.suppress(UserError):  # combinations that mean nothing
                criteria.create(name, **chosen)
                if not seen or not seen.issuperset(chosen.items()):
                    seen |= chosen.items()
                    yield pytest.param({name: chosen}, id="-".join(map(str, (name, *values))))


def importance(model, windows, chosen, **settings):
    return scoring.score(model, windows, chosen, progress=False, **settings).importance


def error(found, expected):
    """The difference that 99 % of a layer's neurons stay below, relative to their importance plus the median; the worst layer's.

    A student without 2.5 % of its neurons may lose another one of two that are equal but for rounding: hence not all neurons.
    """
    pairs = [(one.double().cpu(), other.double().cpu()) for one, other in zip(found, expected, strict=True)]
    return max(float(((one - other).abs() / (other.abs() + other.abs().median())).quantile(0.99)) for one, other in pairs)


@pytest.mark.parametrize("spec", specs())
def test_each_criterion_is_that_of_float64_on_the_cpu(spec, network, windows, record_property):
    (variant,) = criteria.variants([spec])
    # A forward pass for each neuron: there are few.
    sizes = {"intermediate_size": 32} if variant.criterion.kind == "measured" else {}
    found = importance(network(**sizes), windows, [spec], batch_size=4)[variant.name]
    expected = importance(network("float64", "cpu", "float32", **sizes), windows, [spec], batch_size=4)[variant.name]
    measured = error(found, expected)
    record_property("error", measured)
    assert all(row.dtype == torch.float64 and row.isfinite().all() for row in found)
    assert measured < 1e-3


@pytest.mark.parametrize(("dtype", "least"), [("bfloat16", 0.97), ("float16", 0.99)])
def test_half_precision_ranks_as_float64(dtype, least, network, windows, record_property):
    found = importance(network(dtype), windows, THREE)
    expected = importance(network("float64", "cpu", dtype), windows, THREE)
    correlations = {name: min(rank_correlation(found[name], expected[name])) for name in THREE}
    for name, value in correlations.items():
        record_property(f"rank correlation, {name}", value)
    assert min(correlations.values()) > least


@pytest.mark.parametrize("attention", models.loading.ATTENTIONS)
def test_each_attention_gives_the_scores_of_float64(attention, device, network, windows, record_property):
    dtype = "bfloat16" if attention == "flash_attention_2" else "float32"
    if attention == "flash_attention_2":
        from transformers.utils import is_flash_attn_2_available

        if device == "cpu" or not is_flash_attn_2_available():
            pytest.skip("flash_attention_2 needs CUDA and the package flash-attn")
    found = importance(network(dtype, attention=attention), windows, ["entropy"])["entropy"]
    expected = importance(network("float64", "cpu", dtype, attention="eager"), windows, ["entropy"])["entropy"]
    record_property("error", error(found, expected))
    if dtype == "float32":
        assert error(found, expected) < 1e-3
    else:
        assert min(rank_correlation(found, expected)) > 0.97


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_logits_are_summed_in_float32(dtype, device, network, record_property):
    head = models.head(network(dtype))
    hidden = torch.randn(96, SIZES["hidden_size"], generator=torch.Generator().manual_seed(0)).to(device, head.weight.dtype)
    exact = hidden.double() @ head.weight.double().t()
    given = torch.empty(96, SIZES["vocab_size"], device=device)
    with torch.no_grad():
        found = [head.logits(hidden), head.logits(hidden, out=given)]
    assert found[1].data_ptr() == given.data_ptr()
    for logits in found:
        measured = float((logits - exact).abs().max() / exact.abs().max())
        record_property("error", measured)
        assert logits.dtype == torch.float32 and measured < 1e-5


def test_the_batch_is_found_and_changes_nothing(network, windows, record_property):
    model = network()
    scores = scoring.score(model, windows, THREE, batch_size=0, progress=False)
    record_property("batch_size", scores.batch_size)
    assert scores.batch_size >= 1 and scores.batch_size.bit_count() == 1
    expected = importance(model, windows, THREE, batch_size=2)
    assert max(error(scores.importance[name], expected[name]) for name in THREE) < 1e-3


def test_a_batch_that_runs_out_of_memory_is_halved(device, network, monkeypatch, record_property):
    model = network()
    windows = np.random.default_rng(1).integers(0, SIZES["vocab_size"], (16, 256))
    expected = importance(model, windows, ["entropy"], batch_size=4)["entropy"]
    if device == "cpu":
        _fail_above(4, monkeypatch)
    else:
        total = torch.cuda.get_device_properties(device).total_memory
        reserved = [_reserved(model, windows, size) for size in (4, 16)]
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(sum(reserved) / 2 / total)
    try:
        scores = scoring.score(model, windows, ["entropy"], batch_size=16, progress=False)
    finally:
        if device != "cpu":
            torch.cuda.set_per_process_memory_fraction(1.0)
    record_property("batch_size", scores.batch_size)
    assert scores.batch_size < 16 and error(scores.importance["entropy"], expected) < 1e-3


def _fail_above(most, monkeypatch):
    original = Reader.__call__

    def call(self, windows, *arguments):
        if len(windows) > most:
            raise torch.OutOfMemoryError
        return original(self, windows, *arguments)

    monkeypatch.setattr(Reader, "__call__", call)


def _reserved(model, windows, size):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    importance(model, windows, ["entropy"], batch_size=size)
    return torch.cuda.max_memory_reserved()


def test_layers_computed_twice_give_the_same_scores_in_less_memory(device, network, record_property):
    model = network()
    windows = np.random.default_rng(2).integers(0, SIZES["vocab_size"], (4, 256))
    found, peaks = [], []
    for again in (False, True):
        with peak_memory(device if device != "cpu" else "") as memory:
            found.append(importance(model, windows, THREE, activation_checkpointing=again))
        peaks.append(memory.get("peak"))
    measured = max(error(found[1][name], found[0][name]) for name in THREE)
    record_property("error", measured)
    record_property("peak_bytes", peaks)
    assert measured < 1e-3
    assert device == "cpu" or peaks[1] < peaks[0]


def test_a_stopped_run_goes_on_where_it_was(network, windows, tmp_path, record_property):
    model, settings = network(), {"batch_size": 2, "checkpoint": tmp_path, "checkpoint_every": 2}
    whole = importance(model, windows, ["entropy"], batch_size=2)["entropy"]
    with pytest.MonkeyPatch.context() as patch:
        _stop_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            importance(model, windows, ["entropy"], **settings)
    resumed = importance(model, windows, ["entropy"], **settings)["entropy"]
    # Not the same bytes: attention's backward kernels add in any order on CUDA.
    record_property("error", error(resumed, whole))
    assert error(resumed, whole) < 1e-3


def _stop_after(batches, patch):
    original, calls = Reader.__call__, []

    def call(self, *arguments):
        calls.append(1)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return original(self, *arguments)

    patch.setattr(Reader, "__call__", call)
