"""The workflow engine: its graph is the study's, and what it computes is what `hfprune study run` computes.

Snakemake lives in an environment of its own, named by the variable SNAKEMAKE; these tests are chosen by their markers alone.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import toys
import yaml
from cluster import Cluster

PROJECT = Path(__file__).resolve().parent.parent
WORKFLOW = PROJECT / "workflow"
PROFILES = ("local", "gpus", "slurm", "kubernetes")
MANIFESTS = list(yaml.safe_load_all((WORKFLOW / "kubernetes.yaml").read_text(encoding="utf-8")))
SNAKEMAKE = shutil.which(os.environ.get("SNAKEMAKE", "snakemake")) or "snakemake"


@pytest.fixture(scope="module")
def hfprune(tmp_path_factory):
    """The command `hfprune` of this checkout as an executable file."""
    path = tmp_path_factory.mktemp("bin") / "hfprune"
    call = f"{sys.executable} -c 'import sys; from hfprune_nb.cli.main import main; sys.exit(main())'"
    path.write_text(f'#!/bin/sh\nexport PYTHONPATH={PROJECT}\nexec {call} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def smoke(hfprune, tmp_path_factory):
    """The tables of the undisturbed `hfprune study run smoke`."""
    results = tmp_path_factory.mktemp("reference")
    subprocess.run([hfprune, "study", "run", "smoke"], env=os.environ | {"HFPRUNE_RESULTS": str(results)}, check=True)
    return tables(results / "smoke")


@pytest.fixture
def engine(hfprune, tmp_path):
    """Return a function that runs Snakemake on the toy study with a profile, and the study's project."""
    project = toys.write_project(tmp_path / "project")
    environment = os.environ | {"HFPRUNE_HOME": str(project)}
    environment.pop("HFPRUNE_RESULTS", None)

    def run(profile, *options, study="toy", config=(), timeout=None, **variables):
        command = [SNAKEMAKE, "--snakefile", WORKFLOW / "Snakefile", "--profile", WORKFLOW / "profiles" / profile, *options]
        command += ["--config", f"study={study}", f"hfprune={hfprune}", *config]
        return subprocess.run(command, cwd=tmp_path, env=environment | variables, capture_output=True, text=True, timeout=timeout)

    return run, project


def tables(folder):
    """Return name -> bytes of a study's exported tables."""
    return {path.name: path.read_bytes() for path in (folder / "tables").iterdir()}


def times_computed(folder):
    """Return job -> how often it was computed, by all runs of a study together."""
    entries = [json.loads(line) for path in (folder / "log").iterdir() for line in path.open()]
    return Counter(entry["job"] for entry in entries if entry["event"] == "computed")


def test_profiles_are_complete():
    for name in PROFILES:
        profile = yaml.safe_load((WORKFLOW / "profiles" / name / "config.yaml").read_text(encoding="utf-8"))
        assert profile["retries"] >= 1 and profile["rerun-triggers"] == "mtime" and {"cores", "jobs"} & profile.keys(), name
        assert profile["rerun-incomplete"] and profile["nolock"], f"{name}: a killed Snakemake must go on without being asked"


def test_the_readme_names_profiles_files_and_options_that_exist(capsys):
    text = (WORKFLOW / "README.md").read_text(encoding="utf-8")
    for name in PROFILES[1:]:
        assert f"workflow/profiles/{name}" in text
    for name in ("Dockerfile", "kubernetes.yaml"):
        assert f"workflow/{name}" in text and (WORKFLOW / name).is_file()
    from hfprune_nb.cli.main import main

    with pytest.raises(SystemExit):
        main(["study", "run", "--help"])
    assert "--gpus" in capsys.readouterr().out


@pytest.mark.snakemake
@pytest.mark.parametrize("profile", ["local", "kubernetes"])
@pytest.mark.parametrize("study", ["toy", PROJECT / "notebooks" / "studies" / "smoke.yaml"])
def test_dry_run_has_one_job_per_cell(engine, study, profile):
    run, project = engine
    variables = {} if study == "toy" else {"HFPRUNE_HOME": str(PROJECT), "HFPRUNE_RESULTS": str(project / "results")}
    answer = run(profile, "--dry-run", "--cores", "2", study=study, **variables)
    assert answer.returncode == 0, answer.stderr
    counts = dict(line.split()[:2] for line in (answer.stdout + answer.stderr).splitlines() if len(line.split()) == 2)
    expected = {"toy": 12, "smoke": 26}[Path(study).stem]
    assert int(counts["total"]) == expected + 2  # and two that compute nothing: export and all


@pytest.mark.snakemake
def test_snakemake_computes_what_study_run_computes(engine, hfprune):
    run, project = engine
    answer = run("local", "--cores", "2")
    assert answer.returncode == 0, answer.stderr
    found = tables(project / "results" / "toy")
    assert "Nothing to be done" in (again := run("local", "--cores", "2")).stdout + again.stderr
    (project / "results").rename(project / "engine")
    subprocess.run([hfprune, "study", "run", "toy"], env=os.environ | {"HFPRUNE_HOME": str(project)}, check=True)
    assert tables(project / "results" / "toy") == found


@pytest.mark.snakemake
def test_a_killed_snakemake_goes_on_by_the_same_command(engine):
    run, project = engine
    with pytest.raises(subprocess.TimeoutExpired):
        run("local", "--cores", "2", timeout=10)
    answer = run("local", "--cores", "2")
    assert answer.returncode == 0, answer.stderr
    assert set(times_computed(project / "results" / "toy").values()) == {1}


@pytest.mark.snakemake
@pytest.mark.timeout(900)
def test_smoke_study_by_snakemake(engine, smoke, tmp_path):
    run, _ = engine
    answer = run("local", "--cores", "2", study="smoke", HFPRUNE_HOME=str(PROJECT), HFPRUNE_RESULTS=str(tmp_path))
    assert answer.returncode == 0, answer.stderr
    assert tables(tmp_path / "smoke") == smoke


@pytest.mark.snakemake
def test_one_cell_on_each_gpu_of_a_machine(engine):
    """Two jobs at a time, one slot each: the kernels see different GPUs."""
    run, project = engine
    mark = "import os, time\nopen(f'gpu{seed}', 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])\ntime.sleep(4)"
    toys.write_stage(project, "calibration", "01_calibration.ipynb", toys.CALIBRATION, before=mark)
    answer = run("gpus", "--cores", "2", "--until", "calibration", config=["gpu_slots=2"])
    assert answer.returncode == 0, answer.stderr
    assert {(project / "notebooks" / f"gpu{seed}").read_text() for seed in (0, 1)} == {"0", "1"}


# What a notebook does once and never again, as the file that it leaves behind tells.
ONCE = """
from pathlib import Path
import time

if not Path({file!r}).exists():
    Path({file!r}).touch()
    {what}
"""


@pytest.fixture(scope="module")
def kubernetes(hfprune, tmp_path_factory):
    """The toy study by Snakemake's executor for Kubernetes, started twice: (answers, cluster, results, undisturbed results).

    Scoring wants two GPUs. One of its notebooks fails once, and the node under the figures is lost once.
    """
    top = tmp_path_factory.mktemp("kubernetes")
    project, volume, wheels = toys.write_project(top / "project"), top / "volume", top / "wheels"
    fails = ONCE.format(file=str(top / "failed"), what="raise RuntimeError('a bad node')")
    hangs = ONCE.format(file=str(top / "evict"), what="time.sleep(100)")
    scoring = (f"{toys.SCORING[0]}\nprocesses: int = 1", toys.SCORING[1])
    toys.write_stage(project, "scoring", "02_scoring.ipynb", scoring, before=fails)
    toys.write_stage(project, "figures", "06_figures.ipynb", toys.FIGURES, before=hangs)
    toys.write_study(project, scoring={"device": "cuda", "processes": 2})
    shutil.copytree(WORKFLOW, project / "workflow")
    volume.mkdir()
    (top / "pods").mkdir()

    # As workflow/Dockerfile has it: Snakemake's Python first, the storage plugin at hand without a network.
    python = Path(SNAKEMAKE).with_name("python")
    plugin = ["--no-deps", "--dest", wheels, "snakemake-storage-plugin-fs"]
    subprocess.run([python, "-m", "pip", "download", "--quiet", *plugin], check=True)
    image = {"PATH": f"{python.parent}:{os.environ['PATH']}", "HOME": str(top), "HFPRUNE_HOME": str(project)}
    image |= {"HFPRUNE_RESULTS": str(volume / "results"), "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_FIND_LINKS": str(wheels)}

    role, job = (item for item in MANIFESTS if item["kind"] in ("Role", "Job"))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    command = [SNAKEMAKE, *container["command"][1:], "--jobs", "2", "--seconds-between-status-checks", "1"]
    command += ["--kubernetes-persistent-volumes", f"hfprune:{volume}", "--default-storage-prefix", volume / "snakemake"]
    command += ["--latency-wait", "5", *container["args"][:3], "study=toy", f"hfprune={hfprune}"]
    with Cluster(top / "pods", image, role["rules"], top / "evict") as cluster:
        outside = image | {"KUBECONFIG": str(cluster.configuration())}
        answers = [subprocess.run(command, cwd=project, env=outside, capture_output=True, text=True) for _ in range(2)]
    subprocess.run([hfprune, "study", "run", "toy"], env=os.environ | {"HFPRUNE_HOME": str(project)}, check=True)
    return answers, cluster, volume / "results" / "toy", project / "results" / "toy"


def containers(cluster, stage):
    """Return the containers of all pods that were asked for a job of a stage."""
    found = [job["spec"]["template"]["spec"]["containers"][0] for job in cluster.submitted]
    return [container for container in found if f"--allowed-rules {stage} " in container["args"][1]]


def validate(path):
    """Check a file of Kubernetes objects against the schemas of the API, unknown fields included."""
    command = [Path(SNAKEMAKE).with_name("kubernetes-validate"), "--strict", path]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.snakemake
def test_manifests_are_kubernetes_objects():
    validate(WORKFLOW / "kubernetes.yaml")


@pytest.mark.snakemake
@pytest.mark.timeout(600)
def test_pods_compute_what_study_run_computes(kubernetes):
    answers, _, results, undisturbed = kubernetes
    assert answers[1].returncode == 0, answers[1].stderr
    assert tables(results) == tables(undisturbed)
    assert times_computed(results) == times_computed(undisturbed) and len(times_computed(results)) == 12


@pytest.mark.snakemake
def test_a_failed_container_ends_snakemake_and_the_next_start_goes_on(kubernetes):
    """The executor asks for the log of a restart that never was; kubernetes.yaml therefore starts Snakemake again."""
    answers, cluster, _, _ = kubernetes
    assert answers[0].returncode == 1 and answers[1].returncode == 0
    assert len(cluster.refused) == 1 and "previous terminated container" in cluster.refused[0]
    assert next(item for item in MANIFESTS if item["kind"] == "Job")["spec"]["backoffLimit"] > 1


@pytest.mark.snakemake
def test_the_cell_of_a_lost_node_is_tried_again_with_more_memory(kubernetes):
    _, cluster, _, _ = kubernetes
    first, second = (container["resources"]["limits"]["memory"] for container in containers(cluster, "figures"))
    assert int(second.rstrip("M")) == 2 * int(first.rstrip("M"))


@pytest.mark.snakemake
def test_pods_ask_for_what_the_cell_needs_and_are_valid(kubernetes, tmp_path):
    _, cluster, _, _ = kubernetes
    submitted = tmp_path / "submitted.yaml"
    submitted.write_text(yaml.safe_dump_all({"apiVersion": "batch/v1", "kind": "Job"} | job for job in cluster.submitted))
    validate(submitted)
    for stage, number in (("calibration", None), ("scoring", "2"), ("pruning", None)):
        assert {container["resources"]["limits"].get("nvidia.com/gpu") for container in containers(cluster, stage)} == {number}


@pytest.mark.slurm
@pytest.mark.timeout(1800)
def test_smoke_study_on_a_slurm_of_one_node(hfprune, smoke, tmp_path):
    environment = os.environ | {"HFPRUNE_RESULTS": str(tmp_path), "SNAKEMAKE": SNAKEMAKE, "HFPRUNE": str(hfprune)}
    script = Path(__file__).parent / "slurm" / "single_node.sh"
    answer = subprocess.run([script, "smoke"], env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert tables(tmp_path / "smoke") == smoke
