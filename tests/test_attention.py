"""Attention's key-value groups: what silencing one means, their scores, and a budget shared with the neurons."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from hfprune_nb import models
from hfprune_nb.errors import UserError
from hfprune_nb.method import pruning, scoring
from hfprune_nb.models.hooks import replaced, silenced

GROUPED = ("llama", "llama-biases", "mistral", "qwen2", "qwen3", "gemma", "phi3")
ALL = [list(range(40))] * 3
TOKENS = torch.arange(24).reshape(2, 12)
CRITERIA = [
    "entropy",
    {"one_hot_ce": {"reduction": "square"}, "as": "square"},
    {"one_hot_ce": {"reduction": "window"}, "as": "window"},
    "kl_fisher",
    "wanda",
]


@pytest.fixture
def grouped(tiny):
    """Return a function that makes a tiny model of 6 query heads: grouped(architecture, groups=3, **changes)."""

    def make(architecture="llama", groups=3, **changes):
        sizes = {} if architecture in ("qwen3", "gemma") else {"hidden_size": 24}
        return tiny(architecture, "float64", num_attention_heads=6, num_key_value_heads=groups, **(sizes | changes))

    return make


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("groups", [3, 6])
@pytest.mark.parametrize("architecture", GROUPED)
def test_removed_groups_are_silenced_ones_and_reload_plainly(architecture, groups, grouped, tmp_path):
    dense = grouped(architecture, groups)
    neurons, kept = [[0, 7, 39], list(range(3)), [1, 2, 3]], [[0, 2], [1, 2], [0, 1]]
    with silenced(dense, neurons, kept):
        expected = logits(dense)
    assert not torch.allclose(expected, logits(pruning.narrow(copy.deepcopy(dense), neurons)))
    per_group = models.attention_groups(dense)[0].parameters_per_group
    per_neuron = models.gated_mlps(dense)[0].parameters_per_neuron
    narrow = pruning.narrow(copy.deepcopy(dense), neurons, kept)
    torch.testing.assert_close(logits(narrow), expected)
    removed = models.count_parameters(dense) - models.count_parameters(narrow)
    assert removed == 3 * 37 * per_neuron + 3 * (groups - 2) * per_group
    narrow.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(logits(again), logits(narrow)) and again.config.num_key_value_heads == 2
    generated = [model.generate(TOKENS, max_new_tokens=4, do_sample=False) for model in (again, narrow)]
    assert torch.equal(*generated)
    with pytest.raises(UserError, match="prune the model that was scored"):
        pruning.narrow(again, [[0]] * 3, [[0, 2]] * 3)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([[0, 1], [0], [0]], "keep 1 to 2 attention groups"),
        ([[], [], []], "at least one"),
        ([[0, 0]] * 3, "groups of layer 0 repeat"),
        ([[0, 3]] * 3, "group 3 of layer 0 does not exist among 3"),
        ([[0]] * 2, "2 layers"),
    ],
)
def test_groups_that_would_make_a_wrong_model_are_refused(groups, words, grouped):
    model = grouped()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=words) as caught:
        pruning.narrow(model, ALL, groups)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_attention_that_is_no_set_of_groups_is_refused(grouped, tiny):
    normed = grouped("qwen3")
    normed.model.layers[1].self_attn.q_norm.weight = torch.nn.Parameter(torch.ones(6 * 8))
    with pytest.raises(UserError, match=r"layer 1 .*`q_norm.weight` over all"):
        models.attention_groups(normed)
    adapted = grouped()
    adapted.model.layers[2].self_attn.v_proj = torch.nn.Sequential(adapted.model.layers[2].self_attn.v_proj)
    with pytest.raises(UserError, match="layer 2 is not made of linear modules"):
        models.attention_groups(adapted)
    mixing = grouped()
    output = mixing.model.layers[0].self_attn.o_proj
    output.register_forward_pre_hook(lambda _, inputs: (inputs[0] / inputs[0].norm(dim=-1, keepdim=True),))
    with pytest.raises(UserError, match="the other groups change"):
        models.check_groups(mixing)


def products(model, windows, gradient):
    """`sum over channels of a * dC/da` of every layer, (windows, positions, groups), by autograd; C is summed over positions."""
    seen, found = {}, []

    def watch(layer, given):
        seen[layer] = given if given.requires_grad else given.detach().requires_grad_()
        return seen[layer]

    for window in windows:
        with replaced(model, watch, models.attention_groups):
            z = model(input_ids=torch.as_tensor(window)[None]).logits[0]
        slopes = torch.autograd.grad(gradient(z, torch.as_tensor(window)), list(seen.values()))
        units = models.attention_groups(model)
        rows = zip(seen.values(), slopes, units, strict=True)
        found.append([(a * g)[0].detach().unflatten(-1, (unit.width, -1)).sum(-1) for a, g, unit in rows])
    return [torch.stack(layer) for layer in zip(*found, strict=True)]


def entropy(z, window):
    return -(z.softmax(-1) * z.log_softmax(-1)).sum()


def cross_entropy(z, window):
    return torch.nn.functional.cross_entropy(z[:-1], window[1:], reduction="sum")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3"])
def test_scores_of_groups_are_those_of_slow_autograd(architecture, grouped, token_windows):
    model = grouped(architecture)
    found = scoring.score(model, token_windows, CRITERIA, attention_groups=True, progress=False).groups
    of_entropy, of_ce = products(model, token_windows, entropy), products(model, token_windows, cross_entropy)
    for layer in range(3):
        expected = {
            "entropy": of_entropy[layer].abs().sum((0, 1)) / 12,
            "square": of_ce[layer].square().sum((0, 1)) / 2 / 11,
            "window": of_ce[layer].sum(1).square().sum(0) / 2 / 11,
        }
        for name, row in expected.items():
            torch.testing.assert_close(found[name][layer], row, rtol=1e-8, atol=0)
    inputs = {}
    with torch.no_grad(), replaced(model, lambda layer, a: inputs.setdefault(layer, a), models.attention_groups):
        model(input_ids=torch.as_tensor(token_windows))
    for unit in models.attention_groups(model):
        channel = unit.output.weight.norm(p=1, dim=0) * inputs[unit.layer].square().mean((0, 1)).sqrt()
        torch.testing.assert_close(found["wanda"][unit.layer], channel.view(3, -1).sum(1))


def test_scores_of_groups_leave_those_of_neurons_and_depend_on_no_batch_and_no_interruption(grouped, token_windows, tmp_path):
    model, settings = grouped("qwen2"), {"progress": False, "seed": 3}
    criteria = [*CRITERIA, "self_distillation"]
    plain = scoring.score(model, token_windows, criteria, **settings)
    assert plain.groups == {}
    expected = scoring.score(model, token_windows, criteria, attention_groups=True, checkpoint=tmp_path, **settings)
    variants = {
        "batch": {"batch_size": 2},
        "chunk": {"chunk_size": 5},
        "layers": {"activation_checkpointing": True},
        "resumed": {"checkpoint": tmp_path},
    }
    for name, changes in variants.items():
        found = scoring.score(model, token_windows, criteria, attention_groups=True, **settings, **changes)
        assert_equal(found.groups, expected.groups, exact=name == "resumed")
        assert_equal(found.importance, plain.importance)


def assert_equal(found, expected, exact=False):
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        for row, other in zip(found[name], rows, strict=True):
            torch.testing.assert_close(row, other, rtol=0 if exact else 1e-8, atol=0 if exact else 1e-12)


def test_criteria_that_score_no_groups_are_refused(grouped, token_windows):
    for criterion in ("magnitude", "llm_pruner", {"entropy": {"aggregation": "weight"}, "as": "weight"}):
        with pytest.raises(UserError, match="scores no attention groups"):
            scoring.score(grouped(), token_windows, [criterion], attention_groups=True, progress=False)
