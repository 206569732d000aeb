"""The README shows what is committed: its table is the study's, its links lead somewhere, its example works."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from hfprune_nb.runs import forecast, grid, study

PROJECT = Path(__file__).parent.parent
README = (PROJECT / "README.md").read_text(encoding="utf-8")


def committed_text(file):
    """A file as it was committed: results/ holds what the user's last run wrote."""
    answer = subprocess.run(["git", "-C", PROJECT, "show", f"HEAD:{file}"], capture_output=True, text=True, encoding="utf-8")
    return answer.stdout if answer.returncode == 0 else (PROJECT / file).read_text(encoding="utf-8")


def test_tables_are_those_of_the_committed_results():
    blocks = re.findall(r"<!-- table: (\S+) -->\n(.*?)<!-- end of table -->", README, flags=re.DOTALL)
    assert blocks
    for file, shown in blocks:
        committed = committed_text(file).splitlines()
        assert shown.strip().splitlines() == [line for line in committed if line.startswith("|")], file


def forecast_row(name, loaded):
    """A row of the README's forecast for studies that are run together."""
    tables = [forecast.forecast_table(each) for each in loaded]
    stages = [
        forecast.in_words(sum(table.loc[stage, "hours"] for table in tables)) for stage in ("scoring", "evaluation", "recovery")
    ]
    needs = {f"{each.name}/{job}": need for each in loaded for job, need in forecast.needs(each).items()}
    depends_on = {
        f"{each.name}/{job.reference}": [f"{each.name}/{other}" for other in job.depends_on]
        for each in loaded
        for job in grid.plan(each)
    }
    wholes = [forecast.in_words(forecast.total(needs, depends_on, workers)) for workers in (1, 8, 64)]
    memory = max(table["memory"].max() for table in tables)
    return f"| {' | '.join([name, *stages, *wholes, f'{memory:.0f} GB'])} |"


def test_the_forecast_of_the_papers_studies_is_what_the_plan_says():
    block = README.split("| study | scoring |")[1].split("\n\n")[0]
    *shown, together = [line for line in block.splitlines() if line.startswith("| ")]
    loaded = [study.load(line.split()[1]) for line in shown]
    assert len(loaded) == 6 and all(each.sections["evaluation"]["device"] == "cuda" for each in loaded)
    assert shown == [forecast_row(each.name, [each]) for each in loaded]
    assert together == forecast_row("all six", loaded)


def test_the_example_of_a_study_loads(tmp_path):
    (example,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "my-model").mkdir()
    (tmp_path / "mine.yaml").write_text(example)
    loaded = study.load(tmp_path / "mine.yaml")
    assert loaded.models == [str(tmp_path / "my-model")] and len(loaded.variants) == 2
    assert sum(job.stage == "pruning" for job in loaded.jobs) == 3 * 2 * 3 * 2 * 2


def test_no_stage_of_a_study_is_longer_than_it_may_be():
    for file in (PROJECT / "notebooks" / "studies").glob("*.yaml"):
        assert not forecast.overdue(study.load(file)), file.stem


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (PROJECT / target).exists(), target


def test_studies_and_notebooks_that_are_named_exist():
    named = set(re.findall(r"`([\w.-]+)`", README))
    for file in (PROJECT / "notebooks" / "studies").glob("*.yaml"):
        assert file.stem in named, file.stem
    for notebook in (PROJECT / "notebooks").glob("*.ipynb"):
        assert notebook.stem in named, notebook.stem


def test_example_criterion_has_the_gradient_of_its_value():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    scope = {}
    exec(code, scope)
    logits = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    value, gradient = scope["Collision"]().value_and_gradient(logits)
    (expected,) = torch.autograd.grad(value.sum(), logits)
    torch.testing.assert_close(gradient.detach(), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("command", ["make study", "make test", "make lab", "make lint", "make setup"])
def test_commands_are_makefile_targets(command):
    assert command in README
    assert re.search(rf"^{command.split()[1]}:", (PROJECT / "Makefile").read_text(), flags=re.MULTILINE)
