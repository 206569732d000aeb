"""Loading by alias, folder and GGUF file; what cannot be loaded is told in one sentence."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hfprune_nb import models
from hfprune_nb.errors import UserError
from hfprune_nb.models import loading


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_tiny_alias_is_deterministic_and_cached(own_cache, monkeypatch):
    first, tokenizer = models.load(models.TINY, dtype="float32", device="cpu")
    monkeypatch.setattr(loading.tiny, "write", lambda folder: pytest.fail("written twice"))
    second, _ = models.load(models.TINY, dtype="float32", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in first.parameters()) and not first.training
    text = "Every neuron counts: naïve café!"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_local_folder_loads_in_every_dtype(own_cache):
    folder = loading._source(models.TINY)
    for name, dtype in models.DTYPES.items():
        model, _ = models.load(folder, dtype=name, device="cpu")
        assert next(model.parameters()).dtype == dtype


def write_gguf(model, file, without=""):
    """Write a tiny LLaMA as a GGUF file with the gguf library, but for the tensor `without`."""
    import gguf

    writer = gguf.GGUFWriter(file, "llama")
    config = model.config
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(3)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(300)
    alphabet = models_alphabet()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(alphabet + [f"<extra{i}>" for i in range(300 - len(alphabet))])
    writer.add_token_types([1] * 300)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for layer in range(3):
        for ours, theirs in {
            "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
            "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        }.items():  # fmt: skip
            names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    state = model.state_dict()
    for ours, theirs in names.items():
        if theirs == without:
            continue
        writer.add_tensor(theirs, state[ours].float().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file_is_dequantised_once(own_cache, tiny, monkeypatch):
    """A LLaMA GGUF file loads by its path and is converted only once; one that lacks a tensor is refused by its name."""
    model = tiny("llama-tied", hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=4, vocab_size=300)
    state, file = model.state_dict(), own_cache / "tiny.gguf"
    write_gguf(model, own_cache / "part.gguf", without="blk.2.ffn_down.weight")
    with pytest.raises(UserError, match="with model.layers.2.mlp.down_proj.weight missing"):
        models.load(own_cache / "part.gguf", device="cpu")
    write_gguf(model, file)
    loaded, _ = models.load(str(file), dtype="float32", device="cpu")
    mlps = models.gated_mlps(loaded)
    expected = state["model.layers.1.mlp.down_proj.weight"].to(torch.bfloat16).float()
    assert torch.equal(mlps[1].down.weight, expected), "weights differ from the file's, rounded to bfloat16"
    monkeypatch.setattr(loading, "_convert_gguf", lambda *_: pytest.fail("converted twice"))
    models.load(str(file), dtype="bfloat16", device="cpu")


def models_alphabet():
    from tokenizers.pre_tokenizers import ByteLevel

    return [*sorted(ByteLevel.alphabet()), "ab"]


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("nobody/nothing", {}, "is not cached and HF_HUB_OFFLINE is set"),
        ("models/none.gguf", {}, "is not cached and HF_HUB_OFFLINE is set"),
        ("/nowhere.gguf", {}, "model '/nowhere.gguf' does not exist"),
        ("nowhere.gguf", {}, "model 'nowhere.gguf' does not exist"),
        ("tiny-random-lama", {}, "model 'tiny-random-lama' is unknown: did you mean tiny-random-llama"),
        ("tiny-random-llama", {"dtype": "int3"}, "dtype 'int3' is unknown"),
        ("tiny-random-llama", {"device": "cuda:7"}, "device"),
    ],
)
def test_what_cannot_be_loaded_is_told_in_one_sentence(name, settings, words, own_cache):
    if settings.get("device") and torch.cuda.is_available():
        settings["device"] = "cuda:99"
    with pytest.raises(UserError, match=words) as caught:
        models.load(name, **({"device": "cpu"} | settings))
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_named(own_cache, tiny):
    tiny().save_pretrained(own_cache / "bare")
    for load in (models.tokenizer, models.load):
        with pytest.raises(UserError, match="bare' has no tokenizer .* copy tokenizer.json and tokenizer_config.json") as caught:
            load(str(own_cache / "bare"))
        assert "\n" not in str(caught.value)


def test_paths_and_torch_objects_are_taken_as_names(own_cache):
    model, _ = models.load(Path(loading._source(models.TINY)), dtype=torch.float16, device=torch.device("cpu"))
    assert model.dtype == torch.float16
    assert models.notes(Path("anything")) == []


def test_scoring_and_measuring_take_paths_lists_and_torch_objects(own_cache):
    from hfprune_nb.measure import evaluation
    from hfprune_nb.method.scoring import distributed

    windows = np.random.default_rng(0).integers(0, 384, (3, 8))
    plain = {"dtype": "float32", "device": "cpu", "progress": False}
    expected = distributed.score(models.TINY, windows, ["entropy"], folder=own_cache / "one", **plain).importance["entropy"]
    settings = plain | {"dtype": torch.float32, "device": torch.device("cpu")}
    source = Path(loading._source(models.TINY))
    found = distributed.score(source, windows.tolist(), ["entropy"], folder=str(own_cache / "two"), **settings).importance[
        "entropy"
    ]
    assert all(torch.equal(*rows) for rows in zip(found, expected, strict=True))
    model, _ = models.load(models.TINY, dtype="float32", device="cpu")
    measured = [evaluation.held_out(model, each, 2, progress=False).perplexity for each in (windows, windows.tolist())]
    assert measured[0].equals(measured[1])


def test_a_whole_cache_is_only_read(own_cache, monkeypatch):
    """It may be another user's: no lock is taken, no folder made."""
    models.load(models.TINY, device="cpu")
    monkeypatch.setattr(loading, "FileLock", lambda file: pytest.fail("locked"))
    monkeypatch.setattr(loading.Path, "mkdir", lambda *_, **__: pytest.fail("a folder was made"))
    models.load(models.TINY, device="cpu")


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:", "cuda:x", "cuda:99", "GPU 0"])
def test_a_device_that_is_none_is_told_at_once(device):
    with pytest.raises(UserError, match="choose"):
        models.resolve_device(device)


def test_one_part_of_a_gguf_model_is_refused(own_cache):
    (own_cache / "big-00001-of-00003.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="is part 1 of 3 of a GGUF model: join the parts"):
        models.load(own_cache / "big-00001-of-00003.gguf", device="cpu")


def test_what_another_library_says_is_kept_to_its_end():
    error = RuntimeError("Error(s) in loading:\n\tsize mismatch for model.norm.weight\n" + "x" * 9000)
    assert "loading: size mismatch for model.norm.weight" in loading._reason(error) and len(loading._reason(error)) < 1000
    assert loading._reason(KeyError()) == "KeyError"


def test_a_model_without_sdpa_takes_eager_attention_and_says_so(own_cache, caplog):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    model = Gemma2ForCausalLM(
        Gemma2Config(vocab_size=384, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=8)
    )  # fmt: skip
    model.save_pretrained(own_cache / "gemma2")
    models.tokenizer(models.TINY).save_pretrained(own_cache / "gemma2")
    loaded, _ = models.load(own_cache / "gemma2", device="cpu")
    assert loaded.config._attn_implementation == "eager"
    assert "does not run with attention: sdpa, so it runs with eager" in caplog.text


def test_a_failed_conversion_leaves_nothing_behind(own_cache):
    (own_cache / "broken.gguf").write_bytes(b"GGUF not really")
    with pytest.raises(UserError):
        models.load(str(own_cache / "broken.gguf"), device="cpu")
    left = [path for path in (own_cache / "cache" / "models").glob("*") if not path.name.startswith(".")]
    assert left == []


def test_weights_that_are_dequantised_are_told(own_cache):
    assert "dequantised" in models.notes("smollm2-135m")[0]
    assert any("tied again" in note for note in models.notes("qwen2.5-coder-0.5b"))
    assert models.notes("meta-llama/Llama-2-7b-hf") == []


@pytest.mark.parametrize(
    ("attention", "words"), [("flash", "attention 'flash' is unknown"), ("flash_attention_2", "choose sdpa")]
)
def test_an_attention_that_is_not_there_is_told_in_one_sentence(attention, words, own_cache):
    with pytest.raises(UserError, match=words):
        models.load(models.TINY, device="cpu", attention=attention)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_asked_for_is_used(attention, own_cache):
    model, _ = models.load(models.TINY, device="cpu", attention=attention)
    assert model.config._attn_implementation == attention


def test_a_balanced_model_is_spread_by_accelerate_and_scores_the_same(own_cache, monkeypatch, token_windows):
    """Accelerate's hooks move activations between devices; here all of them are the CPU."""
    from accelerate import dispatch_model
    from transformers import AutoModelForCausalLM

    from hfprune_nb.method import scoring

    plain, _ = models.load(models.TINY, dtype="float32", device="cpu")
    original, asked = AutoModelForCausalLM.from_pretrained, []

    def from_pretrained(*arguments, device_map=None, **rest):
        asked.append(device_map)
        places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
        places |= {f"model.layers.{layer}": "cpu" for layer in range(3)}
        model, report = original(*arguments, **rest)
        return dispatch_model(model, places, force_hooks=True), report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    spread, _ = models.load(models.TINY, dtype="float32", device="balanced")
    assert asked == ["auto"] and hasattr(spread.model.layers[0], "_hf_hook")
    for settings in ({}, {"activation_checkpointing": True}):
        expected = scoring.score(plain, token_windows, ["entropy", "self_distillation"], progress=False, **settings).importance
        found = scoring.score(spread, token_windows, ["entropy", "self_distillation"], progress=False, **settings).importance
        assert all(torch.equal(*rows) for name in expected for rows in zip(expected[name], found[name], strict=True))


def test_a_model_larger_than_the_gpus_is_told_in_one_sentence(own_cache, monkeypatch):
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*arguments, device_map, **rest):
        model, report = original(*arguments, **rest)
        return model.to("meta"), report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(UserError, match="the GPUs cannot hold all"):
        models.load(models.TINY, device="balanced")


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
def test_logits_of_the_head_are_float32_sums_of_exact_products(kind, tiny):
    model = tiny("llama", dtype=kind, vocab_size=5000, hidden_size=64)
    hidden = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    exact = hidden.double() @ model.lm_head.weight.double().t()
    found = models.head(model).logits(hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    variable = hidden.clone().requires_grad_()
    torch.testing.assert_close(models.head(model).logits(variable), found, rtol=1e-5, atol=1e-5)
    assert models.head(model).logits(variable).requires_grad
    out = torch.empty(7, 5000)
    assert models.head(model).logits(hidden, out=out).data_ptr() == out.data_ptr() and torch.equal(out, found)
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16", "a setting of the whole process was left behind"


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("length", "rotary", "context"),
    [
        (64, None, 64),
        (32, YARN, 128),
        (128, YARN, 128),
        (32, {"rope_type": "linear", "factor": 4.0}, 128),
        (128, {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}, 128),
    ],
)  # fmt: skip
def test_a_context_may_be_stretched_by_its_rotary_positions(length, rotary, context):
    from transformers import LlamaConfig

    config = LlamaConfig(max_position_embeddings=length, rope_scaling=rotary)
    assert models.context_length(config) == context
    models.check_context(config, context)
    with pytest.raises(UserError, match=f"longer than the model's context of {context} tokens"):
        models.check_context(config, context + 1)
