"""Single criteria against slow, obvious float64 computations of their formulas, and the identities between them."""

import copy
import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from test_kinds import activations, exact_kl_fisher, label_gradient

from hfprune_nb import criteria, models
from hfprune_nb.criteria.policy_gradient import PolicyGradient
from hfprune_nb.errors import UserError
from hfprune_nb.method import iterated, pruning, scoring, selection
from hfprune_nb.models.hooks import replaced, silenced
from hfprune_nb.runs import forecast
from hfprune_nb.runs.stages import STAGES

QUIET = {"progress": False}


def importance(model, windows, *specs, **settings):
    return scoring.score(model, windows, list(specs), **QUIET, **settings).importance


def all_hidden(model, windows):
    """h of every layer over all tokens, (tokens, neurons)."""
    return [torch.cat(rows) for rows in zip(*(activations(model, window) for window in windows), strict=True)]


def assert_close(found, expected, rtol=1e-6):
    for row, other in zip(found, expected, strict=True):
        torch.testing.assert_close(row, torch.as_tensor(other, dtype=torch.float64), rtol=rtol, atol=1e-12)


# Logits


def test_entropy_of_as_many_tokens_as_the_vocabulary_has_is_entropy(tiny, token_windows):
    z = 4 * torch.randn(17, 23, dtype=torch.float64)
    for k in (23, 1000):
        for one, other in zip(*(criteria.create(*named, **own).value_and_gradient(z) for named, own in
                                ((["entropy_topk"], {"k": k}), (["entropy"], {}))), strict=True):  # fmt: skip
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    found = importance(
        tiny("llama", "float64"), token_windows[:2], "entropy", {"entropy_topk": {"k": 61}}, {"entropy_topk": {}, "as": "few"}
    )
    assert_close(found["entropy_topk"], found["entropy"])
    assert not torch.allclose(found["few"][0], found["entropy"][0], rtol=0.01)


def test_squared_tokens_of_kl_fisher_are_the_divergences_of_single_positions_silenced(tiny):
    model = tiny("llama", "float64", vocab_size=7, num_hidden_layers=2, intermediate_size=6)
    window, share = np.array([[1, 4, 2, 6, 3]]), 1e-3
    expected, ids = exact_kl_fisher(model, window, "square"), torch.as_tensor(window)
    with torch.no_grad():
        dense = torch.log_softmax(model(input_ids=ids).logits, -1)
        for layer, neuron in itertools.product(range(2), range(6)):
            total = 0
            for position in range(5):
                scale = torch.ones(5, 6, dtype=torch.float64)
                scale[position, neuron] -= share
                with replaced(model, lambda at, h, layer=layer, scale=scale: h * scale if at == layer else h):
                    changed = torch.log_softmax(model(input_ids=ids).logits, -1)
                total += float((dense.exp() * (dense - changed)).sum(-1).mean())
            assert total / share**2 == pytest.approx(float(expected[layer][neuron]), rel=0.02)


# Gates


def window_sums(model, windows):
    """u of the summed cross-entropy, for each layer (windows, neurons)."""
    rows = []
    for window in torch.as_tensor(windows):

        def cotangent(logits, window=window):
            gradient = label_gradient(torch.roll(window, -1))(logits)
            gradient[-1] = 0
            return gradient

        rows.append([(h * g).sum(0) for h, g in activations(model, window, cotangent)])
    return [torch.stack(own) for own in zip(*rows, strict=True)]


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_taylor2_weighs_the_mean_against_the_square_of_window_sums(architecture, tiny, token_windows):
    model, windows, positions = tiny(architecture, "float64"), token_windows[:3], 11
    signed = {"taylor2": {"sign": "signed"}, "as": "signed"}
    published = {"taylor2": {"curvature": "published"}, "as": "published"}
    found = importance(model, windows, "taylor2", signed, published)
    for layer, u in enumerate(window_sums(model, windows)):
        first, second = u.mean(0) / positions, u.square().mean(0) / 2 / positions
        assert_close([found["taylor2"][layer]], [(first - second).abs()])
        assert_close([found["signed"][layer]], [second - first])
        assert_close([found["published"][layer]], [(first - (u / positions).square().mean(0) / 2).abs()])


def test_a_divergence_increment_is_the_cross_term_with_what_is_gone_and_the_own_curvature(tiny):
    model = tiny("llama", "float64", vocab_size=7, num_hidden_layers=2, intermediate_size=6)
    window, draws = np.array([[1, 4, 2, 6, 3]]), 1000
    specs = ["one_hot_ce", {"divergence_increment": {"first_stage_ratio": 0.17}}]
    # The same window again and again, each time with other labels.
    found = importance(model, window.repeat(draws, 0), *specs, batch_size=500)
    gone = [row.argsort()[:1] for row in found["one_hot_ce"]]
    kept = [torch.arange(6)[torch.arange(6) != row] for row in gone]
    ids = torch.as_tensor(window)
    with torch.no_grad():
        q = torch.softmax(model(input_ids=ids).logits[0], -1)
    with silenced(model, kept):
        own = exact_kl_fisher(model, window, "window")
        cross = [(h * g).sum(0) / 5 for h, g in activations(model, window[0], lambda z: torch.softmax(z, -1) - q)]

        def divergence():
            return float((q * (q.log() - torch.log_softmax(model(input_ids=ids).logits[0], -1))).sum(-1).mean())

        with torch.no_grad():
            found_at, share, neuron = {}, 1e-2, int(kept[1][0])
            for sign in (1, -1):
                scale = torch.ones(6, dtype=torch.float64).index_fill(0, torch.tensor(neuron), 1 - sign * share)
                with replaced(model, lambda layer, h, scale=scale: h * scale if layer == 1 else h):
                    found_at[sign] = divergence()
    slope = (found_at[1] - found_at[-1]) / 2 / share
    assert slope == pytest.approx(-float(cross[1][neuron]), rel=0.01), "a removal changes the divergence by minus the product"
    for layer, indices in enumerate(kept):
        expected = (own[layer] - cross[layer])[indices]
        sampling = 6 * own[layer][indices] * (2 / draws) ** 0.5
        assert ((found["divergence_increment"][layer] / draws)[indices] - expected).abs().le(sampling + 1e-9).all()
        assert found["divergence_increment"][layer].argmin() == gone[layer], "what the student has lost ranks last"


# Activations


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_flap_is_the_variance_and_with_the_squared_mean_it_is_obd(architecture, tiny, token_windows):
    model = tiny(architecture, "float64")
    found = importance(model, token_windows, "flap", {"flap": {"metric": "ifv"}, "as": "ifv"}, {"obd": {"damping": 1e-300}})
    for mlp, h in zip(models.gated_mlps(model), all_hidden(model, token_windows), strict=True):
        norms = mlp.down.weight.square().sum(0)
        assert_close([found["ifv"][mlp.layer]], [h.var(0, correction=0)])
        assert_close([found["flap"][mlp.layer]], [h.var(0, correction=0) * norms])
        assert_close([found["obd"][mlp.layer]], [found["flap"][mlp.layer] + h.mean(0).square() * norms])


@pytest.mark.parametrize("architecture", ["llama-biases", "gemma", "phi3"])
def test_llm_bip_is_the_change_of_the_blocks_output_without_the_neuron(architecture, tiny, token_windows):
    model, windows = tiny(architecture, "float64", intermediate_size=5), token_windows[:2]
    specs = [{"llm_bip": {"norm": norm}, "as": f"norm_{norm}"} for norm in ("1", "2", "relative")]
    found, outputs = importance(model, windows, *specs), {}
    for layer, module in enumerate(model.get_decoder().layers):
        module.register_forward_hook(
            lambda _, args, output, layer=layer: outputs.__setitem__(layer, output[0] if isinstance(output, tuple) else output)
        )
    ids = torch.as_tensor(windows)
    for layer, neuron in itertools.product(range(3), range(5)):
        mask = torch.arange(5) != neuron
        with torch.no_grad():
            model(input_ids=ids)
            dense = outputs[layer]
            with replaced(model, lambda at, h, layer=layer, mask=mask: h * mask if at == layer else h):
                model(input_ids=ids)
            change = outputs[layer] - dense
        expected = (change.abs().sum(-1), change.norm(dim=-1), change.norm(dim=-1) / dense.norm(dim=-1))
        for spec, each in zip(specs, expected, strict=True):
            assert float(found[spec["as"]][layer][neuron]) == pytest.approx(float(each.mean()), rel=1e-6)


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_obs_is_the_error_after_a_refit_and_isc_adds_obd(damping, tiny, token_windows):
    model = tiny("llama", "float64")
    found = importance(model, token_windows, *({name: {"damping": damping}} for name in ("obd", "obs", "isc")))
    for mlp, h in zip(models.gated_mlps(model), all_hidden(model, token_windows), strict=True):
        obd, obs, isc = (found[name][mlp.layer] for name in ("obd", "obs", "isc"))
        # Damping is as much as further tokens that each set one neuron alone.
        extra = (damping * h.square().mean(0).mean() * len(h)) ** 0.5 * torch.eye(mlp.width, dtype=h.dtype)
        rows = torch.cat([h, extra])
        for neuron in range(mlp.width):
            others = rows[:, torch.arange(mlp.width) != neuron]
            error = rows[:, neuron] - others @ torch.linalg.lstsq(others, rows[:, neuron : neuron + 1]).solution[:, 0]
            refitted = float(mlp.down.weight[:, neuron].square().sum() * error.square().sum() / len(h))
            assert float(obs[neuron]) == pytest.approx(refitted, rel=1e-8)
        assert_close([isc], [obd + obs], rtol=1e-12)
        assert (obd <= isc).all() and (isc <= 2 * obd * (1 + 1e-12)).all() and (obs < obd).all()


def test_statistics_that_are_large_have_no_snapshots(tiny, token_windows):
    scores = scoring.score(tiny("llama"), token_windows, ["obs", "obd", {"gblm": {"p": 2}}], batch_size=2, **QUIET)
    assert {n: set(found) for n, found in scores.snapshots.items()} == {
        n: {"obd"} for n in (1, 2, 4, 8)
    } | {9: {"obs", "obd", "gblm"}}  # fmt: skip


# Weight gradients


def weight_gradients(model, windows):
    """For each window and layer the weights and gradients of gate, up and the transposed down of the mean cross-entropy."""
    model.requires_grad_(True)
    for window in torch.as_tensor(windows):
        model.zero_grad()
        logits = model(input_ids=window[None]).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], window[1:]).backward()
        layers = []
        for mlp in models.gated_mlps(model):
            parts = [(module.weight.detach(), module.weight.grad.clone()) for module in mlp.inputs]
            if mlp.fused is not None:
                parts = list(zip(*(tensor.split(mlp.width) for tensor in parts[0]), strict=True))
            layers.append([*parts, (mlp.down.weight.detach().t(), mlp.down.weight.grad.t().clone())])
        yield layers
    model.requires_grad_(False)


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_gblm_adds_the_norm_of_gradients_to_that_of_activations_whatever_the_number_of_windows(architecture, tiny, token_windows):
    model, windows = tiny(architecture, "float64"), token_windows[:3]
    specs = [{"gblm": {"p": p, "alpha": 3.0}, "as": f"l{p}"} for p in (1, 2)]
    found = importance(model, windows, *specs, batch_size=2)
    hidden, gradients = all_hidden(model, windows), list(weight_gradients(model, windows))
    for layer, h in enumerate(hidden):
        norm = (h.square().sum(0) / 3).sqrt()
        weight, slopes = gradients[0][layer][-1][0], torch.stack([each[layer][-1][1] for each in gradients])
        for p, total in ((1, slopes.abs().sum(0) * 128 / 3), (2, (slopes.square().sum(0) * 128 / 3).sqrt())):
            expected = (weight.abs() * (norm[:, None] + 3 * total)).sum(1)
            assert_close([found[f"l{p}"][layer]], [expected], rtol=1e-5)
    again = importance(model, np.concatenate([windows, windows]), *specs)
    for name, rows in found.items():
        assert_close(again[name], rows)


@pytest.mark.parametrize("order", ["second", "mixed"])
def test_llm_pruners_second_order_is_of_squared_gradients(order, tiny, token_windows):
    model, windows = tiny("phi3", "float64"), token_windows[:3]
    found = importance(model, windows, {"llm_pruner": {"granularity": "element", "order": order}})["llm_pruner"]
    gradients = list(weight_gradients(model, windows))
    for layer, row in enumerate(found):
        expected = 0
        for part in range(3):
            weight, slopes = gradients[0][layer][part][0], torch.stack([each[layer][part][1] for each in gradients])
            change = (weight * slopes.mean(0) if order == "mixed" else 0) - weight.square() * slopes.square().mean(0) / 2
            expected = expected + change.abs().sum(1)
        assert_close([row], [expected], rtol=1e-5)
    with pytest.raises(UserError, match="order is of elements"):
        criteria.variants([{"llm_pruner": {"order": order}}])


def test_saap_fuses_two_importances_and_divides_by_their_fluctuation(tiny, token_windows):
    model, windows = tiny("llama", "float64"), token_windows[:6]
    both = [{"saap": {"subsets": 3, "fluctuation": way}, "as": way} for way in ("removed", "kept")]
    found = importance(model, windows, *both, batch_size=4)
    gradients = list(weight_gradients(model, windows))

    def fused(layer, numbers):
        products = [sum(w * g for w, g in (gradients[n][layer][part] for n in numbers)) for part in range(3)]
        vector, element = sum(p.sum(1).abs() for p in products), sum(p.abs().sum(1) for p in products)
        return vector / vector.mean() / 2 + element / element.mean() / 2

    for layer in range(3):
        whole, parts = fused(layer, range(6)), torch.stack([fused(layer, (n, n + 3)) for n in range(3)])
        fluctuation = parts.std(0) / (parts.mean(0) + 1e-6 * whole.mean())
        assert_close([found["removed"][layer]], [whole / (1 + fluctuation)], rtol=1e-5)
        assert_close([found["kept"][layer]], [whole * (1 + fluctuation)], rtol=1e-5)


# Search


@pytest.mark.parametrize("settings", [{}, {"baseline": "others"}, {"budget": "layer"}], ids=str)
def test_a_policy_gradient_finds_the_order_of_a_loss_that_is_linear_in_the_mask(settings):
    cost = [torch.linspace(-1, 1, 12).double(), torch.linspace(1, -1, 8).double()]
    criterion = PolicyGradient(keep=0.5, epochs=250, masks=4, rate=0.05, initial="flat", batch=4, **settings)
    asked = []

    def loss(numbers, masks):
        asked.append(numbers)
        return float(-sum((own * mask).sum() for own, mask in zip(cost, masks, strict=True))) + 7

    start = [torch.rand(12).double(), torch.rand(8).double()]
    found = criterion.search(loss, start, 6, seed=1)
    assert asked[:16:4] == [range(4), range(4, 6)] * 2, "windows in turn"
    for row, own in zip(found, cost, strict=True):
        assert ((row > 0.5) == (own > 0)).all(), row
        assert row.min() >= 0 and row.max() <= 1
    parts = found if settings.get("budget") == "layer" else [torch.cat(found)]
    assert [float(part.mean()) for part in parts] == pytest.approx([0.5] * len(parts), abs=1e-9)
    again = criterion.search(loss, start, 6, seed=1)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_one_step_of_the_policy_gradient_is_that_of_the_authors_code():
    losses, seen, criterion = iter([3.0, 5.0]), [], PolicyGradient(keep=0.5, epochs=1, rate=1e-4, initial="flat")

    def loss(numbers, masks):
        seen.append(masks[0].clone())
        return next(losses)

    (found,) = criterion.search(loss, [torch.rand(40).double()], 2, seed=0)
    one, two = ((mask - 0.5) / ((0.5 + 1e-7) ** 2) ** 0.5 for mask in seen)
    moved = 0.5 - 1e-4 * ((3 - 4) * one + (5 - 4) * two)  # the mean of the first losses is the baseline; masks - 1 is one
    torch.testing.assert_close(found, moved - (moved.mean() - 0.5), rtol=0, atol=1e-12)
    assert 0.3 < float(torch.cat(seen).mean()) < 0.7 and set(torch.cat(seen).tolist()) == {0, 1}


def test_a_search_begins_at_wanda_and_asks_for_the_loss_of_masks(tiny, token_windows, monkeypatch):
    model, windows, found = tiny("qwen3", "float64"), token_windows, {}
    spec = {"policy_gradient": {"keep": 0.5, "rate": 1e-9, "epochs": 2, "batch": 4, "masks": 3}}
    scores = scoring.score(model, windows, [spec, "wanda"], **QUIET)
    for one, other in zip(scores.importance["policy_gradient"], scores.importance["wanda"], strict=True):
        assert stats.spearmanr(one, other).statistic > 0.99
    assert scores.notes["policy_gradient"]["forward passes of the text"] == 6
    assert scores.notes["policy_gradient"]["mean rank correlation with its start in a layer"] > 0.99
    assert (
        "policy_gradient" not in scores.snapshots[9]
        and criteria.create("policy_gradient", **spec["policy_gradient"]).passes[0] == 7
    )
    kept = [torch.arange(0, 40, 2 + layer) for layer in range(3)]

    def asking(self, loss, start, windows, seed):
        masks = [torch.zeros(40).index_fill(0, row, 1) for row in kept]
        found["loss"] = loss(range(2, 5), masks)
        return [row + 0.0 for row in start]

    monkeypatch.setattr(PolicyGradient, "search", asking)
    scoring.score(model, windows, ["policy_gradient"], chunk_size=5, **QUIET)
    ids = torch.as_tensor(windows[2:5])
    with torch.no_grad(), silenced(model, kept):
        logits = model(input_ids=ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert found["loss"] == pytest.approx(float(expected), rel=1e-9)


def test_what_the_student_has_lost_ranks_below_negative_scores():
    first = [torch.tensor([3.0, 0.0, 1.0]), torch.tensor([2.0, 5.0])]
    found = selection.rank_last([torch.tensor([-7.0, 0.0, 2.0]), torch.tensor([0.0, 4.0])], [[0, 2], [1]], first)
    assert found[0].tolist()[::2] == [-7, 2] and found[1][1] == 4
    assert found[0][1] < -7 and found[0][1] < found[1][0] < -7


# Rounds


def plans(model, allocation="uniform"):
    def plan(rows, share):
        return selection.allocate(model, neuron_ratio=share * 0.3, importance=rows, allocation=allocation)

    return plan


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("criterion", ["kl_fisher", "self_distillation", "magnitude"])
def test_rounds_score_what_is_left_before_the_next_part_goes(criterion, allocation, tiny, token_windows):
    model, windows, plan = tiny("llama", "float64"), token_windows[:3], None
    first, plan = importance(model, windows, criterion)[criterion], plans(model, allocation)
    before = [tensor.clone() for tensor in model.parameters()]

    again = {"plan": plan, "windows": windows, "criterion": criterion, **QUIET}
    assert all(one is other for one, other in zip(iterated.in_rounds(model, first, 1, **again), first, strict=True))
    rows, gone = first, [set() for _ in range(3)]
    for share in (1 / 3, 2 / 3):
        kept = selection.kept_neurons(rows, plan(rows, share).width_after)
        alive = [sorted(set(range(40)) - lost) for lost in gone]
        assert all(set(own.tolist()) <= set(others) for own, others in zip(kept, alive, strict=True)), "a neuron came back"
        gone = [set(range(40)) - set(own.tolist()) for own in kept]
        fresh = importance(pruning.narrow(copy.deepcopy(model), kept), windows, criterion)[criterion]
        rows = [
            torch.full((40,), -1e9, dtype=torch.float64).index_copy(0, own, new) for own, new in zip(kept, fresh, strict=True)
        ]
        rows = [row + torch.arange(40) * 1e-3 * (row < -1e8) for row in rows]
    found = iterated.in_rounds(model, first, 3, **again)
    final = plan(found, 1).width_after
    assert sum(final) == sum(plan(first, 1).width_after)
    for own, other in zip(selection.kept_neurons(found, final), selection.kept_neurons(rows, final), strict=True):
        assert torch.equal(own, other)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))
    if criterion == "magnitude":
        once = selection.kept_neurons(first, plan(first, 1).width_after)
        assert all(torch.equal(one, other) for one, other in zip(once, selection.kept_neurons(found, final), strict=True))
    with pytest.raises(UserError, match="rounds 0 is too small"):
        iterated.in_rounds(model, first, 0, **again)


def test_each_further_round_costs_what_scoring_the_criterion_costs():
    known, stages = forecast.rates(), {"calibration/c": {"n_windows": 4, "seq_len": 8}}
    stages["scoring/s"] = {"model": "smollm2-135m", "calibration": "calibration/c", "criteria": ["entropy", "kl_fisher", "wanda"]}
    asked = {"model": "smollm2-135m", "scores": "scoring/s", "criterion": "kl_fisher"}
    once, four = (STAGES["pruning"].work(asked | {"rounds": rounds}, known, stages.get) for rounds in (1, 4))
    amount, tokens = STAGES["scoring"].work(stages["scoring/s"] | {"criteria": ["kl_fisher"]}, known, stages.get)
    rates = known["devices"]["cpu"]["seconds_per_unit"]
    assert (four[0] - once[0]) * rates["pruning"] == pytest.approx(3 * amount * rates["scoring"])
    assert (once[1], four[1]) == (0, 3 * tokens) and once == STAGES["pruning"].work(asked, known, stages.get)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rounds": 0}, "rounds 0 must be 1"),
        ({"rounds": 2, "attention_split": "proportional"}, "set rounds to 1, or attention_split to none"),
        ({"rounds": 2, "allocation": "global_normalised"}, "'global_normalised' cannot share out in rounds"),
    ],
)
def test_rounds_that_make_no_sense_are_refused_before_anything_runs(values, sentence):
    with pytest.raises(UserError, match=sentence):
        STAGES["pruning"].check({"allocation": "uniform", "ratio": 0.2, "neuron_ratio": 0.0, "levels": 0} | values)
