"""The README shows what is committed: its table is the study's, its links lead somewhere, its example works."""

import re
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).parent.parent
README = (PROJECT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_committed_results():
    blocks = re.findall(r"<!-- table: (\S+) -->\n(.*?)<!-- end of table -->", README, flags=re.DOTALL)
    assert blocks
    for file, shown in blocks:
        committed = (PROJECT / file).read_text(encoding="utf-8").splitlines()
        assert shown.strip().splitlines() == [line for line in committed if line.startswith("|")], file


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (PROJECT / target).exists(), target


def test_studies_and_notebooks_that_are_named_exist():
    named = set(re.findall(r"`([\w.-]+)`", README))
    for study in (PROJECT / "notebooks" / "studies").glob("*.yaml"):
        assert study.stem in named, study.stem
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
