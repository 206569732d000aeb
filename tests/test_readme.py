"""README and docs show what is committed: generated parts are new, links lead somewhere, examples work."""

import re
import subprocess
import tarfile
import tomllib
from io import BytesIO
from pathlib import Path

import pytest
import torch
import yaml

import hfprune_nb
from hfprune_nb.runs import forecast, pages, study

PROJECT = Path(__file__).parent.parent
WRITTEN = [PROJECT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "tests/README.md")]
PAGES = {
    path.relative_to(PROJECT): path.read_text(encoding="utf-8")
    for path in [PROJECT / "README.md", *PROJECT.glob("docs/*.md"), *WRITTEN]
}
README, STUDIES = PAGES[Path("README.md")], PAGES[Path("docs/studies.md")]
CONTRIBUTING = PAGES[Path("CONTRIBUTING.md")]


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A folder with results as they were committed: results/ holds what the user's last run wrote."""
    folder = tmp_path_factory.mktemp("committed")
    answer = subprocess.run(["git", "-C", PROJECT, "archive", "HEAD", "--", ":(glob)results/*/tables/**"], capture_output=True)
    if answer.returncode:
        return PROJECT
    with tarfile.open(fileobj=BytesIO(answer.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_generated_parts_are_new(page, committed):
    assert pages.fill(PAGES[page], committed) == PAGES[page], "run `hfprune study pages`"


def test_the_first_page_has_its_generated_parts_and_is_short():
    families = re.findall(r"^\| \[`", README, flags=re.MULTILINE)  # one row each: a new member breaks nothing
    assert len(README.splitlines()) - len(families) <= 92
    for part in ("criteria", "allocations", "results/offline/tables/verdict.md", "results/offline/tables/overview.md"):
        (shown,) = re.findall(rf"<!-- generated: {part}.*?-->\n(.*?)<!-- end -->", README, flags=re.DOTALL)
        assert len(shown.split()) > 20, part


def test_the_forecast_is_of_the_papers_studies():
    (names,) = re.findall(r"<!-- generated: forecast of (.*?) -->", PAGES[Path("docs/cost.md")])
    loaded = [study.load(name) for name in names.split(", ")]
    assert len(loaded) == 6 and all(each.sections["evaluation"]["device"] == "cuda" for each in loaded)


def test_the_example_of_a_study_loads(tmp_path):
    (example,) = re.findall(r"```yaml\n(.*?)```", STUDIES, flags=re.DOTALL)
    (tmp_path / "my-model").mkdir()
    (tmp_path / "mine.yaml").write_text(example)
    loaded = study.load(tmp_path / "mine.yaml")
    assert loaded.models == [str(tmp_path / "my-model")] and len(loaded.variants) == 2
    assert sum(job.stage == "pruning" for job in loaded.jobs) == 5 * 2 * 2 * 2, "seeds, criteria, allocations, multiples"


def test_no_stage_of_a_study_is_longer_than_it_may_be():
    for file in (PROJECT / "notebooks" / "studies").glob("*.yaml"):
        assert not forecast.overdue(study.load(file)), file.stem


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_and_pictures_exist(page):
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", PAGES[page]):
        path = (PROJECT / page).parent / target
        assert path.exists(), target
        titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE) if heading else [heading]
        assert heading in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], heading


def test_every_page_of_the_docs_is_linked_from_the_first():
    assert set(re.findall(r"\((docs/\w+\.md)", README)) == {str(page) for page in PAGES if page.parent.name == "docs"}


def test_studies_and_notebooks_that_are_named_exist():
    named = set(re.findall(r"`([\w.-]+)`", STUDIES))
    for file in (PROJECT / "notebooks" / "studies").glob("*.yaml"):
        assert file.stem in named, file.stem
    for notebook in (PROJECT / "notebooks").glob("*.ipynb"):
        assert notebook.stem in named, notebook.stem


@pytest.mark.parametrize(("page", "name"), [(README, "Collision"), (CONTRIBUTING, "Margin")], ids=["README", "CONTRIBUTING"])
def test_example_criterion_has_the_gradient_of_its_value(page, name):
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    scope = {}
    exec(code, scope)
    logits = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    value, gradient = scope[name]().value_and_gradient(logits)
    (expected,) = torch.autograd.grad(value.sum(), logits)
    torch.testing.assert_close(gradient.detach(), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("command", ["make study", "make test", "make lab", "make lint", "make setup"])
def test_commands_are_makefile_targets(command):
    assert command in README
    assert re.search(rf"^{command.split()[1]}:", (PROJECT / "Makefile").read_text(), flags=re.MULTILINE)


def test_every_test_file_that_is_listed_exists():
    table = PAGES[Path("tests/README.md")].partition("## Where things are tested")[2]
    rows = re.findall(r"^\| [a-z, ]+ \| (.*) \|$", table, flags=re.MULTILINE)
    names = re.findall(r"`(\w+)`", " ".join(rows))
    assert len(names) > 50 and all((PROJECT / "tests" / f"test_{name}.py").is_file() for name in names)


def test_the_citation_names_this_version_and_the_paper():
    cited = yaml.safe_load((PROJECT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = cited["preferred-citation"]
    assert cited["version"] == hfprune_nb.__version__ and paper["identifiers"][0]["value"] == "arXiv:2603.08083"


def test_every_bound_of_a_dependency_has_its_reason():
    declared = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounded = [name for name in declared["dependencies"] if re.search("[<>=]", name)]
    assert bounded and all(f"| `{name}`" in PAGES[Path("docs/pins.md")] for name in bounded)
