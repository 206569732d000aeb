"""The command line: exit codes, one sentence for bad input, assets fetched before a study, nothing deleted unasked."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import toys

import hfprune_nb.inputs
from hfprune_nb.cli.main import main
from hfprune_nb.errors import UserError
from hfprune_nb.inputs import hub
from hfprune_nb.runs import grid, scheduler, status


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("HFPRUNE_HOME", str(tmp_path))
    monkeypatch.delenv("HFPRUNE_RESULTS", raising=False)
    # main() answers SIGTERM in this process; put the handler back afterwards.
    before = signal.getsignal(signal.SIGTERM)
    yield toys.write_project(tmp_path)
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def assets(monkeypatch):
    """A stand-in for the assets module that knows one asset and remembers what was fetched."""
    fetched = []

    def get(name):
        if name != "model":
            raise UserError(f"unknown asset {name!r}: did you mean 'model'?")

    asset = SimpleNamespace(name="model", kind="model", description="a toy", licence="MIT", size=1_000_000)
    module = SimpleNamespace(
        list_assets=lambda: [asset],
        get=get,
        is_cached=lambda name: name in fetched,
        fetch=lambda name, progress=True: fetched.append(name) or f"cache/{name}",
        fetched=fetched,
    )
    monkeypatch.setitem(sys.modules, "hfprune_nb.inputs.assets", module)
    monkeypatch.setattr(hfprune_nb.inputs, "assets", module, raising=False)
    return module


@pytest.fixture
def no_jobs(monkeypatch):
    """Studies whose jobs are not executed: `run` reports the outcomes set in `states`."""
    states = ["computed"]
    monkeypatch.setattr(
        scheduler,
        "run",
        lambda loaded, workers, progress, gpus: status.Summary(
            loaded,
            [status.Outcome(job, states[0], error="why") for job in grid.plan(loaded)],
            1.0,
        ),
    )
    return states


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["assets"],
        ["study"],
        ["study", "run"],
        ["study", "clean"],
        ["study", "verify"],
        ["study", "job"],
        ["study", "rates"],
        ["assets", "fetch"],
    ],
)
def test_help_says_what_it_is_for(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--help"])
    assert caught.value.code == 0
    assert "usage: hfprune" in capsys.readouterr().out


def test_help_has_examples_and_exit_codes(capsys):
    for arguments, words in ((["--help"], "hfprune study run offline"), (["study", "run", "--help"], "Exit status: 0")):
        with pytest.raises(SystemExit):
            main(arguments)
        assert words in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"hfprune {hfprune_nb.__version__}\n"


@pytest.mark.parametrize("workers", ["0", "-1", "two"])
def test_bad_option_is_refused(workers):
    with pytest.raises(SystemExit) as caught:
        main(["study", "run", "toy", "--workers", workers])
    assert caught.value.code == 2


def test_bad_input_is_one_sentence_and_exit_code_2(project, capsys):
    toys.write_study(project, "bad", criterion=["entropy"])
    assert main(["study", "run", "bad"]) == 2
    said = capsys.readouterr()
    assert said.err == "error: bad.yaml: unknown key 'criterion', did you mean 'criteria'?\n" and said.out == ""
    assert main(["study", "status", "toi"]) == 2
    assert "did you mean 'toy'?" in capsys.readouterr().err


def test_assets_list_and_fetch(assets, project, capsys):
    assert main(["assets", "list"]) == 0
    assert "model" in capsys.readouterr().out
    assert main(["assets", "fetch", "model"]) == 0 and assets.fetched == ["model"]
    assert main(["assets", "fetch", "--all"]) == 0
    assert main(["assets", "fetch"]) == 2
    before = list(assets.fetched)
    assert main(["assets", "fetch", "model", "modle"]) == 2 and assets.fetched == before


@pytest.mark.parametrize(("flag", "fetched"), [("--fetch", ["model"]), ("--no-fetch", [])])
def test_run_fetches_the_assets_of_the_study(assets, project, no_jobs, flag, fetched):
    toys.write_study(project, assets=["model"])
    assert main(["study", "run", "toy", flag]) == 0
    assert assets.fetched == fetched


def test_failed_jobs_give_exit_code_1_and_a_summary(project, no_jobs, capsys):
    no_jobs[0] = "failed"
    assert main(["study", "run", "toy"]) == 1
    said = capsys.readouterr().out
    assert "12 failed" in said and said.count("why") == 12


def test_status_and_plan(project, capsys):
    assert main(["study", "status", "toy"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 13 and said[-1] == "12 jobs: 12 waiting"
    assert said[0].split() == ["waiting", "evaluation", "tiny,", "dense"]
    assert main(["study", "plan", "toy"]) == 0
    said = capsys.readouterr().out
    assert "total           12     0" in said and "whole study by workers or GPUs: 1: " in said and "64: " in said
    assert "rates of the cpu: Measured" in said


def test_graph_names_every_job_and_what_it_waits_for(project, capsys):
    assert main(["study", "graph", "toy"]) == 0
    graph = json.loads(capsys.readouterr().out)
    jobs = {job["reference"]: job for job in graph["jobs"]}
    assert len(jobs) == 12 and graph["threads"] == 1 and graph["folder"] == str(project / "results" / "toy")
    assert all(set(job["needs"]) <= jobs.keys() for job in jobs.values())
    assert all(job["output"].endswith(f"{name}/notebook.ipynb") for name, job in jobs.items())
    assert all(job["minutes"] >= 10 and job["memory_mb"] >= 1000 for job in jobs.values())


def test_job_computes_one_job_once_and_refuses_one_without_its_inputs(project, capsys):
    assert main(["study", "graph", "toy"]) == 0
    jobs = json.loads(capsys.readouterr().out)["jobs"]
    first = {job["stage"]: job["reference"] for job in reversed(jobs)}
    for state in ("computed", "done"):
        assert main(["study", "job", "toy", first["calibration"]]) == 0
        assert capsys.readouterr().out.startswith(state)
    assert main(["study", "job", "toy", first["pruning"]]) == 2
    assert "which is not finished: run that job first" in capsys.readouterr().err
    assert main(["study", "job", "toy", "pruning/0"]) == 2
    assert "has no job 'pruning/0'" in capsys.readouterr().err
    (done,) = (project / "results" / "toy").glob("*/*/DONE")
    assert f"calibration/{done.parent.name}" == first["calibration"]


def test_rates_are_fitted_to_cards(project, capsys):
    folder = Path(__file__).parent / "cards" / "offline"
    before = (project / "data" / "rates.yaml").read_text()
    assert main(["study", "rates", str(folder / "cards.json")]) == 0
    assert "scoring" in capsys.readouterr().out
    assert (project / "data" / "rates.yaml").read_text() != before


def test_results_folder_can_be_chosen(project, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HFPRUNE_RESULTS", str(tmp_path / "unused"))
    kept = tmp_path / "elsewhere" / "toy" / "scoring" / "0123456789abcdef"
    kept.mkdir(parents=True)
    assert main(["study", "clean", "toy", "--results", str(tmp_path / "elsewhere"), "--yes"]) == 0
    assert not kept.exists()


def test_what_notebooks_made_without_a_study_can_be_cleaned(project, capsys):
    kept = project / "results" / "local" / "scoring" / "0123456789abcdef"
    kept.mkdir(parents=True)
    assert main(["study", "clean", "local", "--yes"]) == 0 and not kept.exists()
    assert main(["study", "clean", "locale", "--yes"]) == 2 and "no study file 'locale'" in capsys.readouterr().err


def test_one_artifact_can_be_computed_again(project, capsys):
    folder = project / "results" / "toy" / "scoring"
    wanted, other = folder / "0123456789abcdef", folder / "fedcba9876543210"
    for path in (wanted, other):
        path.mkdir(parents=True)
    (folder / f".{wanted.name}.lock").touch()
    assert main(["study", "clean", "toy", f"scoring/{wanted.name}", "--yes"]) == 0
    assert not list(folder.glob(f"*{wanted.name}*")) and other.exists()
    assert main(["study", "clean", "toy", f"scoring/{wanted.name}", "--yes"]) == 2
    assert f"no artifact scoring/{wanted.name}: `hfprune study graph toy` lists them" in capsys.readouterr().err


def test_cost_of_a_hub_model_is_that_of_the_revision_asked_for(monkeypatch, capsys):
    def load(name, *_):
        raise UserError(f"{name} at {hub.pins()[name]}")

    monkeypatch.setenv(hub.REVISIONS, "{}")
    monkeypatch.setattr("hfprune_nb.models.load", load)
    assert main(["cost", "--model", "owner/name", "--revision", "v1", "--device", "cpu"]) == 2
    assert "owner/name at v1" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error(project):
    command = f'{sys.executable} -c \'from hfprune_nb.cli.main import main; main(["study", "graph", "toy"])\' | head -c 1'
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    answer = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert answer.stdout == "{" and answer.stderr == ""


def test_clean_shows_first_and_asks(project, capsys, monkeypatch):
    folder = project / "results" / "toy"
    artifact, exported = folder / "scoring" / "0123456789abcdef", folder / "tables" / "table.csv"
    for path in (artifact, exported.parent):
        path.mkdir(parents=True)
    exported.write_text("1,2")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False))
    assert main(["study", "clean", "toy"]) == 2 and artifact.exists()
    assert str(artifact) in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert main(["study", "clean", "toy"]) == 0 and artifact.exists()
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert main(["study", "clean", "toy"]) == 0 and not artifact.exists() and exported.exists()
    assert main(["study", "clean", "toy", "--exported", "--yes"]) == 0 and not folder.exists()
    assert main(["study", "clean", "toy"]) == 0 and "nothing to delete" in capsys.readouterr().out


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_is_one_line_and_exit_code_130(project, monkeypatch, capsys, request, signal_number):
    def interrupted(*_, **__):
        os.kill(os.getpid(), signal_number)
        time.sleep(1)

    monkeypatch.setattr(scheduler, "run", interrupted)
    # A shell that runs the tests in the background has its children ignore interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    assert main(["study", "run", "toy"]) == 130
    assert capsys.readouterr().err == "interrupted: run the same command again to continue\n"


def test_status_and_plan_import_nothing_heavy(project):
    code = (
        "import sys; from hfprune_nb.cli.main import main; [main(['study', each, 'toy']) for each in ('status', 'plan')]\n"
        "assert not {'torch', 'transformers', 'papermill', 'pandas', 'nbconvert'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.getcwd()}, check=True)


def test_an_unknown_criterion_stops_a_study_before_anything_runs(project, assets, no_jobs, capsys):
    path = toys.write_study(project, criteria=["entropie"])
    assert main(["study", "run", str(path)]) == 2
    said = capsys.readouterr()
    assert "did you mean 'entropy'" in said.err and said.err.count("\n") == 1
    assert assets.fetched == []
