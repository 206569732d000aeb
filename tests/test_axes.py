"""A study's further axes: models that differ in a parameter alone have it in their names, to the last table and figure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import synthetic
import yaml

from hfprune_nb.files import write_json
from hfprune_nb.report import apart, neurons, recommendation, tuning, widths
from hfprune_nb.report.criterion import criterion_table
from hfprune_nb.report.paired import paired_table
from hfprune_nb.report.results import collect, legend
from hfprune_nb.report.style import Legend

PROJECT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1)
WIDE = "multiple_of 64"
FEW = {"n_items": 10, "tasks": {"boolq": "acc"}}


def record(folder, inputs=(), **parameters):
    """Write what a stage records of a run, and return its reference."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "params.json", {"inputs": dict.fromkeys(inputs, ""), "parameters": parameters})
    return f"{folder.parent.name}/{folder.name}"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two criteria, seeds and multiples; a multiple of 64 does a little more harm. Returns evaluations, prunings, scorings."""
    root = tmp_path_factory.mktemp("study")
    found = {"evaluation": [synthetic.evaluation(root / "evaluation" / "dense", **FEW)], "pruning": [], "scoring": []}
    for seed in SEEDS:
        folder = synthetic.scoring(root / "scoring" / f"s{seed}", seed, criteria=synthetic.THREE)
        text = record(root / "calibration" / f"c{seed}", seed=seed, n_windows=8)
        record(folder, [text], calibration=text, seed=seed)
        found["scoring"].append(folder)
        for criterion in ("entropy", "one_hot_ce"):
            for multiple in (1, 64):
                name, scores = f"{criterion}-{seed}-{multiple}", f"scoring/s{seed}"
                pruned = synthetic.pruning(root / "pruning" / name, criterion, 0.2, seed)
                record(pruned, [scores], scores=scores, criterion=criterion, multiple_of=multiple, seed=0)
                found["pruning"].append(pruned)
                loads = {"loads_with": "hfprune_nb.load"} if multiple == 64 else {}
                evaluated = synthetic.evaluation(root / "evaluation" / name, criterion, 0.2, seed, **FEW, **loads)
                record(evaluated, [f"pruning/{name}", "evaluation/dense"], pruned=f"pruning/{name}", limit=seed)
                found["evaluation"].append(evaluated)
    return found


def test_every_table_and_figure_tells_the_models_apart(study):
    results = collect(study["evaluation"])
    names = {"dense", "entropy", "one_hot_ce", f"entropy@{WIDE}", f"one_hot_ce@{WIDE}"}
    assert set(results.models["criterion"]) == names and len(results.models) == 9
    assert "Models whose names say no more are those of multiple_of 1." in results.notes
    labels = criterion_table(results).display["Criterion"].tolist()
    assert f"Entropy (HFPrune), {WIDE}" in labels and len(labels) == len(set(labels)) == 5
    pairs = set(paired_table(results).long[["a", "b"]].itertuples(index=False, name=None))
    assert {frozenset(pair) for pair in pairs} == {
        frozenset(pair)
        for pair in (
            ("entropy", "one_hot_ce"),
            (f"entropy@{WIDE}", f"one_hot_ce@{WIDE}"),
            ("entropy", f"entropy@{WIDE}"),
            ("one_hot_ce", f"one_hot_ce@{WIDE}"),
        )
    }
    looks = [json.dumps(results.legend.look(name)) for name in names]
    assert len(set(looks)) == len(names)


def test_the_recommendation_knows_how_each_loads(study):
    table = recommendation.recommendation_table(study["evaluation"], study["pruning"])
    loads = dict(table.long[["criterion", "loads_with"]].itertuples(index=False, name=None))
    assert loads["entropy"] == "plain" and loads[f"entropy@{WIDE}"] == "hfprune_nb.load"
    chosen = recommendation.chosen(table, "plain", 0.2, "smollm2-135m")
    assert "@" not in chosen["criterion"]


def test_kept_sets_and_widths_are_those_of_their_own_models(study):
    names = legend(study["pruning"])
    pairs = neurons.kept_pairs(study["pruning"], names)
    assert f"Entropy (HFPrune) / Entropy (HFPrune), {WIDE}" in set(pairs["comparison"])
    table = widths.widths_table(study["pruning"], names)
    assert table.display["Allocation"].tolist() == ["Uniform", f"Uniform, {WIDE}"] and table.long["n_models"].tolist() == [4, 4]


def test_tuned_and_compensated_models_keep_the_parameter(study, tmp_path):
    pruned = study["pruning"][1]
    folders = list(study["evaluation"])
    for tuned, compensation in ((True, "none"), (False, "least_squares")):
        for source in study["pruning"][:2]:
            folder = pruned.parent.parent / "evaluation" / f"{tmp_path.name}-{tuned}-{source.name}"
            spent = {"recovery": {"flops": 1.0}} if tuned else {}
            synthetic.evaluation(folder, "entropy", 0.2, 0, **FEW, tuned=tuned, compensation=compensation, **spent)
            record(folder, [f"pruning/{source.name}"], pruned=f"pruning/{source.name}")
            folders.append(folder)
    recovered = tuning.Recovered(folders)
    assert {entry["criterion"] for entry in recovered.spent} == {"entropy", f"entropy@{WIDE}"}
    for results in (recovered.by_treatment[True, "none"], recovered.by_treatment[False, "least_squares"]):
        assert set(results.models["criterion"]) == {"entropy", f"entropy@{WIDE}"}


def test_only_what_differs_at_one_point_is_named(study):
    """A calibration seed, a setting of the evaluation and a parameter that goes with the criterion name nothing."""
    one_each = [folder for folder in study["evaluation"] if folder.name.startswith(("dense", "entropy-0-1", "one_hot_ce-0-64"))]
    read = apart.told_apart(({"criterion": folder.name, "model": "m"}, folder) for folder in one_each)
    assert [(facts["apart"], facts["further"]) for facts, _ in read] == [({}, "")] * len(read)
    scorings, sentence = apart.without_further(study["scoring"], "scores.json")
    assert scorings == study["scoring"] and sentence == ""


def test_values_without_the_default_are_named_but_the_smallest(tmp_path):
    folders = []
    for windows in (16, 8, 104):
        text = record(tmp_path / "calibration" / f"{windows}", n_windows=windows)
        folder = tmp_path / "scoring" / f"{windows}"
        record(folder, [text], calibration=text)
        write_json(folder / "scores.json", {"model": "m", "criteria": ["entropy"], "seed": 0})
        folders.append(folder)
    kept, sentence = apart.without_further(folders, "scores.json")
    assert [folder.name for folder in kept] == ["8"]
    assert sentence == "Shown with n_windows 8; not shown: n_windows 16; n_windows 104."
    names = legend(folders)
    order = ["entropy", "entropy@n_windows 16", "entropy@n_windows 104"]
    assert names.in_order(reversed(order)) == order


def test_an_allocation_and_a_parameter_are_compared_one_at_a_time():
    names = Legend([("entropy", spec, further) for spec in ("uniform", "global") for further in ("", WIDE)])
    found = names.pairs(["entropy", "entropy@global", f"entropy@{WIDE}", f"entropy@global, {WIDE}"])
    assert len(found) == 4 and ("entropy", f"entropy@global, {WIDE}") not in found
    assert names.label(f"entropy@global, {WIDE}") == f"{names.label('entropy@global')}, {WIDE}"
    assert names.forwards(f"entropy@global, {WIDE}") == names.forwards("entropy@global") == names.forwards(f"entropy@{WIDE}") == 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_with_two_further_axes_runs_to_its_recommendation(tmp_path):
    settings = {
        "extends": str(PROJECT / "notebooks" / "studies" / "smoke.yaml"),
        "seeds": [0],
        "criteria": ["entropy"],
        "calibration": {"n_windows": None},
        "axes": {"calibration": {"n_windows": [4, 8]}, "pruning": {"multiple_of": [1, 16]}},
        "experiments": {"criteria": ["entropy"], "n_single": 2, "student_ratios": [0.05]},
    }
    (tmp_path / "wide.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    folders = {"HFPRUNE_HOME": PROJECT, "HFPRUNE_CACHE": tmp_path / "cache", "HFPRUNE_RESULTS": tmp_path / "results"}
    environment = os.environ | {name: str(folder) for name, folder in folders.items()}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hfprune_nb.cli", "study", "run", str(tmp_path / "wide.yaml")]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0 and "0 failed, 0 skipped" in answer.stdout, answer.stdout[-3000:] + answer.stderr[-3000:]
    tables = tmp_path / "results" / "wide" / "tables"
    names = {"entropy", "entropy@multiple_of 16", "entropy@n_windows 8", "entropy@n_windows 8, multiple_of 16"}
    for name in ("criterion", "recommendation"):
        assert set(pd.read_csv(tables / f"{name}.csv")["criterion"]) - {"dense"} == names, name
    assert (
        "Shown with n_windows 4; not shown: n_windows 8."
        in (next((tmp_path / "results/wide/questions").glob("*")) / "notebook.ipynb").read_text()
    )
