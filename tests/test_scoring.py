"""The engine against a naive loop: full logits, autograd through everything, one window at a time."""

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES
from scipy.stats import spearmanr

from hfprune_nb import models
from hfprune_nb.errors import UserError
from hfprune_nb.inputs import calibration
from hfprune_nb.method import scoring, selection
from hfprune_nb.models import cpu_attention
from hfprune_nb.models.hooks import replaced, silenced

THREE = ["one_hot_ce", "entropy", "self_distillation"]
TENTH = [*THREE[:2], {"self_distillation": {"first_stage_ratio": 0.1}}]


def equal(one, other):
    """Whether the layers of two importances hold the same bits."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def naive(model, windows, criterion, kept=None, alpha=1.0, temperature=1.0):
    """|h * dC/dh| summed over tokens, with C averaged over positions, by autograd through the whole model, for each layer.

    Self-distillation is written as in SDMPrune's code: cross-entropy and divergence are means over their own positions.
    """
    mlps = models.gated_mlps(model)
    total = [torch.zeros(mlp.width, dtype=torch.float64) for mlp in mlps]
    for window in torch.as_tensor(windows):
        with torch.no_grad():
            teacher = model(input_ids=window[None]).logits[0].double()
        leaves = {}

        def watch(layer, hidden, leaves=leaves):
            # Adding a zero that needs a gradient gives dC/dh without changing h.
            leaves[layer] = torch.zeros_like(hidden).requires_grad_()
            leaves[layer].value = hidden.detach()
            return hidden + leaves[layer]

        context = silenced(model, kept) if kept is not None else replaced(model, lambda _, hidden: hidden)
        with context, replaced(model, watch):
            logits = model(input_ids=window[None]).logits[0].double()
        log_p = torch.log_softmax(logits, -1)
        if criterion == "one_hot_ce":
            value = torch.nn.functional.nll_loss(log_p[:-1], window[1:])
        elif criterion == "entropy":
            value = -(log_p.exp() * log_p).sum(-1).mean()
        else:
            log_q = torch.log_softmax(teacher / temperature, -1)
            value = alpha * torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
            value = value + (1 - alpha) * torch.nn.functional.nll_loss(log_p[:-1], window[1:])
        gradients = torch.autograd.grad(value, [leaves[layer] for layer in range(len(mlps))])
        for layer, gradient in enumerate(gradients):
            total[layer] += (leaves[layer].value * gradient).abs().sum((0, 1)).double()
    return total


SOFT = {"self_distillation": {"alpha": 0.4, "temperature": 0.2, "first_stage_ratio": 0.1}, "as": "soft"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_pass_equals_the_naive_loop(architecture, tiny, token_windows):
    model = tiny(architecture, dtype="float64")
    scores = scoring.score(model, token_windows, [*TENTH, SOFT], batch_size=4, chunk_size=7, progress=False)
    for criterion in ("one_hot_ce", "entropy"):
        torch.testing.assert_close(scores.importance[criterion], naive(model, token_windows, criterion), rtol=1e-5, atol=1e-9)
    first = scores.importance["one_hot_ce"]
    kept = selection.kept_neurons(first, [36] * len(first))
    for name, settings in (("self_distillation", {}), ("soft", {"alpha": 0.4, "temperature": 0.2})):
        expected, found = naive(model, token_windows, "self_distillation", kept, **settings), scores.importance[name]
        own = [row[indices] for row, indices in zip(found, kept, strict=True)]
        torch.testing.assert_close(own, [r[i] for r, i in zip(expected, kept, strict=True)], rtol=1e-5, atol=1e-9)
        lowest = min(row.min() for row in own)
        for row, indices, of_first in zip(found, kept, first, strict=True):
            removed = torch.ones_like(row, dtype=torch.bool).scatter_(0, indices, False)
            assert row[removed].max() < lowest, "a neuron removed in the first stage does not rank last"
            assert torch.equal(row[removed].argsort(), of_first[removed].argsort()), "the order of the first stage is lost"


@pytest.mark.parametrize("architecture", ["llama-biases", "gemma", "phi3"])
def test_weight_aggregation_equals_autograd_over_the_whole_model(architecture, tiny, token_windows):
    model = tiny(architecture, dtype="float64")
    scores = scoring.score(model, token_windows[:3], [{"entropy": {"aggregation": "weight"}}], progress=False)
    mlps = models.gated_mlps(model)
    expected = [torch.zeros(mlp.width, dtype=torch.float64) for mlp in mlps]
    model.requires_grad_(True)
    for window in torch.as_tensor(token_windows[:3]):
        log_p = torch.log_softmax(model(input_ids=window[None]).logits[0], -1)
        model.zero_grad()
        (-(log_p.exp() * log_p).sum(-1).mean()).backward()
        for mlp in mlps:
            parts = list(mlp.fused.weight.chunk(2)) if mlp.fused is not None else [mlp.gate.weight, mlp.up.weight]
            slopes = list(mlp.fused.weight.grad.chunk(2)) if mlp.fused is not None else [mlp.gate.weight.grad, mlp.up.weight.grad]
            change = mlp.down.weight.T * mlp.down.weight.grad.T + sum(w * g for w, g in zip(parts, slopes, strict=True))
            expected[mlp.layer] += change.abs().mean(1).detach()
    torch.testing.assert_close(scores.importance["entropy"], expected, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"batch_size": 9}, {"chunk_size": 1}, {"chunk_size": 1000}])
def test_batches_and_chunks_do_not_change_scores(changes, tiny, token_windows):
    model = tiny("qwen3")
    settings = {"batch_size": 3, "chunk_size": 16, "progress": False}
    one = scoring.score(model, token_windows, THREE, **settings)
    other = scoring.score(model, token_windows, THREE, **(settings | changes))
    for criterion in THREE:
        torch.testing.assert_close(one.importance[criterion], other.importance[criterion], rtol=2e-4, atol=1e-7)


def test_order_of_windows_does_not_change_scores(tiny, token_windows):
    model = tiny("llama")
    one = scoring.score(model, token_windows, THREE, progress=False)
    other = scoring.score(model, token_windows[::-1], THREE, progress=False)
    for criterion in THREE:
        torch.testing.assert_close(one.importance[criterion], other.importance[criterion], rtol=1e-4, atol=1e-7)


def test_criteria_scored_together_equal_criteria_scored_alone(tiny, token_windows):
    model = tiny("llama-tied")
    together = scoring.score(model, token_windows, [*THREE, "magnitude", "random"], seed=5, progress=False)
    for criterion in together.importance:
        alone = scoring.score(model, token_windows, [criterion], seed=5, progress=False)
        assert equal(alone.importance[criterion], together.importance[criterion]), criterion


def test_same_arguments_give_the_same_bytes(tiny, token_windows, tmp_path):
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for file in files:
        scoring.score(tiny("llama"), token_windows, [*THREE, "random"], progress=False).save(file)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("aggregation", ["activation", "weight"])
def test_scoring_leaves_the_model_as_it_was(aggregation, tiny, token_windows):
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scoring.score(model, token_windows, [{name: {"aggregation": aggregation}} for name in THREE], progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert not any(mlp.down._forward_pre_hooks or mlp.up._forward_hooks for mlp in models.gated_mlps(model))


def test_no_logits_larger_than_a_chunk_ever_exist(tiny, token_windows, monkeypatch):
    seen, original = [], models.Head.logits
    monkeypatch.setattr(
        models.Head, "logits", lambda self, hidden, **out: seen.append(len(hidden)) or original(self, hidden, **out)
    )
    scoring.score(tiny("llama"), token_windows, THREE, batch_size=9, chunk_size=10, progress=False)
    assert max(seen) == 10


def test_narrower_dtypes_rank_like_double(tiny, token_windows):
    # Random weights with large activations are the hard case for bfloat16; tests/test_real_model.py has the real one.
    exact = scoring.score(tiny("llama", dtype="float64"), token_windows, ["entropy"], progress=False).importance["entropy"]
    for dtype, least in (("float32", 0.9999), ("bfloat16", 0.97)):
        found = scoring.score(tiny("llama", dtype=dtype), token_windows, ["entropy"], progress=False).importance["entropy"]
        for layer in range(len(exact)):
            assert spearmanr(exact[layer], found[layer]).statistic > least, dtype


def test_logit_softcapping_and_scaling_are_part_of_the_head(token_windows):
    from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig

    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3}
    for config in (Gemma2Config(**sizes, final_logit_softcapping=3.0), GraniteConfig(**sizes, logits_scaling=4.0)):
        model = AutoModelForCausalLM.from_config(config).double().eval().requires_grad_(False)
        scores = scoring.score(model, token_windows, ["one_hot_ce"], progress=False)
        torch.testing.assert_close(
            scores.importance["one_hot_ce"], naive(model, token_windows, "one_hot_ce"), rtol=1e-5, atol=1e-9
        )


def test_a_model_without_gated_mlp_is_refused_by_name(token_windows):
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    moe = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_experts=2
        )
    )
    for model in (gpt2, moe):
        with pytest.raises(UserError, match=type(model).__name__):
            scoring.score(model, token_windows, ["entropy"], progress=False)


def test_broken_weights_and_dead_models_are_refused(tiny, token_windows):
    broken = tiny("llama")
    models.gated_mlps(broken)[1].down.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        scoring.score(broken, token_windows, ["entropy"], progress=False)
    dead = tiny("llama")
    dead.lm_head.weight.data.zero_()
    with pytest.raises(UserError, match="equal"):
        scoring.score(dead, token_windows, ["entropy"], progress=False)


@pytest.mark.parametrize(("name", "value"), [("batch_size", -1), ("chunk_size", 0), ("checkpoint_every", 0)])
def test_sizes_that_are_too_small_are_refused(name, value, tiny, token_windows):
    with pytest.raises(UserError, match=f"{name} {value} is too small"):
        scoring.score(tiny("llama"), token_windows, ["entropy"], progress=False, **{name: value})


def test_an_unknown_aggregation_is_refused(tiny, token_windows):
    with pytest.raises(UserError, match="aggregation 'activations' is not one of"):
        scoring.score(tiny("llama"), token_windows, [{"entropy": {"aggregation": "activations"}}], progress=False)


@pytest.mark.parametrize(
    ("windows", "criteria", "words"),
    [
        (None, [], "criteria is empty"),
        (np.empty((0, 8)), ["entropy"], "calibration"),
        (calibration.Windows(np.zeros((2, 8), dtype=np.int64)), ["entropy"], r"windows must be .* give \.ids"),
        (np.full((2, 8), 3.5), ["entropy"], "windows: float64 values are no token ids"),
        (np.ones((2, 8), bool), ["entropy"], "windows: bool values are no token ids"),
        ([[1, 2, 3], [4, 5]], ["entropy"], "windows differ in length"),
        (None, None, "None is no criterion"),
        (None, ["entropie"], "did you mean"),
    ],
)
def test_bad_arguments_are_refused(windows, criteria, words, tiny, token_windows):
    with pytest.raises(UserError, match=words):
        scoring.score(tiny("llama"), token_windows if windows is None else windows, criteria, progress=False)


def test_scores_of_another_model_or_a_truncated_file_are_refused(tiny, token_windows, tmp_path):
    file = tmp_path / "scores.safetensors"
    scoring.score(tiny("llama"), token_windows, ["magnitude"], progress=False).save(file)
    with pytest.raises(UserError, match="another model"):
        scoring.load_importance(file, "magnitude", tiny("llama", intermediate_size=44))
    with pytest.raises(UserError, match="not in"):
        scoring.load_importance(file, "entropy")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="truncated"):
        scoring.load_importance(file, "magnitude")
    with pytest.raises(UserError, match="does not exist"):
        scoring.load_importance(tmp_path / "none.safetensors", "magnitude")


# Attention in blocks


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma"])
def test_attention_in_blocks_is_the_same_attention(architecture, tiny, token_windows, monkeypatch):
    """The engine's own attention against the model's, with windows that are no multiple of the block and heads in groups."""
    monkeypatch.setattr(cpu_attention, "_BLOCK", 5)
    model = tiny(architecture, dtype="float64", num_attention_heads=4, num_key_value_heads=2)
    calls = []
    monkeypatch.setattr(cpu_attention._CausalBlocks, "apply", spied(cpu_attention._CausalBlocks.apply, calls))
    found = scoring.score(model, token_windows, ["entropy"], progress=False).importance["entropy"]
    assert calls and model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(found, naive(model, token_windows, "entropy"), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_probabilities_are_as_good_as_float32_makes_them(dtype):
    """Whatever the dtype of queries and keys, their products are exact and summed in float32: bfloat16 sums would be 0.01 off."""
    generator = torch.Generator().manual_seed(0)
    query, key = (3 * torch.randn(1, heads, 150, 64, generator=generator).to(dtype) for heads in (6, 2))
    for block, p in cpu_attention._probabilities(query, key, 0.125):
        scores = query.double()[:, :, block] @ key.double().repeat_interleave(3, 1)[:, :, : block.stop].mT * 0.125
        later = torch.arange(block.stop) > torch.arange(block.start, block.stop)[:, None]
        expected = torch.softmax(scores.masked_fill(later, -torch.inf), -1)
        torch.testing.assert_close(p.double().view_as(expected), expected, rtol=1e-4, atol=1e-6)


def spied(function, calls):
    return lambda *arguments: calls.append(None) or function(*arguments)


def test_attention_that_is_not_plainly_causal_is_left_to_torch(tiny, token_windows, monkeypatch):
    model, calls = tiny("mistral", dtype="float64", sliding_window=4), []
    monkeypatch.setattr(cpu_attention._CausalBlocks, "apply", spied(cpu_attention._CausalBlocks.apply, calls))
    found = scoring.score(model, token_windows, ["entropy"], progress=False).importance["entropy"]
    assert not calls
    torch.testing.assert_close(found, naive(model, token_windows, "entropy"), rtol=1e-5, atol=1e-9)


def test_a_model_loaded_with_another_attention_keeps_it(tiny, token_windows, monkeypatch):
    model, calls = tiny("llama"), []
    model.set_attn_implementation("eager")
    monkeypatch.setattr(cpu_attention._CausalBlocks, "apply", spied(cpu_attention._CausalBlocks.apply, calls))
    scoring.score(model, token_windows, ["entropy"], progress=False)
    assert not calls and model.config._attn_implementation == "eager"


def test_windows_that_the_model_cannot_read_are_refused(tiny):
    with pytest.raises(UserError, match="seq_len=65 is longer than the model's context of 64 tokens: lower seq_len"):
        scoring.score(tiny(), np.ones((1, 65), dtype=int), ["entropy"], progress=False)
    with pytest.raises(UserError, match="its tokenizer gives token id 61 and its embedding has 61 rows"):
        scoring.score(tiny(), np.full((1, 8), 61), ["entropy"], progress=False)
