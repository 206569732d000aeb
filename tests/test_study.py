"""Studies on toy notebooks: the grid, resuming, early cut-off, local failures, interrupts that leave nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
import toys

from hfprune_nb import paths, progress
from hfprune_nb.errors import UserError
from hfprune_nb.files import read_json
from hfprune_nb.runs import export, grid, kernel, scheduler, stage, status, study
from hfprune_nb.runs.artifacts import Artifact
from hfprune_nb.runs.parameters import check_parameters
from hfprune_nb.runs.stages import STAGES


@pytest.fixture(scope="module")
def finished_project(tmp_path_factory):
    """A project whose study `toy` was run once by real worker processes; read-only."""
    project = toys.write_project(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HFPRUNE_HOME", str(project))
        patch.delenv("HFPRUNE_RESULTS", raising=False)
        summary = scheduler.run(study.load("toy"), progress=False)
        assert summary.ok and summary.count("computed") == 12, summary.text()
    return project


@pytest.fixture
def project(finished_project, tmp_path, monkeypatch):
    """A copy of the finished project that a test may change; jobs run in this process, to save starting workers."""
    shutil.copytree(finished_project, tmp_path, dirs_exist_ok=True, copy_function=shutil.copy2)
    monkeypatch.setenv("HFPRUNE_HOME", str(tmp_path))
    monkeypatch.delenv("HFPRUNE_RESULTS", raising=False)
    monkeypatch.setattr(scheduler, "ProcessPoolExecutor", lambda workers, *_, **__: ThreadPoolExecutor(1))
    return tmp_path


def jobs(loaded, name):
    return [job for job in grid.plan(loaded) if job.stage == name]


def artifact(loaded, name, position=0):
    return Artifact(loaded.folder / jobs(loaded, name)[position].reference)


def computed(summary):
    return [outcome.job.reference for outcome in summary.outcomes if outcome.state == "computed"]


def figures_value(loaded, job):
    return (loaded.folder / job.reference / "value.txt").read_bytes()


# -- the file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criterion": ["entropy"]}, "unknown key 'criterion', did you mean 'criteria'"),
        ({"recipe": ["hfprune"]}, "recipe: unknown"),
        ({"models": None}, "models must be a list with at least one entry"),
        ({"seeds": []}, "seeds must be a list"),
        ({"seeds": [0, 0]}, "seeds names an entry twice"),
        ({"seeds": ["0"]}, "seeds: parameter 'seed' .* must be int, not str '0'"),
        ({"ratios": [0.2, 1.0]}, "ratio 1 must lie between 0 and 1: write 20 % as 0.2"),
        ({"ratios": [20]}, "ratio 20 must lie between 0 and 1"),
        ({"ratios": None}, "either ratio .* or neuron_ratio"),
        ({"neuron_ratios": [0.1]}, "either ratio .* or neuron_ratio"),
        ({"name": 3}, "name must be text"),
        ({"name": "a/b"}, "not a plain name"),
        ({"run": {"worker": 2}}, "section run: unknown key 'worker', did you mean 'workers'"),
        ({"run": {"workers": 0}}, "run.workers must be a positive int"),
        ({"run": {"offline": 1}}, "run.offline must be true or false"),
        ({"calibration": {"n_window": 8}}, "section calibration: .*did you mean 'n_windows'"),
        ({"calibration": {"n_windows": "8"}}, "section calibration: parameter 'n_windows'"),
        ({"evaluation": {"tasks": "choice"}}, r"parameter 'tasks' .* must be list.* str 'choice': write \[...\]"),
        ({"criteria": "entropy"}, "criteria must be a list"),
        ({"evaluation": {"n_windows": -1}}, "n_windows -1 is too small or no number: it must be at least 1"),
        ({"evaluation": {"n_windows": 0}}, "n_windows 0 is too small or no number"),
        ({"recovery": {"epochs": float("nan")}}, "epochs nan is too small or no number: it must be at least 0"),
        ({"recovery": {"steps": -3}}, "steps -3 is too small"),
        ({"calibration": {"seed": 8}}, "calibration.seed is set by the grid"),
        ({"scoring": {"calibration": "x"}}, "scoring.calibration is set by the grid"),
        ({"recovery": {}, "recovery_criteria": ["entropie"]}, "recovery_criteria: unknown 'entropie', did you mean 'entropy'"),
    ],
)
def test_bad_study_is_refused_in_one_sentence(project, changes, message):
    toys.write_study(project, "bad", **changes)
    with pytest.raises(UserError, match=message) as caught:
        study.load("bad")
    assert "\n" not in str(caught.value)


def test_bad_file_is_refused(project):
    (project / "notebooks" / "studies" / "bad.yaml").write_text("models: [")
    with pytest.raises(UserError, match="not valid YAML"):
        study.load("bad")
    with pytest.raises(UserError, match="no study file 'toi': did you mean 'toy'"):
        study.load("toi")


def test_a_study_file_of_another_editor_is_read_or_refused_with_its_line(project):
    file = toys.write_study(project, "edited", description="caf\u00e9")
    text = file.read_text(encoding="utf-8")
    file.write_bytes(("\ufeff" + text.replace("\n", "\r\n")).encode())
    assert study.load("edited").models == study.load("toy").models
    file.write_bytes(f"# caf\u00e9\n{text}".encode("latin-1"))
    with pytest.raises(UserError, match="study file .*edited.yaml, line 1 is not UTF-8"):
        study.load("edited")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [a]\nratios: [0.2]\nmodels: [b]", "'models' is given twice, again in line 5"),
        ("calibration: {n_windows: 8, n_windows: 9}", "'n_windows' is given twice"),
        ("calibration:\n- corpus: wikitext", "calibration must be a section with `name: value` lines"),
        ("calibration: wikitext", "calibration must be a section"),
        ("run: [2]", "run must be a section"),
        ("axes: {pruning: [2]}", "axes.pruning must be a section"),
        ("axes: {prunning: {seed: [2]}}", "section axes: unknown key 'prunning', did you mean 'pruning'"),
        ("axes: {pruning: {sed: [2]}}", "axes.pruning.sed: .* has no parameter 'sed': did you mean 'seed'"),
        ("axes: {pruning: {scores: [a]}}", "axes.pruning.scores is set by the grid"),
        ("axes: {evaluation: {limit: [1, 2]}}", "axes.evaluation: no table tells these apart: write a study for each value"),
        ("calibration:\n\tcorpus: wikitext", "not valid YAML"),
        ("criteria: [[entropy]]", "is no criterion"),
        ("criteria: [entropie]", "did you mean 'entropy'"),
        ("criteria: [{self_distillation: {alfa: 0.4}}]", "did you mean 'alpha'"),
        ("criteria: [{self_distillation: {alpha: 4}}]", "alpha 4 is not a number"),
        ("criteria: [entropy, {one_hot_ce: {}, as: entropy}]", "'entropy' is named twice"),
        ("criteria: [entropy]\nallocations: [global, {global: {floor: 0.3}}]", "allocations: 'global' is named twice"),
        ("models: [./missing]", "models: './missing' does not exist: it was looked for in "),
        ("calibration: {corpus: missing.jsonl}", "calibration.corpus: 'missing.jsonl' does not exist: it was looked for in "),
        ("scoring: {device: gpu}", "device 'gpu' is unknown: choose one of auto, cpu, cuda, cuda:N, balanced"),
        ("scoring: {dtype: half}", "dtype 'half' is unknown"),
        ("recovery: {recipe: lora}", "recipe 'lora' is unknown"),
        ("extends: missing", "no study file 'missing'"),
        ("extends: [toy]", "extends must be the name of one study file"),
        ("description: 2025-03-01", "description must be text, .*: put it in quotes"),
    ],
)
def test_a_slip_in_the_file_is_one_sentence(project, text, message):
    base = "models: [tiny]\nseeds: [0]\ncriteria: [entropy]\nratios: [0.2]\n"
    kept = [line for line in base.splitlines() if line.split(":")[0] not in {row.split(":")[0] for row in text.splitlines()}]
    (project / "notebooks" / "studies" / "slip.yaml").write_text("\n".join([*kept, text]))
    with pytest.raises(UserError, match=message) as caught:
        study.load("slip")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("slip.yaml")


def test_numbers_are_read_as_meant(project):
    toys.write_study(project, "numbers")
    file = project / "notebooks" / "studies" / "numbers.yaml"
    file.write_text(file.read_text() + "calibration: {length: 2e-5}\n")
    assert study.load("numbers").sections["calibration"] == {"length": 2e-5}
    file.write_text(file.read_text().replace("length: 2e-5", "n_windows: 1e3"))
    with pytest.raises(UserError, match="must be int, not float 1000.0"):
        study.load("numbers")


def test_relative_paths_are_looked_up_beside_the_study_file(project, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("work")
    (folder / "own-model").mkdir()
    (folder / "text.jsonl").write_text("{}")
    file = toys.write_study(project, "own", models=["own-model"], calibration={"corpus": "text.jsonl"})
    moved = Path(shutil.move(file, folder / "own.yaml"))
    loaded = study.load(moved)
    assert loaded.models == [str(folder / "own-model")]
    assert loaded.sections["calibration"]["corpus"] == str(folder / "text.jsonl")
    monkeypatch.chdir(folder)
    assert [job.key for job in study.load("own.yaml").jobs] == [job.key for job in loaded.jobs]


def test_a_study_extends_another_and_says_only_what_differs(project):
    toys.write_study(project, "base", recovery={"steps": 5}, run={"workers": 3})
    toys.write_study(project, "paper", extends="base", models=["other"], seeds=None, criteria=None, ratios=[0.5], evaluation=None)
    paper = study.load("paper")
    assert (paper.name, paper.models, paper.axes["pruning"]["ratio"]) == ("paper", ["other"], [0.5])
    assert paper.axes["calibration"]["seed"] == [0, 1] and paper.sections["recovery"] == {"steps": 5}
    assert paper.run["workers"] == 2 and paper.sections["evaluation"] == {"tasks": ["choice", "other"]}
    file = project / "notebooks" / "studies" / "paper.yaml"
    file.write_text(file.read_text() + "recovery: null\nevaluation: {seed: 3}\n")
    paper = study.load("paper")
    assert "recovery" not in paper.sections and paper.sections["evaluation"] == {"tasks": ["choice", "other"], "seed": 3}
    # What is exported says it all, without the file that is extended.
    (project / "notebooks" / "studies" / "whole.yaml").write_text(paper.text)
    assert [job.reference for job in study.load("whole").jobs] == [job.reference for job in paper.jobs]


def test_one_attention_serves_every_stage_that_loads_a_model(tmp_path):
    """In the kit's own notebooks; a section may still say otherwise."""
    text = "models: [m]\nseeds: [0]\ncriteria: [entropy]\nratios: [0.2]\nevaluation: {}\nrecovery: {attention: sdpa}\n"
    (tmp_path / "own.yaml").write_text(text + "attention: eager\n")
    sections = study.load(tmp_path / "own.yaml").sections
    found = {name: own.get("attention") for name, own in sections.items()}
    assert found.pop("recovery") == "sdpa"
    assert {name for name, attention in found.items() if attention == "eager"} == {"scoring", "pruning", "evaluation"}
    (tmp_path / "own.yaml").write_text(text + "attention: 3\n")
    with pytest.raises(UserError, match="parameter 'attention' of .* must be str"):
        study.load(tmp_path / "own.yaml")


def test_files_that_extend_each_other_are_refused(project):
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        toys.write_study(project, name, extends=f"{other}.yaml")
    with pytest.raises(UserError, match=r"a.yaml: extends goes round in a circle \(a.yaml -> b.yaml -> c.yaml -> a.yaml\)"):
        study.load("a")


# -- the plan


def test_plan_is_the_grid(project):
    loaded = study.load("toy")
    plan = grid.plan(loaded)
    counts = Counter(job.stage for job in plan)
    assert counts == {"calibration": 2, "scoring": 2, "pruning": 3, "evaluation": 4, "figures": 1}
    assert [job.point["seed"] for job in jobs(loaded, "pruning") if job.point["criterion"] == "magnitude"] == [0]
    assert plan[0].point == {"model": "tiny", "criterion": "dense"}
    positions = {job.reference: position for position, job in enumerate(plan)}
    assert all(positions[name] < positions[job.reference] for job in plan for name in job.depends_on)
    assert plan == grid.plan(study.load("toy"))


def test_ratios_share_one_scoring_and_two_models_nothing(project):
    toys.write_study(project, "wide", models=["tiny", "other"], ratios=[0.1, 0.2])
    loaded = study.load("wide")
    assert len(jobs(loaded, "scoring")) == 4 and len(jobs(loaded, "pruning")) == 12
    assert len(jobs(loaded, "evaluation")) == 14 and len(jobs(loaded, "figures")) == 1


def test_neuron_ratios_leave_the_ratio_unset(project):
    toys.write_study(project, "neurons", ratios=None, neuron_ratios=[0.5])
    for job in jobs(study.load("neurons"), "pruning"):
        assert (job.parameters["ratio"], job.parameters["neuron_ratio"]) == (0.0, 0.5)


def test_cost_and_experiments_need_no_grid(project):
    empty = {"seeds": None, "criteria": None, "ratios": None, "evaluation": None}
    toys.write_study(project, "cost", models=["tiny", "other"], cost={"repetitions": 2}, **empty)
    plan = grid.plan(study.load("cost"))
    assert [(job.stage, job.parameters, job.depends_on) for job in plan] == [
        ("cost", {"model": model, "repetitions": 2, "n_windows": 2, "seq_len": 8}, ()) for model in ("tiny", "other")
    ]
    toys.write_study(project, "both", cost={}, experiments={"ablations": 2}, **empty)
    assert [job.stage for job in grid.plan(study.load("both"))] == ["experiments", "cost", "questions"]


def test_questions_wait_for_everything_that_they_show(project):
    toys.write_study(project, "asked", experiments={})
    plan = grid.plan(study.load("asked"))
    counts = Counter(job.stage for job in plan)
    assert counts == {
        "calibration": 2, "scoring": 2, "pruning": 3, "evaluation": 4, "figures": 1, "experiments": 1, "questions": 1,
    }  # fmt: skip
    last = plan[-1]
    assert last.stage == "questions" and len(last.depends_on) == len(set(last.depends_on)) == 2 + 3 + 4 + 1
    assert all(sorted(last.parameters[name]) == last.parameters[name] for name in STAGES["questions"].inputs)


@pytest.mark.parametrize(("criteria", "tuned"), [(None, {"entropy"}), (["magnitude", "entropy"], {"magnitude", "entropy"})])
def test_recovery_tunes_the_dense_model_once_and_the_chosen_criteria(project, criteria, tuned):
    toys.write_study(project, "tuned", recovery={"steps": 5}, recovery_criteria=criteria)
    loaded = study.load("tuned")
    plan = {job.reference: job for job in grid.plan(loaded)}
    recoveries = jobs(loaded, "recovery")
    prunings = [job for job in jobs(loaded, "pruning") if job.point["criterion"] in tuned]
    assert sorted(job.parameters["pruned"] for job in recoveries) == sorted(["", *(job.reference for job in prunings)])
    evaluated = [job for job in jobs(loaded, "evaluation") if job.parameters["recovered"]]
    assert {job.parameters["recovered"] for job in evaluated} == {job.reference for job in recoveries}
    for job in evaluated:
        source = plan[job.parameters["recovered"]]
        assert job.parameters["pruned"] == source.parameters["pruned"] and source.parameters["steps"] == 5
        assert plan[job.parameters["reference"]].point == {"model": "tiny", "criterion": "dense"}
        assert set(job.depends_on) >= {source.reference, job.parameters["reference"]} and "" not in job.depends_on
    positions = list(plan)
    assert all(positions.index(name) < positions.index(job.reference) for job in plan.values() for name in job.depends_on)
    assert len(jobs(loaded, "evaluation")) == 4 + len(recoveries)


def test_any_parameter_can_be_an_axis(project):
    toys.write_study(project, "wide", axes={"calibration": {"n_windows": [2, 4]}, "figures": {"title": ["a", "b"]}})
    loaded = study.load("wide")
    counts = Counter(job.stage for job in loaded.jobs)
    # Two seeds of two lengths; entropy from each, magnitude from those of the first seed.
    assert counts == {"calibration": 4, "scoring": 4, "pruning": 4 + 2, "evaluation": 1 + 6, "figures": 2}
    labels = [job.label for job in jobs(loaded, "pruning")]
    assert (
        len(set(labels)) == 6 and "tiny, seed 0, n_windows 2, entropy, 0.2" in labels and "tiny, seed 0, entropy, 0.2" in labels
    )


def test_allocations_are_an_axis_and_suit_their_criteria(project):
    toys.write_study(project, "wide", criteria=["entropy"], allocations=["uniform", {"global": {"floor": 0.5}, "as": "half"}])
    assert [job.point.get("allocation") for job in jobs(study.load("wide"), "pruning")] == [None, None, "half", "half"]
    toys.write_study(project, "wide", criteria=["entropy", "magnitude"], allocations=["global"])
    with pytest.raises(UserError, match="criterion 'magnitude' are not comparable between layers"):
        study.load("wide")
    both = {"criteria": ["entropy", "magnitude"], "allocations": ["uniform", "global"], "seeds": [0]}
    toys.write_study(project, "wide", **both, impossible="skip")
    points = [(job.point["criterion"], job.point.get("allocation")) for job in jobs(study.load("wide"), "pruning")]
    assert points == [("entropy", None), ("entropy", "global"), ("magnitude", None)]
    toys.write_study(project, "wide", **both, impossible="maybe")
    with pytest.raises(UserError, match="impossible must be refuse or skip, not 'maybe'"):
        study.load("wide")
    toys.write_study(project, "wide", allocations=["dlp", "uniform"], seeds=[0])
    (scoring,) = jobs(study.load("wide"), "scoring")
    assert scoring.parameters["criteria"] == ["entropy", "magnitude", "wanda"], "what an allocation reads is scored beside"
    norms = {"wanda": {}, "as": "norms"}
    toys.write_study(project, "wide", criteria=[norms, "magnitude"], pruning={"allocation": "owl"})
    loaded = study.load("wide")
    assert jobs(loaded, "scoring")[0].parameters["criteria"] == [{"wanda": {}, "as": "norms"}, "magnitude"]
    assert len(jobs(loaded, "pruning")) == 4, "one for each seed, as the allocation reads text where the criterion does not"
    toys.write_study(project, "wide", allocations=["sensitivity"], calibration={"n_windows": 3})
    with pytest.raises(UserError, match="'sensitivity' measures on 4 calibration windows, and there are 3"):
        study.load("wide")
    toys.write_study(project, "wide", allocations=["globel"])
    with pytest.raises(UserError, match="did you mean 'global'"):
        study.load("wide")


def test_several_variants_of_a_criterion_are_several_criteria(project):
    soft = {"self_distillation": {"alpha": 0.4}, "as": "soft"}
    toys.write_study(project, "variants", criteria=["entropy", "self_distillation", soft, "random"], recovery={}, seeds=[0])
    loaded = study.load("variants")
    assert [job.parameters["criterion"] for job in jobs(loaded, "pruning")] == ["entropy", "self_distillation", "soft", "random"]
    (scoring,) = jobs(loaded, "scoring")
    assert scoring.parameters["criteria"] == ["entropy", "self_distillation", soft, "random"]
    assert loaded.recovery_criteria == ["entropy", "self_distillation", "soft"]
    toys.write_study(project, "variants", criteria=["entropy", "self_distillation", soft | {"as": "other"}], seeds=[0])
    assert jobs(study.load("variants"), "scoring")[0].key != scoring.key


def test_plan_table_has_one_row_per_job(project):
    table = status.plan_table(study.load("toy"))
    assert len(table) == 12 and set(table["state"]) == {"done"}
    assert {"stage", "model", "seed", "criterion", "ratio", "state", "key"} <= set(table.columns)


# -- run and resume


def test_finished_study_is_exported(project):
    loaded = study.load("toy")
    for name in ("tables/table.csv", "figures/figure.png", "index.html", "study.yaml", "cards.json", "run.log"):
        assert (loaded.folder / name).is_file(), name
    shown = [path.stem for path in export.files(loaded.folder, "notebooks", ".html")]
    assert shown == [path.stem for path in sorted((loaded.folder / "notebooks").glob("*.ipynb"))]
    assert shown == ["01_calibration", "02_scoring", "03_pruning", "05_evaluation", "05_evaluation_dense", "06_figures"]
    assert len(read_json(loaded.folder / "cards.json")) == 12
    assert len((loaded.folder / "run.log").read_text().splitlines()) == 13
    assert [path.name for path in export.files(loaded.folder, "figures", "")] == ["figure.png"]


def test_values_flow_through_the_chain(project):
    last = artifact(study.load("toy"), "evaluation", -1).path("value.txt").read_text()
    assert "magnitude" in last and "0.2" in last and "other" in last


def test_second_run_does_nothing_and_imports_nothing_heavy(project):
    before = {path: path.stat().st_mtime_ns for path in (project / "results").rglob("*")}
    code = (
        "import sys; from hfprune_nb.runs import scheduler, study; summary = scheduler.run(study.load('toy'), progress=False)\n"
        "assert summary.count('done') == 12\n"
        "heavy = {'torch', 'transformers', 'papermill', 'nbconvert', 'pandas'} & sys.modules.keys()\n"
        "assert not heavy, heavy\nprint(summary.text())"
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "study toy is finished: 12 jobs, nothing to do" in said.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (project / "results").rglob("*")}


def test_lost_and_edited_artifacts_are_recomputed_and_equal_bytes_stop_there(project):
    loaded = study.load("toy")
    lost, edited = artifact(loaded, "calibration", 1), artifact(loaded, "pruning", 2)
    shutil.rmtree(lost.folder)
    edited.path("value.txt").write_text("edited")
    assert {o.job.reference for o in status.status(loaded) if o.state == "waiting"} == {
        lost.reference,
        jobs(loaded, "scoring")[1].reference,
        edited.reference,
    }
    table = (loaded.folder / "tables" / "table.csv").read_bytes()
    assert computed(scheduler.run(loaded, progress=False)) == [lost.reference, edited.reference]
    assert (loaded.folder / "tables" / "table.csv").read_bytes() == table


def test_changed_bytes_rerun_exactly_what_depends_on_them(project):
    loaded = study.load("toy")
    shutil.rmtree(artifact(loaded, "calibration", 1).folder)
    changed = (toys.CALIBRATION[0], "'now different'")
    toys.write_stage(project, "calibration", "01_calibration.ipynb", changed)
    again = scheduler.run(loaded, progress=False)
    stages = [reference.split("/")[0] for reference in computed(again)]
    assert stages == ["calibration", "scoring", "pruning", "evaluation", "figures"]
    assert "now different" in (loaded.folder / "tables" / "table.csv").read_text()


def test_a_failure_stays_local_and_the_figures_show_what_exists(project):
    broken = "if seed == 1:\n    raise ZeroDivisionError('on purpose')"
    toys.write_stage(project, "pruning", "03_pruning.ipynb", toys.PRUNING, before=broken)
    loaded = study.load("toy")
    for job in jobs(loaded, "pruning"):
        shutil.rmtree(loaded.folder / job.reference)
    summary = scheduler.run(loaded, progress=False)
    assert not summary.ok
    assert (summary.count("failed"), summary.count("skipped")) == (1, 1)
    failed = next(outcome for outcome in summary.outcomes if outcome.state == "failed")
    assert failed.error == "ZeroDivisionError: on purpose" and failed.error in summary.text()
    notebook = stage.failed_notebook(Artifact(loaded.folder / failed.job.reference))
    assert "ZeroDivisionError" in toys.outputs(notebook)
    figures = summary.outcomes[-1]
    assert figures.state == "computed" and len(figures.job.parameters["evaluations"]) == 3
    assert (loaded.folder / "tables" / "table.csv").read_bytes() == figures_value(loaded, figures.job)
    assert [o.error for o in status.status(loaded) if o.state == "failed"] == ["ZeroDivisionError: on purpose"]


def test_nothing_is_shown_when_no_evaluation_exists(project):
    toys.write_stage(project, "evaluation", "05_evaluation.ipynb", toys.EVALUATION, before="raise ValueError('all')")
    loaded = study.load("toy")
    shutil.rmtree(loaded.folder / "evaluation")
    summary = scheduler.run(loaded, progress=False)
    assert summary.outcomes[-1].state == "skipped" and summary.count("failed") == 1


def test_a_missing_notebook_is_executed_again_but_not_the_computation(project):
    loaded = study.load("toy")
    scored = artifact(loaded, "scoring")
    written = scored.path("DONE").stat().st_mtime_ns
    scored.path("notebook.ipynb").unlink()
    assert computed(scheduler.run(loaded, progress=False)) == [scored.reference]
    assert scored.path("DONE").stat().st_mtime_ns == written and scored.path("notebook.ipynb").is_file()


def test_a_notebook_that_fails_after_finish_is_a_failure_but_its_computation_is_kept(project):
    notebook = toys.write_stage(project, "scoring", "02_scoring.ipynb", toys.SCORING)
    working = notebook.read_text()
    notebook.write_text(working.replace("print(run.describe())", "raise ValueError('late')"))
    loaded = study.load("toy")
    scored = artifact(loaded, "scoring")
    shutil.rmtree(scored.folder)
    assert scheduler.run(loaded, progress=False).count("failed") == 1
    written = scored.path("DONE").stat().st_mtime_ns
    notebook.write_text(working)
    assert computed(scheduler.run(loaded, progress=False))[0] == scored.reference
    assert scored.path("DONE").stat().st_mtime_ns == written


def test_front_door_notebook_runs_a_study_and_shows_it_and_two_runs_give_identical_bytes(project):
    notebook = Path(__file__).parents[1] / "notebooks" / "00_study.ipynb"
    front_door = Path(shutil.copy(notebook, project / "notebooks"))
    toys.write_study(project, "small", seeds=[0])
    parameters = check_parameters(front_door, {"study_file": "small", "workers": 2})
    kernel.run(front_door, project / "shown.ipynb", parameters)
    shown = toys.outputs(project / "shown.ipynb")
    assert "study small: 8 jobs" in shown and "8 computed" in shown
    assert "image/png" in (project / "shown.ipynb").read_text()
    again, first = study.load("small"), study.load("toy")
    for job in grid.plan(again)[:-1]:
        assert Artifact(again.folder / job.reference).digest == Artifact(first.folder / job.reference).digest


def test_clean_keeps_what_was_exported(project):
    loaded = study.load("toy")
    doomed = scheduler.removable(loaded.folder)
    assert len(doomed) == 12 and scheduler.clean(loaded.folder) == doomed
    assert (loaded.folder / "figures" / "figure.png").is_file() and not (loaded.folder / "scoring").exists()
    assert {outcome.state for outcome in status.status(loaded)} == {"waiting"}
    scheduler.clean(loaded.folder, everything=True)
    assert not loaded.folder.exists()


@pytest.mark.skipif(os.name != "posix", reason="process groups are a POSIX feature")
def test_interrupt_leaves_no_kernel_and_no_trace(project):
    hang = "import os, time\nopen(f'pid{seed}', 'w').write(str(os.getpid()))\ntime.sleep(600)"
    toys.write_stage(project, "calibration", "01_calibration.ipynb", toys.CALIBRATION, before=hang)
    loaded = study.load("toy")
    shutil.rmtree(loaded.folder / "calibration")
    code = "import sys; from hfprune_nb.cli.main import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "study", "run", "toy"],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        start_new_session=True,
        # A shell that runs the tests in the background has its children ignore interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stderr=subprocess.PIPE,
        text=True,
    )
    marks = [project / "notebooks" / f"pid{seed}" for seed in (0, 1)]
    while not all(mark.is_file() and mark.read_text() for mark in marks):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and said.splitlines()[-1].startswith("interrupted")
    for mark in marks:
        with pytest.raises(ProcessLookupError):
            os.kill(int(mark.read_text()), 0)
    assert not list((loaded.folder / "calibration").glob("*.ipynb"))


# -- what is shown


def test_the_bar_of_a_resumed_study_says_what_is_left_and_no_rate(project, capsys):
    loaded = study.load("toy")
    shutil.rmtree(artifact(loaded, "scoring").folder)
    scheduler.run(loaded)
    said = capsys.readouterr().err
    assert "job/s" not in said and re.search(r"toy: 100%\|[^\r]*12/12 jobs", said) and re.search(r"about \d+ s left", said)
    assert "scoring tiny, seed 0:" in said


def test_status_tells_progress_and_owner_of_a_running_job(project):
    loaded = study.load("toy")
    job = jobs(loaded, "scoring")[0]
    running = Artifact(loaded.folder / job.reference)
    shutil.rmtree(running.folder)
    code = (
        "import sys, time; from pathlib import Path; from hfprune_nb.runs.locks import Lock\n"
        "lock = Lock(Path(sys.argv[1])); lock.take(); print('held', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, stage.lock(running).path],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert owner.stdout.readline() == "held\n"
        told = {"what": "scoring", "n": 250, "total": 1000, "unit": "tok", "rate": 5.0, "time": time.time()}
        stage.progress_file(running).write_text(json.dumps(told))
        (line,) = [outcome.line() for outcome in status.status(loaded) if outcome.state == "running"]
        assert "scoring 25%, 5 tok/s, 2 min left" in line and f"process {owner.pid} on" in line
    finally:
        owner.kill()
        owner.wait()
    assert {o.state for o in status.status(loaded) if o.job == job} == {"waiting"}


def test_a_batch_run_tells_its_progress_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HFPRUNE_PROGRESS", "log")
    monkeypatch.setenv(progress.PROGRESS_FILE, str(tmp_path / "progress.json"))
    with progress.bar(8, "window", "held-out text") as bar:
        assert progress.told(tmp_path / "progress.json").startswith("held-out text 0%")
        bar.update(2)
        bar.refresh()
        assert progress.told(tmp_path / "progress.json").startswith("held-out text 25%, ")
    monkeypatch.setenv(progress.PROGRESS_FILE, str(tmp_path / "missing" / "progress.json"))
    with progress.bar(8, "window", "held-out text") as bar:
        bar.update(8)
    assert progress.told(tmp_path / "missing" / "progress.json") == ""


def test_what_another_process_tells_is_shown_as_it_goes_on(tmp_path, capsys):
    """A notebook that makes its own input is not silent for the hours that this takes."""
    file = tmp_path / "progress.json"
    with progress.followed(file, seconds=0.01):
        for what, n in (("scoring", 250), ("scoring", 500), ("held-out text", 3)):
            file.write_text(json.dumps({"what": what, "n": n, "total": 1000, "unit": "tok", "rate": 5.0, "time": time.time()}))
            time.sleep(0.2)
    shown = capsys.readouterr().err
    assert "scoring:  50%" in shown and "held-out text:   0%" in shown and "3/1000" in shown
    with progress.followed(tmp_path / "none.json", seconds=0.01):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_the_log_of_a_run_is_json_by_line(finished_project):
    (path,) = (finished_project / "results" / "toy" / "log").glob("*.jsonl")
    events = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = Counter(event["event"] for event in events)
    assert kinds == {"start": 12, "computed": 12, "end": 1} and events[-1]["computed"] == 12
    assert all(event["time"] and event["seconds"] >= 0 for event in events if event["event"] == "computed")


def test_several_jobs_of_an_exported_stage_keep_their_points_in_the_names(project):
    toys.write_study(project, "cost", models=["tiny", "other"], seeds=None, criteria=None, ratios=None, evaluation=None, cost={})
    loaded = study.load("cost")
    assert scheduler.run(loaded, progress=False).ok
    assert [path.name for path in export.files(loaded.folder, "tables", ".csv")] == ["table_other.csv", "table_tiny.csv"]
    assert [path.stem for path in export.files(loaded.folder, "notebooks", ".html")] == ["07_cost_other", "07_cost_tiny"]


def test_rendered_notebooks_show_results_and_warnings_but_no_progress_bars(tmp_path):
    code = """
import sys, tqdm
print("before")
for _ in tqdm.tqdm(range(3), desc="scoring", ascii=True): pass
for _ in tqdm.tqdm(iter(range(3)), desc="reading"): pass
print("library.py:3: FutureWarning: 20 % [or so]", file=sys.stderr)
print("after")
"""
    executed = tmp_path / "executed.ipynb"
    kernel.run(toys.write_notebook(tmp_path / "bars.ipynb", "n: int = 1", code, "pass"), executed, {})
    notebook = nbformat.read(executed, as_version=4)
    said = "".join(output.text for output in notebook.cells[-2].outputs)
    assert "scoring: 100%" in said and "reading: 3it" in said
    bar = nbformat.v4.new_output("display_data", {export.WIDGET: {"model_id": "1"}, "text/plain": "scoring: 100%"})
    notebook.cells[-1].outputs, notebook.metadata["widgets"] = [bar], {"state": {}}
    shown = export.without_progress(notebook)
    assert "widgets" not in shown.metadata
    written = {name: "".join(o.text for o in shown.cells[-2].outputs if o.name == name) for name in ("stdout", "stderr")}
    assert written == {"stdout": "before\nafter\n", "stderr": "library.py:3: FutureWarning: 20 % [or so]\n"}
    assert shown.cells[-1].outputs == []


def test_rendered_notebooks_tell_no_folder_of_this_machine():
    page = f"<pre>{sys.prefix}/lib/library.py:3: Warning</pre> {paths.project()}/notebooks <a href='https://example.org'>"
    shown = export.without_folders(page)
    assert shown.endswith("lib/library.py:3: Warning</pre> notebooks <a href='https://example.org'>")
    assert sys.prefix not in shown and str(paths.project()) not in shown
