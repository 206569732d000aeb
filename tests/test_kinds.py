"""Every kind of criterion against a slow, obvious float64 computation, and what each kind costs."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES

from hfprune_nb import criteria, models
from hfprune_nb.criteria import WeightGradientCriterion, noise
from hfprune_nb.errors import UserError
from hfprune_nb.method import scoring
from hfprune_nb.method.scoring import accumulator, backward
from hfprune_nb.models.hooks import replaced

QUIET = {"progress": False}


def activations(model, window, cotangent=None):
    """h of every layer, (seq, neurons), and where `cotangent` gives dC/dz of the logits the gradient for it, by autograd."""
    leaves, seen = {}, {}

    def watch(layer, hidden):
        # Adding a zero that needs a gradient gives dC/dh without changing h.
        leaves[layer], seen[layer] = torch.zeros_like(hidden).requires_grad_(), hidden.detach()[0]
        return hidden + leaves[layer]

    with replaced(model, watch):
        logits = model(input_ids=torch.as_tensor(window)[None]).logits[0]
    if cotangent is None:
        return [seen[layer] for layer in sorted(seen)]
    gradients = torch.autograd.grad(logits, [leaves[layer] for layer in sorted(leaves)], cotangent(logits.detach()))
    return [(seen[layer], gradient[0]) for layer, gradient in enumerate(gradients)]


def label_gradient(labels):
    def cotangent(logits):
        return torch.softmax(logits, -1) - torch.nn.functional.one_hot(labels, logits.shape[1])

    return cotangent


def test_every_criterion_says_how_many_numbers_it_sums_for_each_neuron(tiny, token_windows, monkeypatch):
    """What a forecast counts as memory, in the sums that the engine keeps: one for each snapshot, or for each subset."""
    variants = [
        *({name: {}} for name in criteria.names() if name not in ("ablation", "policy_gradient")),
        {"gblm": {"p": 2}, "as": "gblm_2"},
        *({"llm_pruner": {"granularity": "element", "order": order}, "as": order} for order in ("first", "second", "mixed")),
        {"llm_bip": {"norm": "relative"}, "as": "relative"},
        {"saap": {"subsets": 3}, "as": "saap_3"},
    ]
    found, merged = {}, accumulator.Accumulator.merged
    monkeypatch.setattr(accumulator.Accumulator, "merged", lambda sums: found.update(sums.sums) or merged(sums))
    scoring.score(tiny("llama"), token_windows, variants, batch_size=4, **QUIET)
    for variant in criteria.variants(variants):
        rows = [rows[1] for name, rows in found.items() if name.startswith(f"{variant.name}/")]
        kept = variant.create().subsets or len(accumulator.snapshot_counts(len(token_windows)))
        expected = variant.create().numbers_per_neuron(40, 16) if variant.criterion.reads_text else 0
        assert sum(row.numel() for row in rows) == kept * 40 * expected, variant.name


# Activations


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wanda_is_the_norm_of_the_weights_times_the_root_mean_square_of_the_activation(architecture, tiny, token_windows):
    model = tiny(architecture, "float64")
    scores = scoring.score(model, token_windows, ["wanda", {"wanda": {"p": 2}, "as": "wanda_2"}], batch_size=4, **QUIET)
    hidden = [torch.cat(rows) for rows in zip(*(activations(model, window) for window in token_windows), strict=True)]
    for mlp, h in zip(models.gated_mlps(model), hidden, strict=True):
        for name, p in (("wanda", 1), ("wanda_2", 2)):
            expected = [float(mlp.down.weight[:, i].abs().pow(p).sum() ** (1 / p) * h[:, i].square().mean() ** 0.5)
                        for i in range(mlp.width)]  # fmt: skip
            assert scores.importance[name][mlp.layer].tolist() == pytest.approx(expected, rel=1e-10)
    assert scores.mean_value == {} and scores.tokens == token_windows.size
    alone = scoring.score(model, token_windows[:4], ["wanda"], **QUIET).importance["wanda"]
    torch.testing.assert_close(scores.snapshots[4]["wanda"], alone, rtol=1e-10, atol=0)


def test_criteria_of_activations_and_weights_need_no_backward_pass_and_no_logits(tiny, token_windows, monkeypatch):
    model, forwards = tiny("llama"), []
    model.get_decoder().register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    scoring.score(model, np.empty((0, 0)), ["magnitude", "random"], **QUIET)
    probes = len(forwards)

    def refused(*_, **__):
        raise AssertionError("a head or a gradient")

    monkeypatch.setattr(models.Head, "logits", refused)
    monkeypatch.setattr(torch.Tensor, "backward", refused)
    monkeypatch.setattr(torch.autograd, "grad", refused)
    forwards.clear()
    scoring.score(model, token_windows, ["wanda", "magnitude"], batch_size=3, **QUIET)
    assert forwards[probes:] == [False] * 3


def test_one_forward_and_one_backward_serve_all_that_share_them(tiny, token_windows, monkeypatch):
    model, forwards, backwards, original = tiny("llama"), [], [], torch.Tensor.backward
    scoring.score(model, np.empty((0, 0)), ["magnitude"], **QUIET)
    decoder_calls = model.get_decoder().register_forward_hook(lambda *_: forwards.append(None))
    scoring.score(model, np.empty((0, 0)), ["magnitude"], **QUIET)
    probes = len(forwards)
    decoder_calls.remove()
    forwards.clear()
    monkeypatch.setattr(torch.Tensor, "backward", lambda *args, **kw: backwards.append(None) or original(*args, **kw))
    monkeypatch.setattr(backward.Reader, "_forward", counted(backward.Reader._forward, forwards))
    specs = [
        "entropy",
        {"entropy": {"reduction": "window"}, "as": "signed"},
        {"entropy": {"aggregation": "weight"}, "as": "by_weight"},
    ]
    scoring.score(model, token_windows, [*specs, "one_hot_ce", "wanda", {"kl_fisher": {"draws": 3}}], batch_size=9, **QUIET)
    assert probes and len(forwards) == 1 and len(backwards) == 5


def counted(function, calls):
    return lambda *arguments: calls.append(None) or function(*arguments)


def test_an_activation_criterion_without_text_is_refused(tiny):
    with pytest.raises(UserError, match="these criteria read text"):
        scoring.score(tiny("llama"), np.empty((0, 12)), ["wanda"], **QUIET)


# Logits with other reductions


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_reductions_square_tokens_or_the_signed_sum_of_a_window(architecture, tiny, token_windows):
    model, windows = tiny(architecture, "float64"), token_windows[:3]
    specs = [{"one_hot_ce": {"reduction": name}, "as": name} for name in ("absolute", "square", "window")]
    found = scoring.score(model, windows, specs, **QUIET).importance
    seq = windows.shape[1]
    expected = {name: [torch.zeros(40, dtype=torch.float64) for _ in range(3)] for name in found}
    for window in torch.as_tensor(windows):

        def cotangent(logits, window=window):
            gradient = label_gradient(torch.roll(window, -1))(logits)
            gradient[-1] = 0  # the text ends here
            return gradient

        for layer, (h, g) in enumerate(activations(model, window, cotangent)):
            expected["absolute"][layer] += (h * g).abs().sum(0) / (seq - 1)
            expected["square"][layer] += (h * g).square().sum(0) / 2 / (seq - 1)
            expected["window"][layer] += (h * g).sum(0).square() / 2 / (seq - 1)
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], rows, rtol=1e-6, atol=1e-12)


# KL-Fisher


def test_noise_is_a_function_of_its_keys_and_uniform():
    keys = noise.mixed(torch.arange(200_000))
    numbers = noise.uniform(keys)
    assert torch.equal(noise.uniform(noise.mixed(torch.tensor([7]))), numbers[7:8])
    assert numbers.min() >= 0 and numbers.max() < 1 and len(numbers.unique()) == len(numbers)
    counts = torch.histc(numbers, 50, 0, 1)
    assert ((counts - 4000) ** 2 / 4000).sum() < 100, "chi-square of 49 degrees of freedom"
    assert abs(float(torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1])) < 0.01


@pytest.mark.parametrize("estimator", ["label", "gaussian", "rademacher"])
def test_every_cotangent_has_the_fisher_matrix_as_its_covariance(estimator):
    logits = torch.tensor([2.0, 0.5, 0.0, -1.0, -1.0, -3.0, 1.0], dtype=torch.float64)
    p, draws = torch.softmax(logits, 0), 100_000
    criterion = criteria.create("kl_fisher", estimator=estimator)
    value, cotangent = criterion.value_and_gradient(logits.expand(draws, -1), noise.mixed(torch.arange(draws)))
    assert cotangent.mean(0).abs().max() < 0.01
    torch.testing.assert_close(cotangent.t() @ cotangent / draws, torch.diag(p) - torch.outer(p, p), rtol=0, atol=0.005)
    assert float(value.mean()) == pytest.approx(float(-(p * p.log()).sum()), abs=0.01)


def exact_kl_fisher(model, windows, reduction):
    """`1/2 E[(sum over the window of h dC/dh)^2]`, or of each token's, over labels independent at each position, divided by T.

    Cross terms between targets vanish in expectation, so every position and label has a gradient of its own.
    """
    total = [torch.zeros(mlp.width, dtype=torch.float64) for mlp in models.gated_mlps(model)]
    for window in torch.as_tensor(windows):
        with torch.no_grad():
            p = torch.softmax(model(input_ids=window[None]).logits[0], -1)
        for position, label in itertools.product(range(len(window)), range(p.shape[1])):

            def cotangent(logits, position=position, label=label):
                gradient = torch.zeros_like(logits)
                gradient[position] = torch.softmax(logits[position], -1)
                gradient[position, label] -= 1
                return gradient

            for layer, (h, g) in enumerate(activations(model, window, cotangent)):
                product = (h * g).sum(0).square() if reduction == "window" else (h * g).square().sum(0)
                total[layer] += p[position, label] * product / 2 / len(window)
    return total


@pytest.mark.parametrize("reduction", ["window", "square"])
def test_kl_fisher_estimates_what_all_labels_weighted_by_their_probability_give(reduction, tiny):
    model = tiny("llama", "float64", vocab_size=7, num_hidden_layers=2, intermediate_size=6)
    windows = np.array([[1, 4, 2, 6, 3]])
    expected = torch.cat(exact_kl_fisher(model, windows, reduction))
    for estimator in ("label", "gaussian", "rademacher"):
        settings = {"reduction": reduction, "estimator": estimator, "draws": 100}
        found = scoring.score(model, windows, [{"kl_fisher": settings}], **QUIET)
        ratio = torch.cat(found.importance["kl_fisher"]) / expected
        assert (ratio.log().abs() < 6 * math.sqrt(2 / 100)).all(), estimator
        assert float(ratio.mean()) == pytest.approx(1, abs=0.3), estimator


def test_kl_fisher_is_the_second_order_of_the_measured_divergence(tiny):
    """Scaling a neuron by 1 - e makes KL = e^2 times the score, summed over labels exactly."""
    model = tiny("llama", "float64", vocab_size=7, num_hidden_layers=2, intermediate_size=6)
    window, share = np.array([[1, 4, 2, 6, 3]]), 1e-3
    expected = exact_kl_fisher(model, window, "window")
    with torch.no_grad():
        dense = torch.log_softmax(model(input_ids=torch.as_tensor(window)).logits, -1)
    for layer, neuron in itertools.product(range(2), range(6)):
        scale = torch.ones(6, dtype=torch.float64)
        scale[neuron] -= share
        with torch.no_grad(), replaced(model, lambda at, h, layer=layer, scale=scale: h * scale if at == layer else h):
            changed = torch.log_softmax(model(input_ids=torch.as_tensor(window)).logits, -1)
        divergence = float((dense.exp() * (dense - changed)).sum(-1).mean())
        assert divergence / share**2 == pytest.approx(float(expected[layer][neuron]), rel=0.02)


def test_sampled_labels_depend_on_seed_window_and_position_alone(tiny, token_windows):
    model, seen = tiny("llama", "float64"), []

    def labels(**settings):
        seen.clear()
        original = type(criteria.create("kl_fisher")).value_and_gradient
        with pytest.MonkeyPatch.context() as patch:

            def watched(self, logits, keys):
                value, gradient = original(self, logits, keys)
                seen.append(keys)
                return value, gradient

            patch.setattr(type(criteria.create("kl_fisher")), "value_and_gradient", watched)
            scoring.score(model, token_windows, ["kl_fisher"], **QUIET, **settings)
        return torch.cat(seen)

    keys = labels(batch_size=4, chunk_size=7)
    assert torch.equal(keys, labels(batch_size=1)) and torch.equal(keys, labels(batch_size=9, chunk_size=1))
    assert len(keys.unique()) == token_windows.size and not torch.isin(keys, labels(seed=1)).any()


# Weight gradients


class RootMeanSquare(WeightGradientCriterion):
    """`sum over all weights of |w| sqrt(mean over windows of g^2)`: a member that only these tests know."""

    name = "root_mean_square"
    label = "|w| rms(g)"
    source = "test"
    gradient_of = criteria.create("one_hot_ce")

    def statistics(self, weights, gradients):
        return {"gate": gradients[0].square(), "up": gradients[1].square(), "down": gradients[2].square()}

    def importance(self, sums, inputs, down, windows):
        parts = zip((*inputs, down.t()), (sums["gate"], sums["up"], sums["down"]), strict=True)
        return sum((weight.double().abs() * (square / windows).sqrt()).sum(1) for weight, square in parts)


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": True}, {"batch_size": 1}], ids=str)
@pytest.mark.parametrize("architecture", ["llama-biases", "phi3"])
def test_weight_gradients_equal_autograd_over_the_whole_model(architecture, settings, tiny, token_windows):
    model, windows = tiny(architecture, "float64"), token_windows[:3]
    variant = criteria.Variant("rms", RootMeanSquare, RootMeanSquare.complete({}))
    scores = scoring.score(model, windows, [variant, "one_hot_ce"], **QUIET, **settings)
    model.requires_grad_(True)
    squares = {}
    for window in torch.as_tensor(windows):
        model.zero_grad()
        logits = model(input_ids=window[None]).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], window[1:]).backward()
        for mlp in models.gated_mlps(model):
            for module in (*mlp.inputs, mlp.down):
                squares[module] = squares.get(module, 0) + module.weight.grad.square()
    for mlp in models.gated_mlps(model):
        parts = [module.weight.detach().abs() * (squares[module] / 3).sqrt() for module in (*mlp.inputs, mlp.down)]
        expected = parts.pop().sum(0)
        for part in itertools.chain.from_iterable(part.split(mlp.width) for part in parts):
            expected = expected + part.sum(1)
        torch.testing.assert_close(scores.importance["rms"][mlp.layer], expected, rtol=1e-5, atol=1e-12)
    assert scores.mean_value.keys() == {"one_hot_ce"}


def test_a_reduction_of_activations_does_not_go_with_weights():
    with pytest.raises(UserError, match="leave it out with aggregation 'weight'"):
        criteria.variants([{"entropy": {"aggregation": "weight", "reduction": "square"}}])


# Measured


@pytest.mark.parametrize("group", [1, 3])
def test_ablation_is_the_measured_divergence_shared_by_a_group(group, tiny, token_windows):
    model, windows = tiny("qwen3", "float64", intermediate_size=8), token_windows[:3]
    found = scoring.score(model, windows, [{"ablation": {"group": group}}], batch_size=2, **QUIET).importance["ablation"]
    ids = torch.as_tensor(windows)
    with torch.no_grad():
        dense = torch.log_softmax(model(input_ids=ids).logits, -1)
        for mlp in models.gated_mlps(model):
            for start in range(0, 8, group):
                before = mlp.down.weight.clone()
                mlp.down.weight[:, start : start + group] = 0
                changed = torch.log_softmax(model(input_ids=ids).logits, -1)
                mlp.down.weight.copy_(before)
                divergence = float((dense.exp() * (dense - changed)).sum(-1).mean(-1).sum())
                own = found[mlp.layer][start : start + group]
                assert own.tolist() == pytest.approx([divergence / len(own)] * len(own), rel=1e-6, abs=1e-14)


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_llm_pruner_takes_the_absolute_value_of_the_gradient_over_all_windows(architecture, tiny, token_windows):
    model, windows = tiny(architecture, "float64"), torch.as_tensor(token_windows[:3])
    specs = ["llm_pruner", {"llm_pruner": {"granularity": "element"}, "as": "element"}]
    found = scoring.score(model, token_windows[:3], specs, batch_size=2, **QUIET).importance
    model.requires_grad_(True)
    logits = model(input_ids=windows).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).backward()
    for mlp in models.gated_mlps(model):
        products = [(module.weight * module.weight.grad).detach() for module in (*mlp.inputs, mlp.down)]
        rows = [products.pop().t()]
        rows += [part for product in products for part in product.split(mlp.width)]
        vector, element = sum(row.sum(1).abs() for row in rows), sum(row.abs().sum(1) for row in rows)
        torch.testing.assert_close(found["llm_pruner"][mlp.layer], vector, rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(found["element"][mlp.layer], element, rtol=1e-5, atol=1e-12)
        assert (element >= vector - 1e-12).all()
