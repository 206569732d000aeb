"""The published loops, written anew: without habits they give the engine's scores, and each habit does what it is said to."""

import dataclasses

import pytest
import torch

from hfprune_nb.cost import published_loops
from hfprune_nb.cost.published_loops import NONE, Habits
from hfprune_nb.method.scoring import score
from hfprune_nb.models import gated_mlps

HABITS = [field.name for field in dataclasses.fields(Habits)]


def close(a, b, tolerance=1e-6):  # the engine multiplies activations and gradients in float32
    largest = max(float(row.abs().max()) for row in b)
    for found, expected in zip(a, b, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * largest)


def engine(model, windows, criterion, **settings):
    return score(model, windows, [{criterion: settings}], progress=False).importance[criterion]


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen2", "phi3"])
def test_without_habits_the_hfprune_loop_gives_the_engine_s_scores(tiny, token_windows, architecture):
    model = tiny(architecture, "float64")
    close(published_loops.hfprune(model, token_windows, NONE, chunk_size=5), engine(model, token_windows, "entropy"))


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_without_habits_the_cross_entropy_loop_gives_the_engine_s_scores(tiny, token_windows, architecture):
    model = tiny(architecture, "float64")
    expected = engine(model, token_windows, "one_hot_ce", aggregation="weight")
    close(published_loops.llm_pruner(model, token_windows, NONE, chunk_size=5), expected)


@pytest.mark.parametrize("alpha", [1.0, 0.4])
@pytest.mark.parametrize("teacher_copy", [False, True])
def test_without_habits_the_sdmprune_loop_gives_the_engine_s_scores(tiny, token_windows, alpha, teacher_copy):
    model = tiny("llama", "float64")
    settings = {"alpha": alpha, "temperature": 0.5, "first_stage_ratio": 0.1}
    expected = engine(model, token_windows, "self_distillation", aggregation="weight", **settings)
    habits = dataclasses.replace(NONE, teacher_copy=teacher_copy)
    found = published_loops.sdmprune(model, token_windows, habits, chunk_size=5, **settings)
    close(found, expected)
    assert [int((row < 0).sum()) for row in found] == [4, 4, 4], "a tenth of forty neurons ranks last in each of three layers"


@pytest.mark.parametrize("habit", [name for name in HABITS if name not in ("bfloat16_sums", "teacher_copy")])
def test_a_habit_that_costs_time_or_memory_changes_no_score(tiny, token_windows, habit):
    model = tiny("llama", "float64")
    expected = published_loops.hfprune(model, token_windows, NONE)
    close(published_loops.hfprune(model, token_windows, dataclasses.replace(NONE, **{habit: True})), expected)


def test_float32_is_enough(tiny, token_windows):
    model = tiny("llama", "float32")
    close(published_loops.hfprune(model, token_windows, NONE), engine(model, token_windows, "entropy"), 1e-4)


def test_a_sum_in_bfloat16_stops_growing(tiny, token_windows):
    """The same window again and again: float64 sums grow in proportion, bfloat16 sums stall after about 256 of them."""
    model = tiny("llama", "float32", num_hidden_layers=1)
    repeated = token_windows[:1].repeat(600, axis=0)
    rounded = dataclasses.replace(NONE, bfloat16_sums=True, one_window=True)
    (exact,), (half,) = (
        published_loops.hfprune(model, repeated, NONE, batch_size=100),
        published_loops.hfprune(model, repeated, rounded),
    )
    (early,) = published_loops.hfprune(model, repeated[:512], rounded)
    assert ((half / exact) < 0.95).all(), "600 additions lose more than a twentieth"
    assert ((half / exact) > 0.2).all(), "and the beginning is counted"
    assert (half == early).double().mean() > 0.9, "nothing is added after the first 512"
    assert (half <= 512 * (exact / 600) * 1.01).all()


def test_the_loops_leave_the_model_as_it_was(tiny, token_windows):
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for loop in (published_loops.hfprune, published_loops.llm_pruner, published_loops.sdmprune):
        loop(model, token_windows[:2])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not any(mlp.down._forward_pre_hooks for mlp in gated_mlps(model))
    assert not model.get_input_embeddings()._forward_hooks


def test_the_published_loop_takes_gradients_of_mlp_weights_and_no_others(tiny, token_windows, monkeypatch):
    model, seen = tiny(), []
    names = {parameter: name for name, parameter in model.named_parameters()}
    forget = published_loops._forget

    def watched(weights):
        seen.append([names[parameter] for parameter in names if parameter.grad is not None])
        forget(weights)

    monkeypatch.setattr(published_loops, "_forget", watched)
    published_loops.hfprune(model, token_windows[:1])
    assert len(seen[0]) == 9 and all(".mlp." in name for name in seen[0])
    seen.clear()
    published_loops.llm_pruner(model, token_windows[:1])
    assert set(seen[0]) == set(names.values()), "the cross-entropy loop keeps the gradients of everything"


def test_contestants_and_ablation_can_be_run_and_have_names_of_their_own(tiny, token_windows):
    model = tiny()
    found = [
        *published_loops.contestants(model, token_windows[:2], batch_size=2),
        *published_loops.ablation(model, token_windows[:2], 2),
    ]
    assert len({contestant.name for contestant in found}) == len(found)
    assert {contestant.implementation for contestant in found} == {"engine", "published loop", "ablation"}
    for contestant in found:
        contestant.run()


def test_the_last_step_of_the_ablation_has_no_habit_left(tiny, token_windows):
    model = tiny("llama", "float64")
    last = published_loops.ablation(model, token_windows, 3)[-1]
    close(last.run(), engine(model, token_windows, "entropy"))


def test_variants_are_copies_of_the_asked_width(tiny):
    model = tiny("llama", intermediate_size=64)
    models, facts = published_loops.variants(model, [0.1, 0.2], [1, 8])
    assert (
        list(models) == [row["model"] for row in facts] == ["dense", "10 %", "10 %, multiple of 8", "20 %", "20 %, multiple of 8"]
    )
    widths = [gated_mlps(found)[0].width for found in models.values()]
    assert models["dense"] is model and widths[0] == 64 and max(widths[1:]) < 64
    assert widths[2] % 8 == widths[4] % 8 == 0 and widths[1] > widths[3]
