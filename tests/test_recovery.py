"""Packing without leaks, a loss that autograd confirms, tuning that resumes to the same bytes, and plain merged checkpoints."""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from hfprune_nb import criteria, models
from hfprune_nb.errors import UserError
from hfprune_nb.inputs import instructions
from hfprune_nb.inputs.instructions import NO_LOSS, Record, Row
from hfprune_nb.measure import evaluation
from hfprune_nb.method import export, pruning, recovery
from hfprune_nb.method.recovery import training
from hfprune_nb.method.recovery.loss import Objective


@pytest.fixture(scope="module")
def tokenizer():
    return models.tokenizer(models.TINY)


@pytest.fixture
def network():
    """The tiny random LLaMA model, in float32 on the CPU."""
    return models.load(models.TINY, "float32", "cpu")[0]


TASKS = [Record(instructions.TEMPLATE.format(instruction=f"Double {i}."), f"It is {2 * i}.") for i in range(40)]


def examples(vocabulary=61, lengths=(7, 3, 9, 1, 5)):
    """Random examples with labels on their later half, as rows of one example each."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in lengths:
        ids = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
        labels = [NO_LOSS if i < length // 2 else token for i, token in enumerate(ids[1:])] + [NO_LOSS]
        rows.append(Row(ids, list(range(length)), labels))
    return rows


def joined(rows):
    names = ("input_ids", "position_ids", "labels")
    return Row(*([token for row in rows for token in getattr(row, name)] for name in names))


def loss_of(model, rows):
    """The loss per label by transformers' own forward and torch's own cross-entropy."""
    batch = instructions.collate(rows)
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())


# Records


def test_records_are_split_by_prompt_and_shuffled_by_seed(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps({"instruction": f"Say {i % 150}", "output": f"{i}"}) for i in range(300)))
    train, held_out = (instructions.records(str(file), split=split) for split in instructions.SPLITS)
    assert len(train) + len(held_out) == 300 and len(held_out) > 0
    assert not {record.prompt for record in train} & {record.prompt for record in held_out}
    again = instructions.records(str(file), seed=1)
    assert again != train and sorted(map(str, again)) == sorted(map(str, train))
    assert instructions.records(str(file), n_records=5) == train[:5]


@pytest.mark.parametrize(
    "raw",
    [
        {"instruction": "Add", "input": "1 and 1", "output": "2"},
        {"instruction": "Add\n1 and 1", "response": "2"},
        {"messages": [
            {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Add\n1 and 1"},
            {"role": "assistant", "content": "2"},
        ]},
        {"conversations": [{"from": "human", "value": "Add\n1 and 1"}, {"from": "gpt", "value": "2"}]},
        {"messages": [
            {"role": "user", "content": [{"type": "text", "text": "Add\n"}, {"type": "text", "text": "1 and 1"}]},
            {"role": "assistant", "content": "2"},
        ]},
        {"messages": '[{"role": "user", "content": "Add\\n1 and 1"}, {"role": "assistant", "content": "2"}]'},
        {"prompt": "Add\n1 and 1", "completion": "2"},
        {"prompt": [{"role": "user", "content": "Add\n1 and 1"}], "completion": [{"role": "assistant", "content": "2"}]},
        {"instruction": "Add", "context": "1 and 1", "response": "2", "category": "sums"},
    ],
)  # fmt: skip
def test_every_form_of_record_gives_the_same_prompt(raw, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([raw]))
    (record,) = instructions.records(str(tmp_path / "data.json"), split="train")
    assert record == Record(instructions.TEMPLATE.format(instruction="Add\n1 and 1"), "2")


def test_records_without_an_answer_are_counted(tmp_path):
    asked = [{"role": "user", "content": "Add"}, {"role": "assistant", "content": None}]
    empty = [{"messages": asked}, {"messages": []}, {"instruction": "Add", "output": None}, {"instruction": " ", "output": "2"}]
    (tmp_path / "data.json").write_text(json.dumps([*empty, {"instruction": "Add", "output": "2"}]))
    passed_over = Counter()
    assert len(instructions.records(str(tmp_path / "data.json"), passed_over=passed_over)) == 1
    assert passed_over == {"without text": 4}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"question": "?"}]', "rename"),
        ('{"instruction": "?"}', "line 1 has instruction and neither messages nor"),
        ('"instruction"', "no record"),
        ("[", "is no JSON"),
        ('[{"instruction": "?", "output": " "}]', "fewer than"),
        ('[{"messages": [{"role": "user", "content": "?"}]}]', "record 1 is not one user and one assistant"),
        ('{"messages": [{"role": "user", "content": {"a": 1}}]}', "line 1 has a turn of role, content without"),
        ('{"instruction": "?", "output": 2}', "line 1 has instruction, output and neither"),
    ],
)
def test_bad_data_gets_one_sentence(content, words, tmp_path):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        instructions.records(str(tmp_path / "data.json"))
    assert "\n" not in str(caught.value)


# Packing


def test_loss_is_on_responses_and_their_end_only(tokenizer):
    (row,) = instructions.pack(tokenizer, TASKS[:1], 512)
    learned = [label for label in row.labels if label != NO_LOSS]
    assert learned[-1] == tokenizer.eos_token_id and tokenizer.decode(learned[:-1]) == TASKS[0].response
    following = [*row.input_ids[1:], NO_LOSS]
    assert all(label in (NO_LOSS, token) for label, token in zip(row.labels, following, strict=True))
    assert tokenizer.decode(row.input_ids[:-1]) == TASKS[0].prompt + TASKS[0].response


def test_an_end_that_the_tokenizer_adds_is_taught_and_taught_once():
    tokenizer = models.tokenizer(models.TINY)
    ids = {"<s>": tokenizer.bos_token_id, "</s>": tokenizer.eos_token_id}
    plain = instructions.pack(tokenizer, TASKS[:1], 512, bos=True)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=list(ids.items()))
    (row,) = adding = instructions.pack(tokenizer, TASKS[:1], 512)
    assert adding == plain and row.labels.count(tokenizer.eos_token_id) == 1


def test_examples_stay_whole_and_rows_full(tokenizer):
    seq_len = 400
    rows = instructions.pack(tokenizer, TASKS, seq_len)
    alone = [instructions.pack(tokenizer, [record], seq_len)[0] for record in TASKS]
    assert max(len(row.input_ids) for row in rows) <= seq_len and len(rows) < len(TASKS) / 2
    starts = [[i for i, place in enumerate(row.position_ids) if place == 0] for row in rows]
    cut = [
        list(row.input_ids[begin:end])
        for row, begins in zip(rows, starts, strict=True)
        for begin, end in zip(begins, [*begins[1:], len(row.input_ids)], strict=True)
    ]
    assert sorted(cut) == sorted(list(row.input_ids) for row in alone), "an example was lost, cut or doubled"
    assert instructions.count_tokens(rows) == tuple(
        map(sum, zip(*(instructions.count_tokens([row]) for row in alone), strict=True))
    )


def test_a_long_example_is_cut_and_a_long_prompt_left_out(tokenizer):
    long = Record("Count: ", "one two three " * 200)
    (row,) = instructions.pack(tokenizer, [long, Record("x" * 999, "no room")], 50)
    assert len(row.input_ids) == 50 and tokenizer.eos_token_id not in row.input_ids
    with pytest.raises(UserError, match="seq_len"):
        instructions.pack(tokenizer, [Record("x" * 999, "no room")], 50)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi3"])
def test_packed_loss_and_gradients_equal_the_unpacked_ones(architecture, tiny):
    """Token-weighted: the mean over all labels, however the examples are laid out; rows of unequal length are padded."""
    rows = examples()
    model = tiny(architecture).requires_grad_(True)
    counts = [sum(label != NO_LOSS for label in row.labels) for row in rows]
    apart = sum(loss_of(model, [row]) * count for row, count in zip(rows, counts, strict=True) if count) / sum(counts)
    expected = torch.autograd.grad(apart, list(model.parameters()))
    for layout in ([joined(rows)], [joined(rows[:2]), joined(rows[2:])]):
        found = loss_of(model, layout)
        torch.testing.assert_close(found, apart, rtol=1e-5, atol=1e-6)
        gradients = torch.autograd.grad(found, list(model.parameters()))
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_packing_with_running_positions_would_leak(tiny):
    """The test above can fail: without restarting positions the examples of a row see each other."""
    row = joined(examples())
    leaking = Row(row.input_ids, list(range(len(row.input_ids))), row.labels)
    assert abs(float(loss_of(tiny("llama"), [leaking]) - loss_of(tiny("llama"), [row]))) > 1e-3


# The loss


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen2"])
@pytest.mark.parametrize("distillation", [0.0, 0.6, 1.0])
def test_chunked_loss_equals_autograd(architecture, distillation, tiny):
    model, teacher = tiny(architecture, "float64").requires_grad_(True), tiny(architecture, "float64", initializer_range=0.25)
    rows, temperature = [joined(examples())], 0.7
    batch = instructions.collate(rows)
    wanted = batch["labels"] != NO_LOSS
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    log_p = torch.log_softmax(model(**inputs).logits[wanted].double(), -1)
    log_q = torch.log_softmax(teacher(**inputs).logits[wanted].double() / temperature, -1)
    cross_entropy = -log_p.gather(1, batch["labels"][wanted][:, None])[:, 0]
    divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
    expected = ((1 - distillation) * cross_entropy + distillation * divergence).mean()
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    teachers = (teacher, models.head(teacher)) if distillation else None
    for chunk_size in (3, 1000):
        objective = Objective(model, models.head(model), teachers, distillation, temperature, chunk_size)
        found = objective(**batch)["loss"]
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        for one, other in zip(torch.autograd.grad(found, list(model.parameters())), gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_scaled_and_capped_logits_have_the_right_gradient(tiny):
    head = models.Head(tiny("llama").get_output_embeddings().requires_grad_(True), multiplier=0.5, softcap=2.0)
    hidden = torch.randn(6, 16, requires_grad=True, generator=torch.Generator().manual_seed(0))
    targets, weight = torch.arange(6), head.module.weight
    plain = 2.0 * torch.tanh(hidden @ weight.t() * 0.5 / 2.0)
    expected = torch.nn.functional.cross_entropy(plain, targets, reduction="sum")
    found = recovery.ChunkedLoss.apply(hidden, weight, head, criteria.create("one_hot_ce"), targets, None, None, 4)
    for one, other in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# Tuning


def tune(network, tokenizer, scratch, name="hfprune-lora", steps=6, **changes):
    rate = 3e-3 if name == "full" else 1e-2
    chosen = recovery.recipe(name, seq_len=256, rows_per_step=4, learning_rate=rate)
    settings = {"max_steps": steps, "measurements": 3, "scratch": scratch, "progress": False} | changes
    return recovery.recover(network, tokenizer, TASKS, TASKS[:5], chosen, **settings)


@pytest.mark.parametrize("name", recovery.RECIPES)
def test_tuning_lowers_both_losses_and_leaves_a_plain_model(name, network, tokenizer, tmp_path):
    tuned = tune(network, tokenizer, tmp_path / "scratch", name, max_steps=8)
    losses = {split: part["loss"].tolist() for split, part in tuned.curve.groupby("split")}
    assert len(losses["train"]) == 8 and losses["train"][-1] < losses["train"][0]
    assert losses["held_out"][-1] < losses["held_out"][0]
    assert tuned.curve["step"].max() == 8 and not tuned.curve.duplicated(["step", "split"]).any()
    assert tuned.facts["tokens"] > 0 and not any(parameter.requires_grad for parameter in tuned.model.parameters())
    assert type(tuned.model).__name__ == "LlamaForCausalLM" and not [n for n, _ in tuned.model.named_modules() if "lora" in n]
    assert models.count_parameters(tuned.model) == models.count_parameters(models.load(models.TINY, "float32", "cpu")[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["hfprune-lora", "full"])
def test_what_was_learned_is_applied_again_and_saved_as_a_plain_checkpoint(name, dtype, tokenizer, tmp_path):
    narrow = [models.load(models.TINY, dtype, "cpu")[0] for _ in range(2)]
    kept = torch.arange(40).repeat(3, 1)
    for model in narrow:
        pruning.narrow(model, kept)
    tuned = tune(narrow[0], tokenizer, tmp_path / "scratch", name)
    tuned.save(tmp_path)
    again = recovery.apply(narrow[1], tmp_path)
    tokens = torch.arange(30)[None]
    expected = tuned.model(input_ids=tokens).logits
    assert torch.equal(again(input_ids=tokens).logits, expected)
    export.save_checkpoint(again, tokenizer, tmp_path / "checkpoint")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=getattr(torch, dtype))
    assert torch.equal(plain(input_ids=tokens).logits, expected) and plain.config.intermediate_size == 40
    results = [file.suffix for folder in ("adapter", ".") for file in (tmp_path / folder).glob("*.*") if file.is_file()]
    assert results and set(results) <= {".safetensors", ".json"}


def test_merged_adapters_answer_as_unmerged_ones(network, tokenizer, tmp_path):
    from peft import PeftModel

    dense = models.load(models.TINY, "float32", "cpu")[0]
    tune(network, tokenizer, tmp_path / "scratch").save(tmp_path)
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        unmerged = PeftModel.from_pretrained(dense, str(tmp_path / "adapter")).eval()(input_ids=tokens).logits
        torch.testing.assert_close(network(input_ids=tokens).logits, unmerged, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["hfprune-lora", "full"])
def test_a_killed_training_resumes_to_the_same_bytes(name, tokenizer, tmp_path, monkeypatch):
    def fresh():
        return models.load(models.TINY, "float32", "cpu")[0]

    whole = tune(fresh(), tokenizer, tmp_path / "whole", name)
    step, calls = training._Trainer.training_step, []

    def die(self, *given):
        calls.append(1)
        if len(calls) == 4 * 4 + 2:  # within the fifth step: the checkpoint of the fourth is there
            raise KeyboardInterrupt
        return step(self, *given)

    monkeypatch.setattr(training._Trainer, "training_step", die)
    with pytest.raises(KeyboardInterrupt):
        tune(fresh(), tokenizer, tmp_path / "killed", name)
    # A kill while a checkpoint is written leaves a part of one.
    (tmp_path / "killed" / "checkpoint-5").mkdir()
    (tmp_path / "killed" / "checkpoint-5" / "trained.safetensors").write_bytes(b"half")
    before = len(calls)
    resumed = tune(fresh(), tokenizer, tmp_path / "killed", name)
    assert len(calls) - before == 2 * 4, "finished steps were computed again"
    assert resumed.weights.keys() == whole.weights.keys()
    assert all(torch.equal(resumed.weights[key], tensor) for key, tensor in whole.weights.items())
    assert resumed.curve.equals(whole.curve) and resumed.facts["tokens"] == whole.facts["tokens"]


def test_the_seed_decides_everything(tokenizer, tmp_path):
    def run(name, seed):
        torch.rand(len(name))  # the caller's generator is in another state each time
        return tune(models.load(models.TINY, "float32", "cpu")[0], tokenizer, tmp_path / name, steps=3, seed=seed)

    first, again, other = run("a", 1), run("bb", 1), run("ccc", 2)
    assert all(torch.equal(tensor, again.weights[name]) for name, tensor in first.weights.items())
    assert not all(torch.equal(tensor, other.weights[name]) for name, tensor in first.weights.items())


def test_the_micro_batch_does_not_change_what_is_learned(tokenizer, tmp_path):
    runs = []
    for micro_batch in (1, 4):
        network = models.load(models.TINY, "float32", "cpu")[0]
        runs.append(tune(network, tokenizer, tmp_path / str(micro_batch), "full", steps=3, micro_batch=micro_batch))
    for name, tensor in runs[0].weights.items():
        torch.testing.assert_close(tensor, runs[1].weights[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_micro_batch_changes_the_draws_of_dropout_and_nothing_else(tokenizer, tmp_path, dropout):
    chosen = dataclasses.replace(recovery.RECIPES["hfprune-lora"], dropout=dropout, seq_len=256, rows_per_step=4)
    losses = []
    for micro_batch in (1, 4):
        network = models.load(models.TINY, "float32", "cpu")[0]
        settings = {"max_steps": 2, "measurements": 1, "progress": False, "scratch": tmp_path / str(micro_batch)}
        tuned = recovery.recover(network, tokenizer, TASKS, TASKS[:5], chosen, micro_batch=micro_batch, **settings)
        losses.append(tuned.curve["loss"].iloc[-1])
    assert (losses[0] == pytest.approx(losses[1], rel=1e-5)) == (dropout == 0)


@pytest.mark.parametrize(
    ("changes", "told"), [({"seed": 1}, "seed"), ({"steps": 5}, "steps"), ({"name": "sdmprune-lora"}, "name, rank, alpha")]
)
def test_checkpoints_of_another_training_are_not_resumed(network, tokenizer, tmp_path, changes, told):
    tune(network, tokenizer, tmp_path, steps=3)
    with pytest.raises(UserError, match=f"keeps work of another run .{told}.* differ.: delete it or name another"):
        tune(models.load(models.TINY, "float32", "cpu")[0], tokenizer, tmp_path, **{"steps": 3} | changes)
    with pytest.raises(UserError, match="keeps work of another run .model differ"):
        tune(network, tokenizer, tmp_path, steps=3)  # which was tuned in place


def test_distillation_pulls_towards_the_teacher(tokenizer, tmp_path):
    kept, tokens = torch.arange(40).repeat(3, 1), torch.arange(4, 60)[None]
    teacher = models.load(models.TINY, "float32", "cpu")[0]

    def divergence(model):
        with torch.no_grad():
            log_p, log_q = (torch.log_softmax(m(input_ids=tokens).logits, -1) for m in (model, teacher))
        return float((log_q.exp() * (log_q - log_p)).sum(-1).mean())

    def pruned():
        return pruning.narrow(models.load(models.TINY, "float32", "cpu")[0], kept)

    settings = {"steps": 12}
    taught = tune(pruned(), tokenizer, tmp_path / "taught", **settings, teacher=teacher, distillation=1.0)
    alone = tune(pruned(), tokenizer, tmp_path / "alone", **settings)
    assert divergence(taught.model) < divergence(alone.model)
    assert taught.facts["flops"] > alone.facts["flops"]


def test_a_training_that_diverges_says_so(tokenizer, network, tmp_path):
    network.get_decoder().norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="diverged.*lower learning_rate") as caught:
        tune(network, tokenizer, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"micro_batch": 3}, "micro_batch"),
        ({"max_steps": -1}, "max_steps"),
        ({"measurements": 0}, "measurements"),
        ({"distillation": 2.0}, "distillation"),
        ({"distillation": 0.5}, "teacher"),
    ],
)
def test_bad_settings_get_one_sentence(changes, words, tokenizer, network, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        tune(network, tokenizer, tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_recipes_are_the_published_ones_and_can_be_changed():
    hfprune, sdmprune, full = recovery.RECIPES.values()
    assert (hfprune.rank, hfprune.alpha, hfprune.learning_rate, hfprune.rows_per_step, hfprune.seq_len) == (
        32,
        64,
        4e-4,
        128,
        1024,
    )
    assert (sdmprune.rank, sdmprune.alpha, sdmprune.learning_rate, sdmprune.seq_len) == (8, 16, 1e-4, 4096)
    assert (full.rank, full.epochs, full.learning_rate, full.weight_decay) == (0, 3, 1e-4, 0.05)
    assert recovery.recipe("hfprune-lora", rank=0, learning_rate=1e-3).learning_rate == 1e-3
    for name, changes, words in (
        ("lora", {}, "unknown"),
        ("full", {"rank": 8}, "adapters"),
        ("full", {"epochs": -1}, "negative"),
    ):
        with pytest.raises(UserError, match=words):
            recovery.recipe(name, **changes)


def test_what_was_learned_by_another_model_is_refused(network, tokenizer, tmp_path):
    tune(network, tokenizer, tmp_path / "scratch", steps=1).save(tmp_path)
    other = pruning.narrow(models.load(models.TINY, "float32", "cpu")[0], torch.arange(40).repeat(3, 1))
    with pytest.raises(UserError, match="does not fit"):
        recovery.apply(other, tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        recovery.apply(other, tmp_path / "nothing")


def test_operations_follow_the_six_n_rule():
    assert recovery.flops(100, 100, 10) == 6 * 100 * 10
    assert recovery.flops(100, 2, 10) == 10 * (4 * 100 + 6 * 2)
    assert recovery.flops(100, 100, 10, teacher=120) == 10 * (6 * 100 + 2 * 120)


# Export


@pytest.mark.registry  # reads the harness's task index, which takes longer than all other tests here
def test_the_exported_checkpoint_scores_the_same_through_the_harness_s_command_line(network, tokenizer, tmp_path, monkeypatch):
    """Tuned, merged, saved, then read by `lm_eval` in a process that knows nothing of this kit."""
    project = Path(__file__).resolve().parent.parent
    monkeypatch.setenv("HFPRUNE_HOME", str(project))
    pruning.narrow(network, torch.arange(48).repeat(3, 1))
    tuned = tune(network, tokenizer, tmp_path / "scratch")
    export.save_checkpoint(tuned.model, tokenizer, tmp_path / "checkpoint")
    ours, *_ = evaluation.benchmark_items(tuned.model, tokenizer, ["smoke_choice"], "local", 0, 4)
    task = yaml.safe_load((project / "data" / "tasks" / "smoke_choice.yaml").read_text())
    task |= {"task": "exported_choice", "dataset_kwargs": {"data_files": {"test": str(project / "data/smoke/choice.jsonl")}}}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "exported_choice.yaml").write_text(yaml.safe_dump(task))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "exported_choice", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tmp_path / 'checkpoint'},dtype=float32", "--batch_size", "4"]
    command += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out"), "--log_samples"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets"), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, env=offline, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr[-2000:]
    (samples,) = (tmp_path / "out").rglob("samples_exported_choice_*.jsonl")
    theirs = [json.loads(line) for line in samples.read_text().splitlines()]
    for metric in ("acc", "acc_norm"):
        expected = ours[ours["metric"] == metric].set_index("doc_id")["value"].to_dict()
        assert {sample["doc_id"]: float(sample[metric]) for sample in theirs} == expected and len(expected) == 24
