"""The smoke study end to end: the real notebooks through papermill on a tiny random model, offline, in a folder of its own."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from faults import COMMAND, Runner, kill_and_resume
from safetensors.numpy import load_file
from toys import pictures

import hfprune_nb
from hfprune_nb import models
from hfprune_nb.errors import UserError
from hfprune_nb.files import load_layers
from hfprune_nb.runs import stage
from hfprune_nb.runs.artifacts import finished, open_artifact
from hfprune_nb.runs.parameters import notebook_parameters, notebook_path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
]  # the first test waits for the whole study, on a busy machine for a while

PROJECT = Path(__file__).resolve().parent.parent
STUDY = PROJECT / "notebooks" / "studies" / "smoke.yaml"
SETTINGS = yaml.safe_load(STUDY.read_text(encoding="utf-8"))


class Smoke(Runner):
    """The finished study; `answer` is what the command said."""

    answer = ""

    def artifacts(self, stage):
        return finished(self.folder, stage)


def smoke_runner(root):
    """The study in empty results and an empty cache: nothing it needs is fetched or made before."""
    (root / "results").mkdir()
    folders = {"HFPRUNE_HOME": PROJECT, "HFPRUNE_CACHE": root / "cache", "HF_HOME": root / "hub"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return Smoke(root / "results" / "smoke", **{name: str(folder) for name, folder in folders.items()}, **offline)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Run the study once."""
    study = smoke_runner(tmp_path_factory.mktemp("smoke"))
    status, study.answer = study.run()
    assert status == 0, study.answer
    return study


def test_every_job_of_the_grid_is_computed(smoke):
    assert "27 jobs" in smoke.answer and "27 computed, 0 done, 0 failed, 0 skipped" in smoke.answer
    # Two seeds, five criteria, one ratio; magnitude reads weights only and has one seed.
    expected = {"calibration": 2, "scoring": 2, "pruning": 9, "evaluation": 10, "figures": 1, "experiments": 1, "questions": 1}
    expected["recommendation"] = 1
    assert {stage: len(smoke.artifacts(stage)) for stage in expected} == expected


def test_nothing_unfinished_is_left(smoke):
    assert smoke.leftovers() == []


@pytest.mark.parametrize("moments", [3, pytest.param(20, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
def test_killed_at_any_moment_and_resumed_gives_the_same_bytes(smoke, tmp_path, moments):
    kill_and_resume(smoke_runner(tmp_path), smoke, moments, longest=20, seed=moments)


def test_every_artifact_keeps_its_executed_notebook_and_card(smoke):
    for done in smoke.folder.glob("*/*/DONE"):
        artifact = open_artifact(done.parent)
        notebook = json.loads(artifact.path("notebook.ipynb").read_text(encoding="utf-8"))
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert all(cell["execution_count"] for cell in code), artifact.reference
        assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
        given = notebook["metadata"]["papermill"]["parameters"]
        assert {name: given[name] for name in artifact.parameters} == artifact.parameters
        card = artifact.card
        assert card["seconds"] > 0 and card["peak_memory_bytes"] > 1e8 and card["threads"] in (1, None)
        assert card["versions"]["torch"].startswith("2.13.0")
        assert "seed" in card["facts"] or "seed" not in artifact.parameters, artifact.reference


def test_results_are_published_for_a_reader(smoke):
    for name in ("criterion", "ablation", "fidelity", "paired", "published", "truth"):
        for suffix in ("csv", "md", "html"):
            assert (smoke.folder / "tables" / f"{name}.{suffix}").stat().st_size > 0
    drawn = (
        "hero",
        "forest",
        "next_tokens",
        "against_ratio",
        "importance",
        "rank_agreement",
        "kept_overlap",
        "truth",
        "calibration",
        "gradient",
    )
    for name in drawn:
        for suffix in ("png", "svg"):
            assert (smoke.folder / "figures" / f"{name}.{suffix}").stat().st_size > 1000
    assert not (smoke.folder / "figures" / "widths.png").exists(), "all layers are as wide: there is nothing to see"
    pages = {path.stem for path in (smoke.folder / "notebooks").glob("*.html")}
    chain = {"01_calibration", "02_scoring", "03_pruning", "05_evaluation", "05_evaluation_dense", "06_figures"}
    assert pages == chain | {"08_experiments", "09_questions", "12_recommendation"}
    index = (smoke.folder / "index.html").read_text(encoding="utf-8")
    for link in re.findall(r'href="([^"#]+)"', index):
        assert (smoke.folder / link).is_file(), link
    assert (smoke.folder / "study.yaml").read_bytes() == STUDY.read_bytes()
    assert len(json.loads((smoke.folder / "cards.json").read_text(encoding="utf-8"))) == 27


def test_the_criterion_table_holds_dense_and_every_criterion(smoke):
    table = pd.read_csv(smoke.folder / "tables" / "criterion.csv")
    assert set(zip(table["criterion"], table["ratio"], strict=True)) == {
        ("dense", 0.0),
        *((c, 0.2) for c in SETTINGS["criteria"]),
    }
    pruned = table[table["criterion"] != "dense"]
    assert set(pruned["measure"]) >= {"task", "perplexity", "js", "kl", "jaccard15", "top1"}
    seeds = pruned.groupby("criterion")["n_seeds"].agg(["min", "max"])
    assert seeds.loc["magnitude"].tolist() == [1, 1] and (seeds.drop("magnitude") == 2).all(axis=None)
    known = pruned.dropna(subset=["low", "high"])
    assert len(known) == len(pruned) and (known["low"] <= known["mean"]).all() and (known["mean"] <= known["high"]).all()
    assert np.isfinite(table.loc[table["measure"] == "perplexity", "mean"]).all()


def test_the_pruned_models_have_the_requested_size(smoke):
    for artifact in smoke.artifacts("pruning"):
        facts = json.loads(artifact.path("pruning.json").read_text(encoding="utf-8"))
        one_neuron_per_layer = 3 * 3 * 32 / facts["dense_parameters"]
        assert facts["ratio"] == 0.2 and abs(facts["achieved_ratio"] - 0.2) <= one_neuron_per_layer
        kept = load_file(artifact.path("kept.safetensors"))
        assert [len(kept[f"layers.{layer}"]) for layer in range(3)] == facts["widths"]
        assert facts["loads_with"] == "plain" and facts["allocation"] == facts["allocation_spec"] == "uniform"


def test_a_cold_kernel_gives_the_bytes_of_a_warm_one(smoke, tmp_path, monkeypatch):
    for name, value in (smoke.environment | {"HFPRUNE_RESULTS": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    made = smoke.artifacts("scoring")[0]
    shutil.copytree(smoke.folder / "calibration", tmp_path / "smoke" / "calibration")
    cold = stage.execute("scoring", "smoke", made.parameters)
    assert cold.folder != made.folder and cold.reference == made.reference and cold.digest == made.digest
    assert pictures(cold.path("notebook.ipynb")) == pictures(made.path("notebook.ipynb")) != []


def test_layers_of_different_width_go_through_the_notebooks(smoke, tmp_path, monkeypatch):
    """A global allocation from the study's scores to an evaluation, whose tables will say how such a model loads."""
    for name, value in (smoke.environment | {"HFPRUNE_RESULTS": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    evaluated = next(artifact for artifact in smoke.artifacts("evaluation") if artifact.parameters["pruned"])
    pruned = open_artifact(smoke.folder / evaluated.parameters["pruned"])
    for folder in ("calibration", "scoring", "evaluation"):
        shutil.copytree(smoke.folder / folder, tmp_path / "smoke" / folder)
    chosen = {"criterion": "entropy", "allocation": {"global": {"floor": 0.25}, "as": "global_25"}, "save_checkpoint": True}
    made = stage.execute("pruning", "smoke", pruned.parameters | chosen)
    facts = json.loads(made.path("pruning.json").read_text(encoding="utf-8"))
    assert min(facts["widths"]) >= 16 and len(set(facts["widths"])) > 1 and facts["loads_with"] == "hfprune_nb.load"
    model = hfprune_nb.load(made.path("checkpoint"))
    assert [mlp.width for mlp in models.gated_mlps(model)] == facts["widths"]
    assert models.count_parameters(model) == facts["parameters"]
    measured = stage.execute("evaluation", "smoke", evaluated.parameters | {"pruned": made.reference})
    summary = json.loads(measured.path("summary.json").read_text(encoding="utf-8"))
    assert summary["allocation"] == "global_25" and summary["allocation_spec"] == facts["allocation_spec"]
    assert any("global_25" in note and "hfprune_nb.load" in note for note in summary["notes"])


def test_a_finished_study_does_nothing_and_says_so(smoke):
    before = {path: path.stat().st_mtime_ns for path in smoke.folder.rglob("*")}
    status, said = smoke.run()
    assert status == 0 and "27 jobs, nothing to do" in said
    assert {path: path.stat().st_mtime_ns for path in smoke.folder.rglob("*")} == before


def test_a_deleted_artifact_is_the_only_one_made_again(smoke):
    """The evaluation comes out with the same bytes, so the figures that were drawn from it stand."""
    chosen = next(
        artifact
        for artifact in smoke.artifacts("evaluation")
        if json.loads(artifact.path("summary.json").read_text(encoding="utf-8"))["criterion"] == "entropy"
    )
    sealed, published, digest = smoke.sealed(), smoke.exported(), chosen.digest
    shutil.rmtree(chosen.folder)
    status, said = smoke.run()
    assert status == 0 and "1 computed, 26 done, 0 failed" in said, said
    again = smoke.sealed()
    assert [folder for folder in sealed if again[folder] != sealed[folder]] == [chosen.folder]
    assert chosen.digest == digest
    assert smoke.exported() == published


def test_a_stage_runs_alone_through_papermill(smoke, tmp_path):
    """One notebook, its own parameters, any study name; the scores equal those of the study."""
    given = next(artifact for artifact in smoke.artifacts("calibration") if artifact.parameters["seed"] == 0)
    alone = smoke.folder.parent / "alone"
    shutil.copytree(given.folder, alone / given.reference)
    parameters = SETTINGS["scoring"] | {
        "study": "alone", "model": SETTINGS["models"][0], "criteria": ["entropy"], "calibration": given.reference,
    }  # fmt: skip
    command = [sys.executable, "-m", "papermill", "notebooks/02_scoring.ipynb", str(tmp_path / "out.ipynb"), "--no-progress-bar"]
    command += ["-y", yaml.safe_dump(parameters)]
    answer = subprocess.run(command, env=smoke.environment, cwd=PROJECT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    (made,) = finished(alone, "scoring")
    assert made.parameters["criteria"] == ["entropy"] and made.inputs == {given.reference: given.digest}
    found = load_layers(made.path("scores.safetensors"))
    in_study = next(artifact for artifact in smoke.artifacts("scoring") if artifact.parameters["seed"] == 0)
    assert found.keys() == {"entropy"} and [len(row) for row in found["entropy"]] == [64] * 3
    np.testing.assert_allclose(found["entropy"], load_layers(in_study.path("scores.safetensors"))["entropy"], rtol=1e-6)
    assert json.loads((tmp_path / "out.ipynb").read_text(encoding="utf-8"))["metadata"]["papermill"]["exception"] is None


@pytest.mark.parametrize(
    ("line", "nearest"),
    [("criterai: [entropy]", "criteria"), ("calibration: {n_window: 4}", "n_windows"), ("run: {worker: 2}", "workers")],
)
def test_a_misspelt_key_ends_with_one_line(smoke, tmp_path, line, nearest):
    kept = [text for text in STUDY.read_text(encoding="utf-8").splitlines() if text.split(":")[0] != line.split(":")[0]]
    (tmp_path / "typo.yaml").write_text("\n".join([*kept, line]), encoding="utf-8")
    command = [*COMMAND, "study", "run", str(tmp_path / "typo.yaml")]
    answer = subprocess.run(command, env=smoke.environment, capture_output=True, text=True)
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr.count("\n") == 1 and f"did you mean '{nearest}'" in answer.stderr
    assert not (smoke.folder.parent / "typo").exists()


@pytest.fixture
def in_study(smoke, monkeypatch):
    """Return a function that begins a run as a notebook does: the stage's defaults, some parameters changed."""
    for name in ("HFPRUNE_HOME", "HFPRUNE_RESULTS"):
        monkeypatch.setenv(name, smoke.environment[name])

    def start(stage_name, **changes):
        parameters = notebook_parameters(notebook_path(stage_name))
        defaults = {name: parameter.default for name, parameter in parameters.items() if name != "study"}
        return stage.start(stage_name, study="smoke", **(defaults | changes))

    return start


@pytest.mark.parametrize(
    ("stage_name", "inputs"),
    [
        ("scoring", {"calibration": "calibration"}),
        ("pruning", {"scores": "scoring"}),
        ("evaluation", {"pruned": "pruning", "reference": "evaluation"}),
    ],
)
def test_an_artifact_of_another_model_is_refused(smoke, in_study, stage_name, inputs):
    """Its token ids or neurons mean something else there, even where every shape fits."""
    references = {name: smoke.artifacts(source)[0].reference for name, source in inputs.items()}
    before = smoke.sealed()
    with pytest.raises(UserError, match="tiny-random-llama") as caught:
        in_study(stage_name, model="smollm2-135m", **references)
    assert "\n" not in str(caught.value) and smoke.sealed() == before


def test_a_reference_on_other_text_is_refused(smoke, in_study):
    """Another seed gives windows of the same shape and other text: fidelity would be nonsense that looks like a number."""
    pruned = next(artifact for artifact in smoke.artifacts("evaluation") if artifact.parameters["pruned"])
    with pytest.raises(UserError, match="seed"):
        in_study("evaluation", **(pruned.parameters | {"seed": 7}))
