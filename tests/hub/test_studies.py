"""The paper's six studies run against the stand-in, then from the cache alone, and keep to the commits that they began with."""

import json
import shutil
import subprocess
import sys

import pytest
import yaml

from hub import contents
from hub.conftest import PROJECT

pytestmark = pytest.mark.slow
WHOLE, LIGHT = "llama-3.2-1b", ("llama-2-7b", "llama-3.2-3b", "qwen2.5-1.5b", "qwen2.5-7b", "qwen3-1.7b")
SHRUNKEN = yaml.safe_load((PROJECT / "tests" / "hub" / "shrunken.yaml").read_text())


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """The shrunken studies: one with every stage and task, the others as far as their evaluations, on two tasks."""
    folder = tmp_path_factory.mktemp("studies")
    for name in (WHOLE, *LIGHT):
        study = {"extends": f"{name}.yaml"} | SHRUNKEN
        if name in LIGHT:
            evaluated = SHRUNKEN["evaluation"] | {"tasks": ["piqa", "race"]}
            study |= {"evaluation": evaluated, "recovery": None, "experiments": None}
        (folder / f"small-{name}.yaml").write_text(yaml.safe_dump(study))
    return folder


@pytest.fixture
def kit(hub, studies, environment):
    for name in (*contents.GATED, *contents.OPEN):
        hub.repository("model", name)

    def run(action, name, token=contents.MEMBER, status=0, **settings):
        command = [sys.executable, "-m", "hfprune_nb", "study", action, str(studies / f"small-{name}.yaml")]
        extra = settings | ({"HF_TOKEN": token} if token else {})
        done = subprocess.run(command, env=environment | extra, capture_output=True, text=True, timeout=900)
        assert done.returncode == status, done.stderr[-3000:] + done.stdout[-1000:]
        return done.stderr if status else done.stdout

    return run


@pytest.fixture
def cards(everything):
    def read(name):
        return [json.loads(path.read_text()) for path in (everything / "results" / f"small-{name}").glob("*/*/card.json")]

    return read


@pytest.mark.timeout(1200)
def test_a_whole_study_runs_and_keeps_to_its_commits(hub, kit, cards, everything, forget):
    forget()
    assert "GB" in kit("plan", WHOLE) and not hub.requests, "planning asks nobody"
    refused = kit("run", WHOLE, token="", status=2)
    assert "is gated and no token was given: accept its licence on https://huggingface.co/meta-llama/Llama-3.2-1B" in refused
    assert "Traceback" not in refused and not list((everything / "results").glob("*/*/*/card.json"))
    kit("run", WHOLE)
    commits = json.loads((everything / "results" / f"small-{WHOLE}" / "revisions.json").read_text())
    expected = {
        f"{name}@main": hub.repository(kind, name).branches["main"]
        for kind, name in hub.repositories
        if f"{name}@main" in commits
    }
    assert commits == expected and len(commits) == 12, "the model, C4, LaMini and the nine data sets of ten tasks"
    for card in cards(WHOLE):
        assert all(commits[f"{name}@main"] == commit for name, commit in card["parameters"].get("revisions", {}).items())
    used = {name for card in cards(WHOLE) for name in card["parameters"].get("revisions", {})}
    assert {f"{name}@main" for name in used} == set(commits)
    assert hub.asked("GET store .*LaMini") and len(hub.asked(r"GET hub .*/revision/main")) >= 12

    moved = hub.commit("model", "meta-llama/Llama-3.2-1B", contents.model("llama", seed=9), gated=True)
    assert moved not in commits.values()
    hub.requests.clear()
    assert "nothing to do" in kit("run", WHOLE) and not hub.asked("revision")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.long) for name in LIGHT[:-1]), LIGHT[-1]])
def test_the_other_studies_reach_their_evaluations(kit, cards, name):
    kit("run", name)
    evaluated = [card for card in cards(name) if card["stage"] == "evaluation"]
    assert len(evaluated) == 2
    assert all(set(card["parameters"]["revisions"]) >= {"allenai/c4", "baber/piqa", "EleutherAI/race"} for card in evaluated)


@pytest.mark.timeout(1200)
def test_a_study_that_was_run_once_needs_no_hub(hub, kit, everything):
    name = LIGHT[-1]
    kit("run", name)
    folder = everything / "results" / f"small-{name}"
    before = {path.parent.name for path in folder.glob("*/*/DONE")}
    shutil.rmtree(folder / "evaluation")
    kit("run", name, HF_HUB_OFFLINE="1")
    assert {path.parent.name for path in folder.glob("*/*/DONE")} == before
    shutil.rmtree(folder / "evaluation")
    hub.stop()
    try:
        kit("run", name)
    finally:
        hub.start()
    assert {path.parent.name for path in folder.glob("*/*/DONE")} == before
