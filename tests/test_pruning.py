"""Exact arithmetic of ratios, and narrow models that answer as silenced ones do."""

import errno
import functools

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hfprune_nb import allocations, files, models
from hfprune_nb.allocations import Units
from hfprune_nb.errors import UserError
from hfprune_nb.method import compensation, pruning, selection
from hfprune_nb.models.hooks import replaced, silenced


def importance_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(mlp.width, dtype=torch.float64, generator=generator) for mlp in models.gated_mlps(model)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_narrow_model_equals_silenced_model_and_reloads_without_our_code(architecture, tiny, tmp_path):
    model = tiny(architecture)
    tokens = torch.randint(0, 61, (2, 10))
    plan = selection.allocate(model, neuron_ratio=0.3)
    kept = selection.kept_neurons(importance_of(model), plan.width_after)
    with torch.no_grad(), silenced(model, kept):
        expected = model(input_ids=tokens).logits
    narrow = pruning.narrow(model, kept)
    with torch.no_grad():
        found = narrow(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert models.count_parameters(narrow) == plan.parameters
    narrow.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert again.config.intermediate_size == plan.width_after[0]
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens).logits, found)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_per_neuron_is_what_removing_one_neuron_takes_away(architecture, tiny):
    wide, narrow = tiny(architecture), tiny(architecture, intermediate_size=39)
    per_neuron = models.gated_mlps(wide)[0].parameters_per_neuron
    assert models.count_parameters(wide) - models.count_parameters(narrow) == 3 * per_neuron


sizes = st.tuples(st.integers(1, 80), st.integers(2, 20000), st.integers(3, 30000), st.integers(0, 10**9))


@given(sizes, st.floats(1e-4, 0.999), st.booleans())
def test_achieved_ratio_is_within_one_neuron_per_layer(sizes, ratio, of_neurons):
    layers, width, per_neuron, rest = sizes
    dense, units = layers * width * per_neuron + rest, [Units(width, per_neuron)] * layers
    chosen = {"neuron_ratio": ratio} if of_neurons else {"ratio": ratio}
    try:
        plan = allocations.allocate(units, dense, **chosen)
    except UserError:
        reachable = ratio * width if of_neurons else ratio * dense / (layers * per_neuron)
        assert reachable < 0.5 + 1e-6 or reachable > width - 0.5 - 1e-6
        return
    one_neuron_per_layer = 1 / width if of_neurons else layers * per_neuron / dense
    achieved = plan.neuron_ratio if of_neurons else plan.achieved_ratio
    assert abs(achieved - ratio) <= one_neuron_per_layer
    assert plan.parameters == dense - layers * (width - plan.width_after[0]) * per_neuron
    assert len(plan.width_after) == layers and 1 <= plan.width_after[0] < width


@given(st.integers(1, 40), st.integers(2, 5000), st.floats(0.01, 0.99), st.integers(1, 512))
def test_multiple_of_gives_a_multiple_that_is_nearest(layers, width, ratio, multiple):
    try:
        exact, kept = (
            allocations.allocate([Units(width, 7)] * layers, layers * width * 7, neuron_ratio=ratio, multiple_of=m).width_after[0]
            for m in (1, multiple)
        )
    except UserError:
        return
    assert kept % multiple == 0 and kept >= multiple
    assert abs(kept - exact) <= multiple / 2 or kept == multiple


def test_more_pruning_removes_a_superset(tiny):
    model = tiny("llama")
    importance = importance_of(model)
    kept = [selection.kept_neurons(importance, selection.allocate(model, neuron_ratio=ratio).width_after) for ratio in (0.2, 0.5)]
    for layer in range(len(importance)):
        assert set(kept[1][layer].tolist()) < set(kept[0][layer].tolist())


def test_the_most_important_are_kept_in_ascending_order_and_ties_are_settled():
    for importance in ([[3.0, 1.0, 2.0, 1.0]], torch.tensor([[3.0, 1.0, 2.0, 1.0]]), [np.array([3.0, 1.0, 2.0, 1.0])]):
        for width, expected in ((2, [0, 2]), (3, [0, 2, 3]), (0, [])):
            assert [row.tolist() for row in selection.kept_neurons(importance, [width])] == [expected]


def test_ratio_arithmetic_reproduces_the_published_table_9_computation():
    # LLaMA-2-7B: 32 layers, hidden 4096, intermediate 11008, 6,738,415,616 parameters; 20 % of all is 31.1 % of the neurons.
    plan = allocations.allocate([Units(11008, 3 * 4096)] * 32, 6_738_415_616, ratio=0.2)
    assert round(100 * plan.neuron_ratio, 1) == 31.1 and abs(plan.achieved_ratio - 0.2) < 1e-4


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"ratio": 1.2}, "outside"),
        ({"ratio": -0.1}, "outside"),
        ({"neuron_ratio": 1.0}, "outside"),
        ({"ratio": "0.2"}, "ratio '0.2' is outside"),
        ({"ratio": 0.2, "multiple_of": 1.5}, "multiple_of 1.5 is no whole number from 1 to 40"),
        ({"ratio": 0.2, "allocation": None}, "None is no allocation"),
        ({"ratio": 0.9}, "cannot be reached"),
        ({"ratio": 0.2, "neuron_ratio": 0.2}, "exactly one"),
        ({}, "exactly one"),
        ({"neuron_ratio": 0.2, "multiple_of": 41}, "multiple_of"),
        ({"neuron_ratio": 0.2, "allocation": "unifrom"}, "did you mean 'uniform'"),
        ({"neuron_ratio": 0.2, "allocation": {"uniform": {"floor": 0.1}}}, "no setting 'floor'"),
        ({"neuron_ratio": 0.2, "allocation": {"global": {"floor": 1.5}}}, "floor 1.5"),
        ({"neuron_ratio": 0.2, "allocation": "global"}, "needs importance"),
        ({"neuron_ratio": 1e-4}, "removes no neuron"),
    ],
)
def test_bad_requests_get_one_sentence(chosen, words, tiny):
    with pytest.raises(UserError, match=words) as caught:
        selection.allocate(tiny("llama"), **chosen)
    assert "\n" not in str(caught.value)


def test_kept_neurons_of_another_model_are_refused(tiny):
    kept = torch.arange(40).repeat(3, 1)
    with pytest.raises(UserError, match="layers"):
        pruning.narrow(tiny("llama", num_hidden_layers=2), kept)
    with pytest.raises(UserError, match="does not exist"):
        pruning.narrow(tiny("llama", intermediate_size=30), kept)
    with pytest.raises(UserError, match="kept: None is no list"):
        pruning.narrow(tiny("llama"), None)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([3, 3, 5], "repeat"),
        ([5, 3], "out of order"),
        ([-1, 3], "neuron -1 of layer 1"),
        ([0, 40], "neuron 40 of layer 1"),
        ([0.5, 1.0], "whole numbers"),
        ([True, False], "whole numbers"),
        ([[0, 1]], "whole numbers"),
        ("ab", "whole numbers"),
    ],
)
def test_indices_that_would_make_a_wrong_model_are_refused(row, words, tiny, token_windows):
    model, kept = tiny("llama"), [[0, 1], row, [0]]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for use in (
        lambda: pruning.narrow(model, kept),
        lambda: silenced(model, kept),
        lambda: compensation.least_squares(model, token_windows, kept, progress=False),
    ):
        with pytest.raises(UserError, match=words) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan")])
def test_a_ridge_that_penalises_nothing_is_refused(ridge, tiny, token_windows):
    with pytest.raises(UserError, match="must be greater than 0"):
        compensation.least_squares(tiny(), token_windows, [[0, 1]] * 3, ridge=ridge, progress=False)


def test_kept_neurons_within_rounding_of_those_that_go_are_counted():
    """One step of bfloat16 is 2^-7: it could move one of the kept, and another ties; where all or none stay there is no cut."""
    step = 2.0**-7
    row = torch.tensor([5.0, 1 + step / 2, 0.1, 1.0, 1 + 2 * step, 1.0])
    rows = [row, torch.arange(6.0), torch.arange(6.0)]
    assert selection.within_rounding(rows, [4, 6, 0], "bfloat16") == 2
    assert selection.within_rounding(rows, [4, 6, 0], torch.float32) == 1, "no precision decides a tie"
    assert selection.within_rounding([-row], [2], "float32") == 1 and selection.within_rounding([row], [2], "float32") == 0


@pytest.mark.parametrize("as_path", [str, lambda path: path])
def test_kept_indices_survive_a_round_trip_and_truncation_is_told(as_path, tmp_path):
    kept, file = [[0, 2, 5], [], [1]], tmp_path / "kept.safetensors"
    pruning.save_kept(kept, as_path(file))
    assert [row.tolist() for row in pruning.load_kept(as_path(file))] == kept
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match="truncated"):
        pruning.load_kept(as_path(file))


def test_a_full_disk_is_told_in_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match="disk is full"):
        pruning.save_kept(torch.tensor([[0]]), tmp_path / "kept.safetensors")


# Least-squares compensation


def activations(model, windows):
    """The neurons' activations of each layer, (tokens, neurons) float64."""
    seen = {}

    def keep(layer, hidden):
        seen[layer] = hidden.flatten(0, 1).double()
        return hidden

    with torch.no_grad(), replaced(model, keep):
        model(input_ids=torch.as_tensor(windows))
    return [seen[layer].numpy() for layer in range(len(seen))]


@functools.cache
def biased_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 61}
    model = LlamaForCausalLM(LlamaConfig(**sizes, mlp_bias=True, initializer_range=0.3)).double().eval()
    return model.requires_grad_(False)


def some_kept(model, width=24):
    return selection.kept_neurons(importance_of(model), [width] * len(models.gated_mlps(model)))


@pytest.mark.parametrize(("architecture", "bias"), [("llama", False), ("qwen2", False), ("phi3", False), ("llama-biases", True)])
def test_compensation_is_the_closed_form_optimum(architecture, bias, tiny, token_windows):
    """Without a noticeable ridge the repaired weight is the least-squares solution that numpy finds."""
    model = tiny(architecture, "float64")
    kept = some_kept(model)
    repaired, errors = compensation.least_squares(model, token_windows, kept, bias, ridge=1e-12, progress=False)
    for mlp, hidden, indices in zip(
        models.gated_mlps(model), activations(model, token_windows), map(torch.Tensor.numpy, kept), strict=True
    ):
        target = hidden @ mlp.down.weight.numpy().T
        inputs = hidden[:, indices]
        if bias:
            inputs = np.hstack([inputs, np.ones((len(inputs), 1))])
        solution, *_ = np.linalg.lstsq(inputs, target, rcond=None)
        weight = repaired[f"layers.{mlp.layer}.weight"].numpy()
        np.testing.assert_allclose(weight, solution[: len(indices)].T, rtol=1e-4, atol=1e-6)
        if bias:
            shift = repaired[f"layers.{mlp.layer}.bias"].numpy() - mlp.down.bias.numpy()
            np.testing.assert_allclose(shift, solution[-1], rtol=1e-4, atol=1e-6)
        left = np.linalg.norm(target - inputs @ solution) / np.linalg.norm(target)
        assert errors.loc[mlp.layer, "repaired"] == pytest.approx(left, rel=1e-4, abs=1e-6)


def test_flaps_bias_is_the_mean_of_what_the_removed_neurons_gave(tiny, token_windows):
    model = tiny("llama", "float64")
    kept = some_kept(model)
    repaired, errors = compensation.compensate("flap_bias", model, token_windows, kept, progress=False)
    for mlp, hidden, indices in zip(
        models.gated_mlps(model), activations(model, token_windows), map(torch.Tensor.numpy, kept), strict=True
    ):
        weight, gone = mlp.down.weight.numpy(), np.setdiff1d(np.arange(mlp.width), indices)
        lost = hidden[:, gone] @ weight[:, gone].T
        np.testing.assert_allclose(repaired[f"layers.{mlp.layer}.bias"].numpy(), lost.mean(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(repaired[f"layers.{mlp.layer}.weight"].numpy(), weight[:, indices])
        left = np.linalg.norm(lost - lost.mean(0)) / np.linalg.norm(hidden @ weight.T)
        assert errors.loc[mlp.layer, "repaired"] == pytest.approx(left, rel=1e-9)
    with pytest.raises(UserError, match="no MLP biases in its configuration"):
        compensation.compensate("flap_bias", tiny("qwen2"), token_windows, kept, progress=False)


@given(st.floats(1e-8, 1e6), st.integers(1, 39), st.booleans(), st.integers(0, 9))
def test_compensation_never_rebuilds_its_own_text_worse_than_slicing(ridge, width, bias, seed):
    model = biased_model()
    kept = selection.kept_neurons(importance_of(model, seed), [width] * 3)
    windows = np.random.default_rng(seed).integers(0, 61, (2, 6))  # fewer tokens than neurons: singular without the ridge
    repaired, errors = compensation.least_squares(model, windows, kept, bias, ridge, progress=False)
    assert (errors["repaired"] <= errors["slicing"] * (1 + 1e-9)).all() and np.isfinite(errors).all(axis=None)
    for mlp, hidden, indices in zip(
        models.gated_mlps(model), activations(model, windows), map(torch.Tensor.numpy, kept), strict=True
    ):
        weight = mlp.down.weight.numpy()
        target = hidden @ weight.T
        sliced = np.linalg.norm(target - hidden[:, indices] @ weight[:, indices].T) / np.linalg.norm(target)
        assert errors.loc[mlp.layer, "slicing"] == pytest.approx(sliced, rel=1e-6, abs=1e-9)
    assert all(torch.isfinite(tensor).all() for tensor in repaired.values())


def test_a_huge_ridge_is_plain_slicing_and_repair_helps_the_whole_model(tiny, token_windows):
    tokens = torch.as_tensor(token_windows)
    dense = tiny("llama")
    kept = some_kept(dense, 32)
    sliced = compensation.least_squares(dense, token_windows, kept, ridge=1e12, progress=False)[0]
    for mlp, indices in zip(models.gated_mlps(dense), kept, strict=True):
        torch.testing.assert_close(sliced[f"layers.{mlp.layer}.weight"], mlp.down.weight[:, indices])
    repaired = compensation.least_squares(dense, token_windows, kept, progress=False)[0]
    with torch.no_grad():
        expected = dense(input_ids=tokens).logits
        plain = (pruning.narrow(tiny("llama"), kept)(input_ids=tokens).logits - expected).norm()
        model = pruning.repair(pruning.narrow(tiny("llama"), kept), repaired)
        assert (model(input_ids=tokens).logits - expected).norm() < plain


@pytest.mark.parametrize(("architecture", "bias"), [("llama", False), ("llama", True), ("llama-biases", True), ("qwen2", False)])
def test_a_repaired_model_is_rebuilt_from_its_folder_and_reloads_without_our_code(
    architecture, bias, tiny, token_windows, tmp_path
):
    dense = tiny(architecture)
    kept = some_kept(dense)
    repaired, _ = compensation.least_squares(dense, token_windows, kept, bias, progress=False)
    pruning.save_kept(kept, tmp_path / "kept.safetensors")
    files.save_tensors(repaired, tmp_path / "repaired.safetensors")
    tokens = torch.as_tensor(token_windows)
    with torch.no_grad():
        expected = pruning.repair(pruning.narrow(dense, kept), repaired)(input_ids=tokens).logits
        rebuilt = pruning.rebuild(tiny(architecture), tmp_path)
        assert torch.equal(rebuilt(input_ids=tokens).logits, expected)
        rebuilt.save_pretrained(tmp_path / "checkpoint")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32).eval()
        assert torch.equal(again(input_ids=tokens).logits, expected)
        (tmp_path / "repaired.safetensors").unlink()
        plain = pruning.rebuild(tiny(architecture), tmp_path)(input_ids=tokens).logits
        assert torch.equal(plain, pruning.narrow(tiny(architecture), kept)(input_ids=tokens).logits)


@pytest.mark.parametrize(
    ("architecture", "settings", "words"),
    [
        ("qwen2", {"bias": True}, "no MLP biases"),
        ("phi3", {"bias": True}, "no MLP biases"),
        ("llama", {"ridge": 0.0}, "ridge"),
        ("llama", {"windows": np.empty((0, 4), dtype=int)}, "window"),
    ],
)
def test_what_cannot_be_repaired_gets_one_sentence(architecture, settings, words, tiny, token_windows):
    model = tiny(architecture)
    given_ = {"windows": token_windows, "progress": False} | settings
    with pytest.raises(UserError, match=words) as caught:
        compensation.least_squares(model, given_.pop("windows"), some_kept(model), **given_)
    assert "\n" not in str(caught.value)


def test_a_repair_of_another_model_is_refused(tiny, token_windows):
    model = tiny("llama")
    repaired, _ = compensation.least_squares(model, token_windows, some_kept(model), progress=False)
    with pytest.raises(UserError, match="do not fit"):
        pruning.repair(pruning.narrow(tiny("llama"), some_kept(model, 30)), repaired)
