"""Models whose layers differ in width: every way in which they are written, read, moved on and refused."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import hfprune_nb
from hfprune_nb import criteria, files, models
from hfprune_nb.cost import flops
from hfprune_nb.errors import UserError
from hfprune_nb.inputs.instructions import Record
from hfprune_nb.measure import evaluation
from hfprune_nb.method import compensation, export, pruning, recovery, scoring, selection
from hfprune_nb.models.cpu_attention import fast_on_cpu
from hfprune_nb.models.hooks import silenced

KEPT = [range(3, 40), range(0, 40, 3), []]  # a layer may lose all neurons
IDS = torch.arange(2, 26).reshape(2, 12)


def widths(model):
    return [mlp.width for mlp in models.gated_mlps(model)]


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.fixture
def ragged():
    """A ragged model and its tokenizer."""
    model, tokenizer = models.load(models.TINY, "float32", "cpu")
    return pruning.narrow(model, KEPT), tokenizer


@pytest.mark.parametrize("as_path", [str, lambda path: path])
def test_every_reader_of_ours_gives_the_same_bytes(as_path, ragged, tmp_path):
    model, tokenizer = ragged
    export.save_checkpoint(model, tokenizer, as_path(tmp_path / "kit"))
    model.save_pretrained(tmp_path / "bare")  # no file of ours in it
    found = [
        hfprune_nb.load(as_path(tmp_path / "kit")),
        hfprune_nb.load(as_path(tmp_path / "bare")),
        models.load(str(tmp_path / "kit"), "float32", "cpu")[0],
    ]
    for again in found:
        assert widths(again) == [37, 14, 0] == widths(model)
        assert {name: tensor.dtype for name, tensor in again.state_dict().items()} == {
            name: tensor.dtype for name, tensor in model.state_dict().items()
        }
        assert torch.equal(logits(again), logits(model))
    assert hfprune_nb.load(tmp_path / "kit", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_plain_transformers_says_what_is_wrong_and_trusting_the_file_helps(ragged, tmp_path):
    model, tokenizer = ragged
    export.save_checkpoint(model, tokenizer, tmp_path / "own")
    with pytest.raises(RuntimeError, match="'intermediate_size' is a per-layer attribute"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "own", trust_remote_code=True)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")  # as its user passes it on
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(logits(third), logits(model))
    assert again.generate(IDS[:1], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 15)


def test_the_file_in_a_checkpoint_needs_nothing_of_ours(ragged, tmp_path):
    export.save_checkpoint(*ragged, tmp_path)
    text = (tmp_path / "modeling_per_layer.py").read_text(encoding="utf-8")
    assert "hfprune_nb" not in text
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert stored["architectures"] == ["PerLayerLlamaForCausalLM"] and stored["intermediate_size"] == 37


def test_a_padded_checkpoint_is_a_plain_one_of_the_same_function(ragged, tmp_path):
    model, tokenizer = ragged
    export.save_checkpoint(model, tokenizer, tmp_path, padded=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py")) and widths(again) == [37] * 3
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
    assert widths(model) == [37, 14, 0] and model.config.per_layer_config[2].intermediate_size == 0, "the model stays as it is"


@pytest.mark.parametrize("architecture", ["llama-biases", "phi3"])
def test_padding_keeps_biases_and_fused_halves_apart(architecture, tiny, tmp_path):
    model = pruning.narrow(tiny(architecture, "float64"), [range(5), range(30), range(40)])
    export.save_checkpoint(model, models.load(models.TINY, device="cpu")[1], tmp_path, padded=True)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_equal_widths_are_plain_again_whatever_they_were_before(ragged, tmp_path):
    model, tokenizer = ragged
    export.save_checkpoint(model, tokenizer, tmp_path / "ragged")
    again = hfprune_nb.load(tmp_path / "ragged")
    with pytest.raises(UserError, match="neuron 9 of layer 2 does not exist"):
        pruning.narrow(again, [range(10)] * 3)
    pruning.narrow(pruning.narrow(again, [range(14), range(14), []]), [[], [], []])
    assert again.config.intermediate_size == 0
    other = pruning.narrow(models.load(models.TINY, "float32", "cpu")[0], [range(30), range(10), range(20)])
    export.save_checkpoint(pruning.narrow(other, [range(10)] * 3), tokenizer, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain).__name__ == "LlamaForCausalLM" and plain.config.intermediate_size == 10
    assert "per_layer_config" not in json.loads((tmp_path / "plain" / "config.json").read_text(encoding="utf-8"))


def test_attention_and_cost_know_the_model(ragged, tmp_path):
    model, tokenizer = ragged
    export.save_checkpoint(model, tokenizer, tmp_path)
    again = hfprune_nb.load(tmp_path).requires_grad_(False)
    with fast_on_cpu(again):
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
    dense = models.load(models.TINY, "float32", "cpu")[0]
    saved = flops.forward_flops(dense.config, 24, 12) - flops.forward_flops(again.config, 24, 12)
    assert saved == 24 * 2 * 3 * 32 * (3 * 64 - sum(widths(again)))


def test_a_ragged_model_is_scored_and_pruned_again(ragged):
    """Every criterion gives each layer as many scores as it has neurons, none to the layer that has none."""
    model, _ = ragged
    windows = np.random.default_rng(0).integers(2, 300, (3, 16))
    found = scoring.score(model, windows, criteria.names(), progress=False).importance
    assert {name: [len(row) for row in rows] for name, rows in found.items()} == {name: [37, 14, 0] for name in found}
    for name, rows in found.items():
        plan = selection.allocate(model, neuron_ratio=0.3, importance=rows, criterion=name)
        assert plan.width_before == [37, 14, 0] and plan.width_after == [26, 10, 0], "the same fraction of each"
        kept = selection.kept_neurons(rows, plan.width_after)
        with silenced(model, kept):
            expected = logits(model)
        narrow = pruning.narrow(copy.deepcopy(model), kept)
        torch.testing.assert_close(logits(narrow), expected, rtol=1e-4, atol=1e-5)
        assert widths(narrow) == plan.width_after and models.count_parameters(narrow) == plan.parameters


@pytest.mark.parametrize("kind", ["least_squares", "least_squares_bias", "flap_bias"])
def test_a_ragged_model_is_repaired_and_rebuilt(kind, tmp_path):
    dense = models.load(models.TINY, "float32", "cpu")[0]
    windows = np.random.default_rng(0).integers(2, 300, (4, 16))
    repaired, errors = compensation.compensate(kind, dense, windows.tolist(), KEPT, progress=False)
    assert (errors["repaired"] <= errors["slicing"] * 1.000001).all() and np.isfinite(errors).all(axis=None)
    pruning.save_kept(KEPT, tmp_path / "kept.safetensors")
    files.save_tensors(repaired, tmp_path / "repaired.safetensors")
    expected = pruning.repair(pruning.narrow(copy.deepcopy(dense), KEPT), repaired)
    assert torch.equal(logits(pruning.rebuild(dense, str(tmp_path))), logits(expected))
    export.save_checkpoint(expected, models.load(models.TINY, device="cpu")[1], tmp_path / "checkpoint")
    assert torch.equal(logits(hfprune_nb.load(tmp_path / "checkpoint")), logits(expected))


@pytest.mark.parametrize("recipe", ["hfprune-lora", "full"])
def test_a_ragged_model_is_tuned_and_evaluated(recipe, ragged, tmp_path):
    model, tokenizer = ragged
    records = [Record(f"Say {word}.", f"{word} {word}") for word in ("one", "two", "three", "four")]
    chosen = recovery.recipe(recipe, seq_len=32, rows_per_step=1)
    settings = {"max_steps": 2, "scratch": tmp_path / "scratch", "progress": False}
    tuned = recovery.recover(copy.deepcopy(model), tokenizer, records, records, chosen, **settings)
    tuned.save(tmp_path)
    again = recovery.apply(model, tmp_path)
    assert widths(again) == [37, 14, 0] and torch.equal(logits(again), logits(tuned.model))
    export.save_checkpoint(again, tokenizer, tmp_path / "checkpoint")
    read = hfprune_nb.load(tmp_path / "checkpoint")
    assert torch.equal(logits(read), logits(again))
    windows = np.random.default_rng(0).integers(2, 300, (2, 16))
    measured = [evaluation.held_out(network, windows, 4, progress=False).perplexity for network in (again, read)]
    assert measured[0].equals(measured[1])


def test_an_architecture_of_one_s_own_must_be_padded(ragged, tmp_path):
    model, tokenizer = ragged
    model.__class__ = type("OwnForCausalLM", (type(model),), {})
    with pytest.raises(UserError, match="OwnForCausalLM is no class of transformers") as caught:
        export.save_checkpoint(model, tokenizer, tmp_path / "own")
    assert "\n" not in str(caught.value) and not (tmp_path / "own").exists()
    export.save_checkpoint(model, tokenizer, tmp_path / "padded", padded=True)


@pytest.mark.parametrize(("padded", "expected"), [(False, "hfprune_nb.load"), (True, "plain, padded")])
def test_tables_are_told_how_a_model_loads(padded, expected):
    assert export.loads_with([3, 3], padded) == "plain" and export.loads_with([3, 4], padded) == expected
    assert export.notes({"allocation": "uniform", "loads_with": "plain"}) == []
    (sentence,) = export.notes({"allocation": "global_10", "loads_with": expected})
    assert "global_10" in sentence and "from_pretrained" in sentence


def test_a_folder_without_a_model_gets_one_sentence(tmp_path):
    with pytest.raises(UserError, match="could not be loaded") as caught:
        hfprune_nb.load(tmp_path)
    assert "\n" not in str(caught.value)
