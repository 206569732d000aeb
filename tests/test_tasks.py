"""A task on local records asks exactly what the harness asks on the hub's records."""

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
from test_calibration import PROJECT, byte_tokenizer, silent
from transformers import LlamaConfig, LlamaForCausalLM

from hfprune_nb import assets, benchmarks, tasks
from hfprune_nb.errors import UserError


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
    monkeypatch.setattr(tasks, "_task_manager", lambda: SimpleNamespace(all_tasks=["arc_easy", "mmlu", "race"]))
    with pytest.raises(UserError, match=message):
        tasks.load_tasks(names, source)


def test_the_hubs_silence_is_told(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", silent)
    with pytest.raises(UserError, match=r"task 'piqa': the hub did not give its data \(ConnectionError\)"):
        tasks.load_tasks(["piqa"], "hub")


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
