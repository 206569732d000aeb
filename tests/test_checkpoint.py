"""Folders of weights that are not what they seem: each is refused by name, in one sentence, before anything is computed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hfprune_nb import models
from hfprune_nb.errors import UserError
from hfprune_nb.models import loading

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny random model's folder, to be spoilt; its embedding and head are tied."""
    return shutil.copytree(loading._source(models.TINY), tmp_path / "model")


def change_weights(folder, change):
    """Write the weights again as `change(name, tensor)` gives them: pairs of names and tensors."""
    found = [pair for name, tensor in load_file(folder / WEIGHTS).items() for pair in change(name, tensor)]
    save_file({name: tensor.contiguous() for name, tensor in found}, folder / WEIGHTS, metadata={"format": "pt"})


def change_configuration(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(folder, words):
    with pytest.raises(UserError, match=words) as caught:
        models.load(folder, dtype="float32", device="cpu")
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda name, tensor: [(f"_orig_mod.{name}", tensor)],
            r"with lm_head.* and 27 more missing and _orig_mod.* without a place",
        ),
        (lambda name, tensor: [] if name == DOWN else [(name, tensor)], rf"with {DOWN} missing:"),
        (
            lambda name, tensor: [(name, tensor), (name + "_scale_inv", tensor.clone())],
            "with model.*weight_scale_inv.* without a place",
        ),
        (lambda name, tensor: [(name, tensor[:, :50] if name == DOWN else tensor)], f"{DOWN} is 32 x 50 in the file and 32 x 64"),
        (
            lambda name, tensor: [(name, tensor)] + [("lm_head.weight", tensor + 1)] * name.endswith("embed_tokens.weight"),
            "lm_head.weight with values of its own, while config.json ties it",
        ),
    ],
)
def test_weights_that_do_not_fit_the_model_one_to_one(change, words, folder):
    change_weights(folder, change)
    refusal(folder, words)


def test_a_head_that_is_missing_is_refused_only_where_the_configuration_does_not_tie_it(folder):
    model, _ = models.load(folder, dtype="float32", device="cpu")
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    change_configuration(folder, tie_word_embeddings=False)
    refusal(folder, "with lm_head.weight missing:")


def test_a_tied_head_may_be_stored_a_second_time(folder):
    change_weights(
        folder,
        lambda name, tensor: [(name, tensor)] + [("lm_head.weight", tensor.clone())] * name.endswith("embed_tokens.weight"),
    )
    models.load(folder, dtype="float32", device="cpu")


def test_parts_that_did_not_arrive_are_named(folder, tmp_path):
    models.load(folder, dtype="float32", device="cpu")[0].save_pretrained(folder, max_shard_size="20KB")
    parts = sorted(folder.glob("model-*.safetensors"))
    models.load(folder, dtype="float32", device="cpu")
    whole = parts[1].read_bytes()
    parts[1].write_bytes(whole[: len(whole) // 2])
    refusal(folder, f"{parts[1].name} is corrupt")
    parts[1].unlink()
    refusal(folder, f"{parts[1].name} of {len(parts)} parts of its weights did not arrive")
    parts[1].write_bytes(whole)
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").unlink()
    refusal(folder, f"{WEIGHTS}.index.json, which says what")


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_no_file(name, folder):
    (folder / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 100\n")
    refusal(folder, f"{name} is a pointer of Git LFS")


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}},
        {"text_config": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
    ],
)
def test_quantised_weights_are_refused_by_their_method(changes, folder):
    change_configuration(folder, **changes)
    refusal(folder, "quantised weights .(gptq|fp8|bitsandbytes|compressed-tensors)., which cannot be scored")


def test_code_in_the_folder_is_neither_run_nor_recommended(folder, tmp_path):
    change_configuration(folder, model_type="own", auto_map={"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.OwnLM"})
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    for load in (models.load, models.tokenizer, models.configuration):
        with pytest.raises(UserError, match="architecture 'own' comes as Python code in its folder, which the kit does not run"):
            load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("text", "words"), [(None, "has no config.json"), ("{", "is no JSON"), ("[]", "holds list in")])
def test_a_folder_whose_configuration_cannot_be_read(text, words, folder):
    (folder / "config.json").unlink()
    if text:
        (folder / "config.json").write_text(text)
    refusal(folder, words)


def test_a_file_of_a_folder_is_no_model(folder):
    refusal(folder / "model.safetensors", "is a file: give the folder in which it lies")


# Adapters


@pytest.fixture
def adapters(folder, tmp_path):
    """LoRA adapters of the tiny model on attention, with a bias of chance, in a folder of their own."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model, _ = models.load(folder, dtype="float32", device="cpu")
    configuration = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, configuration).eval()
    adapted.save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters", adapted


def test_adapters_are_merged_into_the_model_that_they_name(adapters, folder):
    saved, adapted = adapters
    ids = torch.arange(9)[None]
    expected = adapted(input_ids=ids).logits
    model, tokenizer = models.load(saved, dtype="float32", device="cpu")
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    dense, words = models.load(folder, dtype="float32", device="cpu")
    assert not torch.allclose(dense(input_ids=ids).logits, expected, atol=1e-3), "the adapters change nothing"
    assert type(model) is type(dense) and model.state_dict().keys() == dense.state_dict().keys()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.get_vocab() == words.get_vocab() == models.tokenizer(saved).get_vocab()
    models.check_neurons(model)


def test_adapters_find_their_model_beside_them(adapters, folder):
    saved, _ = adapters
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "../model"}))
    models.load(saved, dtype="float32", device="cpu")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_stored_as_codes_are_refused_without_a_word_of_the_configuration(dtype, folder):
    change_weights(folder, lambda name, tensor: [(name, tensor.to(dtype) if name == DOWN else tensor)])
    refusal(folder, f"quantised weights .{DOWN} in {WEIGHTS}.")


def test_a_head_that_was_trained_beside_the_adapters_stays_apart(folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = models.load(folder, dtype="float32", device="cpu")[0]
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"))
    adapted.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(2)
    adapted.save_pretrained(tmp_path / "tuned")
    model, tokenizer = models.load(tmp_path / "tuned", dtype="float32", device="cpu")
    ids = torch.arange(9)[None]
    assert torch.equal(model.lm_head.weight, 2 * model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    again, _ = models.load(tmp_path / "merged", dtype="float32", device="cpu")
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_whole_weights_beside_adapters_leave_open_what_is_meant(adapters, folder):
    saved, _ = adapters
    shutil.copytree(folder, saved, dirs_exist_ok=True)
    refusal(saved, "holds model.safetensors and adapters, which may be merged in it or not")
    (saved / WEIGHTS).unlink()
    models.load(saved, dtype="float32", device="cpu")


@pytest.mark.parametrize("fault", ["no base", "other weights", "pickle", "prompt"])
def test_adapters_that_cannot_be_merged(fault, adapters, folder):
    saved, _ = adapters
    file, weights = saved / "adapter_config.json", saved / "adapter_model.safetensors"
    if fault == "no base":
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
        refusal(saved, "adapters of no base model")
    elif fault == "other weights":
        save_file({name.replace("layers.0", "layers.7"): tensor for name, tensor in load_file(weights).items()}, weights)
        refusal(saved, "its adapters do not fit LlamaForCausalLM .*layers")
    elif fault == "pickle":
        weights.rename(saved / "adapter_model.bin")
        refusal(saved, "without adapter_model.safetensors")
    else:
        from peft import PromptTuningConfig, get_peft_model

        base = models.load(folder, dtype="float32", device="cpu")[0]
        get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(saved)
        refusal(saved, "adapters of type PROMPT_TUNING, which cannot be merged")
