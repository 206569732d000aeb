"""Stages: the parameters cell rules, papermill's silent traps are errors, and a notebook that fails has no result."""

import json
import os
from types import SimpleNamespace

import papermill
import pytest
import toys

from hfprune_nb.errors import UserError
from hfprune_nb.runs import kernel, parameters, stage, stages


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("HFPRUNE_HOME", str(tmp_path))
    monkeypatch.delenv("HFPRUNE_RESULTS", raising=False)
    return toys.write_project(tmp_path)


def start_all(name, **changes):
    return stage.start(name, study="toy", **(parameters.complete(name, {}) | changes))


def finish(run, value="value"):
    run.path("value.txt").write_text(value)
    return run.finish(device="cpu")


# -- the parameters cell


def test_parameters_are_those_that_papermill_sees(project):
    for definition in stages.STAGES.values():
        notebook = project / "notebooks" / definition.notebook
        # Papermill's own reading skips unions.
        read = [name for name, parameter in parameters.notebook_parameters(notebook).items() if "|" not in parameter.type]
        assert read == list(papermill.inspect_notebook(notebook))


def test_misspelt_parameter_is_refused_with_the_nearest_name(project):
    with pytest.raises(UserError, match="no parameter 'n_window': did you mean 'n_windows'"):
        stage.execute("calibration", "toy", {"n_window": 8})
    assert not (project / "results").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_windows", "8"),
        ("n_windows", 8.0),
        ("n_windows", True),
        ("corpus", 3),
        ("corpus", None),
        ("length", "1e-4"),
    ],
)
def test_wrong_type_is_refused(project, name, value):
    with pytest.raises(UserError, match=f"parameter '{name}' of 01_calibration.ipynb must be"):
        parameters.complete("calibration", {name: value})


def test_wrong_type_inside_a_list_is_refused(project):
    for stage_name, name in (("evaluation", "tasks"), ("scoring", "criteria")):
        with pytest.raises(UserError, match=r"must be list\[str"):
            parameters.complete(stage_name, {name: ["choice", 3]})


def test_whole_numbers_become_floats_so_that_keys_agree(project):
    values = parameters.complete("calibration", {"length": 2})
    assert values["length"] == 2.0 and isinstance(values["length"], float)


@pytest.mark.parametrize("value", [None, 3, "half", [1]])
def test_default_none_takes_anything(project, value):
    assert parameters.complete("evaluation", {"limit": value})["limit"] == value


@pytest.mark.parametrize("value", [None, 3])
def test_union_takes_either_and_nothing_else(tmp_path, value):
    notebook = toys.write_notebook(tmp_path / "x.ipynb", "limit: int | None = 4")
    assert parameters.check_parameters(notebook, {"limit": value}) == {"limit": value}
    with pytest.raises(UserError, match=r"must be int \| None"):
        parameters.check_parameters(notebook, {"limit": "4"})


@pytest.mark.parametrize("line", ["total = n * 2", "import os", "total = len('ab')", "a, b = 1, 2", "x: int"])
def test_computed_value_in_the_parameters_cell_is_refused(tmp_path, line):
    notebook = toys.write_notebook(tmp_path / "x.ipynb", f"n: int = 2\n{line}")
    with pytest.raises(UserError, match="may only hold `name = literal`"):
        parameters.notebook_parameters(notebook)


def test_notebook_without_parameters_cell_is_refused(tmp_path):
    notebook = toys.write_notebook(tmp_path / "x.ipynb", "n: int = 2", tags=())
    with pytest.raises(UserError, match="no cell tagged 'parameters'"):
        parameters.notebook_parameters(notebook)


# -- start, finish, inputs


def test_start_finish_start(project):
    run = start_all("calibration")
    assert not run.done and "to be computed" in run.describe()
    assert repr(run.describe()) == str(run.describe()), "a notebook shows it without quotes"
    artifact = finish(run)
    assert run.done and run.path("value.txt") == artifact.path("value.txt")
    again = start_all("calibration")
    assert again.done and again.path("value.txt").read_text() == "value"
    assert again.finish(device="other").card["facts"] == {"device": "cpu"}


def test_card_tells_how_it_was_made(project):
    card = finish(start_all("calibration", seed=3)).card
    assert card["parameters"]["seed"] == 3 and card["facts"] == {"device": "cpu"}
    assert {"versions", "python", "platform", "cpu_count", "git", "seconds", "started", "finished"} <= card.keys()
    assert card["peak_memory_bytes"] > 2**20 and "torch" in card["versions"]


def test_start_needs_every_parameter(project):
    with pytest.raises(UserError, match="lacks parameters of 01_calibration.ipynb: seed"):
        stage.start("calibration", study="toy", model="tiny", corpus="text", n_windows=4, length=1.0)
    with pytest.raises(UserError, match="unknown stage 'scorin': did you mean 'scoring'"):
        stage.start("scorin", study="toy")


@pytest.mark.parametrize("study", ["", "../x", "a/b", ".hidden"])
def test_study_is_a_plain_name(project, study):
    with pytest.raises(UserError, match="not a plain name"):
        stage.start("calibration", study=study, **parameters.complete("calibration", {}))


def test_unfinished_run_is_not_done_and_its_files_are_cleared(project):
    partial = start_all("calibration").path("value.txt")
    partial.write_text("half")
    run = start_all("calibration")
    assert not run.done and not partial.exists()


def test_input_is_given_as_reference_or_folder(project):
    artifact = finish(start_all("calibration"))
    by_reference = start_all("scoring", calibration=artifact.reference)
    by_folder = start_all("scoring", calibration=str(artifact.folder))
    assert by_reference.parameters == by_folder.parameters
    assert by_folder.inputs["calibration"] == artifact


def test_bad_inputs_are_refused(project, tmp_path):
    artifact = finish(start_all("calibration"))
    with pytest.raises(UserError, match="must be an artifact of the stage 'scoring'"):
        start_all("pruning", scores=artifact.reference)
    with pytest.raises(UserError, match="neither 'stage/key' nor a folder"):
        start_all("scoring", calibration=str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="missing or unfinished"):
        start_all("scoring", calibration="calibration/0123456789abcdef")
    with pytest.raises(UserError, match="'reference' of evaluation goes with 'pruned' or 'recovered' only"):
        start_all("evaluation", reference="evaluation/0123456789abcdef")
    artifact.path("value.txt").write_text("edited")
    with pytest.raises(UserError, match="corrupt"):
        start_all("scoring", calibration=artifact.reference)


def test_empty_inputs_are_made_with_the_parameters_handed_down(project, monkeypatch, capsys):
    monkeypatch.setattr("hfprune_nb.inputs.shares.warning", lambda model, ratio: f"{model}: {ratio} is nearly all")
    run = start_all("pruning", seed=5)
    assert capsys.readouterr().out.splitlines()[0] == "tiny: 0.2 is nearly all", "before anything is computed for it"
    scores = run.inputs["scores"]
    assert scores.parameters["seed"] == 5
    assert scores.path("notebook.ipynb").is_file()
    assert scores.inputs.keys() == {scores.parameters["calibration"]}
    pruned = finish(run)
    assert stage.ancestor(pruned, "calibration").reference == scores.parameters["calibration"]
    assert stage.ancestor(pruned, "scoring") == scores and stage.ancestor(pruned, "figures") is None


def test_dense_evaluation_has_no_inputs_and_a_pruned_one_gets_its_reference(project):
    dense = start_all("evaluation", tasks=["other"])
    assert dense.inputs == {"pruned": None, "recovered": None, "reference": None}
    dense = finish(dense)
    pruned = finish(start_all("pruning"))
    run = start_all("evaluation", pruned=pruned.reference, tasks=["other"])
    assert run.inputs == {"pruned": pruned, "recovered": None, "reference": dense}


def test_empty_list_means_every_finished_artifact(project):
    made = sorted(finish(start_all("evaluation", seed=seed)).reference for seed in range(3))
    start_all("evaluation", seed=9).path("value.txt").write_text("unfinished")
    run = start_all("figures")
    assert [artifact.reference for artifact in run.inputs["evaluations"]] == made == run.parameters["evaluations"]
    assert start_all("questions").inputs["scorings"] == []


# -- execution by papermill


def test_execute_leaves_the_notebook_in_the_artifact(project):
    artifact = stage.execute("calibration", "toy", {"seed": 4})
    assert artifact.path("value.txt").read_text() == "('text', 4, 4, 1.0)"
    assert "seed 4" in toys.outputs(artifact.path("notebook.ipynb"))
    assert artifact.current
    assert [path.name for path in artifact.folder.parent.iterdir()] == [artifact.key]


def test_failed_notebook_keeps_its_traceback_and_is_not_done(project):
    broken = "from hfprune_nb.errors import UserError\nraise UserError('corpus is empty: give text')"
    toys.write_stage(project, "calibration", "01_calibration.ipynb", toys.CALIBRATION, before=broken)
    with pytest.raises(stage.StageError, match="^corpus is empty: give text$"):
        stage.execute("calibration", "toy", {})
    (failed,) = (project / "results" / "toy" / "calibration").glob("*.ipynb")
    assert failed.name.endswith(".failed.ipynb") and "UserError: corpus is empty: give text" in toys.outputs(failed)
    assert "Traceback" not in toys.outputs(failed)
    with pytest.raises(stage.StageError):
        stage.execute("calibration", "toy", {}, {"HFPRUNE_TRACEBACK": "1"})
    assert "Traceback" in toys.outputs(failed)
    assert json.loads(failed.read_text())["metadata"]["hfprune"]["error"] == "corpus is empty: give text"
    assert not start_all("calibration").done
    toys.write_stage(project, "calibration", "01_calibration.ipynb", toys.CALIBRATION)
    assert stage.execute("calibration", "toy", {}).done and not failed.exists()


def test_notebook_that_never_finishes_is_a_failure(project):
    toys.write_notebook(project / "notebooks" / "01_calibration.ipynb", toys.CALIBRATION[0], "model")
    with pytest.raises(stage.StageError, match="without run.finish"):
        stage.execute("calibration", "toy", {})


def test_full_disk_inside_a_notebook_leaves_no_partial_folder(project):
    full = "run.path('value.txt').write_text('half')\nraise OSError(28, 'No space left on device')"
    toys.write_stage(project, "calibration", "01_calibration.ipynb", toys.CALIBRATION, before=full)
    with pytest.raises(stage.StageError, match="No space left"):
        stage.execute("calibration", "toy", {})
    assert not list((project / "results" / "toy" / "calibration").glob("*.partial"))


def test_hanging_kernel_is_killed(project):
    hang = "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)"
    toys.write_stage(project, "calibration", "01_calibration.ipynb", toys.CALIBRATION, before=hang)
    with pytest.raises(stage.StageError, match="stopped after 0.2 minutes: raise run.timeout_minutes"):
        stage.execute("calibration", "toy", {}, timeout_seconds=12)
    with pytest.raises(ProcessLookupError):
        os.kill(int((project / "notebooks" / "pid").read_text()), 0)


def test_dead_kernel_is_a_failure_with_a_cause(project):
    toys.write_stage(project, "calibration", "01_calibration.ipynb", toys.CALIBRATION, before="import os\nos._exit(9)")
    with pytest.raises(stage.StageError, match="kernel died, most likely for lack of memory"):
        stage.execute("calibration", "toy", {})


@pytest.mark.skipif(os.name != "posix", reason="sockets in the file system are a POSIX feature")
def test_kernel_is_private_and_is_this_interpreter(tmp_path, monkeypatch):
    monkeypatch.setenv("HFPRUNE_HOME", str(tmp_path))
    report = (
        "import json, os, sys\nfrom ipykernel.kernelapp import IPKernelApp\n"
        "keys = ['IPYTHONDIR', 'MARK', 'HFPRUNE_HOME']\n"
        "facts = {key: os.environ[key] for key in keys} | {'python': sys.executable, 'x': x, 'cwd': os.getcwd()}\n"
        "open('facts.json', 'w').write(json.dumps(facts | {'transport': IPKernelApp.instance().transport}))"
    )
    notebook = toys.write_notebook(tmp_path / "notebooks" / "x.ipynb", "x: int = 1", report)
    kernel.run(notebook, tmp_path / "out.ipynb", {"x": 2}, {"MARK": "here"})
    facts = json.loads((tmp_path / "notebooks" / "facts.json").read_text())
    assert facts["transport"] == "ipc" and "unencrypted" not in toys.outputs(tmp_path / "out.ipynb")
    assert facts["python"] == stage.sys.executable and facts["x"] == 2 and facts["MARK"] == "here"
    assert facts["cwd"] == str(tmp_path / "notebooks") and facts["HFPRUNE_HOME"] == str(tmp_path)
    assert not os.path.exists(facts["IPYTHONDIR"]) and "IPYTHONDIR" not in os.environ


def test_kernel_is_not_touched_by_what_the_user_has_for_other_work(tmp_path, monkeypatch):
    home = tmp_path / "runs {user} 100%"
    monkeypatch.setenv("HFPRUNE_HOME", str(home))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("MPLCONFIGDIR", str(home))
    monkeypatch.setenv("PYTHONSTARTUP", str(home / "startup.py"))
    draw = "import profile, matplotlib, matplotlib.pyplot as plt\nassert profile.run and 'started' not in globals()\n"
    draw += "plt.plot([1, 2]); plt.show(); print(matplotlib.rcParams['font.size'])"
    notebook = toys.write_notebook(home / "notebooks" / "x.ipynb", "x: int = 1", draw)
    (notebook.parent / "profile.py").touch()
    (home / "matplotlibrc").write_text("font.size: 30\nbackend: Agg\n")
    (home / "startup.py").write_text("started = True")
    kernel.run(notebook, home / "out.ipynb", {"x": 2})
    assert "image/png" in (home / "out.ipynb").read_text() and toys.outputs(home / "out.ipynb").endswith("10.0\n")


def test_a_matplotlibrc_beside_the_notebooks_counts_in_no_study(project, tmp_path, monkeypatch):
    import matplotlib

    (tmp_path / "matplotlibrc").touch()
    monkeypatch.chdir(tmp_path)
    with matplotlib.rc_context({"font.size": 30}):
        start_all("calibration")
        assert matplotlib.rcParams["font.size"] == 30, "in JupyterLab the user's settings are the user's"
        monkeypatch.setenv(stage.PROGRESS_FILE, str(tmp_path / "progress.json"))
        start_all("calibration")
        assert matplotlib.rcParams["font.size"] == 10


def test_papermills_own_command_line_cannot_misspell_either(project, monkeypatch):
    sources = ["n_windows: int = 4", "# Parameters\nn_window = 8\n", "run = stage.start(...)"]
    shell = SimpleNamespace(user_ns={"In": sources})
    monkeypatch.setitem(stage.sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    with pytest.raises(UserError, match="no parameter 'n_window': did you mean 'n_windows'"):
        start_all("calibration")


@pytest.fixture
def shell(project):
    """IPython as a notebook's kernel runs it, without the kernel."""
    from IPython.core.interactiveshell import InteractiveShell

    found = InteractiveShell.instance()
    found.user_ns["start"] = lambda **changes: start_all("calibration", **changes)
    yield found
    InteractiveShell.clear_instance()


def test_a_notebook_that_fails_or_is_interrupted_holds_nobody_up(shell, capsys):
    shell.run_cell("run = start(); run.path('value.txt').write_text('1')")
    run = shell.user_ns["run"]
    assert run._lock.held
    shell.run_cell("raise KeyboardInterrupt")
    assert not run._lock.path.exists()
    shell.run_cell("run.finish(device='cpu')")
    shell.run_cell("'a cell after the last'")
    assert run.artifact.current and run.artifact.path("value.txt").read_text() == "1" and not run._lock.path.exists()


def test_a_notebook_that_is_started_again_holds_what_it_makes_now_and_nothing_else(shell):
    shell.run_cell("first = start(); second = start(seed=5); second.path('value.txt').write_text('1')")
    first, second = shell.user_ns["first"], shell.user_ns["second"]
    assert second._lock.held and not first._lock.path.exists()
    shell.run_cell("again = start(seed=5); again.path('value.txt').write_text('1'); again.finish()")
    shell.run_cell("'a cell after the last'")
    assert second.artifact.current and not second._lock.path.exists() and not first._lock.path.exists()


def test_what_another_computed_meanwhile_is_not_overwritten(shell, capsys):
    shell.run_cell("run = start(); run.path('value.txt').write_text('1'); 1 / 0")
    other = stage.Run("calibration", "toy", shell.user_ns["run"].parameters, {})
    finish(other, "2")
    shell.run_cell("run.path('value.txt').write_text('3'); run.finish(device='cpu')")
    assert "another process took over" in capsys.readouterr().out
    assert other.artifact.current and other.artifact.path("value.txt").read_text() == "2"


def test_a_notebook_shows_a_users_error_as_its_sentence(shell, capsys, monkeypatch):
    shell.run_cell("from hfprune_nb.errors import UserError\nraise UserError('corpus is empty: give text')")
    assert capsys.readouterr().out == "UserError: corpus is empty: give text\n"
    monkeypatch.setenv("HFPRUNE_TRACEBACK", "1")
    shell.run_cell("raise UserError('corpus is empty: give text')")
    assert "Traceback" in capsys.readouterr().out


def test_scores_of_more_criteria_serve_and_of_less_are_made(project):
    several = finish(start_all("scoring", calibration=finish(start_all("calibration")).reference, criteria=["entropy", "random"]))
    assert start_all("pruning", criterion="random").parameters["scores"] == several.reference
    made = start_all("pruning", criterion="magnitude").inputs["scores"]
    assert made.reference != several.reference and made.parameters["criteria"] == ["magnitude"]
    with pytest.raises(UserError, match="did you mean 'entropy'"):
        start_all("pruning", criterion="entropie")


def test_figures_of_a_study_without_evaluations_name_the_studies_that_have_some(project):
    with pytest.raises(UserError, match="study 'toy' has no finished evaluation to show: run 05_evaluation.ipynb first"):
        start_all("figures")
    finish(start_all("evaluation"))
    with pytest.raises(UserError, match="study 'other' has no finished evaluation to show: set study to toy, or run"):
        stage.start("figures", study="other", **parameters.complete("figures", {}))


def test_a_notebook_is_read_once_for_any_number_of_jobs(project):
    parameters._read_parameters.cache_clear()
    for seed in range(100):
        parameters.complete("evaluation", {"seed": seed})
    assert parameters._read_parameters.cache_info().misses == 1
