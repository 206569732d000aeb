"""The explorer: answers by masks are those of narrowed models, controls are answered, the notebook runs in a kernel alone."""

import copy
import json
import re
import time
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch

from hfprune_nb import models, paths
from hfprune_nb.errors import UserError
from hfprune_nb.explore import Panel, Session
from hfprune_nb.measure import fidelity
from hfprune_nb.method import pruning, scoring
from hfprune_nb.report import one_prompt
from hfprune_nb.runs import artifacts, kernel, parameters

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "10_explore.ipynb"
PROMPT = "the <b>model</b> of attention, naïve"
CHOSEN = ["entropy", "magnitude"]


@pytest.fixture(scope="module")
def scored():
    """The tiny random model in float64, its tokenizer, and its scores."""
    network, tokenizer = models.load(models.TINY, dtype="float64", device="cpu")
    windows = np.random.default_rng(0).integers(0, 256, (4, 16))
    return network, tokenizer, scoring.score(network, windows, [*CHOSEN, "wanda"], progress=False)


@pytest.fixture(scope="module")
def session(scored):
    network, tokenizer, scores = scored
    importance = {name: [row.numpy() for row in rows] for name, rows in scores.importance.items()}
    return Session(network, tokenizer, importance, name=models.TINY)


@pytest.fixture
def panel(session):
    return Panel(session, lambda name: session, CHOSEN, 0.1, "uniform", PROMPT, new_tokens=3)


def words(html):
    """What a reader sees of HTML."""
    return unescape(re.sub("<[^>]*>", "", html))


@torch.no_grad()
@pytest.mark.parametrize("allocation", ["uniform", "global_normalised"])
def test_masked_rows_say_what_narrowed_models_say(session, allocation):
    answer = session.ask(PROMPT, CHOSEN, 0.1, allocation, new_tokens=5)
    ids = torch.tensor([session.tokens(PROMPT)[0]])
    dense = session.network(ids).logits[0]
    for name in ["dense", *CHOSEN]:
        model = copy.deepcopy(session.network)
        if name != "dense":
            pruning.narrow(model, answer.kept[name])
            assert models.count_parameters(model) == answer.plans[name].parameters
        logits, own = model(ids).logits[0], answer.positions[answer.positions["name"] == name]
        expected = fidelity.compare(logits, dense)
        for column in ("kl", "js", "top1"):
            np.testing.assert_allclose(own[column], expected[column], atol=1e-9)
        nll = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
        np.testing.assert_allclose(own["nll"], [*nll.tolist(), np.nan], rtol=1e-6)
        following = answer.next_tokens[answer.next_tokens["name"] == name]
        np.testing.assert_allclose(following["probability"], logits[-1].softmax(-1).topk(10).values, rtol=1e-6)
        written = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=1)[0]
        text = session.tokenizer.decode(written, skip_special_tokens=True)
        assert text.startswith(PROMPT) and answer.written[name] == text[len(PROMPT) :]


def test_an_answer_leaves_the_model_as_it_was(session):
    before = models.weights_digest(session.network)
    one, other = (session.ask(PROMPT, CHOSEN, 0.1, new_tokens=2) for _ in range(2))
    assert models.weights_digest(session.network) == before
    assert one.positions.equals(other.positions) and one.written == other.written


def test_more_is_lost_at_a_higher_ratio(session):
    low, high = (session.ask(PROMPT, ["entropy"], ratio).positions.groupby("name")["kl"].mean() for ratio in (0.02, 0.3))
    assert low["dense"] == high["dense"] == 0 < low["entropy"] < high["entropy"]


@pytest.mark.parametrize("prompt", [PROMPT, "日本語 🙂 text", "two\nlines"])
def test_tokens_are_parts_of_the_prompt(session, prompt):
    ids, texts = session.tokens(prompt)
    assert len(ids) == len(texts) and "".join(texts) == prompt


def test_what_cannot_be_answered_is_said_in_one_sentence(session):
    for changes, sentence in (
        ({"prompt": ""}, "prompt: there is no token in it"),
        ({"prompt": "a " * 600}, "512"),
        ({"chosen": ["entrpy"]}, "'entrpy' was not scored: choose one of"),
        ({"ratio": 0.9}, "ratio 0.9 cannot be reached"),
        ({"new_tokens": 0}, "new_tokens 0 is too small"),
        ({"allocation": "global", "chosen": ["magnitude"]}, "not comparable between layers"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)) as caught:
            session.ask(**{"prompt": PROMPT, "chosen": ["entropy"]} | changes)
        assert "\n" not in str(caught.value)


def test_allocations_are_offered_whose_needs_are_met(session):
    assert {"uniform", "global", "dlp"} <= set(session.allocations()) and "sensitivity" not in session.allocations()
    without = Session(session.network, session.tokenizer, {"entropy": session.importance["entropy"]})
    assert "dlp" not in without.allocations()
    assert all(session.ask(PROMPT, ["entropy"], 0.1, name).plans for name in session.allocations())


# What is drawn


def test_the_strip_holds_the_prompt_and_is_darker_where_more_is_lost(session):
    answer = session.ask(PROMPT, ["entropy"], 0.3)
    html = one_prompt.strip_html(answer.positions, answer.written, session.legend)
    assert words(html).count(PROMPT) == 2 and "<b>model" not in html
    answer.positions.loc[answer.positions["name"] == "entropy", "kl"] = np.linspace(0, 6, (len(answer.positions) // 2))
    html = one_prompt.strip_html(answer.positions, answer.written, session.legend)
    colours = re.findall(r"background:(#\w{6})\" title", html)
    light = [sum(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in colours]
    assert len(light) == len(answer.positions) // 2 and light == sorted(light, reverse=True) and light[0] > light[-1]


def test_bars_are_hollow_where_the_dense_model_does_not_agree(session):
    answer = session.ask(PROMPT, CHOSEN, 0.3)
    html = one_prompt.next_tokens_html(answer.next_tokens, session.legend)
    known = set(answer.next_tokens.loc[answer.next_tokens["name"] == "dense", "token"])
    assert html.count("background:transparent") == (~answer.next_tokens["token"].isin(known)).sum() > 0
    assert words(html).startswith("Dense") and words(html).count("Entropy (HFPrune)") == 1


def test_the_figure_shows_the_share_of_neurons_that_go(session):
    answer = session.ask(PROMPT, CHOSEN, 0.2)
    figure = one_prompt.removed_figure(answer.kept, session.importance["entropy"], session.legend, n_bins=8)
    first, second = (ax.images[0].get_array() for ax in figure.axes[:2])
    for image, name in ((first, "entropy"), (second, "magnitude")):
        assert image.mean() == pytest.approx(answer.plans[name].neuron_ratio)
    assert (np.diff(first, axis=1) <= 0).all(), "the first criterion's own order has its removed neurons first"
    assert one_prompt.removed_figure({}, [], session.legend).axes


def test_the_summary_has_the_perplexity_of_the_prompt(session):
    answer = session.ask(PROMPT, ["entropy"], 0.2)
    table = one_prompt.summary(answer.positions, {"entropy": 0.4}, session.legend)
    ids = torch.tensor([session.tokens(PROMPT)[0]])
    assert table.loc["Dense", "perplexity of the prompt"] == pytest.approx(float(session.network(ids, labels=ids).loss.exp()))
    assert table["neurons removed, %"].tolist() == [0, 40] and table.loc["Dense", "KL to dense, nats"] == 0


# Controls


def test_every_control_is_answered(panel):
    for name, value in (
        ("ratio", 0.3),
        ("criteria", ("magnitude",)),
        ("allocation", "dlp"),
        ("prompt", "of the"),
        ("new_tokens", 5),
    ):
        before, picture = panel.view.value, panel.removed.value
        getattr(panel, name).value = value
        assert panel.view.value != before and "answered in" in panel.status.value, (name, panel.status.value)
        assert (panel.removed.value != picture) == (name not in ("prompt", "new_tokens"))
    floor = {"global": {"floor": 0.3}}
    assert Panel(panel.session, None, ["entropy"], 0.1, floor, "of").answer.plans["entropy"].spec == floor
    assert list(panel.answer.plans) == ["magnitude"] and bytes(panel.removed.value).startswith(b"\x89PNG")


def test_a_bad_wish_is_told_and_what_was_shown_stays(panel):
    before = panel.view.value
    panel.prompt.value = ""
    assert panel.status.value.startswith("prompt: there is no token") and panel.view.value == before
    panel.prompt.value = PROMPT
    assert "answered in" in panel.status.value
    panel.criteria.value = ()
    assert "Dense" in panel.view.value and "Entropy" not in words(panel.view.value)


def test_another_model_is_loaded_by_the_button(session):
    other = Session(session.network, session.tokenizer, {"wanda": session.importance["wanda"]}, name="other")

    def load(name):
        if name != "other":
            raise UserError(f"model '{name}' is unknown: choose another.")
        return other

    panel = Panel(session, load, CHOSEN, 0.1, "uniform", PROMPT, new_tokens=2)
    panel.model.value = "nothing"
    panel.load.click()
    assert panel.status.value == "model &#x27;nothing&#x27; is unknown: choose another." and panel.session is session
    panel.model.value = "other"
    panel.load.click()
    assert panel.session is other and panel.criteria.value == ("wanda",) and list(panel.answer.plans) == ["wanda"]
    assert not panel.load.disabled


# The notebook


@pytest.fixture
def artifact(scored, tmp_path, monkeypatch):
    """A finished scoring of the tiny model, in a study of its own."""
    monkeypatch.setenv("HFPRUNE_RESULTS", str(tmp_path))
    monkeypatch.setenv("HFPRUNE_HOME", str(NOTEBOOK.parent.parent))
    *_, scores = scored
    writer = artifacts.Writer(tmp_path / "mine" / "scoring" / ("0" * 16))
    scores.save(writer.path("scores.safetensors"))
    facts = {"model": models.TINY, "criteria": [*CHOSEN, "wanda"], "seed": 0, "widths": [64, 64, 64]}
    writer.path("scores.json").write_text(json.dumps(facts))
    return writer.finish({}, {}, {})


def test_scores_of_another_model_are_refused(scored, artifact, tiny):
    _, tokenizer, _ = scored
    assert Session.load(models.TINY, "mine", artifact.reference, device="cpu").importance.keys() == {*CHOSEN, "wanda"}
    with pytest.raises(UserError, match="scores: .* holds those of tiny-random-llama, not of other"):
        Session.of_artifact(tiny("llama"), tokenizer, artifact.folder, "other")
    assert paths.results() == artifact.folder.parents[2]


def test_the_notebook_draws_its_defaults_in_a_kernel_alone(artifact, tmp_path):
    settings = {"study": "mine", "model": models.TINY, "scores": artifact.reference, "prompt": PROMPT, "device": "cpu"}
    executed = tmp_path / "executed.ipynb"
    kernel.run(NOTEBOOK, executed, parameters.check_parameters(NOTEBOOK, settings | {"ratio": 0.1, "new_tokens": 3}))
    cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    shown = [output["data"] for cell in cells for output in cell.get("outputs", ()) if "data" in output]
    html = "".join("".join(data.get("text/html", [])) for data in shown)
    assert "perplexity of the prompt" in html and PROMPT in words(html) and "Magnitude" in words(html)
    assert any("image/png" in data for data in shown)
    assert any("application/vnd.jupyter.widget-view+json" in data for data in shown)


@pytest.mark.registry
def test_smollm2_answers_within_two_seconds_of_two_cores(registry):
    """Counted in CPU time, as other work on the machine makes a clock slow."""
    network, tokenizer = models.load("smollm2-135m", device="cpu")
    random = np.random.default_rng(0)
    importance = {name: [random.random(mlp.width) for mlp in models.gated_mlps(network)] for name in CHOSEN}
    session = Session(network, tokenizer, importance)
    text = "Water boils at 100 degrees Celsius. The capital of France is Paris, and the capital of Italy is"
    panel = Panel(session, None, CHOSEN, 0.1, "uniform", text)
    spent = []
    for ratio in (0.2, 0.3):
        start = time.process_time()
        panel.ratio.value = ratio
        spent.append(time.process_time() - start)
    assert min(spent) < 4 and panel.answer.written["dense"].startswith(" Rome")
