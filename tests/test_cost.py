"""Measurements of cost: the arithmetic around the clock is tested, the clock is not."""

import json
import subprocess
import sys
import time

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hfprune_nb.cost import flops, memory, shapes, timing
from hfprune_nb.cost.generation import CACHES, _rates, _token_times, compare, summarise
from hfprune_nb.cost.precision import PAPER_WINDOWS, others, rank_correlation, study
from hfprune_nb.errors import UserError
from hfprune_nb.models import final_hidden, gated_mlps
from hfprune_nb.report import costs, style
from hfprune_nb.runs import stage

# The clock and memory


def test_every_repetition_runs_every_contestant_once_in_rotated_order():
    calls = []
    rows = timing.alternate({name: lambda name=name: calls.append(name) for name in "abc"}, 3, progress=False)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab", "warm-up, then three rotated rounds"
    assert sorted({(row["contestant"], row["repetition"]) for row in rows}) == [(n, r) for n in "abc" for r in range(3)]
    assert all(row["seconds"] >= 0 for row in rows)


def test_no_repetition_is_refused():
    with pytest.raises(UserError, match="repetitions 0"):
        timing.alternate({}, 0)


def test_a_contestant_that_does_not_fit_is_left_out_and_told(caplog):
    def too_large():
        raise torch.OutOfMemoryError

    rows = timing.alternate({"large": too_large, "small": lambda: None}, 2, progress=False)
    assert [row["contestant"] for row in rows] == ["small"] * 2 and "large does not fit" in caplog.text
    with pytest.raises(UserError, match="use a larger one"):
        timing.alternate({"large": too_large}, progress=False)


@pytest.mark.parametrize("in_fork", [False, True])
def test_peak_memory_is_what_a_run_needs_beyond_what_was_there(monkeypatch, tmp_path, in_fork):
    if in_fork:  # as on a system that does not let the mark be reset
        monkeypatch.setattr(memory, "_CLEAR", tmp_path / "missing" / "clear_refs")
    elif not memory.resets_high_water():
        pytest.skip("THIS SYSTEM DOES NOT LET ITS HIGH-WATER MARK BE RESET; the forked way is tested beside")
    held = torch.ones(25_000_000)  # 100 MB that no run is charged with
    contestants = {"large": lambda: torch.ones(50_000_000).sum(), "small": lambda: torch.ones(5_000_000).sum()}
    rows = timing.alternate(contestants, 2, progress=False)
    peaks = {name: [row["peak_bytes"] / 1e6 for row in rows if row["contestant"] == name] for name in contestants}
    assert all(180 < peak < 260 for peak in peaks["large"]), peaks
    assert all(10 < peak < 80 for peak in peaks["small"]), "a small run after a large one is charged with its own"
    assert held.sum() == 25_000_000


def test_the_forked_way_can_run_a_backward_pass(tiny, token_windows):
    from hfprune_nb.method.scoring import score

    assert memory.peak_in_fork(lambda: score(tiny(), token_windows, ["entropy"], progress=False)) >= 0


@pytest.mark.parametrize(("values", "low", "high", "coverage"), [
    ([3, 1, 2], 1, 3, 0.75),
    ([5, 1, 2, 3, 4, 6], 1, 6, 1 - 2 / 64),
    (range(1, 11), 2, 9, 1 - 2 * 11 / 1024),  # the textbook interval of the median of ten: second to ninth
    ([7], 7, 7, 0),
])  # fmt: skip
def test_median_and_its_order_statistic_interval(values, low, high, coverage):
    found = timing.median_interval(values)
    assert (found["low"], found["high"]) == (low, high) and found["median"] == np.median(list(values))
    assert found["coverage"] == pytest.approx(coverage)


def test_the_interval_of_a_median_covers_it_as_often_as_it_says():
    draws = np.random.default_rng(0).exponential(size=(4000, 9))
    intervals = [timing.median_interval(row) for row in draws]
    share = np.mean([interval["low"] <= np.log(2) <= interval["high"] for interval in intervals])
    assert share == pytest.approx(intervals[0]["coverage"], abs=0.01) and share > 0.95


def test_ratios_are_paired_by_repetition():
    rows = [{"contestant": name, "repetition": r, "seconds": s} for name, series in
            {"a": (2, 20, 200), "b": (1, 10, 100)}.items() for r, s in enumerate(series)]  # fmt: skip
    found = timing.ratio_interval(rows, "a", "b")
    assert (found["median"], found["low"], found["high"]) == (2, 2, 2), "a machine that slows down does not widen it"
    assert timing.ratio_interval(rows, "a", "absent") is None


def test_the_matmul_peak_is_positive_and_named_by_dtype(monkeypatch):
    monkeypatch.setitem(timing.PEAK_SIZES, "cpu", (64, 128))
    found = timing.matmul_peak("cpu")
    assert set(found) == {"bfloat16", "float32"} and min(found.values()) > 0


# FLOPs and shapes


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen2", "qwen3"])
def test_flops_are_those_of_torch_s_counter(tiny, architecture):
    model = tiny(architecture, attn_implementation="eager")
    batch, config = torch.randint(0, 61, (3, 12)), model.config
    assert flops.forward_flops(config, 36, 12) == counted(lambda: model(batch, use_cache=False))
    watched = []

    def start_graph(module, inputs):
        watched.append(inputs[0].detach().requires_grad_())
        return (watched[0],)

    hook = gated_mlps(model)[0].down.register_forward_pre_hook(start_graph)
    logits = model.get_output_embeddings()(final_hidden(model, batch))
    hook.remove()
    assert flops.backward_flops(config, 36, 12) == counted(lambda: logits.sum().backward(inputs=watched))


def test_shapes_are_those_of_the_published_models():
    sizes = {"smollm2-135m": 134.5e6, "llama-3.2-1b": 1.236e9, "llama-3.2-3b": 3.213e9, "llama-2-7b": 6.738e9,
             "qwen2.5-1.5b": 1.544e9, "qwen2.5-7b": 7.616e9, "qwen3-1.7b": 1.721e9}  # fmt: skip
    for shape, expected in sizes.items():
        model = shapes.random_model(shape, device="meta")
        assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(expected, rel=0.002), shape
    assert sizes.keys() | {"tiny"} == shapes.SHAPES.keys()


def test_random_models_are_seeded_frozen_and_of_the_asked_dtype():
    first, again, other = (shapes.random_model("tiny", torch.float32, seed=seed) for seed in (0, 0, 1))
    weights = [model.get_input_embeddings().weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].dtype == torch.float32 and not any(p.requires_grad for p in first.parameters())
    with pytest.raises(UserError, match="llama-2-7b"):
        shapes.random_model("llama-9")


# Summary and targets


def contest(tiny, token_windows):
    from hfprune_nb.cost import published_loops

    model = tiny()
    contestants = published_loops.contestants(model, token_windows[:2], batch_size=2)
    rows = timing.alternate({contestant.name: contestant.run for contestant in contestants}, 2, progress=False)
    return rows, timing.summarise(rows, contestants, model, token_windows[:2], 1e12)


def test_the_summary_counts_the_flops_that_a_criterion_needs(tiny, token_windows):
    rows, summary = contest(tiny, token_windows)
    by_name = {row["contestant"]: row for row in summary}
    engine, loop = by_name["entropy: engine"], by_name["entropy: HFPrune loop"]
    assert engine["flops"] == loop["flops"], "a loop that does more gets no credit for it"
    config = tiny().config
    passes = flops.forward_flops(config, 24, 12), flops.backward_flops(config, 24, 12)
    assert by_name["one_hot_ce + entropy: engine"]["flops"] == passes[0] + 2 * passes[1]
    assert engine["peak_fraction"] == pytest.approx(engine["flops"] / engine["seconds"] / 1e12)
    assert engine["tokens_per_second"] == pytest.approx(24 / engine["seconds"])
    found = timing.targets(rows, summary, "cpu", {"entropy": 0.9995})
    assert len(found) == 6 and found[-1]["met"] is True and found[-2]["met"] is None
    assert timing.targets(rows, summary, "cpu", {"entropy": 0.99})[-1]["met"] is False


def test_targets_follow_the_device():
    names = ["entropy: engine", "entropy: engine, 1 window", "entropy: HFPrune loop", "one_hot_ce + entropy: engine",
             "self_distillation: engine", "self_distillation: SDMPrune loop"]  # fmt: skip
    seconds = dict(zip(names, (1.0, 1.2, 2.5, 1.7, 2.0, 7.0), strict=True))
    rows = [{"contestant": n, "repetition": 0, "seconds": s, "peak_bytes": 100 * s} for n, s in seconds.items()]
    on_cpu, on_cuda = (timing.targets(rows, [], device) for device in ("cpu", "cuda"))
    assert [row["met"] for row in on_cpu] == [True, False, True, False]
    assert [row["met"] for row in on_cuda] == [False, False, True, False]
    assert on_cpu[0]["median"] == 2.5 and on_cpu[1]["median"] == pytest.approx(0.48)


def test_the_breakdown_finds_every_part(tiny, token_windows):
    from hfprune_nb.method.scoring import score

    model = tiny()
    found = timing.breakdown(lambda: score(model, token_windows, ["entropy"], progress=False), model)
    assert [row["part"] for row in found] == ["forward", "head and criterion", "backward", "importance"]
    assert sum(row["share"] for row in found) == pytest.approx(1) and min(row["share"] for row in found) > 0
    assert not model.get_decoder()._forward_hooks and not model.get_decoder()._forward_pre_hooks


# Generation


@pytest.mark.parametrize("cache", CACHES)
def test_every_model_generates_the_forced_number_of_tokens(tiny, cache, monkeypatch):
    models = {"dense": tiny(), "pruned": tiny(intermediate_size=24)}
    lengths, rates = [], _rates
    monkeypatch.setattr(
        "hfprune_nb.cost.generation._rates", lambda times, size: (lengths.append(len(times)), rates(times, size))[1]
    )
    rows = compare(models, [1, 3], prompt_tokens=5, new_tokens=4, repetitions=2, cache=cache, progress=False)
    assert lengths == [4] * 8 and len(rows) == 8
    summary = summarise(rows, models, 5)
    assert [(row["model"], row["batch_size"], row["width"]) for row in summary] == [
        ("dense", 1, 40), ("dense", 3, 40), ("pruned", 1, 24), ("pruned", 3, 24)]  # fmt: skip
    assert summary[0]["parameters"] > summary[2]["parameters"] and summary[0]["prefill_flops"] > summary[2]["prefill_flops"]
    assert all(row["first_token_low"] <= row["first_token"] <= row["first_token_high"] for row in summary)


def test_rates_come_from_the_times_of_the_tokens():
    assert _rates([1.0, 1.5, 2.0], 8) == {"first_token": 1.0, "per_token": 0.5, "tokens_per_second": 16.0}


def test_the_clock_of_a_token_starts_before_generation(tiny):
    started = time.perf_counter()
    times = _token_times(tiny(), torch.zeros(1, 4, dtype=torch.long), 3, "dynamic")
    assert len(times) == 3 and 0 < times[0] < times[1] < times[2] <= time.perf_counter() - started


def test_bad_generation_settings_are_refused(tiny):
    with pytest.raises(UserError, match="cache 'paged'"):
        compare({}, [1], cache="paged")
    with pytest.raises(UserError, match="new_tokens 1"):
        compare({}, [1], new_tokens=1)


# Sums in bfloat16


def test_equal_contributions_stall_at_256_times_one_of_them():
    rows = study([torch.ones(4, 8) * torch.arange(1, 9)], [64, 256, 2048], kept=[4], streams=1)
    assert [row["sum_fraction"] for row in rows] == pytest.approx([1, 1, 256 / 2048])
    assert [row["changed"] for row in rows] == [0, 0, 0] and [row["spearman"] for row in rows[:2]] == pytest.approx([1, 1])
    assert rows[2]["spearman"] < 1, "where a sum stalls depends on how its increment is rounded"


def test_kept_neurons_that_are_others_are_counted_in_each_layer():
    a, b = [torch.tensor([1.0, 2, 3, 4])] * 2, [torch.tensor([4.0, 3, 2, 1]), torch.tensor([1.0, 2, 4, 3])]
    assert others(a, b, [3, 2]) == [1, 0] and others(a, b, [2, 1]) == [2, 1]


def test_exact_sums_change_nothing_and_half_precision_more_with_more_windows():
    random = np.random.default_rng(1)
    contributions = [torch.from_numpy(random.gamma(0.5, size=(32, width))) for width in (400, 300)]
    exact = study(contributions, [16, 512], kept=[300, 200], importance_dtype=torch.float64)
    assert all(row["changed"] == 0 and row["spearman"] == pytest.approx(1) for row in exact)
    rows = study(contributions, [16, 4096], kept=[300, 200], streams=2)
    changed = {count: np.mean([row["changed"] for row in rows if row["windows"] == count]) for count in (16, 4096)}
    assert 0 < changed[16] < changed[4096] < 0.25
    assert len(rows) == 2 * 2 * 2 and rows == study(contributions, [16, 4096], kept=[300, 200], streams=2)


def test_a_width_that_cannot_be_kept_is_refused():
    with pytest.raises(UserError, match="kept 8"):
        study([torch.ones(2, 8)], [2], kept=[8])


def test_rank_correlation_is_scipy_s_with_ties():
    from scipy.stats import spearmanr

    a, b = torch.randint(0, 9, (2, 3, 50), generator=torch.Generator().manual_seed(0))
    assert rank_correlation(a, b) == pytest.approx([spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)])


# Tables and figures

FACTS = {
    "model": "invented-1b", "shape": True, "parameters": 1_000_000_000, "dtype": "bfloat16", "corpus": "random tokens",
    "machine": {"device": "cpu", "processor": "a processor", "threads": 2, "torch": "2", "transformers": "5", "memory": "mark"},
    "matmul_peak": {"bfloat16": 4e11, "float32": 1e11}, "n_windows": 2, "seq_len": 512, "repetitions": 3, "float64_windows": 1,
    "accumulation_windows": 64, "accumulation_tokens": 128, "accumulation_ratio": 0.2, "prompt_tokens": 256, "new_tokens": 32,
    "cache": "dynamic",
}  # fmt: skip
SECONDS = {"entropy: engine": 2.0, "entropy: HFPrune loop": 5.0, "self_distillation: SDMPrune loop": 9.0}
STEPS = {"entropy: HFPrune loop, no weight gradients": 3.5, "entropy: HFPrune loop, logits in chunks": 3.0}


@pytest.fixture
def summary():
    kinds = {"entropy: engine": "engine"} | dict.fromkeys(STEPS, "ablation")
    return pd.DataFrame([
        {"contestant": name, "criterion": name.partition(":")[0], "implementation": kinds.get(name, "published loop"),
         "seconds": seconds, "seconds_low": 0.9 * seconds, "seconds_high": 1.1 * seconds, "coverage": 0.75,
         "tokens_per_second": 1024 / seconds, "peak_bytes": 1e8 * seconds, "flops": 10**11, "peak_fraction": 0.1}
        for name, seconds in (SECONDS | STEPS).items()])  # fmt: skip


@pytest.fixture
def generation():
    return pd.DataFrame([
        {"model": name, "ratio": ratio, "multiple_of": multiple, "batch_size": batch, "width": width, "parameters": 10**9,
         "first_token": 0.1 * (1 - ratio), "first_token_low": 0.09, "first_token_high": 0.2, "per_token": 0.02 * (1 - ratio),
         "per_token_low": 0.01, "per_token_high": 0.03, "tokens_per_second": batch * 50 / (1 - ratio),
         "prefill_flops": 10**12 * (1 - ratio)}
        for batch in (1, 8)
        for name, ratio, multiple, width in (
            ("dense", 0, 1, 1536), ("20 %", 0.2, 1, 1017), ("20 %, multiple of 64", 0.2, 64, 960))
    ])  # fmt: skip


def test_published_values_stand_beside_the_loops_that_they_are_of(summary):
    table = costs.scoring_table(summary, FACTS)
    rows = table.display.set_index("Scored by")
    paper = [column for column in rows if "paper" in column]
    assert list(rows.loc["HFPrune loop", paper]) == ["508.9", "35.3"]
    assert list(rows.loc["SDMPrune loop", paper]) == ["1,539.8", "51.2"]
    assert set(rows.loc["engine", paper]) == {"–"}, "nothing was published of the engine"
    assert rows.loc["engine", "Seconds, measured"] == "2.00 [1.80, 2.20]" and rows.loc["engine", "Tokens/s, measured"] == "512"
    assert all("paper" in column or "measured" in column for column in list(rows)[1:])
    assert "75 of 100" in table.notes[-1] and "random weights" in table.notes[-1]


def test_the_ablation_starts_at_the_loop_and_ends_at_the_engine(summary):
    table = costs.ablation_table(summary, FACTS).display
    assert list(table["HFPrune loop"]) == ["as published", "no weight gradients", "logits in chunks", "(the engine)"]
    assert list(table["Speed against the loop"]) == ["1.00x", "1.43x", "1.67x", "2.50x"]


def test_generation_stands_beside_the_paper_at_its_batch_sizes_only(generation):
    table = costs.inference_table(generation, FACTS)
    rows = table.display.set_index(["Batch", "Model"])
    first, decoding = (column for column in rows if "paper" in column)
    assert rows.loc[(1, "dense"), first] == "57.5" and rows.loc[(8, "20 %"), decoding] == "553.9"
    assert rows.loc[(8, "dense"), first] == rows.loc[(1, "20 %, multiple of 64"), first] == "–"
    assert list(rows.loc[1, "Width"]) == ["1536 (multiple of 128)", "1017 (unaligned)", "960 (multiple of 64)"]
    assert rows.loc[(8, "20 %"), "Decoding, gain"] == "+25.0 %" and "1.47" not in table.notes[0]
    assert "contradicts the table" in table.notes[1]


def test_a_missed_target_is_said_with_its_figure(summary):
    targets = pd.DataFrame(
        [{"target": "speed", "bound": ">=", "limit": 2.0, "median": 1.5, "low": 1.4, "high": 1.6, "met": False},
         {"target": "share", "bound": ">=", "limit": None, "median": 0.3, "met": None},
         {"target": "a correlation", "bound": ">=", "limit": 0.999, "median": 0.9995, "met": True}])  # fmt: skip
    table = costs.targets_table(targets, FACTS).display
    assert list(table["Verdict"]) == ["missed", "reported", "met"] and list(table["Wanted"]) == [">= 2", "–", ">= 0.999"]
    assert list(table["Measured"]) == ["1.50 [1.40, 1.60]", "0.30", "0.9995"]
    sentences = costs.findings(targets, costs.ablation_table(summary, FACTS))
    assert "speed: 1.50, wanted >= 2: missed by 0.5." in sentences
    assert any("'no weight gradients' saves most time: 1.50 s, 30 %" in sentence for sentence in sentences)


def test_the_sentence_on_sums_says_what_was_resampled():
    rows = pd.DataFrame({"stream": [0, 1, 0, 1], "windows": [16, 16, 43128, 43128], "layer": 0,
                         "changed": [0.0, 0.002, 0.02, 0.03], "spearman": 0.99, "sum_fraction": [1, 1, 0.04, 0.06]})  # fmt: skip
    sentence = costs.accumulation_sentence(rows, FACTS)
    assert (
        "over 43,128 windows, 2.5 %" in sentence and "(0.10 % over 16 windows)" in sentence and "5.0 % of their true" in sentence
    )
    assert "resampled with replacement from 64 windows of 128 tokens" in sentence
    costs.accumulation_figure(rows, FACTS)


def test_figures_are_drawn_and_reproducible(summary, generation, tmp_path):
    matplotlib.use("Agg")
    precision = pd.DataFrame({"criterion": "entropy", "layer": [0, 1], "spearman": [0.9999, 1.0], "others": [2, 1], "kept": 900})
    for name, draw in {
        "bars": lambda: costs.cost_bars(summary, FACTS),
        "generation": lambda: costs.speed_against_ratio(generation, FACTS),
        "precision": lambda: costs.correlation_figure(precision, FACTS),
    }.items():
        written = [style.save(draw(), tmp_path / folder, name)[0].read_bytes() for folder in ("once", "again")]
        assert written[0] == written[1]
    display = costs.correlation_table(precision, FACTS).display
    assert list(display["Lowest layer"]) == ["0.99990"] and list(display["Kept neurons that are others"]) == ["3 of 1,800"]


# The command and the stage

BARE = """
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = {"papermill", "datasets", "lm_eval", "pandas", "scipy", "sklearn", "matplotlib", "requests", "pypi_simple",
                  "tenacity", "peft", "trl", "seaborn", "pyarrow", "gguf", "accelerate"}
        return None if name.split(".")[0] in absent else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
from hfprune_nb.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
SMALL = ["--shape", "tiny", "--device", "cpu", "--windows", "2", "--seq-len", "16", "--repetitions", "1", "--multiples", "1", "8",
         "--prompt-tokens", "4", "--new-tokens", "2", "--batch-sizes", "2"]  # fmt: skip


def test_the_command_needs_torch_and_transformers_only(tmp_path):
    out = tmp_path / "cost.json"
    command = [sys.executable, "-c", BARE, "cost", *SMALL, "--out", str(out)]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert lines[0].startswith("tiny on ")
    assert all(any(line.startswith(table) for line in lines) for table in ("scored by", "target", "generation by"))
    assert any(line.startswith("entropy: HFPrune loop, logits in chunks") for line in lines)
    found = json.loads(out.read_text())
    assert len(found["runs"]) == len(found["scoring"]) == 14 and len(found["targets"]) == 8
    assert found["generation"][0]["width"] == 64 and found["settings"]["shape"] == "tiny"


def test_the_command_names_what_is_wrong(capsys):
    from hfprune_nb.cli.main import main

    assert main(["cost", "--shape", "llama-9", "--device", "cpu"]) == 2
    assert "llama-2-7b" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["cost", "--shape", "tiny", "--model", "x"])


def test_the_stage_runs_without_a_model_to_fetch(monkeypatch, tmp_path):
    monkeypatch.setenv("HFPRUNE_RESULTS", str(tmp_path))
    small = {"model": "tiny", "shape": True, "device": "cpu", "seq_len": 16, "repetitions": 1, "sum_windows": 3, "sum_tokens": 8,
             "multiples": [1, 8], "prompt_tokens": 4, "new_tokens": 2, "batch_sizes": [1]}  # fmt: skip
    artifact = stage.execute("cost", "toy", small)
    names = {path.name for kind in ("tables", "figures") for path in artifact.path(kind).iterdir()}
    assert {
        "cost_scoring.md",
        "cost_ablation.csv",
        "cost_inference.html",
        "cost_targets.csv",
        "cost_sums.png",
        "cost_bars.svg",
    } <= names
    sums = pd.read_parquet(artifact.path("sums.parquet"))
    assert sums["windows"].max() == PAPER_WINDOWS and sums["changed"].between(0, 1).all()
    assert "paper: LLaMA-2-7B" in artifact.path("tables/cost_scoring.md").read_text(encoding="utf-8")
