"""One environment, said once: lock, conda file and package agree; wings import one way; nothing private, nothing unsafe."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import hfprune_nb

PROJECT = Path(__file__).resolve().parent.parent
PACKAGE = PROJECT / "hfprune_nb"
MODULES = sorted(PACKAGE.rglob("*.py"))
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
TARGETS = {"setup", "study", "test", "lab", "lint"}
# What each wing may import of the others, as DESIGN.md draws it; its own modules and those of COMMON are free.
ALLOWED = {  # who may ask whom: the ground floor knows nobody, the measures know no method
    "criteria": set(),
    "allocations": set(),
    "inputs": set(),
    "models": {"inputs"},
    "method": {"criteria", "allocations", "inputs", "models"},
    "measure": {"inputs", "models"},
    "cost": {"criteria", "inputs", "models", "method"},
    "runs": {"criteria", "allocations", "inputs.hub", "inputs.shares"},  # of inputs, what is known before they are read
    "report": {"criteria", "allocations"},
    "explore": {"criteria", "allocations", "inputs", "models", "method", "measure", "runs", "report"},
    "cli": {"criteria", "allocations", "inputs", "models", "method", "measure", "cost", "runs", "report"},
}
COMMON = {"errors", "families", "files", "machine", "paths", "processes", "progress", "text_files", "__version__"}


def lines(file):
    """The lines of a requirements file that install something."""
    text = (PROJECT / file).read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def python(code):
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")


@pytest.fixture(scope="module")
def pins():
    """Canonical package name -> exact version, as the lock says."""
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines("requirements.lock"))}


def declared():
    project = PYPROJECT["project"]
    return [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]


# Environment


def test_the_lock_pins_every_line_exactly_once(pins):
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines("requirements.lock"))
    assert len(pins) == len(lines("requirements.lock"))
    assert pins["torch"] == "2.13.0"


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_every_dependency_is_satisfied_by_a_pin(pins, requirement):
    pinned = pins.get(canonicalize_name(requirement.name))
    assert pinned, f"{requirement.name} is not in the lock"
    assert requirement.specifier.contains(pinned, prereleases=True), f"the lock has {requirement.name} {pinned}"


def test_the_lock_is_complete(pins):
    """Also what the dependencies depend on is pinned, except the CUDA libraries that some builds of torch bring along."""
    waiting, seen = [(requirement.name, ()) for requirement in declared()], set()
    while waiting:
        name, extras = waiting.pop()
        if (key := (canonicalize_name(name), extras)) in seen:
            continue
        seen.add(key)
        for text in metadata.requires(name) or ():
            needed = Requirement(text)
            applies = [needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)] if needed.marker else [True]
            if any(applies) and not re.match(r"nvidia-|cuda-|triton", needed.name):
                waiting.append((needed.name, tuple(sorted(needed.extras))))
    # pip and setuptools belong to every environment, and pip freeze does not list them.
    assert {name for name, _ in seen} - pins.keys() <= {"pip", "setuptools", "wheel"}


def test_what_is_installed_is_what_the_lock_says(pins):
    """The tests speak for the locked environment: `make test` installs it first. A local build label such as +cpu may follow."""
    installed = {
        name: metadata.version(name).partition("+")[0] for name in ("torch", "transformers", "lm-eval", "datasets", "papermill")
    }
    assert installed == {name: pins[name] for name in installed}


def test_conda_users_get_the_same_pins():
    environment = yaml.safe_load((PROJECT / "environment.yml").read_text(encoding="utf-8"))
    (through_pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    assert through_pip == ["-r requirements.lock", "--editable ."], "versions written twice can disagree"
    assert len(plain) == 2 and "pip" in plain
    (python,) = [entry.partition("=")[2] for entry in plain if entry.startswith("python=")]
    assert SpecifierSet(PYPROJECT["project"]["requires-python"]).contains(python)
    assert environment["channels"] == ["conda-forge"]


def test_the_package_says_which_python_it_needs():
    supported = SpecifierSet(PYPROJECT["project"]["requires-python"])
    assert supported.contains("3.11") and not supported.contains("3.10")
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py311"


def test_make_has_the_promised_verbs_and_ci_calls_them():
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    assert set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE)) >= TARGETS
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE).group(1).split()
    assert set(phony) >= TARGETS, "a file of that name would stop the target"
    ci = PROJECT / ".ci" / "run"
    assert os.access(ci, os.X_OK) and "make test" in ci.read_text(encoding="utf-8").splitlines()


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed on this machine")
def test_make_study_runs_the_offline_study():
    planned = subprocess.run(["make", "--dry-run", "study"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    assert "hfprune study run offline" in planned
    planned = subprocess.run(["make", "--dry-run", "test"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    assert "-m pytest" in planned


@pytest.mark.parametrize(
    "file", ["requirements.lock", "environment.yml", "pyproject.toml", "Makefile", ".ci/run", "data/assets.yaml"]
)
def test_no_host_and_no_machine_path_is_written_down(file):
    """The reader's own pip settings say where packages come from."""
    text = (PROJECT / file).read_text(encoding="utf-8")
    found = re.findall(r"index-url|find-links|trusted-host|file://\S*|(?:/home|/root|/work|/tmp|/Users|/opt)/\S*", text)
    if file != "data/assets.yaml":  # which names the upstream of everything it carries
        found += re.findall(r"https?://\S*|git\+\S*", text)
    assert not found


def test_the_licence_is_apache():
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (PROJECT / "LICENSE").read_text(encoding="utf-8")[:400]


# Package


def imported(file):
    """Yield everything that a source file imports, at its top or in a function, as dotted names."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level], f"relative import in {file}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from names


def inside(names):
    """The kit's own modules among imported `names`, without the package's name."""
    return [name.removeprefix("hfprune_nb.") for name in names if name.startswith("hfprune_nb.")]


@pytest.mark.parametrize("wing", ALLOWED)
def test_imports_run_one_way(wing):
    files = sorted((PACKAGE / wing).rglob("*.py"))
    assert files
    for file in files:
        for name in inside(imported(file)):
            if name.split(".")[0] in {wing, *COMMON}:
                continue
            assert any(f"{name}.".startswith(f"{allowed}.") for allowed in ALLOWED[wing]), f"{file.name} imports {name}"


def test_the_report_needs_no_torch():
    for file in sorted((PACKAGE / "report").rglob("*.py")):
        roots = {name.split(".")[0] for name in imported(file)}
        assert not roots & {"torch", "transformers", "lm_eval"}, file.name
    code = "import sys; from hfprune_nb.report import criterion, neurons, tuning; print('torch' in sys.modules)"
    assert python(code)[0] == "False"


def test_nothing_imports_the_command_line():
    for file in MODULES:
        if file.parent != PACKAGE / "cli" and file != PACKAGE / "__main__.py":
            assert not [name for name in inside(imported(file)) if name.split(".")[0] == "cli"], file.name


def test_every_module_lies_in_a_wing():
    outside = {file.stem for file in PACKAGE.glob("*.py")}
    assert outside | {"__version__"} == {"__init__", "__main__", *COMMON}
    assert {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file()} == set(ALLOWED)


def test_version_and_import_wait_for_no_torch():
    heavy = "print(sorted({'torch', 'pandas', 'papermill'} & set(sys.modules)))"
    assert python(f"import sys; from hfprune_nb.cli import main; from hfprune_nb.runs import study; {heavy}")[0] == "[]"
    code = f"import sys; from hfprune_nb.cli.main import main\ntry: main(['--version'])\nexcept SystemExit: {heavy}"
    assert python(code)[:2] == [f"hfprune {hfprune_nb.__version__}", "[]"]


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nothing_unsafe_or_unfinished_is_in_the_package(file):
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert not {name.split(".")[0] for name in imported(file)} & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {"torch.save", "torch.load", "pd.read_pickle", "pandas.read_pickle", "eval", "exec", "print", "os.system"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "shell"]
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)


def test_remote_code_is_never_trusted_unasked():
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) == "trust_remote_code", f"{file.name} decides for the caller"
            if isinstance(node, ast.FunctionDef):
                arguments = node.args.args[::-1]
                defaults = dict(zip((argument.arg for argument in arguments), node.args.defaults[::-1], strict=False))
                if "trust_remote_code" in defaults:
                    assert ast.literal_eval(defaults["trust_remote_code"]) is False, f"{file.name}: {node.name}"


def test_a_module_answers_to_its_short_name():
    from hfprune_nb import calibration, scoring, stage
    from hfprune_nb.inputs import calibration as same

    assert calibration is same and callable(scoring.score) and callable(stage.start)
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = hfprune_nb.nothing_like_this


@pytest.mark.parametrize("name", ["hfprune_nb", "hfprune_nb.cli"])
def test_the_command_line_is_a_module(name):
    said = subprocess.run([sys.executable, "-m", name, "--help"], capture_output=True, text=True, timeout=100)
    assert said.returncode == 0 and said.stdout.startswith("usage: hfprune ")
