"""`hfprune prune`, and recipes in study files."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import hfprune_nb
from hfprune_nb import models
from hfprune_nb.cli.main import main
from hfprune_nb.errors import UserError
from hfprune_nb.inputs import hub
from hfprune_nb.method.scoring import engine
from hfprune_nb.runs import recipes, study

TEXT = "data/smoke/corpus.txt"
SMALL = ["--corpus", TEXT, "--held-out", TEXT, "--seq-len", "32", "--windows", "8", "--held-out-windows", "4", "--device", "cpu"]


def prune(out, *more):
    return main(["prune", "tiny-random-llama", "--out", str(out), *SMALL, *more])


def test_a_recipe_makes_a_plain_checkpoint_with_its_card(tmp_path, capsys):
    assert prune(tmp_path / "model", "--ratio", "0.2") == 0
    said, facts = capsys.readouterr().out, json.loads((tmp_path / "model/pruning.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16, "the original's own"
    assert models.count_parameters(model) == facts["parameters"] < facts["dense_parameters"]
    assert [mlp.width for mlp in models.gated_mlps(model)] == facts["widths"]
    card = (tmp_path / "model/README.md").read_text()
    found = facts["held_out"][TEXT]
    assert f"| {found['dense_perplexity']:.2f} | {found['perplexity']:.2f} | {found['kl']:.3f} |" in card
    assert "KL-Fisher" in card and "{" not in card.replace('("FOLDER")', "")
    assert f"{facts['dense_parameters']:,} -> {facts['parameters']:,}" in said and 0 < found["kl"] < 10
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "no unfinished folder is left"


@pytest.mark.parametrize("spec", ["[entropy, wanda]", "{entropy: "])
def test_what_is_no_spec_is_refused(tmp_path, capsys, spec):
    with pytest.raises(SystemExit):
        prune(tmp_path / "model", "--ratio", "0.2", "--criterion", spec)
    assert "is no name" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_widths_may_differ(tmp_path):
    assert prune(tmp_path / "model", "--neuron-ratio", "0.3", "--allocation", "global", "--compensation", "none") == 0
    facts = json.loads((tmp_path / "model/pruning.json").read_text())
    model = hfprune_nb.load(tmp_path / "model")
    assert len(set(facts["widths"])) > 1 and [mlp.width for mlp in models.gated_mlps(model)] == facts["widths"]
    assert "hfprune_nb.load" in (tmp_path / "model/README.md").read_text()


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    assert prune(tmp_path / "whole", "--ratio", "0.2", "--recipe", "hfprune") == 0
    score = engine.score

    def interrupted(*arguments, **settings):
        score(*arguments, **settings | {"checkpoint_every": 1})
        raise KeyboardInterrupt

    monkeypatch.setattr("hfprune_nb.method.scoring.score", interrupted)
    assert prune(tmp_path / "again", "--ratio", "0.2", "--recipe", "hfprune") == 130
    assert not (tmp_path / "again").exists()
    monkeypatch.undo()
    assert prune(tmp_path / "again", "--ratio", "0.2", "--recipe", "hfprune") == 0
    whole, again = (tmp_path / name / "model.safetensors" for name in ("whole", "again"))
    assert whole.read_bytes() == again.read_bytes()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--ratio", "20"], "--ratio must lie between 0 and 1: write 20 % as 0.2"),
        (["--ratio", "0.2", "--recipe", "best"], "recipe: unknown 'best'"),
        (["--ratio", "0.2", "--criterion", "entropi"], "did you mean"),
        (["--ratio", "0.2", "--criterion", "magnitude", "--allocation", "global"], "are not comparable between layers"),
        (["--ratio", "0.2", "--compensation", "magic"], "compensation 'magic' is unknown"),
        (["--ratio", "0.2", "--allocation", "{depth: {windows: 9}}"], "measures on 9 calibration windows, and there are 8"),
        (["--ratio", "0.9"], "cannot be reached"),
        (["--ratio", "0.2", "--windows", "100000"], "lower n_windows"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(tmp_path, capsys, more, sentence):
    assert prune(tmp_path / "model", *more) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.strip().splitlines()[-1:]) == 1
    assert not list(tmp_path.iterdir())


def test_a_hub_model_is_that_of_the_revision_asked_for(tmp_path, monkeypatch, capsys):
    def load(name, **_):
        raise UserError(f"{name} at {hub.pins()[name]}")

    monkeypatch.setenv(hub.REVISIONS, "{}")
    monkeypatch.setattr("hfprune_nb.models.load", load)
    commit, out = "0123456789" * 4, str(tmp_path / "model")
    assert main(["prune", "owner/name", "--revision", commit, "--out", out, "--ratio", "0.2"]) == 2
    assert f"owner/name at {commit}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.txt").write_text("mine")
    assert prune(tmp_path / "model", "--ratio", "0.2") == 2
    assert "exists already: name a new folder" in capsys.readouterr().err
    assert (tmp_path / "model/mine.txt").read_text() == "mine"


def test_padding_is_not_counted_and_an_allocation_reads_beside_a_criterion_of_the_same_name(tmp_path):
    variant = ["--criterion", "{wanda: {p: 2}}", "--allocation", "owl", "--compensation", "none"]
    assert prune(tmp_path / "model", "--neuron-ratio", "0.3", "--padded", *variant) == 0
    facts = json.loads((tmp_path / "model/pruning.json").read_text())
    assert len(set(facts["widths"])) > 1 and facts["loads_with"] == "plain, padded"
    assert facts["parameters"] == pytest.approx(facts["dense_parameters"] * (1 - facts["achieved_ratio"]))
    content = {"extends": "smoke", "criteria": [{"wanda": {"p": 2}}], "allocations": ["owl"]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    (scored,) = {str(job.parameters["criteria"]) for job in study.load(tmp_path / "mine.yaml").jobs if job.stage == "scoring"}
    assert scored == str([{"wanda": {"p": 2}}, {"wanda": {}, "as": "wanda_default"}])


@pytest.mark.parametrize("name", recipes.names())
def test_a_study_file_names_a_recipe(tmp_path, name):
    content = {"extends": "smoke", "recipe": name, "criteria": None}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    recipe, loaded = recipes.find(name), study.load(tmp_path / "mine.yaml")
    jobs = [job.parameters for job in loaded.jobs if job.stage == "pruning"]
    assert {job["criterion"] for job in jobs} == {recipe.criterion.name}
    assert {job["compensation"] for job in jobs} == {recipe.compensation}
