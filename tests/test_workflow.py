"""The workflow engine: its graph is the study's, and what it computes is what `hfprune study run` computes.

Snakemake lives in an environment of its own, named by the variable SNAKEMAKE; these tests are chosen by their markers alone.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import toys
import yaml

PROJECT = Path(__file__).resolve().parent.parent
WORKFLOW = PROJECT / "workflow"
SNAKEMAKE = os.environ.get("SNAKEMAKE", "snakemake")


@pytest.fixture
def engine(tmp_path):
    """Return a function that runs Snakemake on the toy study with a profile, and the study's project."""
    project = toys.write_project(tmp_path / "project")
    hfprune = tmp_path / "hfprune"
    hfprune.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'import sys; from hfprune_nb.cli import main; sys.exit(main())' \"$@\"\n"
    )
    hfprune.chmod(0o755)
    environment = os.environ | {"HFPRUNE_HOME": str(project), "PYTHONPATH": str(PROJECT)}
    environment.pop("HFPRUNE_RESULTS", None)

    def run(profile, *options, study="toy", config=()):
        command = [SNAKEMAKE, "--snakefile", WORKFLOW / "Snakefile", "--profile", WORKFLOW / "profiles" / profile, *options]
        command += ["--config", f"study={study}", f"hfprune={hfprune}", *config]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run, project


def test_profiles_are_complete():
    for name in ("local", "gpus", "slurm"):
        profile = yaml.safe_load((WORKFLOW / "profiles" / name / "config.yaml").read_text(encoding="utf-8"))
        assert profile["retries"] >= 1 and profile["rerun-triggers"] == "mtime" and {"cores", "jobs"} & profile.keys(), name


def test_the_readme_names_profiles_and_options_that_exist(capsys):
    text = (WORKFLOW / "README.md").read_text(encoding="utf-8")
    assert "workflow/kubernetes.yaml" in text and len(list(yaml.safe_load_all((WORKFLOW / "kubernetes.yaml").read_text()))) == 2
    for name in ("gpus", "slurm"):
        assert f"--profile workflow/profiles/{name}" in text
    from hfprune_nb import cli

    with pytest.raises(SystemExit):
        cli.main(["study", "run", "--help"])
    assert "--gpus" in capsys.readouterr().out


@pytest.mark.snakemake
@pytest.mark.parametrize("study", ["toy", PROJECT / "notebooks" / "studies" / "smoke.yaml"])
def test_dry_run_has_one_job_per_cell(engine, study):
    run, project = engine
    if study != "toy":
        (project / "notebooks").rename(project / "toys")
        (project / "notebooks").symlink_to(PROJECT / "notebooks")
    answer = run("local", "--dry-run", "--cores", "2", study=study)
    assert answer.returncode == 0, answer.stderr
    counts = dict(line.split()[:2] for line in (answer.stdout + answer.stderr).splitlines() if len(line.split()) == 2)
    expected = {"toy": 12, "smoke": 24}[Path(study).stem]
    assert int(counts["total"]) == expected + 2  # and two that compute nothing: publish and all


@pytest.mark.snakemake
def test_snakemake_computes_what_study_run_computes(engine):
    run, project = engine
    answer = run("local", "--cores", "2")
    assert answer.returncode == 0, answer.stderr
    table = (project / "results" / "toy" / "tables" / "table.csv").read_bytes()
    assert "Nothing to be done" in (again := run("local", "--cores", "2")).stdout + again.stderr
    (project / "results").rename(project / "engine")
    command = [sys.executable, "-c", "from hfprune_nb.cli import main; main()", "study", "run", "toy"]
    environment = os.environ | {"HFPRUNE_HOME": str(project), "PYTHONPATH": str(PROJECT)}
    subprocess.run(command, env=environment, check=True)
    assert (project / "results" / "toy" / "tables" / "table.csv").read_bytes() == table


@pytest.mark.snakemake
def test_one_cell_on_each_gpu_of_a_machine(engine):
    """Two cells at a time, one slot each: the kernels see different GPUs."""
    run, project = engine
    mark = "import os, time\nopen(f'gpu{seed}', 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])\ntime.sleep(4)"
    toys.write_stage(project, "calibration", "01_calibration.ipynb", toys.CALIBRATION, before=mark)
    answer = run("gpus", "--cores", "2", "--until", "calibration", config=["gpu_slots=2"])
    assert answer.returncode == 0, answer.stderr
    assert {(project / "notebooks" / f"gpu{seed}").read_text() for seed in (0, 1)} == {"0", "1"}


@pytest.mark.slurm
@pytest.mark.timeout(1800)
def test_smoke_study_on_a_slurm_of_one_node(tmp_path):
    environment = os.environ | {"HFPRUNE_RESULTS": str(tmp_path), "SNAKEMAKE": SNAKEMAKE}
    script = Path(__file__).parent / "slurm" / "single_node.sh"
    answer = subprocess.run([script, "smoke"], env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert (tmp_path / "smoke" / "tables" / "criterion.csv").is_file()
