"""Whether a rerun reproduced a study: each state of a number, whole tables, the command."""

import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
import synthetic

from hfprune_nb.cli.main import main
from hfprune_nb.report import compare
from hfprune_nb.report.criterion import criterion_table
from hfprune_nb.report.paired import paired_table
from hfprune_nb.report.results import collect

ROW = {"criterion": "entropy", "ratio": 0.2, "mean": 10.0, "low": 9.0, "high": 11.0}
SMALL = {"criteria": ("entropy", "one_hot_ce"), "ratios": (0.2,), "seeds": (0, 1), "n_items": 8}


def states(tmp_path, ours, theirs=ROW):
    for name, row in (("ours", ours), ("theirs", theirs)):
        (tmp_path / name).mkdir(exist_ok=True)
        pd.DataFrame([row]).to_csv(tmp_path / name / "table.csv", index=False)
    found = compare.compare(tmp_path / "ours", tmp_path / "theirs")
    return dict(zip(found["column"], found["state"], strict=True)), compare.reproduced(found)


@pytest.mark.parametrize(
    ("changes", "state", "agrees"),
    [
        ({}, compare.EQUAL, True),
        ({"mean": 10.001}, compare.ROUNDED, True),
        ({"mean": 10.5}, compare.INSIDE, True),
        ({"mean": 11.5}, compare.OUTSIDE, False),
        ({"mean": np.nan}, compare.OUTSIDE, False),
    ],
)
def test_a_number_is_equal_rounded_inside_or_outside(tmp_path, changes, state, agrees):
    found, reproduced = states(tmp_path, ROW | changes)
    assert (found["mean"], reproduced) == (state, agrees)


def test_rows_are_found_by_their_words_and_ratio(tmp_path):
    found, reproduced = states(tmp_path, ROW | {"ratio": 0.3})
    assert not reproduced and found == {"": compare.NEW}
    assert states(tmp_path, ROW | {"criterion": "random"})[1] is False


def test_equal_studies_agree_and_another_seed_is_told(tmp_path):
    for name in ("one", "two"):
        results = collect(synthetic.study(tmp_path / name, **SMALL))
        for table in (criterion_table(results), paired_table(results)):
            table.write(tmp_path / name / "tables")
    same = compare.compare(tmp_path / "one/tables", tmp_path / "two/tables")
    assert set(same["state"]) == {compare.EQUAL} and len(same) > 100
    other = collect(synthetic.study(tmp_path / "three", **SMALL | {"seeds": (8, 9)}))
    criterion_table(other).write(tmp_path / "three/tables")
    changed = compare.compare(tmp_path / "three/tables", tmp_path / "two/tables")
    assert {compare.INSIDE, compare.LOST} <= set(changed["state"]) and not compare.reproduced(changed)
    assert compare.summary(changed).set_index("table").loc["paired", compare.LOST] > 0


def test_written_numbers_keep_five_digits(tmp_path):
    results = collect(synthetic.study(tmp_path / "study", **SMALL))
    table = criterion_table(results)
    table.write(tmp_path)
    written = pd.read_csv(tmp_path / "criterion.csv")
    assert np.allclose(written["mean"], table.long["mean"], rtol=5.1e-5, equal_nan=True)
    assert max(len(text.replace(".", "").lstrip("0")) for text in written["mean"].dropna().astype(str)) <= 6


def test_the_command_compares_with_a_commit_or_a_folder(tmp_path, monkeypatch, capsys):
    project = tmp_path / "kit"
    tables = project / "results/smoke/tables"
    tables.mkdir(parents=True)
    pd.DataFrame([ROW]).to_csv(tables / "table.csv", index=False)
    home = compare.__file__.split("/hfprune_nb/")[0]
    shutil.copytree(f"{home}/notebooks", project / "notebooks")
    git = ["git", "-C", str(project), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "results"], ["commit", "-qm", "results"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setenv("HFPRUNE_HOME", str(project))
    monkeypatch.setenv("HFPRUNE_RESULTS", str(project / "results"))
    assert main(["study", "compare", "smoke"]) == 0
    assert "study smoke: 3 of 3 numbers agree" in capsys.readouterr().out
    shutil.copytree(project / "results/smoke", tmp_path / "before")
    pd.DataFrame([ROW | {"mean": 20.0}]).to_csv(tables / "table.csv", index=False)
    assert main(["study", "compare", "smoke", "--against", str(tmp_path / "before")]) == 1
    assert "outside  table: entropy, 0.2, mean 20, there 10" in capsys.readouterr().out
    assert main(["study", "compare", "smoke", "--against", "nowhere"]) == 2
    assert "--against 'nowhere' is no folder" in capsys.readouterr().err
