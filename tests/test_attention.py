"""Attention's key-value groups: what silencing one means, their scores, and a budget shared with the neurons."""

import copy

import pandas as pd
import pytest
import synthetic
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from hfprune_nb import models
from hfprune_nb.cost import flops, generation
from hfprune_nb.errors import UserError
from hfprune_nb.files import save_tensors
from hfprune_nb.measure import evaluation
from hfprune_nb.method import compensation, pruning, scoring, selection
from hfprune_nb.models.hooks import replaced, silenced
from hfprune_nb.report import attention, results, style
from hfprune_nb.report.table import ABSENT
from hfprune_nb.runs import study

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


def test_criteria_that_score_groups_do_so_beside_others_that_do_not(grouped, token_windows):
    settings = {"attention_groups": True, "progress": False}
    alone = scoring.score(grouped(), token_windows, ["entropy", "wanda"], **settings)
    others = ["flap", "magnitude", "llm_pruner", {"entropy": {"aggregation": "weight"}, "as": "weight"}]
    beside = scoring.score(grouped(), token_windows, ["entropy", *others, "wanda"], **settings)
    assert_equal(beside.groups, alone.groups, exact=True)
    assert len(beside.importance) == 6 and beside.importance["flap"][0].shape == beside.importance["entropy"][0].shape


def some_importance(model, seed=0):
    """Random importance of neurons and groups, by layer."""
    random, kinds = torch.Generator().manual_seed(seed), (models.gated_mlps(model), models.attention_groups(model))
    return [[torch.rand(unit.width, generator=random, dtype=torch.float64) for unit in units] for units in kinds]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma"])
@pytest.mark.parametrize("split", ["none", "proportional", "measured"])
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3])
def test_every_split_removes_the_same_number_of_parameters(split, ratio, architecture, grouped):
    model = grouped(architecture, 6)
    importance, of_groups = some_importance(model)
    groups = selection.kept_groups(split, model, ratio, importance, of_groups, "kl_fisher")
    plan = selection.allocate(model, ratio, groups=groups)
    assert abs(plan.missed_neurons) <= 0.5 * len(plan.width_after)
    narrow = pruning.narrow(copy.deepcopy(model), selection.kept_neurons(importance, plan.width_after), groups)
    assert models.count_parameters(narrow) == plan.parameters
    removed = 0 if groups is None else 6 - len(groups[0])
    assert models.attention_groups(narrow)[0].width == 6 - removed
    if split == "proportional":
        per_group = models.attention_groups(model)[0].parameters_per_group
        gone = [1 - after / before for before, after in zip(plan.width_before, plan.width_after, strict=True)]
        assert abs(removed / 6 - gone[0]) <= 0.5 / 6 + 0.5 / 40 + 0.5 / 6 * per_group * 6 / (40 * plan.parameters_per_neuron)
    if groups:
        lowest = [set(range(6)) - set(kept.tolist()) for kept in groups]
        assert lowest == [set(row.argsort()[:removed].tolist()) for row in of_groups]


@pytest.mark.parametrize("scale", [1e-9, 5.0, 20.0, 1e9])
def test_a_measured_split_is_one_ranking_by_importance_per_parameter(scale, grouped):
    model = grouped("llama", 6)
    importance, of_groups = some_importance(model)
    of_groups = [scale * row for row in of_groups]
    sizes = models.gated_mlps(model)[0].parameters_per_neuron, models.attention_groups(model)[0].parameters_per_group
    pool = [
        (float(score) / size, size)
        for rows, size in zip((importance, of_groups), sizes, strict=True)
        for row in rows
        for score in row
    ]
    left, groups = 0.25 * models.count_parameters(model), 0
    for _, size in sorted(pool):
        left -= size
        if left < 0:
            break
        groups += size == sizes[1]
    kept = selection.kept_groups("measured", model, 0.25, importance, of_groups, "entropy")
    assert [len(row) for row in kept] == [max(1, 6 - int(groups / 3 + 0.5))] * 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"split": "some"}, "choose one of none, proportional, measured"),
        ({"ratio": 0.0}, "give ratio in place of neuron_ratio"),
        ({"split": "measured", "criterion": "wanda"}, "scores of criterion 'wanda' are not comparable"),
        ({"of_groups": [torch.ones(3)] * 3}, "attention groups: all scores of layer 0 are equal"),
    ],
)
def test_splits_that_mean_nothing_get_one_sentence(settings, words, grouped):
    model = grouped()
    importance, of_groups = some_importance(model)
    given = {"split": "proportional", "ratio": 0.2, "importance": importance, "of_groups": of_groups, "criterion": "entropy"}
    with pytest.raises(UserError, match=words) as caught:
        selection.kept_groups(model=model, **given | settings)
    assert "\n" not in str(caught.value)


def test_a_model_with_fewer_groups_is_rebuilt_from_its_folder(grouped, tmp_path):
    dense, neurons, groups = grouped("qwen2"), [[0, 7, 39]] * 3, [[0, 2], [1, 2], [0, 1]]
    pruning.save_kept(neurons, tmp_path / "kept.safetensors")
    pruning.save_kept(groups, tmp_path / "groups.safetensors")
    expected = logits(pruning.narrow(copy.deepcopy(dense), neurons, groups))
    assert torch.equal(logits(pruning.rebuild(dense, tmp_path)), expected)


def test_scores_without_groups_are_told(grouped, token_windows, tmp_path):
    model = grouped()
    found = scoring.score(model, token_windows, ["entropy"], attention_groups=True, progress=False)
    with pytest.raises(UserError, match="stage 02 with attention_groups true"):
        scoring.load_groups(tmp_path / "groups.safetensors", "entropy", model)
    found.save_groups(tmp_path / "groups.safetensors")
    assert_equal({"entropy": scoring.load_groups(tmp_path / "groups.safetensors", "entropy", model)}, found.groups, exact=True)
    with pytest.raises(UserError, match="3 layers of 3, the model has 3 layers of 6 groups"):
        scoring.load_groups(tmp_path / "groups.safetensors", "entropy", grouped("llama", 6))


def study_of_splits(folder, seeds=(0, 1, 2)):
    """Write evaluations of entropy at 20 and 30 %, without a split and by a measured one that does much harm; the folders."""
    options = {"tasks": {"boolq": "acc"}, "n_items": 20}
    found = synthetic.study(folder / "none", ("entropy",), (0.2, 0.3), seeds, **options)
    found += synthetic.study(
        folder / "measured", ("entropy",), (0.2, 0.3), seeds, dense=False, attention_split="measured", groups_removed=1, **options
    )
    for part in found[1 + 2 * len(seeds) :]:
        fidelity = pd.read_parquet(part / "fidelity.parquet")
        fidelity.assign(kl=fidelity["kl"] + 1.0).to_parquet(part / "fidelity.parquet")
    return found


def test_table_8_stands_beside_the_measured_splits(tmp_path):
    folders = study_of_splits(tmp_path)
    table = attention.attention_table(folders)
    kl = table.long[(table.long["column"] == "kl:c4") & (table.long["split"] == "measured")]
    assert kl["change"].between(0.9, 1.1).all() and (kl["p_holm"] < 0.05).all() and len(kl) == 2
    assert table.long.loc[table.long["split"] == "none", "change"].isna().all()
    shown = table.display
    assert list(shown["average of 9, paper: LLaMA-2-7B, %"]) == ["54.8", ABSENT, ABSENT, ABSENT]
    assert list(shown["groups per layer"]) == ["0", "-1"] * 2
    fig = attention.attention_figure(table, "smollm2-135m")
    style.save(fig, tmp_path, "attention", table.long)
    assert len(fig.axes) == 3, "average, and KL on two corpora"
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["MLP only, untuned", "attention + MLP, measured, untuned"]
    told = attention.sentences(table)
    assert any(
        "1 attention group fewer" in sentence and "KL c4" in sentence and sentence.endswith(": worse.") for sentence in told
    )
    one_seed = attention.sentences(attention.attention_table(study_of_splits(tmp_path / "one", seeds=(0,))))
    assert all(sentence.endswith("one seed: no verdict.") for sentence in one_seed)
    one_seed = attention.attention_table(study_of_splits(tmp_path / "shown", seeds=(0,))).display
    assert list(one_seed["average of tasks, points - MLP only"])[::2] == [ABSENT, ABSENT]
    plain = results.collect(folders)
    assert len(plain.models) == 7 and "6 evaluations of models that lost attention groups are not shown here." in plain.notes
    assert attention.attention_table(folders[:7]) is None


def test_a_split_that_is_rounded_to_nothing_is_compared_with_nothing(tmp_path):
    options = {"tasks": {"boolq": "acc"}, "n_items": 20}
    folders = synthetic.study(tmp_path / "none", ("entropy",), (0.2,), **options)
    rounded = {"attention_split": "proportional", "groups_removed": 0}
    folders += synthetic.study(tmp_path / "rounded", ("entropy",), (0.2,), dense=False, **rounded, **options)
    table = attention.attention_table(folders)
    assert len(table.display) == 2 and table.long["change"].isna().all() and attention.sentences(table) == []


def test_a_model_with_fewer_groups_is_repaired_scored_measured_counted_and_generates(grouped, token_windows, tmp_path):
    dense, neurons, groups = grouped("qwen2"), [[*range(0, 40, 2)]] * 3, [[0, 2], [1, 2], [0, 1]]
    repaired, errors = compensation.compensate("least_squares", dense, token_windows, neurons, progress=False)
    assert (errors["repaired"] < errors["slicing"]).all()
    pruning.save_kept(neurons, tmp_path / "kept.safetensors")
    pruning.save_kept(groups, tmp_path / "groups.safetensors")
    save_tensors(repaired, tmp_path / "repaired.safetensors")
    narrow = pruning.rebuild(copy.deepcopy(dense), tmp_path)
    rescored = scoring.score(narrow, token_windows, ["entropy"], attention_groups=True, progress=False)
    assert [len(row) for row in rescored.groups["entropy"]] == [2] * 3
    reference = evaluation.held_out(dense, token_windows)
    found = evaluation.held_out(narrow, token_windows, reference=reference.hidden, reference_head=models.head(dense))
    assert (found.fidelity["kl"] > 0).all() and found.perplexity["nll"].notna().all()
    narrow.set_attn_implementation("eager")  # the counter does not know every fused kernel
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        narrow(TOKENS, use_cache=False)
    assert flops.forward_flops(narrow.config, TOKENS.numel(), TOKENS.shape[1]) == counter.get_total_flops()
    for cache in ("dynamic", "static"):
        rows = generation.compare({"dense": dense, "narrow": narrow}, [2], 6, 3, repetitions=1, cache=cache, progress=False)
        assert {row["model"] for row in rows} == {"dense", "narrow"}


def test_a_study_of_splits_is_refused_before_anything_runs(tmp_path):
    for line, words in {
        "criteria: [entropy, magnitude]": "criterion 'magnitude' scores no attention groups",
        "criteria: [wanda]": "scores of criterion 'wanda' are not comparable",
        "ratios: null\nneuron_ratios: [0.2]": "give ratio in place of neuron_ratio",
        "pruning: {rounds: 4}": "set rounds to 1",
    }.items():
        (tmp_path / "study.yaml").write_text(f"extends: offline-attention\nrecovery_criteria: null\n{line}\n")
        with pytest.raises(UserError, match=words):
            study.load(tmp_path / "study.yaml")
    (scoring_job,) = [job for job in study.load("offline-attention").jobs if job.stage == "scoring"]
    assert scoring_job.parameters["attention_groups"] is True


@pytest.mark.parametrize(
    ("lines", "left"),
    [
        (
            "criteria: [entropy, wanda, magnitude]\nattention_splits: [none, proportional, measured]",
            ["entropy", "entropy, proportional", "entropy, measured", "wanda", "wanda, proportional", "magnitude"],
        ),
        ("criteria: [magnitude]\nattention_splits: [none, measured]", ["magnitude"]),
        (
            "criteria: [entropy]\nattention_splits: [none, proportional]\naxes: {pruning: {rounds: [1, 2]}}",
            ["entropy", "entropy, 2", "entropy, proportional"],
        ),
        (
            "criteria: [wanda]\nallocations: [uniform, global_normalised]\naxes: {pruning: {rounds: [1, 2]}}",
            ["wanda", "wanda, 2", "wanda, global_normalised"],
        ),
    ],
)
def test_what_cannot_be_combined_is_left_out_on_request(lines, left, tmp_path):
    """Criteria that score no groups or not comparably, rounds with a split, rounds with an allocation that needs scores."""
    common = "models: [tiny-random-llama]\nseeds: [0]\nratios: [0.1]\nimpossible: skip\n"
    (tmp_path / "study.yaml").write_text(common + lines)
    jobs = study.load(tmp_path / "study.yaml").jobs
    told = ("criterion", "allocation", "rounds", "attention_split")
    points = [[str(job.point[name]) for name in told if name in job.point] for job in jobs if job.stage == "pruning"]
    assert sorted(", ".join(point) for point in points) == sorted(left)
    (scoring_job,) = [job for job in jobs if job.stage == "scoring"]
    assert scoring_job.parameters["attention_groups"] == any("proportional" in point for point in left)
