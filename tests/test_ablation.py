"""What silencing neurons changes: the incremental ablation against the whole model with weights set to zero, in float64."""

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES

from hfprune_nb import models
from hfprune_nb.errors import UserError
from hfprune_nb.method.scoring.ablation import LOWEST, RANDOM_GROUP, SINGLE, Ablation, changes, first_order, measure, sample

QUIET = {"progress": False}


def whole_model(model, windows, ablation):
    """KL, change of cross-entropy and of entropy by the definitions, with the columns of down_proj set to zero."""
    ids = torch.as_tensor(windows)
    down = models.gated_mlps(model)[ablation.layer].down
    before = down.weight.clone()
    with torch.no_grad():
        dense = torch.log_softmax(model(ids).logits.double(), -1)
        down.weight[:, list(ablation.neurons)] = 0
        changed = torch.log_softmax(model(ids).logits.double(), -1)
        down.weight.copy_(before)
    targets = ids[:, 1:, None]
    entropies = [-(log_p.exp() * log_p).sum(-1).mean() for log_p in (changed, dense)]
    return {
        "kl": float((dense.exp() * (dense - changed)).sum(-1).mean()),
        "ce": float((dense - changed)[:, :-1].gather(2, targets).mean()),
        "entropy": float(entropies[0] - entropies[1]),
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_incremental_ablation_equals_the_whole_model(tiny, token_windows, architecture):
    model = tiny(architecture, "float64")
    windows = token_windows[:4]
    chosen = [
        Ablation(layer, neurons, SINGLE)
        for layer in (0, 1, 2)
        for neurons in ((3,), (39,), tuple(range(0, 40, 3)), tuple(range(40)))
    ]
    found = measure(model, windows, chosen, together=3, **QUIET)
    for row, ablation in zip(found.to_dict("records"), chosen, strict=True):
        expected = whole_model(model, windows, ablation)
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-6, abs=1e-12), (ablation, name)
    assert (found["kl"] >= 0).all() and list(found["size"]) == [1, 1, 14, 40] * 3


def test_single_window_and_batches_of_any_size_agree(tiny, token_windows):
    model = tiny("llama", "float64")
    chosen = [Ablation(layer, (neuron,), SINGLE) for layer in (2, 0) for neuron in range(5)]
    one, many = (measure(model, token_windows[:1], chosen, together=n, **QUIET) for n in (1, 7))
    assert list(one["layer"]) == [2] * 5 + [0] * 5, "rows stand in the given order"
    assert many["kl"].to_numpy() == pytest.approx(one["kl"].to_numpy(), rel=1e-9)


def test_the_model_is_left_as_it_was(tiny, token_windows):
    model = tiny("qwen2")
    before = model(torch.as_tensor(token_windows)).logits
    measure(model, token_windows, [Ablation(1, (0, 5), SINGLE)], **QUIET)
    first_order(model, token_windows[:2], **QUIET)
    assert torch.equal(before, model(torch.as_tensor(token_windows)).logits)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_float32_keeps_changes_far_below_the_rounding_of_a_log_probability():
    generator = torch.Generator().manual_seed(0)
    dense = 3 * torch.randn(40, 500, generator=generator, dtype=torch.float64)
    # What the two models' logits really are: numbers that float32 holds, one millionth apart and less.
    dense = dense.float().double()
    shift = (dense + 1e-3 * torch.randn(40, 500, generator=generator, dtype=torch.float64)).float().double() - dense
    next_tokens = torch.randint(500, (40,), generator=generator)
    exact = changes(dense + shift, dense, torch.log_softmax(dense, -1), next_tokens)
    single = changes((dense + shift).float(), dense.float(), torch.log_softmax(dense, -1).float(), next_tokens)
    for name, ours, truth in zip(("kl", "ce", "entropy"), single, exact, strict=True):
        assert ours.numpy() == pytest.approx(truth.numpy(), rel=2e-3, abs=2e-8), name
    assert exact[0].max() < 2e-6


def test_first_order_is_the_derivative_of_the_real_change(tiny, token_windows):
    """Shrinking a neuron by a small share changes C by that share of the signed prediction."""
    # The architecture normalises in float32 whatever the weights are, so the share is not tiny and the difference central.
    model, windows, share = tiny("llama", "float64"), token_windows[:3], 0.02
    predicted = first_order(model, windows, **QUIET)
    for layer, neuron in ((0, 4), (1, 17), (2, 30)):
        down = models.gated_mlps(model)[layer].down
        ids = torch.as_tensor(windows)
        values = []
        for scale in (1 + share, 1 - share):
            before = down.weight.clone()
            with torch.no_grad():
                down.weight[:, neuron] *= scale
                log_p = torch.log_softmax(model(ids).logits, -1)
                down.weight.copy_(before)
            ce = -log_p[:, :-1].gather(2, ids[:, 1:, None]).mean()
            values.append((float(ce), float(-(log_p.exp() * log_p).sum(-1).mean())))
        for name, (larger, smaller) in zip(("ce", "entropy"), zip(*values, strict=True), strict=True):
            slope = (smaller - larger) / (2 * share)
            assert slope == pytest.approx(predicted[name][layer][neuron], rel=1e-2, abs=1e-6)
    for name in ("ce", "entropy"):
        for absolute, signed in zip(predicted[f"abs_{name}"], predicted[name], strict=True):
            assert (absolute >= np.abs(signed) - 1e-12).all()


def test_absolute_first_order_is_the_criterion_of_the_scoring_engine(tiny, token_windows):
    from hfprune_nb.method import scoring

    model = tiny("llama", "float64")
    scores = scoring.score(model, token_windows, ["one_hot_ce", "entropy"], progress=False)
    predicted = first_order(model, token_windows, **QUIET)
    for ours, name in (("abs_ce", "one_hot_ce"), ("abs_entropy", "entropy")):
        for row, expected in zip(predicted[ours], scores.importance[name], strict=True):
            assert len(token_windows) * row == pytest.approx(expected.numpy(), rel=1e-6)


def test_the_sample_is_stratified_seeded_and_holds_the_extremes():
    rng = np.random.default_rng(0)
    importance = {"one_hot_ce": rng.exponential(size=(9, 60)), "entropy": rng.exponential(size=(9, 60))}
    chosen = sample(importance, n_layers=4, n_single=6, group_sizes=[8, 20], n_groups=2, seed=1)
    assert chosen == sample(importance, 4, 6, [8, 20], 2, 1) != sample(importance, 4, 6, [8, 20], 2, 2)
    assert sorted({a.layer for a in chosen}) == [0, 3, 5, 8]
    for layer in (0, 3, 5, 8):
        here = [a for a in chosen if a.layer == layer]
        singles = [a.neurons[0] for a in here if a.kind == SINGLE]
        rank = sum(np.argsort(np.argsort(values[layer])) for values in importance.values())
        assert len(set(singles)) == 6 and np.argmax(rank) in singles and rank[singles].min() < np.quantile(rank, 0.25)
        assert [len(a.neurons) for a in here if a.kind == RANDOM_GROUP] == [8, 8, 20, 20]
        for name, values in importance.items():
            (lowest,) = [a for a in here if a.kind == LOWEST + name and len(a.neurons) == 8]
            assert set(lowest.neurons) == set(np.argsort(values[layer])[:8])
    with pytest.raises(UserError, match="group_sizes"):
        sample(importance, 2, 2, [61], 1, 0)


def test_a_model_that_does_more_than_its_layers_is_refused(tiny, token_windows):
    model = tiny("llama")

    def double(_, inputs, output):
        output.last_hidden_state = 2 * output.last_hidden_state
        return output

    model.get_decoder().register_forward_hook(double)
    with pytest.raises(UserError, match="one by one"):
        measure(model, token_windows[:2], [Ablation(0, (1,), SINGLE)], **QUIET)
