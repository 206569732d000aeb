"""Tables from synthetic evaluations: numbers, published values apart, degraded studies, bad input."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import synthetic

from hfprune_nb.errors import UserError
from hfprune_nb.report import beside_paper, protocol
from hfprune_nb.report.criterion import criterion_table, overview_table
from hfprune_nb.report.paired import paired_table, with_detectable
from hfprune_nb.report.paper import INCONSISTENT, read
from hfprune_nb.report.results import collect
from hfprune_nb.report.style import Legend
from hfprune_nb.report.table import ABSENT, Table, format_cell
from hfprune_nb.report.verdict import verdict


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return collect(synthetic.study(tmp_path_factory.mktemp("study"), n_items=30))


@pytest.fixture(scope="module")
def criterion(results):
    return criterion_table(results)


@pytest.fixture(scope="module")
def paired(results):
    return paired_table(results)


def cell(table, column, criterion="entropy", ratio=0.2):
    long = table.long
    found = long[(long["column"] == column) & (long["criterion"] == criterion) & np.isclose(long["ratio"], ratio)]
    assert len(found) == 1
    return found.iloc[0]


def test_means_are_those_of_the_items(results, criterion):
    items = results.items[(results.items["criterion"] == "entropy") & (results.items["ratio"] == 0.2)]
    by_task = 100 * items.groupby("task")["value"].mean()
    assert cell(criterion, "boolq")["mean"] == pytest.approx(by_task["boolq"])
    assert cell(criterion, "average")["mean"] == pytest.approx(by_task.mean())
    windows = results.perplexity[(results.perplexity["criterion"] == "dense") & (results.perplexity["corpus"] == "c4")]
    dense = cell(criterion, "perplexity:c4", "dense", 0)
    assert dense["mean"] == pytest.approx(np.exp(windows["nll"].sum() / windows["tokens"].sum()))
    assert dense["low"] < dense["mean"] < dense["high"]


def test_rows_stand_in_the_order_of_the_paper(criterion):
    assert list(criterion.display["Criterion"][:6]) == list(
        map(Legend().label, ("dense", *synthetic.THREE, "magnitude", "random"))
    )
    assert list(criterion.display["Ratio"].unique()) == ["0 %", "10 %", "20 %", "30 %"]


def test_seeds_are_counted_and_one_seed_is_told(criterion):
    assert cell(criterion, "average")["n_seeds"] == 3
    assert cell(criterion, "average", "magnitude")["n_seeds"] == 1
    assert "one seed" in cell(criterion, "average", "magnitude")["note"]


def test_dense_has_no_fidelity_and_shows_a_dash(criterion):
    assert np.isnan(cell(criterion, "js:c4", "dense", 0)["mean"])
    assert criterion.display.loc[0, "JS distance c4"] == ABSENT


def test_published_values_stand_beside_ours_and_never_inside(criterion):
    ablation, fidelity = beside_paper.ablation_table(criterion), beside_paper.fidelity_table(criterion)
    paper = ablation.long[ablation.long["source"] == "paper"].set_index(["criterion", "ratio", "column"])["mean"]
    assert paper["entropy", 0.2, "average"] == 53.1 and paper["one_hot_ce", 0.3, "average"] == 46.8
    assert paper["dense", 0.0, "average"] == 58.3 and paper["self_distillation", 0.2, "average"] == 51.9
    for table in (ablation, fidelity):
        measured = table.long[table.long["source"] == "measured"]
        assert set(measured["model"]) == {"smollm2-135m"}
        assert set(table.long.loc[table.long["source"] == "paper", "model"]) == {"LLaMA-2-7B"}
        assert all("paper" in name or "measured" in name for name in table.display.columns[3:])
    row = fidelity.display.set_index(["Ratio", "Criterion"]).loc["20 %", "One-hot CE"]
    assert row["JS distance, paper: LLaMA-2-7B"] == "0.243"
    assert row["Top-15 Jaccard, paper: LLaMA-2-7B"] == f"0.439 {INCONSISTENT}"
    assert "should fall" in row["Remark on the paper's value"]
    assert set(criterion.long["source"]) == {"measured"}


def test_paired_table_counts_its_family_and_corrects_for_it(paired):
    average = paired.long[paired.long["column"] == "average"]
    assert len(average) == 9 and (average["p_holm"] >= average["p"]).all()
    assert "9 comparisons" in paired.notes[1]
    assert set(paired.long["column"]) == {
        "average",
        "perplexity:c4",
        "perplexity:wikitext",
        "js:c4",
        "js:wikitext",
        "kl:c4",
        "kl:wikitext",
    }


def test_verdicts_follow_the_interval_and_the_direction(paired):
    for row in paired.long.to_dict("records"):
        crosses = row["low"] <= 0 <= row["high"]
        assert crosses == (row["verdict"] == "interval crosses zero")
        if not crosses:
            lower_is_better = row["measure"] != "average"
            better = row["a"] if (row["mean"] < 0) == lower_is_better else row["b"]
            assert row["verdict"].startswith(Legend().label(better))


def test_the_overview_marks_what_is_decided_against_entropy_and_nothing_else(criterion, paired):
    overview = overview_table(criterion, paired)
    assert set(overview.long["column"]) == {"average", "perplexity:c4", "js:c4"}
    rows = paired.long[paired.long["column"].isin(overview.long["column"]) & (paired.long["a"] == "entropy")]
    decided = {(row["ratio"], row["column"]): row["verdict"] for row in rows[rows["b"] == "one_hot_ce"].to_dict("records")}
    expected = {"One-hot CE better": "better", f"{Legend().label('entropy')} better": "worse"}
    cells = overview.long[overview.long["criterion"] == "one_hot_ce"].to_dict("records")
    assert {(cell["ratio"], cell["column"]): cell["against_reference"] for cell in cells} == {
        place: expected.get(verdict, "") for place, verdict in decided.items()
    }
    assert set(overview.long.loc[~overview.long["criterion"].isin(synthetic.THREE), "against_reference"]) == {""}
    undecided = paired.long.assign(verdict="interval crosses zero")
    plain = overview_table(criterion, Table("paired", "", undecided, paired.display, ()))
    lost = paired.long.assign(verdict=f"{Legend().label('entropy')} better")
    marked = overview_table(criterion, Table("paired", "", lost, paired.display, ()))
    row = marked.display.set_index(["Ratio", "Criterion"]).loc["20 %", "One-hot CE"]
    assert row["perplexity c4"].endswith("] ▼") and row.str.count("▼").sum() == 3
    without = plain.display.set_index(["Ratio", "Criterion"]).loc["20 %", "One-hot CE"]
    assert row["perplexity c4"] == f"{without['perplexity c4']} ▼"


def test_difference_of_log_perplexity_is_that_of_the_cells(criterion, paired):
    pair = "column == 'perplexity:c4' and a == 'entropy' and b == 'one_hot_ce' and ratio == 0.2"
    row = paired.long.query(pair).iloc[0]
    ours = np.log(cell(criterion, "perplexity:c4")["mean"] / cell(criterion, "perplexity:c4", "one_hot_ce")["mean"])
    assert row["mean"] == pytest.approx(ours)


def test_protocol_names_what_a_reader_must_know(results):
    note = protocol.protocol_note(results)
    for fact in (
        "smollm2-135m",
        "bfloat16",
        "lm-eval 0.4.12",
        "acc_norm",
        "0-shot",
        "version 1.0",
        "30 of 1000 items",
        "BOS yes",
        "seeds: 0, 1, 2",
        "30 windows of c4 (511 tokens each)",
        "dequantised",
        "achieved 19.98 %",
    ):
        assert fact in note, fact


def test_detectable_differences_are_those_of_the_standard_error(paired):
    row = paired.long[paired.long["column"] == "average"].iloc[0]
    # Three seeds leave more than the 2.80 standard errors of a known spread, and Holm's level reaches further into their tails.
    assert row["detectable_holm"] / 1.5 > row["detectable"] > 2.8016 * row["standard_error"] > 0
    assert paired.long["seed_share"].between(0, 1).all()
    assert f"{row['detectable']:.1f} / {row['detectable_holm']:.1f}" in list(paired.display["Detectable"])


def test_every_table_says_what_it_could_not_have_found(criterion, paired):
    noted = with_detectable(criterion, paired)
    largest = paired.long.loc[paired.long["column"] == "average", "detectable"].max()
    for table in (noted, beside_paper.ablation_table(noted), beside_paper.fidelity_table(noted)):
        assert f"average of tasks, points: {largest:.1f}" in table.markdown()
    nothing = Table("paired", "", paired.long.iloc[:0], paired.display, ())
    assert with_detectable(criterion, nothing) is criterion


def test_the_papers_gaps_stand_beside_ours(paired):
    sentences = beside_paper.paper_sentences(paired)
    assert any("prints +0.5 points for Entropy (HFPrune) minus One-hot CE at 20 %" in s for s in sentences)


def test_protocol_is_written_for_machines(results, tmp_path):
    facts = json.loads(protocol.write_protocol(results, tmp_path).read_text())
    assert facts["settings"]["lm_eval"] == ["0.4.12"] and facts["calibration_seeds"] == [0, 1, 2]
    assert {task["task"]: task["metric"] for task in facts["tasks"]} == synthetic.TASKS
    assert facts["held_out_windows"]["perplexity"] == {"c4": 30, "wikitext": 30}
    assert len(facts["models"]) == len(results.models) and facts["notes"] == results.notes


def test_the_note_tells_versions_and_leaves_machine_and_commit_to_the_card(tmp_path):
    folder = synthetic.evaluation(tmp_path / "dense")
    card = {"versions": {"torch": "2.13.0"}, "platform": "Linux-6.1-x86_64", "cpu_count": 2, "threads": 1, "facts": {}}
    notes = []
    for commit, machine in (("0123456789abcdef", "Abacus 1"), ("fedcba9876543210", "Abacus 2")):
        facts = {"facts": {"hardware": machine}, "git": {"commit": commit, "dirty": True}}
        (folder / "card.json").write_text(json.dumps(card | facts))
        notes.append(protocol.protocol_note(collect([folder])))
    assert "torch 2.13.0" in notes[0] and "cards.json" in notes[0]
    assert notes[0] == notes[1], "the same results on another machine make the same tables"


def test_an_evaluation_of_ones_own_does_not_hide_the_study(tmp_path):
    study = [synthetic.evaluation(tmp_path / "dense"), synthetic.evaluation(tmp_path / "entropy", "entropy", 0.2, 0)]
    own = synthetic.evaluation(tmp_path / "own", n_items=8)
    results = collect([own, *study])
    assert len(results.models) == 2 and set(results.items["doc_id"]) == set(range(40))
    assert any(f"other settings: {tmp_path.name}/own (limit 8)" in note for note in results.notes)
    with pytest.raises(UserError, match=r"more than once, \S+/dense \(limit 40\); \S+/own \(limit 8\): list the ones"):
        collect([study[0], own])


def test_it_is_told_which_self_distillation_stands_beside_the_papers(tmp_path):
    folders = [synthetic.evaluation(tmp_path / "dense"), synthetic.evaluation(tmp_path / "sd", "self_distillation", 0.2, 0)]
    alone = beside_paper.ablation_table(criterion_table(collect(folders)))
    assert any("weight-wise and not in this study" in note for note in alone.notes)
    folders.append(synthetic.evaluation(tmp_path / "own", "variant", 0.2, 0))
    both = beside_paper.ablation_table(criterion_table(collect(folders)))
    (note,) = [note for note in both.notes if "weight-wise" in note]
    assert f"weight-wise: {both.legend.label('variant')}, a row of its own." in note
    assert {"self_distillation", "variant"} <= set(both.long["criterion"])


def test_the_commits_of_models_texts_and_tasks_stand_under_the_tables(tmp_path):
    folder = synthetic.evaluation(tmp_path / "dense")
    summary = json.loads((folder / "summary.json").read_text())
    summary["protocol"]["commits"] = {"allenai/c4": "0a" * 20, "baber/piqa": "1b" * 20}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "Commits read: allenai/c4 0a0a0a0a0a0a, baber/piqa 1b1b1b1b1b1b." in protocol.protocol_note(collect([folder]))


def test_tuned_models_and_skipped_tasks_are_told_and_not_mixed_in(tmp_path):
    dense = synthetic.evaluation(tmp_path / "dense", skipped={"race": "race has no offline data and was skipped."})
    tuned = synthetic.evaluation(tmp_path / "tuned", tuned=True)
    compensated = synthetic.evaluation(tmp_path / "compensated", compensation="bias")
    results = collect([tuned, dense, compensated])
    assert len(results.models) == 1
    note = protocol.protocol_note(results)
    assert "race has no offline data" in note and "2 evaluations of tuned or compensated models are not shown" in note
    with pytest.raises(UserError, match="tuned or compensated models only"):
        collect([tuned])


def test_written_files_are_complete_and_reproducible(criterion, paired, tmp_path):
    for folder in ("one", "two"):
        for table in (criterion, paired, beside_paper.ablation_table(criterion), beside_paper.fidelity_table(criterion)):
            table.write(tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(
        f"{table}.{ending}" for table in ("ablation", "criterion", "fidelity", "paired") for ending in ("csv", "html", "md")
    )
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    read = pd.read_csv(tmp_path / "one" / "criterion.csv")
    assert read["mean"].to_numpy() == pytest.approx(criterion.long["mean"].to_numpy(), rel=5.1e-5, nan_ok=True)
    assert "Protocol." in (tmp_path / "one" / "ablation.md").read_text()
    assert "<table" in (tmp_path / "one" / "criterion.html").read_text()


def test_crows_pairs_is_no_accuracy_and_gets_a_second_average(tmp_path):
    tasks = {"boolq": "acc", "crows_pairs_english": "pct_stereotype"}
    folders = synthetic.study(tmp_path, ("entropy",), (0.2,), tasks=tasks)
    table = criterion_table(collect(folders))
    assert cell(table, "average_without_crows")["mean"] == pytest.approx(cell(table, "boolq")["mean"])
    assert cell(table, "average")["mean"] != cell(table, "average_without_crows")["mean"]
    averages = table.long.loc[table.long["measure"] == "average", "column"]
    assert averages.iloc[0] == "average_without_crows", "the first average stands for all, in the overview and in the verdict"


def test_only_tasks_of_every_model_enter_the_average(tmp_path):
    folders = synthetic.study(tmp_path, ("entropy",), (0.2,), seeds=(0,))
    items = pd.read_parquet(folders[1] / "items.parquet")
    items[items["task"] != "boolq"].to_parquet(folders[1] / "items.parquet")
    table = criterion_table(collect(folders))
    assert "average of 3 tasks, %" in table.display and table.display.loc[1, "boolq acc, %"] == ABSENT


@pytest.mark.parametrize("removed", ["items", "perplexity", "fidelity", "next_tokens"])
def test_a_study_without_one_kind_of_measurement_says_so(tmp_path, removed):
    folders = synthetic.study(tmp_path, ("entropy", "one_hot_ce"), (0.2,))
    for path in tmp_path.glob(f"*/{removed}.parquet"):
        path.unlink()
    results = collect(folders)
    criterion, paired = criterion_table(results), paired_table(results)
    beside_paper.ablation_table(criterion).markdown()
    beside_paper.fidelity_table(criterion).markdown()
    assert verdict(criterion, paired)["sentences"]
    assert removed == "next_tokens" or "No " in protocol.protocol_note(results)


def test_one_criterion_one_seed_and_no_dense_model(tmp_path):
    results = collect(synthetic.study(tmp_path, ("entropy",), (0.2,), seeds=(0,), dense=False))
    criterion, paired = criterion_table(results), paired_table(results)
    assert paired.long.empty and "nothing to compare" in paired.notes[0] and "No rows." in paired.markdown()
    assert "dense model was not evaluated" in criterion.markdown()
    assert verdict(criterion, paired)["sentences"] == [
        "No two criteria were evaluated at the same ratio on the same items and seeds, so nothing is compared."
    ]


def test_one_seed_has_differences_but_no_verdict(tmp_path):
    results = collect(synthetic.study(tmp_path, ("entropy", "self_distillation"), (0.3,), seeds=(0,)))
    criterion, paired = criterion_table(results), paired_table(results)
    assert set(paired.long["verdict"]) == {"one seed: no verdict"} and paired.long[["p", "p_holm", "detectable"]].isna().all(
        axis=None
    )
    clear = paired.long.set_index("column").loc["perplexity:c4"]
    assert clear["high"] < 0 and clear["p_items"] < 0.001, "better on these windows, for this seed"
    assert "no p-value, no verdict" in paired.markdown()
    assert not any(" better than" in sentence for sentence in verdict(criterion, paired)["sentences"])
    assert set(overview_table(criterion, paired).long["against_reference"]) == {""}


def test_no_interval_leaves_what_the_measure_can_be(tmp_path):
    folder = synthetic.evaluation(tmp_path / "dense", n_items=6)
    items = pd.read_parquet(folder / "items.parquet")
    items.assign(value=(items["doc_id"] > 0).astype(float)).to_parquet(folder / "items.parquet")
    found = cell(criterion_table(collect([folder])), "boolq", "dense", 0)
    assert found["low"] < found["mean"] == pytest.approx(100 * 5 / 6) and found["high"] == 100


def test_only_the_dense_model(tmp_path):
    results = collect(synthetic.study(tmp_path, ()))
    criterion = criterion_table(results)
    assert "Nothing of this table was measured" in beside_paper.fidelity_table(criterion).markdown()
    assert list(criterion.display["Criterion"]) == ["Dense"]


def test_a_variant_and_an_allocation_get_their_rows_their_pairs_and_their_names(tmp_path):
    folders = synthetic.study(tmp_path / "plain", ("entropy", "one_hot_ce", "variant", "random"), (0.2,))
    facts = {"allocation": "global", "allocation_spec": "global", "notes": ["Layers have different widths."]}
    folders += [synthetic.evaluation(tmp_path / f"global-{seed}", "entropy", 0.2, seed, **facts) for seed in (0, 1, 2)]
    results = collect(folders)
    criterion, paired = criterion_table(results), paired_table(results)
    names = ["Dense", "One-hot CE", "Self-distillation (alpha 0.4)", "Entropy (HFPrune)", "Entropy (HFPrune), Global", "Random"]
    assert list(criterion.display["Criterion"]) == names
    assert set(criterion.long["allocation"]) == {"uniform", "global"} and "different widths" in criterion.markdown()
    tested = {("variant", "entropy"), ("one_hot_ce", "entropy"), ("entropy", "entropy@global")}
    assert set(zip(paired.long["b"], paired.long["a"], strict=True)) == tested
    assert "One-hot CE" in criterion.markdown() and "allocation" not in criterion_table(collect(folders[:-3])).long
    told = " ".join(verdict(criterion, paired)["sentences"])
    assert "Entropy (HFPrune) is better than Self-distillation (alpha 0.4) by" in told
    marks = overview_table(criterion, paired).long.set_index(["criterion", "column"])["against_reference"]
    row = paired.long[(paired.long["b"] == "variant") & (paired.long["column"] == "perplexity:c4")].iloc[0]
    assert row["verdict"] == "Entropy (HFPrune) better" and marks["variant", "perplexity:c4"] == "worse"


def test_two_models_stay_apart(tmp_path):
    pair = ("entropy", "one_hot_ce")
    folders = [f for m in ("a/one", "two") for f in synthetic.study(tmp_path / m, pair, (0.2,), model=m)]
    results = collect(folders)
    criterion, paired = criterion_table(results), paired_table(results)
    assert list(criterion.display["Model"].unique()) == ["a/one", "two"] and "Model" in paired.display
    assert list(beside_paper.ablation_table(criterion).display["Model"].unique()) == ["a/one", "two"]


def test_a_model_that_broke_shows_not_finite(tmp_path):
    folders = synthetic.study(tmp_path, ("entropy", "one_hot_ce"), (0.2,), seeds=(0,))
    windows = pd.read_parquet(folders[1] / "perplexity.parquet")
    windows.assign(nll=np.nan).to_parquet(folders[1] / "perplexity.parquet")
    results = collect(folders)
    assert "not finite" in criterion_table(results).markdown()
    assert "not finite" in paired_table(results).markdown()


def test_order_of_the_folders_does_not_matter(tmp_path):
    folders = synthetic.study(tmp_path, ("entropy", "one_hot_ce"), (0.1, 0.2))
    one, two = (criterion_table(collect(order)) for order in (folders, folders[::-1]))
    pd.testing.assert_frame_equal(one.long, two.long)


def test_bad_input_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="evaluations is empty"):
        collect([])
    with pytest.raises(UserError, match="summary.json is missing"):
        collect([tmp_path])
    folder = synthetic.evaluation(tmp_path / "dense")
    shutil.copytree(folder, tmp_path / "again")
    with pytest.raises(UserError, match="more than once"):
        collect([folder, tmp_path / "again"])
    pd.DataFrame({"task": ["boolq"]}).to_parquet(folder / "items.parquet")
    with pytest.raises(UserError, match="lacks the column 'doc_id'"):
        collect([folder])
    (folder / "items.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(UserError, match="corrupt"):
        collect([folder])
    (folder / "summary.json").write_text("{")
    with pytest.raises(UserError, match="corrupt"):
        collect([folder])
    (folder / "summary.json").write_text(json.dumps({"model": "x"}))
    with pytest.raises(UserError, match="lacks 'criterion'"):
        collect([folder])
    with pytest.raises(UserError, match="missing"):
        read(tmp_path / "nowhere.csv")


@pytest.mark.parametrize(
    "mean, measure, text",
    [
        (46.23, "task", "46.2"),
        (0.2409, "js", "0.241"),
        (12.345, "perplexity", "12.35"),
        (345.67, "perplexity", "345.7"),
        (4321.0, "perplexity", "4321"),
        (1.234e7, "perplexity", "1.23e+07"),
        (np.nan, "js", "–"),
    ],
)
def test_cells_show_as_many_decimals_as_they_support(mean, measure, text):
    assert format_cell({"mean": mean, "low": np.nan, "high": np.nan, "measure": measure}) == text


@pytest.mark.parametrize(("bos", "words"), [(True, "of c4 with BOS."), (False, "of c4.")])
def test_the_notes_say_where_calibration_and_evaluation_begin_otherwise(bos, words):
    text = {"n_windows": 8, "seq_len": 32, "corpus": "c4", "bos": bos}
    assert protocol._scoring_sentence({"bos": False, "calibration": text}).endswith(words)
