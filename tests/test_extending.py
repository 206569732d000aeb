"""The kit as its users extend it: in a copy, one file for each kind of criterion, one allocation and one stage, and nothing else.

What they add is offered, checked, forecast, scored, pruned, evaluated, compared, drawn and named like what was there before.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first test waits for a whole study

PROJECT = Path(__file__).resolve().parent.parent
README = (PROJECT / "README.md").read_text(encoding="utf-8")
EXAMPLE = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "class Collision" in block)

CRITERIA = {
    "collision": EXAMPLE,
    "reach": '''
from hfprune_nb.criteria.base import ActivationCriterion
from hfprune_nb.families import Setting


class Reach(ActivationCriterion):
    """The largest output weight times the mean of |h|."""

    name, label, source = "reach", "Reach", "example"
    settings = {"power": Setting(1.0, "the exponent of the weight", low=0)}

    def statistics(self, hidden):
        return {"absolute": hidden.abs().sum(1)}

    def importance(self, sums, inputs, down, tokens):
        return down.double().abs().amax(0) ** self.power * sums["absolute"] / tokens
''',
    "gate_norm": '''
from hfprune_nb.criteria.base import WeightCriterion


class GateNorm(WeightCriterion):
    """The norm of the gate row."""

    name, label, source, seeded = "gate_norm", "Gate norm", "example", False

    def importance(self, inputs, down, generator):
        return inputs[0].double().norm(dim=1)
''',
    "saliency": '''
from hfprune_nb.criteria.base import WeightGradientCriterion
from hfprune_nb.criteria.one_hot_ce import OneHotCrossEntropy


class Saliency(WeightGradientCriterion):
    """The sum of |w dC/dw| over a neuron's output weights."""

    name, label, source = "saliency", "Saliency", "example"
    gradient_of = OneHotCrossEntropy()

    def statistics(self, weights, gradients):
        return {"output": (weights[-1] * gradients[-1]).abs().sum(1)}

    def importance(self, sums, inputs, down, windows):
        return sums["output"].double() / windows
''',
    "pairwise": '''
from hfprune_nb.criteria.base import MeasuredCriterion


class Pairwise(MeasuredCriterion):
    """What silencing a neuron does together with its layer's first one."""

    name, label, source = "pairwise", "Pairwise", "example"

    def statistics(self, divergence, widths):
        return [divergence([{layer: sorted({0, i})} for i in range(width)]).t().double() for layer, width in enumerate(widths)]
''',
}
ALLOCATION = '''
from hfprune_nb.allocations.base import AllocationRule
from hfprune_nb.families import Setting


class Slope(AllocationRule):
    """Later layers keep less, linearly."""

    name, label, source = "slope", "Slope", "example"
    settings = {"tilt": Setting(0.2, "by how much the last layer keeps less than the first", low=0, high=1)}

    def plan(self, units, importance, budget):
        mean, last = budget.keep / len(units), max(1, len(units) - 1)
        return budget.widths([mean * (1 + self.tilt * (0.5 - layer / last)) for layer in range(len(units))], units)
'''
STAGE = '''
from hfprune_nb.runs.stages.base import Input, Stage


class Census(Stage):
    """One job for each pruned model, if the study file asks for it."""

    name = "census"
    notebook = "12_census.ipynb"
    inputs = {"pruned": Input("pruning")}
    section = "census"
'''
NOTEBOOK = [
    'study: str = "local"  # results go to results/<study>/census/\nmodel: str = "tiny-random-llama"  # the dense one\n'
    'pruned: str = ""  # reference "pruning/<key>"\ndigits: int = 3  # of the mean width\ntitle: str = ""  # of the result',
    'import json\n\nfrom hfprune_nb.runs import stage\n\nrun = stage.start("census")\nrun.describe()',
    "from hfprune_nb.method import pruning\n\n"
    'widths = [len(rows) for rows in pruning.load_kept(run.inputs["pruned"].path("kept.safetensors"))]\n'
    "if not run.done:\n"
    '    run.path("census.json").write_text(json.dumps({"widths": widths, "mean": round(sum(widths) / len(widths), digits)}))\n'
    "    run.finish()",
]
TILTED = {"slope": {"tilt": 0.4}, "as": "steep"}
STRONG = {"reach": {"power": 2.0}, "as": "reach_2"}
STUDY = {
    "extends": "smoke.yaml",
    "description": "What users add.",
    "seeds": [0],
    "criteria": ["entropy", *CRITERIA, STRONG],
    "ratios": [0.2],
    "allocations": [TILTED],
    "census": {"title": "widths"},
    "axes": {"census": {"digits": [1, 2]}},
}


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A copy of the kit with the new files in it; returns a function that runs Python in it."""
    root = tmp_path_factory.mktemp("kit")
    passing = shutil.ignore_patterns("__pycache__", "cache", ".ipynb_checkpoints")
    for folder in ("hfprune_nb", "notebooks", "data"):
        shutil.copytree(PROJECT / folder, root / folder, ignore=passing)
    for name, text in CRITERIA.items():
        (root / "hfprune_nb" / "criteria" / f"{name}.py").write_text(text, encoding="utf-8")
    (root / "hfprune_nb" / "allocations" / "slope.py").write_text(ALLOCATION, encoding="utf-8")
    (root / "hfprune_nb" / "runs" / "stages" / "census.py").write_text(STAGE, encoding="utf-8")
    parameters, *steps = [nbformat.v4.new_code_cell(source) for source in NOTEBOOK]
    parameters.metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Census"), parameters, *steps], metadata=kernel)
    nbformat.write(notebook, root / "notebooks" / "12_census.ipynb")
    study = yaml.safe_dump(STUDY, sort_keys=False)
    (root / "notebooks" / "studies" / "extended.yaml").write_text(study, encoding="utf-8")
    folders = {"HFPRUNE_HOME": root, "PYTHONPATH": root, "HFPRUNE_CACHE": root / "cache", "HFPRUNE_RESULTS": root / "results"}
    environment = os.environ | {name: str(folder) for name, folder in folders.items()}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        command = [sys.executable, "-m", "hfprune_nb", *arguments] if arguments[0] != "-c" else [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)

    run.root, run.folder = root, root / "results" / "extended"
    return run


@pytest.fixture(scope="module")
def finished(kit):
    """The study with all that is new, run once."""
    answer = kit("study", "run", "extended")
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
    return kit.folder


@pytest.mark.parametrize("name", [*CRITERIA, "slope"])
def test_a_new_member_is_offered_where_a_name_was_misspelt(kit, name):
    wrong = STUDY | ({"allocations": [f"{name}x"]} if name == "slope" else {"criteria": [f"{name}x"]})
    file = kit.root / f"wrong_{name}.yaml"
    file.write_text(yaml.safe_dump(wrong | {"extends": str(kit.root / "notebooks/studies/smoke.yaml")}), encoding="utf-8")
    answer = kit("study", "plan", str(file))
    assert answer.returncode == 2 and f"did you mean '{name}'" in answer.stderr, answer.stderr


def test_a_new_setting_is_checked_in_the_study_file(kit):
    file = kit.root / "out_of_bounds.yaml"
    bad = STUDY | {"extends": str(kit.root / "notebooks/studies/smoke.yaml"), "allocations": [{"slope": {"tilt": 2}}]}
    file.write_text(yaml.safe_dump(bad), encoding="utf-8")
    answer = kit("study", "plan", str(file))
    assert answer.returncode == 2 and "tilt 2" in answer.stderr and "by how much the last layer keeps less" in answer.stderr


def test_help_names_the_new_members(kit):
    answer = kit("study", "run", "--help")
    assert answer.returncode == 0
    for name in (*CRITERIA, "slope", "census"):
        assert name in answer.stdout, name


def test_the_forecast_counts_the_new_jobs(kit):
    file = kit.root / "two_seeds.yaml"
    file.write_text(
        yaml.safe_dump({"extends": str(kit.root / "notebooks/studies/extended.yaml"), "seeds": [0, 1]}), encoding="utf-8"
    )
    answer = kit("study", "plan", str(file))
    assert answer.returncode == 0, answer.stderr
    jobs = {line.split()[0]: int(line.split()[1]) for line in answer.stdout.splitlines()[2:] if line.startswith("  ")}
    # Gate norm reads weights alone, so one seed says all; the census takes every pruned model at two numbers of digits.
    assert jobs["pruning"] == 2 * (len(CRITERIA) + 1) + 1 and jobs["census"] == 2 * jobs["pruning"]


def test_every_new_criterion_is_scored_pruned_and_evaluated(finished):
    evaluated = [json.loads(path.read_text()) for path in finished.glob("evaluation/*/summary.json")]
    names = {summary["criterion"] for summary in evaluated}
    assert names >= {*CRITERIA, "reach_2", "entropy"}, names
    widths = {tuple(json.loads(path.read_text())["widths"]) for path in finished.glob("pruning/*/pruning.json")}
    assert len(widths) == 1, "one allocation, one budget"
    (width,) = widths
    assert len(set(width)) > 1 and list(width) == sorted(width, reverse=True)


def test_the_new_stage_ran_for_every_value_of_its_axis(finished):
    found = [json.loads(path.read_text()) for path in finished.glob("census/*/census.json")]
    assert len(found) == 2 * len(list(finished.glob("pruning/*/DONE")))
    assert len({str(each["mean"]) for each in found}) <= 2


def test_every_new_criterion_is_compared_and_drawn(finished):
    paired = pd.read_csv(finished / "tables" / "paired.csv")
    compared = {frozenset(pair) for pair in paired[["a", "b"]].itertuples(index=False)}
    for name in (*CRITERIA, "reach_2"):
        assert frozenset((f"{name}@steep", "entropy@steep")) in compared, (name, compared)
    drawn = pd.read_csv(finished / "figures" / "against_ratio.csv")
    assert set(drawn["criterion"]) >= {f"{name}@steep" for name in (*CRITERIA, "reach_2")}


def test_tables_and_sentences_name_what_is_new(finished):
    table = (finished / "tables" / "criterion.md").read_text(encoding="utf-8")
    for label in ("Collision", "Reach", "Reach (power 2)", "Gate norm", "Saliency", "Pairwise"):
        assert f"| {label}, Slope (tilt 0.4) " in table, label
    figures = next(finished.glob("figures/*/notebook.ipynb")).read_text(encoding="utf-8")
    questions = next(finished.glob("questions/*/notebook.ipynb")).read_text(encoding="utf-8")
    for label in ("Collision", "Reach (power 2)", "Saliency", "Pairwise"):
        assert label in figures and label in questions, label
    assert "hfprune_nb.load" in table, "a model whose layers differ in width: the table says how it loads"


def test_every_new_criterion_has_its_own_look(kit):
    code = (
        "import json\nfrom hfprune_nb import criteria\nfrom hfprune_nb.report.style import Legend\n"
        f"specs = {STUDY['criteria']!r}\nlegend = Legend(specs)\n"
        "print(json.dumps([legend.look(variant.name) for variant in criteria.variants(specs)], default=str))"
    )
    answer = kit("-c", code)
    assert answer.returncode == 0, answer.stderr
    looks = json.loads(answer.stdout)
    assert len({look["color"] for look in looks}) == len({str(look["marker"]) for look in looks}) == len(looks)
    entropy = kit("-c", "from hfprune_nb.report.style import Legend\nprint(Legend().look('entropy')['color'])").stdout.strip()
    assert looks[0]["color"] == entropy, "the paper's three keep their colours"
