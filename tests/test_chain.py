"""The notebooks' own cells, executed in this process on a tiny model, for what the smoke study has no room for."""

import json

import matplotlib.pyplot as plt
import pytest
from IPython.display import display
from transformers import AutoModelForCausalLM

from hfprune_nb import models
from hfprune_nb.files import read_json
from hfprune_nb.inputs import calibration
from hfprune_nb.runs.artifacts import Artifact
from hfprune_nb.runs.parameters import notebook_path

CORPUS = "data/smoke/corpus.txt"
HELD_OUT = {"tasks": [], "n_windows": 2, "seq_len": 32, "fidelity_positions": 4, "text_column": "messages", "chat_template": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose tokenizer has a chat template, conversations, and instructions."""
    folder = tmp_path_factory.mktemp("chain")
    model, tokenizer = models.load(models.TINY, dtype="float32", device="cpu")
    tokenizer.chat_template = "{% for turn in messages %}[{{ turn['role'] }}] {{ turn['content'] }}\n{% endfor %}"
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    roles = ("user", "assistant") * 12
    turns = [[{"role": role, "content": f"{number}"} for role in roles] for number in range(40)]
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    records = [{"instruction": f"Say {i}.", "response": f"It is {i}, as was asked."} for i in range(40)]
    (folder / "instructions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return folder


@pytest.fixture(scope="module")
def executed(folder):
    """Return a function that executes the code cells of a stage's notebook, up to the first that holds `last`."""

    def run(stage, last="run.finish", **parameters):
        names = {"study": "chain", "model": str(folder / "model"), "device": "cpu"} | parameters
        cells = read_json(notebook_path(stage))["cells"]
        space = {"display": display}
        for source in ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"):
            exec(source, space)
            if "parameters" not in space:
                space |= {name: value for name, value in names.items() if name in space} | {"parameters": names}
            if last in source:
                return space
        raise AssertionError(f"no cell of {stage} holds {last}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HFPRUNE_RESULTS", str(folder / "results"))
        patch.setattr(plt, "show", plt.close)
        yield run


@pytest.fixture(scope="module")
def pruned(executed):
    """A pruning whose layers keep different numbers of neurons."""
    windows = executed("calibration", corpus=CORPUS, n_windows=4, seq_len=32)["run"].artifact
    scores = executed("scoring", calibration=windows.reference, criteria=["entropy"])["run"].artifact
    pruning = executed("pruning", scores=scores.reference, allocation="global", save_checkpoint=False)["run"].artifact
    assert len(set(read_json(pruning.path("pruning.json"))["widths"])) > 1
    return pruning


def test_scoring_that_stops_gives_the_bytes_of_so_few_windows(executed):
    """A target that the first windows reach: what is scored is what a calibration of as many windows gives."""
    scored = {}
    for n_windows, stop_at in ((40, 0.1), (32, 0.0)):
        windows = executed("calibration", corpus=CORPUS, n_windows=n_windows, seq_len=16)["run"].artifact
        settings = {"calibration": windows.reference, "criteria": ["entropy"], "stop_at": stop_at, "stop_ratios": [0.5]}
        scored[stop_at] = executed("scoring", **settings)["run"].artifact
    stopped, plain = (scored[stop_at].path("scores.safetensors").read_bytes() for stop_at in (0.1, 0.0))
    facts = read_json(scored[0.1].path("scores.json"))
    assert stopped == plain and (facts["windows"], facts["of_windows"]) == (32, 40)
    assert facts["reached"][0]["predicted"] >= 0.1


def test_a_tuned_model_of_different_widths_is_padded_on_request(executed, folder, pruned):
    settings = {"pruned": pruned.reference, "data": str(folder / "instructions.jsonl"), "n_records": 8, "n_held_out": 1}
    settings |= {"max_steps": 1, "rows_per_step": 1, "seq_len": 256, "save_checkpoint": True, "padded": True}
    tuned = executed("recovery", **settings)["run"].artifact
    model = AutoModelForCausalLM.from_pretrained(tuned.path("checkpoint"))
    assert {mlp.width for mlp in models.gated_mlps(model)} == {max(read_json(pruned.path("pruning.json"))["widths"])}


def test_held_out_text_is_read_once_and_rendered_as_asked(executed, folder, pruned, monkeypatch):
    """The dense evaluation reads it, conversations through the template and plain text as it stands; all others take its own."""
    corpora = [str(folder / "chat.jsonl"), CORPUS]
    dense = executed("evaluation", perplexity_corpora=corpora, **HELD_OUT)["run"].artifact
    tokenizer = models.tokenizer(str(folder / "model"))
    chat, plain = (calibration.Windows.load(dense.path(f"held_out/{number}")) for number in range(2))
    assert all("[assistant]" in tokenizer.decode(row) or "[user]" in tokenizer.decode(row) for row in chat.ids)
    assert not any("[user]" in tokenizer.decode(row) for row in plain.ids)
    monkeypatch.setattr(calibration, "windows", lambda *_, **__: pytest.fail("held-out text was read again"))
    settings = {"pruned": pruned.reference, "reference": dense.reference, "perplexity_corpora": corpora}
    found = executed("evaluation", **settings, **HELD_OUT)["run"].artifact
    assert isinstance(found, Artifact) and not found.path("held_out").exists()
    assert found.path("windows.parquet").read_bytes() == dense.path("windows.parquet").read_bytes()
    assert found.path("fidelity.parquet").is_file()


def test_experiments_render_conversations_and_leave_plain_text(executed, folder):
    corpora = [str(folder / "chat.jsonl"), CORPUS]
    settings = {"text_column": "messages", "chat_template": True, "n_windows": 2, "seq_len": 32, "own_text": ""}
    space = executed("experiments", "texts = ", corpora=corpora, **settings)
    decoded = {name: " ".join(map(space["tokenizer"].decode, text.ids)) for name, text in space["texts"].items()}
    assert ["[user]" in words or "[assistant]" in words for words in decoded.values()] == [True, False, True]
    space["run"]._lock.release(everything=True)
