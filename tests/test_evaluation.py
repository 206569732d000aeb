"""Fidelity against scipy, held-out text against plain cross-entropy, benchmark answers against lm-eval's own model."""

import copy
import json
import shutil
from pathlib import Path

import datasets
import lm_eval
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr, softmax
from scipy.stats import entropy
from tokenizers.processors import TemplateProcessing

from hfprune_nb import models
from hfprune_nb.errors import UserError
from hfprune_nb.inputs.benchmarks import BENCHMARKS
from hfprune_nb.measure import distributed, evaluation, fidelity, tasks
from hfprune_nb.measure import harness as harness_module
from hfprune_nb.measure.harness import Row, SharedPrefixLM
from hfprune_nb.report import choices

PROJECT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-3  # absolute, in nats of a whole continuation; float32 sums in another order differ by about 1e-5


@pytest.fixture(scope="module")
def tiny_alias(tmp_path_factory):
    """The smoke study's random model and its tokenizer, in float32, written to a cache of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HFPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return models.load(models.TINY, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def smollm(registry):
    return models.load("smollm2-135m", dtype="float32", device="cpu")


def random_logits(positions, vocabulary, seed, scale=3.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, (positions, vocabulary)))


# Fidelity


def test_js_and_kl_equal_scipy():
    ours, dense = random_logits(7, 50, 0), random_logits(7, 50, 1)
    found = fidelity.compare(ours, dense)
    p, q = softmax(ours.numpy(), axis=1), softmax(dense.numpy(), axis=1)
    np.testing.assert_allclose(found["js"], jensenshannon(p, q, base=2, axis=1), rtol=1e-10)
    np.testing.assert_allclose(found["kl"], rel_entr(q, p).sum(axis=1), rtol=1e-10)
    np.testing.assert_allclose(found["entropy_model"], entropy(p, axis=1), rtol=1e-10)
    np.testing.assert_allclose(found["entropy_dense"], entropy(q, axis=1), rtol=1e-10)


def test_float32_logits_of_a_large_vocabulary_keep_five_digits():
    ours, dense = random_logits(3, 50_000, 2), random_logits(3, 50_000, 3)
    wide, narrow = fidelity.compare(ours, dense), fidelity.compare(ours.float(), dense.float())
    pd.testing.assert_frame_equal(wide, narrow, rtol=1e-5)


def test_jaccard_and_agreement_on_cases_made_by_hand():
    dense = -torch.arange(40.0).repeat(5, 1)  # token 0 is the likeliest, the top 15 are tokens 0 to 14
    ours = dense.clone()
    ours[1] = torch.arange(40.0)  # the top 15 are tokens 25 to 39: nothing is shared
    ours[2, 14] = -100.0  # token 15 takes the place of token 14: 14 shared of 16
    ours[3, 0] = -0.5  # still the likeliest
    ours[4, 0] = -1.5  # token 1 is now the likeliest, the same 15 tokens
    found = fidelity.compare(ours, dense)
    np.testing.assert_allclose(found["jaccard15"], [1, 0, 14 / 16, 1, 1])
    np.testing.assert_array_equal(found["top1"], [1, 0, 1, 1, 0])


def test_a_vocabulary_smaller_than_the_top_is_compared_whole():
    found = fidelity.compare(random_logits(4, 9, 4), random_logits(4, 9, 5))
    np.testing.assert_array_equal(found["jaccard15"], 1.0)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-7), (torch.float32, 5e-4)])
def test_identical_logits_are_at_no_distance(dtype, rounding):
    """The distance is a square root, so it rounds to the square root of the dtype's own rounding."""
    logits = random_logits(6, 100, 6).to(dtype)
    found = fidelity.compare(logits, logits.clone())
    assert (found["js"] < rounding).all() and (found["kl"] == 0).all()
    assert (found["jaccard15"] == 1).all() and (found["top1"] == 1).all()


def test_a_constant_added_to_the_logits_changes_nothing():
    ours, dense = random_logits(4, 30, 7), random_logits(4, 30, 8)
    pd.testing.assert_frame_equal(fidelity.compare(ours + 5, dense - 3), fidelity.compare(ours, dense), rtol=1e-9)


def test_distributions_without_common_tokens_are_at_distance_one():
    ours, dense = torch.full((1, 40), -200.0), torch.full((1, 40), -200.0)
    ours[0, :20], dense[0, 20:] = 0.0, 0.0
    found = fidelity.compare(ours, dense).iloc[0]
    assert found["js"] == pytest.approx(1.0, abs=1e-6)
    assert found["kl"] == pytest.approx(200.0, rel=1e-5)
    assert found["jaccard15"] == found["top1"] == 0


def test_sure_and_unsure_positions_stand_apart():
    positions = pd.DataFrame({"window": [0, 0, 0, 1, 1, 2], "entropy_dense": [1.0, 5.0, 2.0, 3.0, 6.0, 9.0]})
    for number, name in enumerate((*fidelity.METRICS, "entropy_model")):
        positions[name] = positions["entropy_dense"] * (number + 1)
    found = fidelity.by_window(positions)
    assert found.columns.tolist() == ["window", "positions", "compared", *fidelity.METRICS, *fidelity.ENTROPIES]
    parts = {name: part.set_index("window") for name, part in found.groupby("positions")}
    assert set(parts) == set(fidelity.SPLITS)
    # The median is 4: the third window has no position below it.
    assert parts["all"]["compared"].tolist() == [3, 2, 1]
    assert parts["low_entropy"]["compared"].to_dict() == {0: 2, 1: 1}
    assert parts["high_entropy"]["compared"].to_dict() == {0: 1, 1: 1, 2: 1}
    assert parts["low_entropy"]["entropy_dense"].to_dict() == {0: 1.5, 1: 3.0}
    assert parts["all"]["kl"][0] == pytest.approx(2 * 8 / 3) and parts["high_entropy"]["kl"][0] == pytest.approx(10.0)


def test_the_parts_make_up_the_whole(tiny, token_windows):
    model, dense = tiny("llama", "float64"), tiny("llama", "float64", initializer_range=0.1)
    reference = evaluation.held_out(dense, token_windows, 6, progress=False).hidden
    found = evaluation.held_out(model, token_windows, 6, reference, models.head(dense), progress=False).fidelity
    parts = {name: part.set_index("window") for name, part in found.groupby("positions")}
    weighted = sum(parts[name]["kl"].mul(parts[name]["compared"]).reindex(range(9), fill_value=0) for name in fidelity.SPLITS[1:])
    np.testing.assert_allclose(weighted, 6 * parts["all"]["kl"], rtol=1e-9)
    assert (parts["low_entropy"]["entropy_dense"].max()) <= parts["high_entropy"]["entropy_dense"].min()


logit_pairs = st.integers(1, 60).flatmap(
    lambda size: st.tuples(*(arrays(np.float32, (2, size), elements=st.floats(-60, 60, width=32)) for _ in range(2)))
)


@given(logit_pairs)
@settings(deadline=None, max_examples=100)
def test_fidelity_stays_within_its_bounds(pair):
    ours, dense = (torch.from_numpy(logits) for logits in pair)
    found, swapped = fidelity.compare(ours, dense), fidelity.compare(dense, ours)
    assert list(found.columns) == [*fidelity.METRICS, *fidelity.ENTROPIES] and len(found) == 2
    assert found[["js", "jaccard15", "top1"]].stack().between(0, 1).all()
    assert (found["kl"] >= 0).all() and np.isfinite(found["kl"]).all()
    np.testing.assert_allclose(found["js"], swapped["js"], atol=1e-3)
    np.testing.assert_array_equal(found["jaccard15"], swapped["jaccard15"])


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_positions_are_even_and_end_with_the_last(seq_len, count):
    places = fidelity.positions(seq_len, count)
    assert len(places) == min(count, seq_len)
    assert places[-1] == seq_len - 1 and places[0] >= 0
    steps = np.diff(places)
    assert (steps > 0).all() and (len(steps) == 0 or steps.max() - steps.min() <= 1)


# Held-out text


@pytest.mark.parametrize(("architecture", "dtype"), [("llama", "float64"), ("gemma", "float32"), ("phi3", "float64")])
def test_likelihoods_equal_plain_cross_entropy(tiny, token_windows, architecture, dtype):
    model = tiny(architecture, dtype)
    found = evaluation.held_out(model, token_windows, progress=False).perplexity
    assert found["window"].tolist() == list(range(9)) and (found["tokens"] == 11).all()
    for row, window in enumerate(torch.from_numpy(token_windows)):
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum")
        assert found["nll"][row] == pytest.approx(float(expected), rel=1e-12 if dtype == "float64" else 1e-5)


def test_batch_size_changes_nothing(tiny, token_windows):
    model = tiny("llama-tied", "float64")
    other = tiny("llama-tied", "float64", initializer_range=0.2)
    reference, dense_head = evaluation.held_out(other, token_windows, 5, progress=False).hidden, models.head(other)
    one, four, all_at_once = (
        evaluation.held_out(model, token_windows, 5, reference, dense_head, batch_size, progress=False)
        for batch_size in (1, 4, 9)
    )
    for found in (four, all_at_once):
        pd.testing.assert_frame_equal(found.perplexity, one.perplexity, rtol=1e-12)
        pd.testing.assert_frame_equal(found.fidelity, one.fidelity, rtol=1e-10)
        torch.testing.assert_close(found.hidden, one.hidden)


def test_a_model_is_its_own_exact_reference(tiny, token_windows):
    model = tiny("qwen2")
    dense = evaluation.held_out(model, token_windows, 4, progress=False)
    assert dense.fidelity is None and dense.hidden.shape == (9, 4, 16)
    again = evaluation.held_out(model, token_windows, 4, dense.hidden, models.head(model), progress=False)
    everywhere = again.fidelity[again.fidelity["positions"] == "all"]
    assert (everywhere["compared"] == 4).all() and len(everywhere) == 9
    np.testing.assert_allclose(again.fidelity["entropy_model"], again.fidelity["entropy_dense"], rtol=1e-5)
    assert (again.fidelity["kl"] < 1e-6).all() and (again.fidelity["js"] < 5e-4).all()
    np.testing.assert_array_equal(again.fidelity[["jaccard15", "top1"]], 1)
    pd.testing.assert_frame_equal(again.perplexity, dense.perplexity)


def test_fidelity_equals_both_models_compared_directly(tiny, token_windows):
    model, dense = tiny("llama", "float64"), tiny("llama", "float64", initializer_range=0.1)
    reference = evaluation.held_out(dense, token_windows, 6, progress=False).hidden
    found = evaluation.held_out(model, token_windows, 6, reference, models.head(dense), progress=False).fidelity
    found = found[found["positions"] == "all"].set_index("window")
    places = fidelity.positions(12, 6)
    for row, window in enumerate(torch.from_numpy(token_windows)):
        with torch.no_grad():
            logits, dense_logits = (network(input_ids=window[None]).logits[0, places] for network in (model, dense))
        expected = fidelity.compare(logits, dense_logits).mean()
        np.testing.assert_allclose(found.loc[row, expected.index].astype(float), expected, rtol=1e-9)


def test_the_stored_reference_is_read_back_unchanged(tiny, token_windows, tmp_path):
    from hfprune_nb import files

    hidden = {"one": evaluation.held_out(tiny(), token_windows, 3, progress=False).hidden, "two": torch.zeros(2, 3, 16)[:, ::2]}
    evaluation.save_reference(hidden, tmp_path / "reference.safetensors")
    read = files.load_tensors(tmp_path / "reference.safetensors")
    assert read.keys() == hidden.keys() and all(torch.equal(read[corpus], hidden[corpus]) for corpus in hidden)


@pytest.mark.parametrize(("windows", "compared"), [(8, 4), (9, 5)])
def test_a_reference_of_other_windows_is_refused(tiny, token_windows, windows, compared):
    model = tiny()
    reference = evaluation.held_out(model, token_windows[:windows], compared, progress=False).hidden
    with pytest.raises(UserError, match="evaluate both with the same parameters") as caught:
        evaluation.held_out(model, token_windows, 4, reference, models.head(model), progress=False)
    assert "\n" not in str(caught.value)


def test_a_reference_of_another_model_is_refused(tiny, token_windows):
    reference = evaluation.held_out(tiny(hidden_size=32), token_windows, 4, progress=False).hidden
    model = tiny()
    with pytest.raises(UserError, match="do not fit the dense model's head"):
        evaluation.held_out(model, token_windows, 4, reference, models.head(model), progress=False)


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"batch_size": -1}, {"compared_positions": 0}])
def test_sizes_below_one_are_refused(tiny, token_windows, changes):
    with pytest.raises(UserError, match="at least 1"):
        evaluation.held_out(tiny(), token_windows, progress=False, **changes)


def test_frames_of_several_corpora_are_stacked():
    frames = {"b": pd.DataFrame({"window": [0, 1], "nll": [1.0, 2.0]}), "a": pd.DataFrame({"window": [0], "nll": [3.0]})}
    stacked = evaluation.stack(frames)
    assert stacked.columns.tolist() == ["corpus", "window", "nll"]
    assert stacked["corpus"].tolist() == ["b", "b", "a"] and stacked["nll"].tolist() == [1.0, 2.0, 3.0]
    assert evaluation.stack({}).columns.tolist() == ["corpus"]


def test_next_tokens_are_the_largest_probabilities(tiny_alias):
    model, tokenizer = tiny_alias
    prompts = ("The sky is", "One and one make")
    found = evaluation.next_tokens(model, tokenizer, prompts, top=7)
    assert found.columns.tolist() == ["prompt_id", "prompt", "rank", "token", "probability"] and len(found) == 14
    for number, prompt in enumerate(prompts):
        rows = found[found["prompt_id"] == number]
        assert (rows["prompt"] == prompt).all() and rows["rank"].tolist() == list(range(1, 8))
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            probability = torch.softmax(model(input_ids=ids).logits[0, -1], -1)
        best = probability.topk(7)
        np.testing.assert_allclose(rows["probability"], best.values, rtol=1e-5)
        assert rows["token"].tolist() == [tokenizer.decode([token]) for token in best.indices.tolist()]


def test_next_tokens_of_the_default_prompts(tiny_alias):
    found = evaluation.next_tokens(*tiny_alias)
    assert found.groupby("prompt_id").size().tolist() == [10] * len(evaluation.PROMPTS)
    assert (found.groupby("prompt_id")["probability"].sum() <= 1 + 1e-6).all()


# Benchmarks


def stock(model, tokenizer, **options):
    return HFLM(pretrained=model, tokenizer=tokenizer, softmax_dtype="float32", **options)


def harness(language_model, chosen, limit=None):
    """The harness's samples by task, for the tasks as the kit loads them."""
    results = lm_eval.simple_evaluate(
        model=language_model,
        tasks=list(chosen.values()),
        task_manager=TaskManager(include_defaults=False),
        limit=limit,
        log_samples=True,
        bootstrap_iters=0,
    )
    return results["samples"]


def assert_same_answers(ours, theirs):
    """Both lists of (log-likelihood, greedy) agree."""
    np.testing.assert_allclose([value for value, _ in ours], [value for value, _ in theirs], rtol=0, atol=TOLERANCE)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_items_equal_the_stock_model(tiny_alias):
    model, tokenizer = tiny_alias
    items, protocol, skipped = evaluation.benchmark_items(model, tokenizer, ["smoke_choice"], "local", batch_size=5)
    samples = harness(stock(model, tokenizer, batch_size=3), tasks.load_tasks(["smoke_choice"]))["smoke_choice"]
    expected = pd.DataFrame(
        {"task": "smoke_choice", "doc_id": s["doc_id"], "doc_hash": s["doc_hash"], "metric": metric, "value": s[metric]}
        for s in samples
        for metric in ("acc", "acc_norm")
    )
    pd.testing.assert_frame_equal(items[expected.columns], expected, check_dtype=False)
    told = choices.measures(items)
    np.testing.assert_array_equal(told["chosen"] == told["right"], items["value"] == 1)
    theirs = [[likelihood for likelihood, _ in s["filtered_resps"]] for s in samples for _ in ("acc", "acc_norm")]
    np.testing.assert_allclose(np.stack(items["loglikelihoods"]), theirs, rtol=0, atol=TOLERANCE)
    assert protocol["smoke_choice"] == {"metric": "acc_norm", "shots": 0, "version": 1.0, "items": 24, "source": "local"}
    assert skipped == {}


def test_a_limit_takes_the_first_items(tiny_alias):
    model, tokenizer = tiny_alias
    everything, *_ = evaluation.benchmark_items(model, tokenizer, ["smoke_choice"])
    first, protocol, _ = evaluation.benchmark_items(model, tokenizer, ["smoke_choice"], limit=5)
    pd.testing.assert_frame_equal(first, everything[everything["doc_id"] < 5])
    assert len(first) == 10 and protocol["smoke_choice"]["items"] == 24


def test_no_task_gives_an_empty_table(tiny_alias):
    items, protocol, _ = evaluation.benchmark_items(*tiny_alias, [])
    assert items.columns.tolist() == evaluation.ITEM_COLUMNS and items.empty and protocol == {}


@pytest.mark.parametrize(
    ("names", "changes", "words"),
    [
        (["smoke_choice"], {"limit": -1}, "limit -1 is negative"),
        (["smoke_choise"], {"source": "local"}, "smoke_choice"),
        (["smoke_choice"], {"source": "here"}, "source='here' is unknown"),
        (["smoke_choice"], {"metric": "f1"}, "metric 'f1' is unknown: choose one of paper, acc"),
    ],
)
def test_bad_requests_are_refused_in_one_sentence(tiny_alias, names, changes, words):
    with pytest.raises(UserError, match=words) as caught:
        evaluation.benchmark_items(*tiny_alias, names, **changes)
    assert "\n" not in str(caught.value)


def test_the_metric_is_a_parameter(tiny_alias):
    chosen = {
        metric: evaluation.benchmark_items(*tiny_alias, ["smoke_choice"], limit=2, metric=metric)[1]["smoke_choice"]["metric"]
        for metric in tasks.METRICS
    }
    assert chosen == {"paper": "acc_norm", "acc": "acc"}


def test_a_skipped_task_leaves_the_others(tiny_alias):
    items, protocol, skipped = evaluation.benchmark_items(*tiny_alias, ["race", "smoke_choice"], "local", limit=2)
    assert list(protocol) == ["smoke_choice"] == items["task"].unique().tolist() and list(skipped) == ["race"]


@pytest.fixture
def two_tasks(monkeypatch, tmp_path):
    """A data folder with the smoke task and a copy of it that asks in other words."""
    data = tmp_path / "data"
    shutil.copytree(PROJECT / "data" / "tasks", data / "tasks")
    shutil.copytree(PROJECT / "data" / "smoke", data / "smoke")
    text = (data / "tasks" / "smoke_choice.yaml").read_text()
    other = text.replace("task: smoke_choice", "task: smoke_other").replace("Question:", "Riddle:")
    (data / "tasks" / "smoke_other.yaml").write_text(other)
    monkeypatch.setattr(tasks.paths, "data", lambda: data)
    return ["smoke_choice", "smoke_other"]


def test_an_evaluation_goes_on_with_the_next_task(tiny_alias, two_tasks, monkeypatch, tmp_path):
    arguments = {"source": "local", "limit": 6}
    undisturbed, *expected = evaluation.benchmark_items(*tiny_alias, two_tasks, **arguments)
    evaluate, evaluated = evaluation._task_items, []

    def killed(language_model, name, *rest):
        if name == "smoke_other" and len(evaluated) == 1:
            raise KeyboardInterrupt
        evaluated.append(name)
        return evaluate(language_model, name, *rest)

    monkeypatch.setattr(evaluation, "_task_items", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluation.benchmark_items(*tiny_alias, two_tasks, **arguments, scratch=tmp_path)
    evaluated.append("killed")
    resumed, *facts = evaluation.benchmark_items(*tiny_alias, two_tasks, **arguments, scratch=tmp_path)
    assert evaluated == ["smoke_choice", "killed", "smoke_other"]
    pd.testing.assert_frame_equal(resumed, undisturbed)
    assert facts == expected
    undisturbed.to_parquet(tmp_path / "one")
    resumed.to_parquet(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    for changes in ({"limit": 5}, {"bos": True}):
        with pytest.raises(UserError, match=f"keeps work of another run .{next(iter(changes))} differ"):
            evaluation.benchmark_items(*tiny_alias, two_tasks, **arguments | changes, scratch=tmp_path)


def test_progress_says_which_task_of_how_many(tiny_alias, two_tasks, capsys):
    evaluation.benchmark_items(*tiny_alias, two_tasks, "local", limit=2)
    shown = capsys.readouterr().err
    assert all(f"{name}, task {number} of 2: 100%" in shown for number, name in enumerate(two_tasks, start=1))


def test_a_task_does_not_depend_on_its_company(tiny_alias, two_tasks):
    together, *_ = evaluation.benchmark_items(*tiny_alias, two_tasks, "local", limit=6)
    alone, *_ = evaluation.benchmark_items(*tiny_alias, two_tasks[1:], "local", limit=6)
    pd.testing.assert_frame_equal(together[together["task"] == "smoke_other"].reset_index(drop=True), alone)


def test_two_processes_answer_as_one(tiny_alias, two_tasks, monkeypatch, tmp_path):
    """The harness shares the items; the first process finds all of them, in their order."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    home = tmp_path / "home"
    shutil.copytree(tasks.paths.data(), home / "data")
    shutil.copy(PROJECT / "data" / "assets.yaml", home / "data")
    monkeypatch.setenv("HFPRUNE_HOME", str(home))
    arguments = {"source": "local", "limit": 7, "batch_size": 2}
    one, *expected = evaluation.benchmark_items(*tiny_alias, two_tasks, **arguments)
    two, *facts = distributed.benchmark_items(*tiny_alias, two_tasks, **arguments, scratch=tmp_path, processes=2)
    pd.testing.assert_frame_equal(two, one)
    assert facts == expected
    assert json.loads((tmp_path / "request.json").read_text())["model"]["dtype"] == "float32"


@pytest.mark.parametrize(("processes", "limit", "most"), [(0, 0, 24), (25, 30, 24), (25, 0, 24), (4, 3, 3)])
def test_more_processes_than_items_are_refused(tiny_alias, processes, limit, most, tmp_path):
    with pytest.raises(UserError, match=f"processes {processes} is outside 1 to {most}, the number of items of smoke_choice"):
        distributed.benchmark_items(*tiny_alias, ["smoke_choice"], "local", limit, scratch=tmp_path, processes=processes)


def test_several_processes_have_nothing_to_share_without_a_task(tiny_alias, tmp_path):
    items, protocol, _ = distributed.benchmark_items(*tiny_alias, [], scratch=tmp_path, processes=2)
    assert items.empty and protocol == {} and not list(tmp_path.iterdir())


def test_the_model_writes_its_answers_in_a_generation_task(tiny_alias, monkeypatch):
    """A task like gsm8k: written answers, read in two ways."""
    model, tokenizer = tiny_alias
    texts = ["One and one make", "The sky is", "A dog has"]
    written = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        written.append(tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]))
    answers = [written[0], "something else", written[2]]
    filters = [{"function": "regex", "regex_pattern": "(.*)"}, {"function": "take_first"}]
    config = {
        "task": "writing", "output_type": "generate_until", "test_split": "test", "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}", "dataset_path": "json", "dataset_kwargs": {"data_files": {}},
        "generation_kwargs": {"until": ["</s>"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [{"name": "whole", "filter": filters[1:]}, {"name": "searched", "filter": filters}],
    }  # fmt: skip

    class Writing(tasks.LocalTask):
        def download(self, *_, **__):
            self.dataset = {"test": datasets.Dataset.from_dict({"text": texts, "answer": answers})}

    monkeypatch.setattr(evaluation, "load_tasks", lambda *_: {"writing": Writing(config=config)})
    items, protocol, _ = evaluation.benchmark_items(model, tokenizer, ["writing"])
    assert protocol["writing"]["metric"] == "exact_match,whole" and protocol["writing"]["items"] == 3
    assert items["metric"].tolist() == ["exact_match,whole", "exact_match,searched"] * 3
    assert items[items["metric"] == "exact_match,whole"]["value"].tolist() == [1.0, 0.0, 1.0]


@pytest.mark.registry
def test_stereotypes_are_counted_from_the_likelihoods(registry, tiny_alias):
    """By hand: the share of pairs whose stereotypical sentence is the likelier one."""
    model, tokenizer = tiny_alias
    items, protocol, _ = evaluation.benchmark_items(model, tokenizer, ["crows_pairs_1508"], limit=12)
    values = items.pivot(index="doc_id", columns="metric", values="value")
    assert protocol["crows_pairs_1508"]["metric"] == "pct_stereotype" and protocol["crows_pairs_1508"]["items"] == 1508
    task = tasks.load_tasks(["crows_pairs_1508"])["crows_pairs_1508"]
    for number, pair in enumerate(task.eval_docs.select(range(12))):
        more, less = (sentence_likelihood(model, tokenizer, pair[name]) for name in ("sent_more", "sent_less"))
        assert values.loc[number, "likelihood_diff"] == pytest.approx(abs(more - less), abs=TOLERANCE)
        assert values.loc[number, "pct_stereotype"] == float(more > less)
    assert 0 < values["pct_stereotype"].mean() < 1


def sentence_likelihood(model, tokenizer, sentence):
    ids = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    ids = torch.tensor([ids + tokenizer(sentence, add_special_tokens=False).input_ids])
    with torch.no_grad():
        log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return float(log_p.gather(-1, ids[0, 1:, None]).sum())


# What requests share


def test_a_row_holds_every_prefix_once():
    row = Row()
    sequences = [[5, 6, 7, 8], [5, 6, 9], [5, 6], [4, 6], [5, 6, 7, 8]]
    paths = [row.add(sequence) for sequence in sequences]
    assert row.tokens == [5, 6, 7, 8, 9, 4, 6]
    assert [[row.tokens[place] for place in path] for path in paths] == sequences
    seen = row.visible(9)
    for path in paths:
        assert seen[path[-1]].nonzero().flatten().tolist() == path
    assert seen[7:].sum() == 2 and seen[7, 7] and seen[8, 8], "padding sees itself only"


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=24), min_size=1, max_size=30))
def test_questions_keep_every_sequence_and_know_their_size(sequences):
    found = harness_module._questions(dict(enumerate(sequences)))
    assert sorted(index for _, members in found for index in members) == list(range(len(sequences)))
    assert [size for size, _ in found] == sorted((size for size, _ in found), reverse=True)
    for size, members in found:
        row = Row()
        for index in members:
            row.add(sequences[index])
        assert len(row) == size


def test_a_beginning_of_all_requests_is_read_once(tiny_alias, monkeypatch):
    model, tokenizer = tiny_alias
    primer = "One fish, two fish, red fish, blue fish. " * 4
    requests = [(primer + context, continuation) for context, continuation in REQUESTS]
    language_model = SharedPrefixLM(model, tokenizer, 4)
    widths, forward = [], model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *a, **k: widths.append(k["input_ids"].shape) or forward(*a, **k))
    ours = answers(language_model, requests)
    length = len(tokenizer(primer).input_ids)
    assert widths[0][0] == 1 and widths[0][1] >= length - 2 > harness_module.CACHED_TOKENS
    assert all(width < length for _, width in widths[1:])
    monkeypatch.undo()
    assert_same_answers(ours, answers(stock(model, tokenizer, batch_size=4), requests))


REQUESTS = [
    ("The cat sat on the", " mat"),
    ("The cat sat on the", " table and went to sleep at once"),
    ("The cat sat on the", "."),
    ("Two and two make", " four"),
    ("The cat sat on the", " mat"),  # asked twice
    ("A", "B"),
    ("A", "C"),
    ("", "No context at all"),
    ("Why? " * 12, "Because."),
    ("Why? " * 12, "Nobody knows, and nobody ever asked before today."),
    ("naïve café:", " déjà vu"),
    ("Trailing space ", "and a word"),
]


def answers(language_model, requests):
    instances = [Instance("loglikelihood", {}, request, index) for index, request in enumerate(requests)]
    return language_model.loglikelihood(instances, disable_tqdm=True)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("bos", [False, True])
def test_shared_prefixes_change_no_answer(tiny_alias, batch_size, bos):
    model, tokenizer = tiny_alias
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    ours = answers(SharedPrefixLM(model, tokenizer, batch_size, bos=bos), REQUESTS)
    assert_same_answers(ours, answers(stock(model, tokenizer, batch_size=4, add_bos_token=bos), REQUESTS))
    assert ours[0] == pytest.approx(ours[4], abs=TOLERANCE)
    default = answers(SharedPrefixLM(model, tokenizer, batch_size), REQUESTS[:1])[0]
    assert (default[0] == pytest.approx(ours[0][0], abs=TOLERANCE)) == bos, "what the tokenizer does is the default"


def test_windows_that_the_model_cannot_read_are_refused(tiny):
    model = tiny()
    with pytest.raises(UserError, match="seq_len=65 is longer than the model's context of 64 tokens: lower seq_len"):
        evaluation.held_out(model, np.ones((1, 65), dtype=int), progress=False)
    with pytest.raises(UserError, match="its tokenizer gives token id 61 and its embedding has 61 rows"):
        evaluation.held_out(model, np.full((1, 8), 61), progress=False)


def test_the_greedy_flag_is_set_for_greedy_continuations(tiny_alias):
    model, tokenizer = tiny_alias
    context, greedy = tokenizer("The cat sat on the").input_ids, []
    for _ in range(3):
        with torch.no_grad():
            greedy.append(int(model(input_ids=torch.tensor([context + greedy])).logits[0, -1].argmax()))
    requests = [(None, context, greedy), (None, context, greedy[:-1]), (None, context, [5, 5, 5])]
    ours = SharedPrefixLM(model, tokenizer)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [flag for _, flag in ours] == [True, True, False]
    assert_same_answers(ours, stock(model, tokenizer)._loglikelihood_tokens(requests, disable_tqdm=True))


@pytest.mark.parametrize("max_length", [16, 24, 40])
def test_what_does_not_fit_goes_to_the_stock_model(tiny_alias, max_length):
    """Contexts that are cut, contexts that fit alone but not with all continuations, and short ones, in one call."""
    model, tokenizer = tiny_alias
    requests = [request for request in REQUESTS if len(tokenizer(request[1]).input_ids) <= max_length]
    lengths = [len(tokenizer("".join(request)).input_ids) for request in requests]
    assert min(lengths) <= max_length < max(lengths) and len(requests) >= 8
    ours = answers(SharedPrefixLM(model, tokenizer, 4, max_length), requests)
    assert_same_answers(ours, answers(stock(model, tokenizer, batch_size=4, max_length=max_length), requests))


@pytest.mark.parametrize("architecture", ["llama-biases", "mistral", "qwen2", "qwen3", "gemma", "phi3"])
def test_every_architecture_answers_as_the_stock_model(tiny, tiny_alias, architecture):
    _, tokenizer = tiny_alias
    model = tiny(architecture, vocab_size=384, **({"sliding_window": 20} if architecture == "mistral" else {}))
    assert_same_answers(
        answers(SharedPrefixLM(model, tokenizer, 4, 64), REQUESTS),
        answers(stock(model, tokenizer, batch_size=4, max_length=64), REQUESTS),
    )


def test_rolling_likelihoods_equal_the_stock_model(tiny_alias):
    """Perplexity tasks of the harness hand over windows without strings."""
    model, tokenizer = tiny_alias
    texts = ["Every neuron counts. " * 6, "Short."]
    found = [
        language_model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts], True)
        for language_model in (SharedPrefixLM(model, tokenizer, 4, 32), stock(model, tokenizer, batch_size=4, max_length=32))
    ]
    np.testing.assert_allclose(*found, rtol=0, atol=TOLERANCE)


@pytest.mark.registry
@pytest.mark.parametrize("task", BENCHMARKS)
def test_real_benchmark_items_equal_the_stock_model(smollm, task):
    model, tokenizer = smollm
    limit = {"boolq": 2, "hellaswag": 2, "arc_challenge": 4, "truthfulqa_mc2_pypi": 1}.get(task, 6)
    chosen = tasks.load_tasks([task], "local")
    ours = harness(SharedPrefixLM(model, tokenizer, 8), chosen, limit)[task]
    theirs = harness(stock(model, tokenizer, batch_size=8), chosen, limit)[task]
    assert len(ours) == len(theirs) == limit
    for one, other in zip(ours, theirs, strict=True):
        assert one["doc_hash"] == other["doc_hash"] and one["arguments"] == other["arguments"]
        assert_same_answers(one["filtered_resps"], other["filtered_resps"])
        assert one["metrics"] == other["metrics"]
        for metric in one["metrics"]:  # an accuracy is equal, a share of probability or a difference of likelihoods nearly
            assert one[metric] == pytest.approx(other[metric], abs=TOLERANCE)
