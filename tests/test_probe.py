"""What passes for a plain gated MLP and is none; and the probes, which leave every model as it was."""

import copy

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES
from torch import nn
from torch.nn.utils import parametrize

from hfprune_nb import models
from hfprune_nb.errors import UserError
from hfprune_nb.method import export, pruning, scoring, selection
from hfprune_nb.models.hooks import silenced

SIZES = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
PER_LAYER = {"vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 4}


def random_model(kind, dtype="float32", **changes):
    """A frozen tiny random model of an architecture by its name in transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | changes)))
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.to(getattr(torch, dtype)).eval().requires_grad_(False)


def gemma_3n(sparsity, **changes):
    shared = {"num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2, "intermediate_size": [40, 40]}
    return random_model("gemma3n_text", activation_sparsity_pattern=sparsity, **PER_LAYER, **(shared | changes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_plain_gated_mlp_passes_and_is_left_as_it_was(architecture, dtype, tiny):
    model = tiny(architecture, dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    models.check_neurons(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]


def test_thresholds_over_all_neurons_are_found_in_any_precision():
    """Gemma 3n zeroes what lies below a quantile of the layer: only its layers that do so are in the way."""
    models.check_neurons(gemma_3n([0.0, 0.0]))
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(UserError, match="in layer 1 the other neurons change when one is removed"):
            models.check_neurons(gemma_3n([0.0, 0.5]).to(getattr(torch, dtype)))


def test_scoring_and_pruning_refuse_it_before_they_start(token_windows):
    model = gemma_3n([0.5, 0.5])
    for work in (
        lambda: scoring.score(model, token_windows, ["entropy"], progress=False),
        lambda: scoring.score(model, np.zeros((0, 0)), ["magnitude"], progress=False),
        lambda: pruning.narrow(model, torch.arange(20).repeat(2, 1)),
    ):
        with pytest.raises(UserError, match="the other neurons change"):
            work()


def test_an_mlp_that_runs_twice_is_refused(tiny):
    model = tiny("llama")
    layer = model.model.layers[1]
    layer.register_forward_hook(lambda module, args, output: output + module.mlp(output))
    with pytest.raises(UserError, match="the MLP of layer 1 runs 2 times"):
        models.check_neurons(model)


class Codes(nn.Linear):
    """A stand-in for quantised linear modules, which are subclasses."""


def quantised(model):
    model.model.layers[1].mlp.up_proj.__class__ = Codes


def eight_bit_floats(model):
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data = weight.data.to(torch.float8_e4m3fn)


def parametrised(model):
    parametrize.register_parametrization(model.model.layers[1].mlp.gate_proj, "weight", nn.Identity())


def with_a_norm(model):
    model.model.layers[1].mlp.sub_norm = nn.LayerNorm(40)


def with_a_scale(model):
    model.model.layers[1].mlp.scale = nn.Parameter(torch.ones(40))


def with_experts(model):
    model.model.layers[1].experts = nn.ModuleList([nn.Linear(16, 16)])


def shared(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp


def adapted(model):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=["up_proj"]), model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (quantised, "MLP of layer 1 holds Codes"),
        (eight_bit_floats, "MLP of layer 1 holds Linear with Tensor of torch.float8_e4m3fn"),
        (parametrised, "MLP of layer 1 holds ParametrizedLinear"),
        (with_a_norm, "MLP of layer 1 has `sub_norm.weight` beside its linear modules"),
        (with_a_scale, "MLP of layer 1 has `scale` beside its linear modules"),
        (with_experts, "layer 1 has experts beside its MLP"),
        (shared, "its layers share an MLP"),
        (adapted, "layer 0 has no gated MLP|not supported: the MLP of layer 0 has|in place of plain linear weights"),
    ],
)
def test_what_passes_for_a_gated_mlp_is_refused(change, words, tiny):
    model = tiny("llama")
    assert len(models.gated_mlps(model)) == 3
    change(model)
    with pytest.raises(UserError, match=words):
        models.gated_mlps(model)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("bitnet", {}, "`ffn_sub_norm.weight` beside its linear modules"),
        ("qwen2_moe", {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}, "has no gated MLP"),
        (
            "gemma4_text",
            {"enable_moe_block": True, "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 8, **PER_LAYER,
             "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
            "has experts beside its MLP",
        ),
    ],
)  # fmt: skip
def test_architectures_with_more_than_a_gated_mlp_are_refused(kind, changes, words):
    with pytest.raises(UserError, match=words):
        models.gated_mlps(random_model(kind, **changes))


# Layers that read on from one text into the next


def hybrid(kind, dtype="float32"):
    """Linear attention in some layers, attention in the others."""
    linear = {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    return random_model(kind, dtype, vocab_size=384, layer_types=["linear_attention", "full_attention"], **linear)


HYBRIDS = ("olmo_hybrid", "qwen3_5_text")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_tells_packed_texts_apart(architecture, dtype, tiny):
    assert models.reads_packed(tiny(architecture, dtype=dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", HYBRIDS)
def test_linear_attention_reads_on_into_the_next_text(kind, dtype):
    assert not models.reads_packed(hybrid(kind, dtype))


@pytest.mark.parametrize("kind", HYBRIDS)
def test_benchmark_requests_of_a_hybrid_model_are_read_apart(kind, caplog):
    from hfprune_nb.measure.harness import SharedPrefixLM

    model = hybrid(kind)
    harness = SharedPrefixLM(model, models.tokenizer(models.TINY), batch_size=4)
    assert "requests are read apart" in caplog.text
    question, long = list(range(20, 60)), list(range(80, 100))
    requests = [(None, question, [choice, 61]) for choice in (70, 71, 72)] + [(None, long, [5])]
    answers = harness._loglikelihood_tokens(requests, disable_tqdm=True)
    for (_, context, continuation), (found, _) in zip(requests, answers, strict=True):
        log_p = model(input_ids=torch.tensor([context + continuation])).logits[0].log_softmax(-1)
        expected = sum(float(log_p[len(context) - 1 + index, token]) for index, token in enumerate(continuation))
        assert found == pytest.approx(expected, abs=1e-4)


def test_a_request_beyond_the_embedding_names_tokenizer_and_embedding(tiny):
    from hfprune_nb.measure.harness import SharedPrefixLM

    harness = SharedPrefixLM(tiny("llama", vocab_size=384), models.tokenizer(models.TINY))
    with pytest.raises(UserError, match="its tokenizer gives token id 385 and its embedding has 384 rows"):
        harness._loglikelihood_tokens([(None, [5, 6], [385]), (None, [5], [6])], disable_tqdm=True)


def test_recovery_gives_every_example_of_a_hybrid_model_a_row_of_its_own(tmp_path):
    from hfprune_nb.inputs.instructions import Record, pack
    from hfprune_nb.method.recovery import recover
    from hfprune_nb.method.recovery.loss import Objective
    from hfprune_nb.method.recovery.recipes import Recipe

    records = [Record("ab", "cd"), Record("the", "mode"), Record("x", "yes")]
    recipe = Recipe("tiny", 0, 0, 0.0, 1e-3, 0.0, 1, 64, 2)
    tokenizer = models.tokenizer(models.TINY)
    model = hybrid("olmo_hybrid")
    rows = pack(tokenizer, records, 64, alone=True)
    assert len(rows) == 3 and len(pack(tokenizer, records, 64)) == 1
    objective = Objective(model, models.head(model), None, 0.0, 1.0, 16)
    apart = [objective.held_out_loss([row], 1) * sum(label >= 0 for label in row.labels) for row in rows]
    together = objective.held_out_loss(rows, 3) * sum(label >= 0 for row in rows for label in row.labels)
    assert together == pytest.approx(sum(apart), rel=1e-5), "padding changed a loss"
    recovered = recover(model, tokenizer, records, records, recipe, max_steps=1, scratch=tmp_path, progress=False)
    assert not recovered.facts["packed"] and recovered.facts["rows"] == 3


# Layers whose keys and values serve others


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_layers_that_share_keys_and_values_cannot_be_computed_again_alone(kind, dtype, token_windows):
    changes = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, **PER_LAYER}
    if kind == "gemma3n_text":
        changes |= {"intermediate_size": [40] * 4, "activation_sparsity_pattern": [0.0] * 4}
    models.check_recomputation(random_model(kind, dtype, num_kv_shared_layers=0, **changes))
    shared = random_model(kind, dtype, num_kv_shared_layers=2, **changes)
    with pytest.raises(UserError, match="later layers of .* read more of layer 1 than its output"):
        models.check_recomputation(shared)
    with pytest.raises(UserError, match="activation_checkpointing: later layers"):
        scoring.score(shared, token_windows, ["entropy"], activation_checkpointing=True, progress=False)
    scoring.score(shared, token_windows, ["entropy"], progress=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_that_stand_alone_may_be_computed_again(architecture, dtype, tiny):
    models.check_recomputation(tiny(architecture, dtype=dtype))


# Architectures beside those that every test goes through

GEMMA_3 = {
    "text_config": SIZES | {"vocab_size": 384, "layer_types": ["sliding_attention", "full_attention"]},
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
    "boi_token_index": 380,
    "eoi_token_index": 381,
    "image_token_index": 382,
}
OTHERS = {
    "gemma2": {},
    "gemma3_text": {},
    "gemma3": GEMMA_3,
    "olmo2": {},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5},
    "glm4": {},
    "cohere": {},
    "stablelm": {},
    "smollm3": {},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_are_scored_pruned_and_loaded_again(kind, tmp_path):
    random_model(kind, **({"vocab_size": 384} | OTHERS[kind])).save_pretrained(tmp_path / "dense")
    models.tokenizer(models.TINY).save_pretrained(tmp_path / "dense")
    model, tokenizer = models.load(tmp_path / "dense", dtype="float32", device="cpu")
    windows = np.random.default_rng(0).integers(0, 370, (2, 12))
    importance = scoring.score(model, windows, ["entropy"], progress=False).importance["entropy"]
    allocation = selection.allocate(model, neuron_ratio=0.25)
    kept = selection.kept_neurons(importance, allocation.width_after)
    ids, mlps = torch.as_tensor(windows), models.gated_mlps(model)
    with silenced(model, kept):
        expected = model(input_ids=ids).logits
    before = models.count_parameters(model)
    pruning.narrow(model, kept)
    assert before - models.count_parameters(model) == sum(10 * mlp.parameters_per_neuron for mlp in mlps)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    export.save_checkpoint(model, tokenizer, tmp_path / "pruned")
    again, _ = models.load(tmp_path / "pruned", dtype="float32", device="cpu")
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_widened_model_computes_in_float32_and_comes_back_to_the_bit(dtype, tiny):
    model, ids = tiny("qwen2", dtype=dtype), torch.arange(9)[None]
    before = copy.deepcopy(model.state_dict())
    exact = copy.deepcopy(model).float().model(input_ids=ids).last_hidden_state
    with models.widened(model):
        found = model.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="stopped"), models.widened(model):
        model.model.layers[1].mlp.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stopped")))
        model.model(input_ids=ids)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items())
