"""What the paper's own numbers support: hand-computed errors, recomputed averages, every known contradiction found."""

import numpy as np
import pandas as pd
import pytest
import synthetic
from scipy import stats

from hfprune_nb.report.paper import (
    INCONSISTENT,
    ITEMS,
    average_error,
    contradictions,
    discordance,
    gaps,
    inconsistent,
    published_tables,
    read,
    rows,
    sentences,
    standard_error,
)
from hfprune_nb.report.results import collect


@pytest.fixture(scope="module")
def paper():
    return read()


def test_binomial_standard_errors_by_hand():
    assert standard_error(50, 100) == pytest.approx(5.0)
    assert standard_error(80, 1000) == pytest.approx(1.2649, abs=1e-4)
    one = {task: 50.0 for task in ITEMS}
    by_hand = np.sqrt(sum(2500 / n for n in ITEMS.values())) / 10
    assert average_error(one) == pytest.approx(by_hand)


def test_the_error_of_an_average_is_that_of_simulated_test_sets():
    rng = np.random.default_rng(0)
    accuracy = {"ARCc": 45.0, "BoolQ": 80.0, "OBQA": 40.0}
    drawn = [np.mean([100 * rng.binomial(ITEMS[t], a / 100) / ITEMS[t] for t, a in accuracy.items()]) for _ in range(4000)]
    assert average_error(accuracy) == pytest.approx(np.std(drawn), rel=0.04)


def test_rows_are_recomputed_from_their_cells(paper):
    printed = rows(paper).set_index(["table", "model", "ratio_pct", "method"])
    ours = printed.loc[("T1", "LLaMA-2-7B", 20, "HFPrune")]
    assert ours["average"] == 59.0 and ours["recomputed"] == pytest.approx(59.05)
    assert ours["without_crows"] == pytest.approx((590.5 - 60.2) / 9) and ours["remark"] == ""
    slip = printed.loc[("T1", "LLaMA-2-7B", 20, "LoRAPrune")]
    assert slip["recomputed"] == pytest.approx(58.73) and "TfQA repeats Wino" in slip["remark"] and "45.6" in slip["remark"]
    assert (printed["same_cells_as"] != "").sum() == 8, "four row pairs of Table 3"
    assert printed.loc[("T3", "Qwen3-1.7B", 20, "HFPrune"), "same_cells_as"] == "Qwen2.5-1.5B at 40 %"


def test_gaps_stand_beside_the_error_of_sampling(paper):
    compared = gaps(paper).set_index(["table", "model", "ratio", "a", "b"])
    smallest = compared.loc[("T6", "LLaMA-2-7B", 20, "IE", "CE")]
    assert smallest["gap"] == pytest.approx(0.5) and not smallest["exceeds"] and not smallest["cells"]
    assert smallest["unpaired_half_width"] < 1.96 * np.sqrt(2) * average_error(dict.fromkeys(ITEMS, 50.0)) + 0.01
    assert compared.loc[("T6", "LLaMA-2-7B", 30, "IE", "SD"), "exceeds"]
    both = compared.loc[("T1", "LLaMA-2-7B", 20, "HFPrune", "SDMPrune")]
    assert both["cells"] and both["unpaired_half_width"] == pytest.approx(1.21, abs=0.01)


def test_the_share_of_discordant_items_is_where_a_paired_test_just_succeeds(paper):
    """Simulated: ten tasks answered by two models that differ on this share of items, at a true gap of this size."""
    row = gaps(paper).query("table == 'T6' and ratio == 20 and b == 'CE'").iloc[0]
    rng, share, gap = np.random.default_rng(1), row["most_discordant"] / 100, row["gap"] / 100
    differences = []
    for _ in range(3000):
        means = []
        for n in ITEMS.values():
            better, worse, _ = rng.multinomial(n, [(share + gap) / 2, (share - gap) / 2, 1 - share])
            means.append((better - worse) / n)
        differences.append(100 * np.mean(means))
    assert np.mean(differences) / np.std(differences) == pytest.approx(stats.norm.ppf(0.975), rel=0.05)


def test_every_known_contradiction_is_found(paper):
    found = contradictions(paper).set_index("place")["computed"]
    assert "1.366x" in found["Table 4, prefill speed-up at 30 %"] and "1.366x" in found["Section 5.2.2, prefill speed-up at 30 %"]
    assert "Table 4, prefill speed-up at 20 %" not in found, "1.24 is what the latencies give"
    assert "+16.9 %" in found["Table 4, decode gain at 20 %"]
    assert "should fall" in found["Table 7, top-15 Jaccard, IE"]
    assert "60.6" in found["Table 8, MLP only at 20 %, tuned"] and "57.7" in found["Table 8, MLP only at 30 %, tuned"]
    assert "2.6 points" in found["Table 3, Qwen2.5-1.5B, HFPrune"]
    assert sum(place.startswith("Table 3") and "all ten" in text for place, text in found.items()) == 8


def test_a_paper_without_slips_is_not_accused(paper):
    sound = paper.copy()
    sound.loc[sound["table"] == "T7", "value"] = [0.2, 0.2, 0.3, 0.3, 0.6, 0.6, 0.5, 0.5]
    sound.loc[
        (sound["table"] == "T4") & sound["metric"].str.startswith("prefill speed-up") & (sound["ratio_pct"] == 30), "value"
    ] = 1.366
    sound.loc[(sound["table"] == "T4") & (sound["metric"] == "decode gain") & (sound["ratio_pct"] == 20), "value"] = 16.88
    places = " ".join(contradictions(sound)["place"])
    assert "Table 7" not in places and "Table 4" not in places


def test_inconsistent_cells_are_marked_and_others_are_not(paper):
    marks = inconsistent(paper)
    marked = paper[marks != ""]
    assert set(marked["table"]) == {"T1", "T3", "T4", "T7", "T8"}
    assert set(marked.loc[marked["table"] == "T1", "method"]) == {"LoRAPrune"}
    assert set(marked.loc[marked["table"] == "T1", "metric"]) == {"TfQA", "avg10"}
    assert set(marked.loc[marked["table"] == "T7", "metric"]) == {"Top-15 Jaccard"}
    assert (marks[paper["table"] == "T6"] == "").all()


def test_sentences_follow_the_numbers(paper, tmp_path):
    text = " ".join(sentences(paper))
    assert "7 of the 9 gaps" in text and "fewer than 7.9 % of the items" in text and "8 rows of Table 3" in text
    assert "without CrowS-Pairs, which is no accuracy, by HFPrune 58.9, SDMPrune 57.8, dense 57.3" in text
    results = collect(synthetic.study(tmp_path, ("entropy", "one_hot_ce"), (0.2,), n_items=30))
    shares = discordance(results, "entropy", "one_hot_ce")
    items = results.items.pivot_table(index=["seed", "task", "doc_id"], columns="criterion", values="value")
    items = items[["entropy", "one_hot_ce"]].dropna()
    by_hand = 100 * (items["entropy"] != items["one_hot_ce"]).groupby("task").mean().mean()
    assert shares["share"].iloc[0] == pytest.approx(by_hand)
    measured = [s for s in sentences(paper, results) if "measured here" in s]
    assert len(measured) == 1 and ("more than that" in measured[0]) == (by_hand > 7.9)


def test_graded_answers_are_left_out_of_the_discordance(tmp_path):
    results = collect(synthetic.study(tmp_path, ("entropy", "one_hot_ce"), (0.2,), tasks={"truthfulqa_mc2": "acc"}))
    results.items["value"] = np.linspace(0, 1, len(results.items))
    assert discordance(results, "entropy", "one_hot_ce").empty


def test_the_three_tables_say_that_nothing_was_measured():
    made = published_tables()
    assert [table.name for table in made] == ["published", "published_gaps", "published_defects"]
    for table in made:
        text = table.markdown()
        assert "nothing in this table was measured" in text and any("paper" in name for name in table.display)
    assert INCONSISTENT in made[0].markdown() and isinstance(made[2].long, pd.DataFrame)
