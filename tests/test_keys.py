"""Keys: what decides a result is part of its address, by content where it is a file, and nothing else is."""

import json
import re
import shutil

import pytest
import toys
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hfprune_nb import criteria, models
from hfprune_nb.errors import UserError
from hfprune_nb.inputs import benchmarks, hub
from hfprune_nb.runs import artifacts, forecast, keys, parameters, pins, provenance, stage, study
from hfprune_nb.runs.keys import address, code_hash
from hfprune_nb.runs.stages import STAGES

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
UNREAD = st.text().filter(lambda name: name not in ("device", "model", "corpus"))


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("HFPRUNE_HOME", str(tmp_path))
    monkeypatch.setenv("HFPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HFPRUNE_RESULTS", raising=False)
    return toys.write_project(tmp_path)


def declare(project, **changes):
    """Declare the toy notebooks' defaults as they are, those in `changes` apart: stage__parameter=value."""
    content = {}
    for name in STAGES:
        found = parameters.notebook_parameters(parameters.notebook_path(name))
        content[name] = {key: parameter.default for key, parameter in found.items() if key != "study"}
    for key, value in changes.items():
        name, _, parameter = key.partition("__")
        content[name][parameter] = value
    (project / "notebooks" / "defaults.yaml").write_text(yaml.safe_dump(content))


def key(name, **values):
    return address(name, parameters.complete(name, values))


@given(st.dictionaries(UNREAD, PLAIN | st.lists(PLAIN)))
def test_address_ignores_order_and_study(values):
    shuffled = dict(reversed(values.items())) | {"study": "another"}
    without = {name: value for name, value in values.items() if name != "study"}
    assert address("calibration", shuffled) == address("calibration", without)
    assert artifacts.KEY.fullmatch(address("calibration", values))


def test_address_depends_on_stage_and_every_value():
    base = {"seed": 0, "ratio": 0.2}
    addresses = {
        address("calibration", base),
        address("figures", base),
        address("calibration", base | {"seed": 1}),
        address("calibration", base | {"other": 0}),
    }
    assert len(addresses) == 4


def test_a_parameter_that_is_added_with_its_default_moves_no_result(project):
    declare(project)
    before = [job.reference for job in study.load("toy").jobs]
    more = (toys.SCORING[0] + "\nsketch: int = 8", toys.SCORING[1])
    toys.write_stage(project, "scoring", "02_scoring.ipynb", more)
    with pytest.raises(UserError, match="parameter 'sketch' stands in one of 02_scoring.ipynb and defaults.yaml only"):
        study.load("toy")
    declare(project)
    assert [job.reference for job in study.load("toy").jobs] == before
    assert key("scoring", sketch=9) != key("scoring")


def test_another_version_of_a_stage_moves_its_results(project, monkeypatch):
    before = {job.stage: job.key for job in study.load("toy").jobs}
    monkeypatch.setattr(type(STAGES["pruning"]), "version", 99)
    after = {job.stage: job.key for job in study.load("toy").jobs}
    assert before["scoring"] == after["scoring"] and before["pruning"] != after["pruning"]
    assert before["figures"] != after["figures"]


def test_editing_a_notebook_while_exploring_changes_no_study_and_is_told(project):
    declare(project)
    before = [(job.reference, job.parameters) for job in study.load("toy").jobs]
    notebook = project / "notebooks" / "01_calibration.ipynb"
    notebook.write_text(notebook.read_text().replace("seq_len: int = 8", "seq_len: int = 16"))
    assert [(job.reference, job.parameters) for job in study.load("toy").jobs] == before
    assert parameters.edited("calibration") == {"seq_len": (16, 8)}
    assert parameters.complete("calibration", {}, exploring=True)["seq_len"] == 16
    explored = stage.start("calibration", study="toy", **parameters.complete("calibration", {}, exploring=True))
    assert f"calibration/{explored.artifact.key}" not in [reference for reference, _ in before]


@pytest.mark.parametrize("machine", ["cpu", "cuda"])
def test_auto_is_the_device_that_it_means(project, monkeypatch, machine):
    monkeypatch.setattr(keys.shutil, "which", lambda name: machine == "cuda" and name)
    monkeypatch.setattr(keys.importlib.metadata, "version", lambda name: "2.13.0")
    assert key("scoring", device="auto") == key("scoring", device=machine)
    assert key("scoring", device="cpu") != key("scoring", device="cuda")


def test_local_text_counts_by_its_content_not_by_where_it_lies(project, tmp_path):
    corpus = tmp_path / "text.jsonl"
    corpus.write_text('{"text": "one"}')
    before = key("calibration", corpus=str(corpus))
    (tmp_path / "moved").mkdir()
    assert key("calibration", corpus=shutil.copy(corpus, tmp_path / "moved")) == before
    run = stage.start("calibration", study="toy", **parameters.complete("calibration", {"corpus": str(corpus)}))
    run.path("value.txt").write_text("1")
    assert run.finish().card["contents"] == {"corpus": ["text.jsonl", keys.sha256(corpus)[:16]]}
    corpus.write_text('{"text": "two"}')
    assert key("calibration", corpus=str(corpus)) != before
    assert key("evaluation", perplexity_corpora=[str(corpus)]) != key("evaluation", perplexity_corpora=["missing.jsonl"])


def test_a_model_folder_counts_by_its_weights_and_not_by_what_a_trainer_left(project, tmp_path, monkeypatch):
    model = tmp_path / "own"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"0" * 2**20)
    before = key("scoring", model=str(model))
    (model / "optimizer.pt").write_bytes(b"1")
    assert key("scoring", model=str(model)) == before
    # A large file is hashed once for each state of it, by whatever process.
    keys._hashed.cache_clear()
    monkeypatch.setattr(keys, "sha256", lambda path: pytest.fail(f"{path} is hashed again") if path.suffix != ".json" else "0")
    assert len(key("scoring", model=str(model))) == 16
    monkeypatch.undo()
    keys._hashed.cache_clear()
    (model / "model.safetensors").write_bytes(b"2" * 2**20)
    monkeypatch.setenv("HFPRUNE_HOME", str(project))
    assert key("scoring", model=str(model)) != before


def test_files_that_a_pattern_names_count_by_their_content(project):
    (project / "own").mkdir()
    (project / "own" / "a.py").write_text("a = 1  # one")
    values = parameters.complete("experiments", {}) | {"own_text": "own/*.py"}
    found = [address("experiments", values), address("experiments", values)]
    (project / "own" / "a.py").write_text("a = 1  # two")
    found.append(address("experiments", values))
    (project / "own" / "b.py").touch()
    found.append(address("experiments", values))
    assert found[0] == found[1] and len(set(found)) == 3, "comments are text, too"
    STAGES["experiments"].check({"criteria": ["entropy"], "own_text": "own/*.py"})
    STAGES["experiments"].check({"criteria": ["entropy"], "own_text": "transformers:*.py"})
    with pytest.raises(UserError, match="own_text='oen/.*' matches no file"):
        STAGES["experiments"].check({"criteria": ["entropy"], "own_text": "oen/*.py"})


@pytest.mark.parametrize("stage", ["figures", "questions"])
def test_hours_are_told_by_rates_which_count(stage, project):
    rates = project / "data" / "rates.yaml"
    rates.parent.mkdir(exist_ok=True)
    rates.write_text("devices: {}")
    before = address(stage, parameters.complete(stage, {}))
    rates.write_text("devices: {cpu: {}}")
    assert address(stage, parameters.complete(stage, {})) != before


def test_adapters_count_with_the_model_that_they_were_trained_on(project, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    (base / "model.safetensors").write_bytes(b"1")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = key("scoring", model=str(adapter))
    (base / "model.safetensors").write_bytes(b"2")
    assert key("scoring", model=str(adapter)) != before
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    assert STAGES["scoring"].from_hub({"model": str(adapter)}) == [(str(adapter), "model")]
    assert pins.pinned("scoring", {"model": str(adapter), "revisions": {}}, {"owner/base@main": "0a" * 20})["revisions"] == {
        "owner/base": "0a" * 20
    }


def test_a_revision_pins_the_weights(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"1")
    found = provenance.model_revision({"model": str(folder), "revisions": {}})
    assert re.fullmatch("files sha256 [0-9a-f]{16}", found)
    (folder / "model.safetensors").write_bytes(b"2")
    assert provenance.model_revision({"model": str(folder), "revisions": {}}) != found
    assert all(re.fullmatch("file sha256 [0-9a-f]{16}", models.revision(alias)) for alias in models.aliases())
    assert models.revision("owner/name") == ""
    commit = "0a" * 20
    assert provenance.model_revision({"model": "owner/name", "revisions": {"owner/name": commit}}) == f"commit {commit}"


@pytest.mark.parametrize(
    ("task", "data"),
    [
        ("lambada_openai", "EleutherAI/lambada_openai"),
        ("mmlu_abstract_algebra", "hails/mmlu_no_train"),
        ("winogrande", "allenai/winogrande"),
        ("mmlu", ""),
        ("no_such_task", ""),
    ],
)
def test_every_task_of_the_harness_is_pinned_to_a_commit_of_its_data(task, data):
    assert hub.task_data(task) == data


def test_tasks_with_local_records_are_known_as_such():
    known = forecast.rates()["tasks"]
    assert {name for name in benchmarks.BENCHMARKS if hub.task_data(name)} == {name for name in known if known[name].get("local")}


def test_tasks_that_have_no_local_records_are_pinned_under_auto():
    read = dict(
        STAGES["evaluation"].from_hub(
            {"model": "tiny", "perplexity_corpora": ["c4"], "tasks": ["arc_easy", "lambada_openai"], "task_source": "auto"}
        )
    )
    assert set(read) == {"tiny", "c4", "EleutherAI/lambada_openai"}


def test_an_edited_task_file_or_its_records_are_another_evaluation(project):
    folder = project / "data" / "tasks"
    folder.mkdir()
    (folder / "own.yaml").write_text("task: own\ndataset_kwargs: {data_files: {test: own.jsonl}}")
    (folder / "own.jsonl").write_text("{}")
    found = [key("evaluation", tasks=["own"])]
    (folder / "own.jsonl").write_text('{"question": 1}')
    found.append(key("evaluation", tasks=["own"]))
    (folder / "own.yaml").write_text("task: own\nnum_fewshot: 1\ndataset_kwargs: {data_files: {test: own.jsonl}}")
    found.append(key("evaluation", tasks=["own"]))
    assert len(set(found)) == 3


CRITERION = '''"""Words."""

class Rule(Base):
    """More words."""

    name, label = "rule", "A rule"
    source = "a paper"

    def value(self, logits):
        return logits + 1  # a remark

    def numbers_per_neuron(self, width, hidden):
        return width
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("a paper", "another paper", True),
        ("More words", "Other words", True),
        ("  # a remark", "", True),
        ("return width", "return 2 * width", True),
        ("logits + 1", "logits + 2", False),
        ("def value", "def gradient", False),
    ],
)
def test_code_counts_and_words_do_not(old, new, same):
    assert (code_hash(CRITERION) == code_hash(CRITERION.replace(old, new))) == same


def test_an_edited_criterion_moves_the_scoring_that_asks_for_it(project, tmp_path, monkeypatch):
    edited = tmp_path / "entropy.py"
    edited.write_text(keys.Path(STAGES["scoring"].sources({"criteria": ["entropy"]})["entropy"]).read_text() + "\nMORE = 1\n")
    before = key("scoring", criteria=["entropy"]), key("scoring", criteria=["magnitude"])
    original = type(STAGES["scoring"]).sources

    def sources(self, values):
        return {name: edited if name == "entropy" else path for name, path in original(self, values).items()}

    monkeypatch.setattr(type(STAGES["scoring"]), "sources", sources)
    assert key("scoring", criteria=["entropy"]) != before[0] and key("scoring", criteria=["magnitude"]) == before[1]


def test_every_criterion_has_a_code_that_can_be_read():
    for name in criteria.names():
        (path,) = STAGES["scoring"].sources({"criteria": [name]}).values()
        assert json.dumps(name).strip('"') in path.read_text()
