"""The notebooks as texts: one skeleton, short cells, half prose, nothing executed, parameters that agree everywhere."""

import ast
import json
import re
import statistics
import subprocess
import sys
import tokenize
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest
import yaml
from click.testing import CliRunner
from papermill.cli import papermill as papermill_command

from hfprune_nb.cost import generation
from hfprune_nb.errors import UserError
from hfprune_nb.measure import tasks
from hfprune_nb.method import compensation
from hfprune_nb.method.recovery import recipes
from hfprune_nb.models import loading
from hfprune_nb.runs import grid, kernel, parameters, stages, study
from hfprune_nb.runs.stages.base import CHOICES

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
WITHOUT_STAGE = {"00_study.ipynb", "10_explore.ipynb", "11_new_criterion.ipynb"}
STAGES = {path.name: name for name, path in ((name, FOLDER / entry.notebook) for name, entry in stages.STAGES.items())}
STUDIES = sorted((FOLDER / "studies").glob("*.yaml"))
IMPORTS = (ast.Import, ast.ImportFrom)
PAPER_MODELS = {"llama-2-7b", "llama-3.2-3b", "llama-3.2-1b", "qwen2.5-7b", "qwen2.5-1.5b", "qwen3-1.7b"}

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def this_checkout(monkeypatch):
    monkeypatch.setenv("HFPRUNE_HOME", str(FOLDER.parent))


def cells(path, kind=None):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if kind in (None, cell["cell_type"])]


def source(cell):
    return "".join(cell["source"])


def code(path):
    return [source(cell) for cell in cells(path, "code")]


def parameters_cell(path):
    (found,) = [cell for cell in cells(path) if "parameters" in cell["metadata"].get("tags", ())]
    return found


def test_the_chain_is_complete():
    assert [path.name for path in NOTEBOOKS] == sorted({*WITHOUT_STAGE, *STAGES})


@every_notebook
def test_first_cell_says_what_it_is_about(path):
    first = cells(path)[0]
    text = source(first)
    assert first["cell_type"] == "markdown" and text.startswith(f"# {path.stem[:2]} ")
    for word in ("**Question.**", "**Paper.**", "**Inputs.**", "**Outputs.**", "**Cost.**"):
        assert word in text, f"the first cell does not give its {word}"


@every_notebook
def test_first_cell_leads_to_the_neighbours(path):
    """In reading order; an export makes plain words of a link whose notebook it lacks."""
    place, links = NOTEBOOKS.index(path), source(cells(path)[0]).splitlines()[-1]
    before, after = NOTEBOOKS[:place][-1:], NOTEBOOKS[place + 1 :][:1]
    expected = [f"({neighbour.name})" for neighbour in (*before, *after)]
    assert re.findall(r"\(\w+\.ipynb\)", links) == expected
    assert links.startswith("←") == bool(before) and links.endswith("→") == bool(after)


@every_notebook
def test_parameters_are_typed_explained_literals(path):
    cell = parameters_cell(path)
    assert cell is cells(path)[1] or source(cell) == source(cells(path)[1]), "the parameters do not follow the title"
    text = source(cell)
    comments = {token.start[0] for token in tokenize.generate_tokens(StringIO(text).readline) if token.type == tokenize.COMMENT}
    known = parameters.notebook_parameters(path)
    for line in ast.parse(text, type_comments=True).body:
        assert isinstance(line, ast.AnnAssign) or line.type_comment, f"neither annotated nor type comment: {ast.unparse(line)}"
        (target,) = line.targets if isinstance(line, ast.Assign) else [line.target]
        kinds = [kind.strip().split("[")[0] for kind in known[target.id].type.split("|")]
        assert type(ast.literal_eval(line.value)).__name__ in kinds, ast.unparse(line)
        assert line.end_lineno in comments, f"no comment behind {target.id}"
    assert len(comments) == len(text.splitlines()), "one line each, nothing else"


@every_notebook
def test_papermill_prints_what_each_parameter_is(path):
    answer = CliRunner().invoke(papermill_command, ["--help-notebook", str(path)])
    assert answer.exit_code == 0, answer.output
    told = papermill.inspect_notebook(path)
    assert list(told) == list(parameters.notebook_parameters(path)), "papermill warns of what it cannot read"
    for name, parameter in told.items():
        assert f"\n  {name}: " in answer.output
        assert len(parameter["help"].split()) > 1 and parameter["help"][:3] != "or ", f"{name} is not explained: {parameter}"


@every_notebook
def test_nothing_is_executed_or_stored(path):
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(path, "code"))
    assert path.stat().st_size < 40_000


@every_notebook
def test_nothing_is_defined_in_a_notebook(path):
    for text in code(path):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        defined = [node for node in ast.parse(text).body if isinstance(node, kinds)]
        # But a criterion that is registered, which notebook 11 is about.
        assert all(path.stem == "11_new_criterion" and node.decorator_list for node in defined), text


@every_notebook
def test_cells_are_short_and_half_are_prose(path):
    lengths = [len(text.splitlines()) for text in code(path)]
    assert max(lengths) <= 30
    assert statistics.median(lengths) <= 8 and np.percentile(lengths, 90) <= 15, sorted(lengths)
    assert 15 <= len(cells(path)) <= 30
    assert 0.4 <= len(cells(path, "markdown")) / len(cells(path)) <= 0.6


def test_the_median_cell_of_the_kit_has_six_lines_at_most():
    assert statistics.median(len(text.splitlines()) for path in NOTEBOOKS for text in code(path)) <= 6


@every_notebook
def test_any_python_kernel_opens_it(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    assert content["nbformat"] == 4
    assert not set(content["metadata"]) - {"kernelspec", "language_info"}, "leftovers of an editor"


def test_sources_are_stripped():
    command = [sys.executable, "-m", "nbstripout", "--verify", "--keep-id", *map(str, NOTEBOOKS)]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize("name", STAGES)
def test_the_stage_starts_with_its_parameters_as_they_were_given(name):
    """A name that is bound again before `stage.start` reads it would change results under another address."""
    path = FOLDER / name
    before, start, _ = "\n".join(code(path)[1:]).partition(f'run = stage.start("{STAGES[name]}")\n')
    assert start, "no run = stage.start(...)"
    nodes = list(ast.walk(ast.parse(before)))
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {alias.asname or alias.name for node in nodes if isinstance(node, IMPORTS) for alias in node.names}
    assert not bound & parameters.notebook_parameters(path).keys()
    assert [text for text in code(path) if "run.finish(" in text], "the run is never sealed"


@pytest.mark.parametrize("name", STAGES)
def test_each_stage_checks_what_it_made(name):
    headings = [source(cell).splitlines()[0] for cell in cells(FOLDER / name, "markdown")]
    assert "## Checks" in headings
    assert any(text.startswith(("assert", "for")) or "\nassert" in text for text in code(FOLDER / name))


def test_shared_parameters_mean_the_same_everywhere():
    kinds = {}
    for path in NOTEBOOKS:
        for name, parameter in parameters.notebook_parameters(path).items():
            kinds.setdefault(name, set()).add(parameter.type)
    assert not {name: found for name, found in kinds.items() if len(found) > 1}


def test_a_new_criterion_is_compared_with_intervals(tmp_path):
    """The notebook on a tiny random model: its class is registered, tested, scored, pruned with and judged."""
    notebook, executed = FOLDER / "11_new_criterion.ipynb", tmp_path / "executed.ipynb"
    assert len(code(notebook)) == 10 and statistics.median(len(text.splitlines()) for text in code(notebook)) <= 6
    tiny = {"model": "tiny-random-llama", "corpus": "data/smoke/corpus.txt", "seeds": [0, 1], "device": "cpu"}
    sizes = {"n_windows": 4, "n_held_out": 4, "seq_len": 32}
    kernel.run(notebook, executed, parameters.check_parameters(notebook, tiny | sizes))
    outputs = ["".join(output["data"]["text/html"]) for cell in cells(executed, "code") for output in cell["outputs"]
               if "text/html" in output.get("data", {})]  # fmt: skip
    (table,) = pd.read_html(StringIO(outputs[-1]), index_col=0)
    assert table.index.tolist() == ["KL to the dense model, nats", "log-perplexity, nats per token"]
    for name in ("min_entropy", "entropy", "difference"):
        assert table[name].str.fullmatch(r"[+-]?\d+\.\d{3} \[[+-]?\d+\.\d{3}, [+-]?\d+\.\d{3}\]").all(), table[name]
    assert table["verdict"].isin(["undecided", "min_entropy is better", "entropy is better"]).all()


# Studies


def test_every_promised_study_is_there():
    assert {path.stem for path in STUDIES} >= {"smoke", "offline", "offline-qwen"} | PAPER_MODELS


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_study_files_load_and_plan(path, monkeypatch, tmp_path):
    monkeypatch.setenv("HFPRUNE_RESULTS", str(tmp_path))
    loaded = study.load(path)
    plan = grid.plan(loaded)
    assert loaded.name == path.stem and loaded.description
    assert len({cell.reference for cell in plan}) == len(plan)
    by_stage = {name: [cell for cell in plan if cell.stage == name] for name in stages.STAGES}
    if not loaded.variants:  # only measures cost or runs experiments
        assert {cell.stage for cell in plan} <= {"cost", "experiments", "questions"}
        return
    seeds, prunings, tuned = len(loaded.axes["calibration"]["seed"]), len(by_stage["pruning"]), len(by_stage["recovery"])
    assert len(by_stage["calibration"]) == len(by_stage["scoring"]) == seeds * len(loaded.models)
    assert len(by_stage["evaluation"]) == prunings + len(loaded.models) + tuned
    assert len(by_stage["figures"]) == 1 and plan[-1].stage in ("figures", "questions", "recommendation")
    assert "entropy" in {variant.name for variant in loaded.variants}, "with which every other one is compared"
    references = {cell.reference: number for number, cell in enumerate(plan)}
    assert all(references[used] < number for number, cell in enumerate(plan) for used in cell.depends_on)
    assert not list(tmp_path.iterdir()), "planning writes nothing"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_study_files_name_parameters_that_exist(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name in stages.STAGES:
        known = parameters.notebook_parameters(parameters.notebook_path(name))
        assert set(content.get(name) or {}) <= set(known)
    assert path.read_text(encoding="utf-8").startswith("#"), "no comment that says what the study is for"


@pytest.mark.parametrize("name", sorted(PAPER_MODELS))
def test_the_paper_s_studies_have_the_paper_s_settings(name):
    loaded = study.load(name)
    bos = name.startswith("llama")
    assert loaded.sections["calibration"] == {"corpus": "c4", "n_windows": 43128, "seq_len": 1024, "bos": bos}
    assert loaded.sections["evaluation"]["bos"] == bos and loaded.axes["pruning"]["ratio"][0] == 0.2
    assert not loaded.run["offline"] and len(loaded.axes["calibration"]["seed"]) >= 3
    assert not loaded.sections["evaluation"].get("limit"), "the paper's tasks are run whole"


def test_the_declared_defaults_are_those_of_the_notebooks():
    """A study takes the declared ones: only so may a notebook be edited while exploring."""
    content = yaml.safe_load((FOLDER / "defaults.yaml").read_text(encoding="utf-8"))
    assert list(content) == list(stages.STAGES)
    for name, values in content.items():
        found = parameters.notebook_parameters(parameters.notebook_path(name))
        expected = {parameter: each.default for parameter, each in found.items() if parameter != "study"}
        assert values == expected, f"notebooks/defaults.yaml and {stages.STAGES[name].notebook} differ"
        assert {name: type(value) for name, value in values.items()} == {name: type(value) for name, value in expected.items()}


def test_what_a_stage_lets_choose_is_what_the_package_knows():
    """The stages repeat it, so that a misspelt value is refused before anything is loaded."""
    allowed = {name: set(values) for each in stages.STAGES.values() for name, values in (CHOICES | each.choices).items()}
    assert allowed["dtype"] == set(loading.DTYPES) and allowed["attention"] == set(loading.ATTENTIONS)
    assert allowed["compensation"] == set(compensation.KINDS) and allowed["recipe"] == set(recipes.RECIPES)
    assert allowed["task_source"] == set(tasks.SOURCES) and allowed["metric"] == set(tasks.METRICS)
    assert allowed["cache"] == set(generation.CACHES)


def test_the_offline_studies_need_no_hub():
    for name in ("smoke", "offline", "offline-qwen"):
        loaded = study.load(name)
        assert loaded.run["offline"] and loaded.sections["evaluation"]["task_source"] == "local"


@pytest.mark.parametrize(("wrong", "right"), [("n_window", "n_windows"), ("corpora", "corpus")])
def test_a_misspelt_parameter_of_a_real_notebook_is_named(wrong, right):
    with pytest.raises(UserError, match=f"did you mean '{right}'") as caught:
        parameters.check_parameters(parameters.notebook_path("calibration"), {wrong: 4})
    assert "\n" not in str(caught.value)
