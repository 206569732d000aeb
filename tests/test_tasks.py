"""A task on local records asks exactly what the harness asks on the hub's records."""

import csv
import gzip
import json
import re
from types import SimpleNamespace

import datasets
import lm_eval
import pytest
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from test_calibration import PROJECT, byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from hfprune_nb.errors import UserError
from hfprune_nb.inputs import assets, benchmarks
from hfprune_nb.measure import tasks
from hfprune_nb.runs import forecast


@pytest.fixture(autouse=True)
def project(monkeypatch):
    monkeypatch.setenv("HFPRUNE_HOME", str(PROJECT))


class GivenTask(ConfigurableTask):
    """The harness's own task file, nothing overridden, on records that a test hands in."""

    def __init__(self, name, split, table):
        self.given = {split: datasets.Dataset(table)}
        config = load_yaml(tasks._harness_file(name))
        absent = {f"{other}_split": None for other in ("training", "validation", "test") if other != split}
        super().__init__(config={**config, **absent})

    def download(self, *_, **__):
        self.dataset = self.given


def requests(task, step=1):
    """What the harness asks and expects for every `step`th record."""
    documents = task.eval_docs.select(range(0, len(task.eval_docs), step))
    return [(task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc)) for doc in documents]


def test_the_smoke_task_is_sound():
    task = tasks.load_tasks(["smoke_choice"])["smoke_choice"]
    asked = requests(task)
    assert len(asked) == 24 == tasks.describe(task)["items"]
    assert all(0 <= gold < len(choices) == len(set(choices)) for _, choices, gold in asked)
    assert {gold for _, _, gold in asked} == {0, 1, 2, 3}
    assert asked[0] == (
        "Question: What colour is a clear sky at noon?\nAnswer:",
        ["green", "blue", "brown", "black"],
        1,
    )


@pytest.mark.parametrize("packing", ["jsonl", "json", "jsonl.gz"])
def test_a_task_of_ones_own_is_read_as_any_file_is(tmp_path, monkeypatch, packing):
    """Blank lines, a byte order mark, a line separator inside a question."""
    monkeypatch.setenv("HFPRUNE_HOME", str(tmp_path))
    asked = [{"question": f"Which\u2028one is {n}?", "choices": [str(n), "none"], "answer": 0} for n in range(6)]
    lines = [json.dumps(record, ensure_ascii=False) for record in asked]
    text = "\ufeff" + "\r\n".join([*lines[:3], "", *lines[3:], "", ""])
    (tmp_path / "data" / "tasks").mkdir(parents=True)
    file = tmp_path / "data" / f"records.{packing}"
    file.write_bytes(gzip.compress(text.encode()) if packing.endswith("gz") else text.encode())
    stock = (PROJECT / "data" / "tasks" / "smoke_choice.yaml").read_text()
    stock = stock.replace("smoke_choice", "own").replace("../smoke/choice.jsonl", f"../records.{packing}")
    (tmp_path / "data" / "tasks" / "own.yaml").write_text(stock)
    assert tasks.load_tasks(["own"])["own"].eval_docs.to_list() == asked
    file.write_text(json.dumps(asked[0]) + "\n" + json.dumps(asked[1] | {"answer": "none"}))
    with pytest.raises(UserError, match="task records .* a field that is not of one kind"):
        tasks.load_tasks(["own"])
    (tmp_path / "data" / "tasks" / "bare.yaml").write_text(stock.replace(f"test: ../records.{packing}", f"../records.{packing}"))
    with pytest.raises(UserError, match="task file .*bare.yaml lacks dataset_kwargs.data_files: give a file of records"):
        tasks.load_tasks(["bare"])
    file.write_bytes(b'{"question": "caf\xe9"}')
    with pytest.raises(UserError, match="task records .* line 1 is not UTF-8"):
        tasks.load_tasks(["own"])


def test_the_harness_evaluates_a_local_task():
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="</s>")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    result = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=256),
        tasks=list(tasks.load_tasks(["smoke_choice"]).values()),
        task_manager=TaskManager(include_defaults=False),
        limit=6,
        bootstrap_iters=0,
    )
    assert len(result["samples"]["smoke_choice"]) == 6
    assert 0 <= result["results"]["smoke_choice"]["acc,none"] <= 1


@pytest.mark.parametrize(
    ("names", "source", "message"),
    [
        (["smoke_chioce"], "local", "no local records: choose of arc_challenge, .*, smoke_choice, or source='hub'"),
        (["piqa"], "nowhere", "source='nowhere' is unknown: choose one of auto, local, hub"),
        (["arc_eesy"], "auto", "task 'arc_eesy' is unknown to lm-eval: did you mean arc_easy"),
        (["?"], "auto", "task '[?]' is unknown to lm-eval: `lm_eval ls tasks` lists the names"),
    ],
)
def test_bad_input_gets_one_sentence(monkeypatch, names, source, message):
    # The real list takes ten seconds to read.
    monkeypatch.setattr(tasks, "_task_manager", lambda: SimpleNamespace(all_tasks=["arc_easy", "mmlu", "race"], task_index={}))
    with pytest.raises(UserError, match=message):
        tasks.load_tasks(names, source)


def test_the_hubs_silence_is_told():
    with pytest.raises(UserError, match="task 'piqa': dataset 'baber/piqa' is not cached and HF_HUB_OFFLINE .* need no hub: arc"):
        tasks.load_tasks(["piqa"], "hub")


@pytest.mark.parametrize("name", [name for name, facts in forecast.rates()["tasks"].items() if "dataset" in facts])
def test_the_forecast_knows_the_data_sets_of_the_harness(name):
    assert load_yaml(tasks._harness_file(name))["dataset_path"] == forecast.rates()["tasks"][name]["dataset"]


def test_tasks_of_the_hub_are_skipped_with_a_sentence():
    asked = ["race", "smoke_choice", "generation", "crows_pairs_english", "truthfulqa_mc2", "sciq"]
    assert list(tasks.load_tasks(asked, "local")) == ["smoke_choice"]
    found = tasks.skipped(asked, "local")
    assert list(found) == ["race", "gsm8k", "ifeval", "crows_pairs_english", "truthfulqa_mc2", "sciq"]
    for name, sentence in found.items():
        assert sentence.startswith(f"{name} was skipped, because ") and sentence.endswith("with task_source hub it is evaluated.")
        assert "\n" not in sentence
    # A task of another edition is suggested by its name.
    editions = {benchmark.edition_of: name for name, benchmark in benchmarks.BENCHMARKS.items() if benchmark.edition_of}
    assert set(editions) == {"crows_pairs_english", "truthfulqa_mc2"}
    assert all(edition in found[name] for name, edition in editions.items())
    assert tasks.skipped(asked, "auto") == tasks.skipped(asked, "hub") == {}


def test_an_edition_of_our_own_is_not_asked_of_the_hub():
    with pytest.raises(UserError, match="'crows_pairs_1508' is local only: name crows_pairs_english"):
        tasks.load_tasks(["crows_pairs_1508"], "hub")


def test_a_package_that_a_task_needs_is_named(monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'langdetect'")

    monkeypatch.setattr(tasks, "load_yaml", missing)
    with pytest.raises(UserError, match=r"'ifeval' needs a package .*langdetect.* install lm_eval\[ifeval\]"):
        tasks.load_tasks(["ifeval"], "hub")


# The paper's ten tasks, two more, and two generation tasks: what tables show of each.
SHOWN = {
    "arc_challenge": "acc_norm", "arc_easy": "acc_norm", "boolq": "acc", "crows_pairs_english": "pct_stereotype",
    "openbookqa": "acc_norm", "piqa": "acc_norm", "race": "acc", "social_iqa": "acc", "truthfulqa_mc2": "acc",
    "winogrande": "acc", "hellaswag": "acc_norm", "sciq": "acc_norm", "gsm8k": "exact_match",
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_the_harness_has_the_task_and_its_metric(name):
    harness = load_yaml(tasks._harness_file(name))
    assert harness["task"] == name
    metrics = [metric["metric"] for metric in harness["metric_list"]]
    assert tasks.shown_metric(metrics, "paper") == SHOWN[name]
    accuracy = SHOWN[name] if name.startswith(("crows", "gsm8k")) else "acc"
    assert tasks.shown_metric(metrics, "acc") == accuracy


def test_a_benchmark_without_records_is_refused():
    with pytest.raises(UserError, match="benchmark 'race' has no local records"):
        benchmarks.benchmark_path("race")


@pytest.mark.registry
@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_a_benchmark_is_whole(registry, name):
    task = tasks.load_tasks([name], "local")[name]
    expected = benchmarks.BENCHMARKS[name]
    harness = load_yaml(tasks._harness_file(name))
    assert tasks.describe(task)["items"] == expected.rows
    assert harness["metadata"]["version"] == task.VERSION
    assert task.config.task == name
    assert tasks.describe(task)["metrics"] == [metric["metric"] for metric in harness["metric_list"]]
    # The split that the harness scores is its test split where it names one.
    assert expected.split == (harness.get("test_split") or harness["validation_split"])


@pytest.mark.registry
@pytest.mark.parametrize("name", ["arc_challenge", "arc_easy", "openbookqa"])
def test_rebuilt_records_ask_what_the_original_table_asks(registry, name):
    rebuilt = benchmarks.read_records(name, "validation")
    original = datasets.Dataset.from_file(str(assets.path("benchmarks") / f"{name}_validation.arrow")).data.table
    assert rebuilt["id"].to_pylist() == original["id"].to_pylist()
    asked, expected = (requests(GivenTask(name, "validation", table)) for table in (rebuilt, original))
    assert asked == expected and len(asked) in {299, 570, 500}


@pytest.mark.registry
@pytest.mark.parametrize("name", ["piqa", "social_iqa", "winogrande", "hellaswag"])
def test_kept_tables_ask_what_the_original_table_asks(registry, name):
    original = datasets.Dataset.from_file(str(assets.path("benchmarks") / f"{name}_validation.arrow")).data.table
    local = tasks.load_tasks([name], "local")[name]
    assert requests(local, step=7) == requests(GivenTask(name, "validation", original), step=7)


@pytest.mark.registry
def test_boolq_has_superglues_titles_and_balance(registry):
    table = benchmarks.read_records("boolq", "validation").to_pylist()
    assert all(re.match(r"\S.* -- ", record["passage"]) and not record["question"].endswith("?") for record in table)
    # SuperGLUE's validation set answers yes to 2,033 of its 3,270 questions.
    assert sum(record["label"] for record in table) == 2033


@pytest.mark.registry
def test_crows_pairs_asks_what_the_harness_asks_on_the_same_pairs(registry):
    with assets.path("crows-pairs").open(encoding="utf-8", newline="") as lines:
        pairs = list(csv.DictReader(lines))
    # The file's first column numbers the pairs and has no name, which the harness would take for its empty prompt.
    table = datasets.Dataset.from_list([{name: pair[name] for name in pair if name} for pair in pairs]).data.table
    asked = requests(tasks.load_tasks(["crows_pairs_1508"], "local")["crows_pairs_1508"])
    assert asked == requests(GivenTask("crows_pairs_1508", "test", table))
    assert all(prompt == "" and gold == 0 for prompt, _, gold in asked)
    assert [choices for _, choices, _ in asked] == [[pair["sent_more"], pair["sent_less"]] for pair in pairs]


@pytest.mark.registry
def test_truthfulqa_asks_what_the_harness_asks_on_the_same_records(registry):
    folder = assets.path("truthfulqa")
    single, later = (
        [json.loads(line) for line in (folder / file).read_text(encoding="utf-8").split("\n") if line]
        for file in ("single_choice.jsonl", "true_answers.jsonl")
    )
    task = tasks.load_tasks(["truthfulqa_mc2_pypi"], "local")["truthfulqa_mc2_pypi"]
    asked = requests(task)
    assert asked == requests(GivenTask("truthfulqa_mc2_pypi", "validation", benchmarks.read_records("truthfulqa_mc2_pypi", "")))
    labels = [record["mc2_targets"]["labels"] for record in task.eval_docs]
    assert sum(map(len, labels)) == sum(len(choices) for _, choices, _ in asked) == 6132
    answers = {" ".join(record["question"].split()): set(record["answer"]) for record in later}
    for (prompt, choices, gold), label, record in zip(asked, labels, single, strict=True):
        right = ord(record["answer"]) - ord("A")
        assert prompt.endswith(f"\n\nQ: {record['question']}\nA:") and gold == 0
        assert choices[0] == record["choices"][right] and label == sorted(label, reverse=True)
        true, false = choices[: sum(label)], choices[sum(label) :]
        # The false answers are the single-choice question's, which are the hub's own; the other true ones are the later list's.
        assert false == [choice for place, choice in enumerate(record["choices"]) if place != right]
        known = answers.get(" ".join(record["question"].split()), set())
        assert all({answer, answer.removesuffix(".")} & {one.strip() for one in known} for answer in true[1:])
        assert len(set(choices)) == len(choices)


@pytest.mark.registry
def test_task_prompts_are_the_harness_s_own(registry):
    texts = list(benchmarks.prompts())
    first, last = texts[0], texts[-1]
    assert len(texts) == 62 == len(set(texts)) and min(map(len, texts)) > 5_000
    loaded = tasks.load_tasks(benchmarks._PROMPTS, "local")
    for text, places in ((first, range(8)), (last, range(488, 496))):
        expected = [task.doc_to_text(task.eval_docs[place]) for place in places for task in loaded.values()]
        assert text == "\n\n".join(expected)
