"""Every criterion with every allocation in every supported architecture: the same model silenced, cut, written and read."""

import copy

import pytest
import torch
from conftest import ARCHITECTURES
from transformers import AutoModelForCausalLM

import hfprune_nb
from hfprune_nb import allocations, criteria, models
from hfprune_nb.errors import UserError
from hfprune_nb.method import export, pruning, scoring, selection
from hfprune_nb.method.measurement import Measurement
from hfprune_nb.method.scoring import distributed
from hfprune_nb.models.hooks import silenced

RATIO = 0.3
# Where a rule measures, one window says as much about the model as several.
ALLOCATIONS = [
    {name: {"windows": 1}} if "windows" in allocations.create(name).settings else name for name in allocations.names()
] + [{"global": {"floor": 0.5}, "as": "global_50"}]
TOKENS = torch.arange(24).reshape(2, 12)


class NoTokenizer:
    """Stands in where only the model's files matter."""

    def save_pretrained(self, folder):
        pass


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


def importance(model, windows):
    """Every criterion's importance, made comparable between layers only where it says so."""
    return scoring.score(model, windows, criteria.names(), progress=False).importance


def comparable(name):
    (variant,) = criteria.variants(name)
    return variant.between_layers


def plans(model, scores, windows):
    """Yield every allocation that goes with every criterion: (criterion, allocation's name, allocation, kept)."""
    for name, rows in scores.items():
        measure = Measurement(model, windows, progress=False)
        for spec in ALLOCATIONS:
            (variant,) = allocations.variants(spec)
            if variant.member.needs_comparable and not comparable(name):
                with pytest.raises(UserError, match=f"scores of criterion '{name}' are not comparable"):
                    selection.allocate(model, neuron_ratio=RATIO, allocation=spec, importance=rows, criterion=name)
                continue
            plan = selection.allocate(
                model,
                neuron_ratio=RATIO,
                allocation=spec,
                importance=rows,
                criterion=name,
                scores=selection.read_scores(spec, list(scores), scores.__getitem__),
                measure=measure,
            )
            yield name, variant.name, plan, selection.kept_neurons(rows, plan.width_after)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_silenced_cut_written_and_read_are_one_model(architecture, tiny, token_windows, tmp_path):
    dense = tiny(architecture, "float64", intermediate_size=41)  # of which the ratio is no whole number
    seen = set()
    for name, allocation, plan, kept in plans(dense, importance(dense, token_windows[:3]), token_windows[:1]):
        total = sum(plan.width_before)
        if allocation == "uniform":
            assert len(set(plan.width_after)) == 1 and abs(plan.missed_neurons) <= 0.5 * len(plan.width_after)
        else:
            assert sum(plan.width_after) == round((1 - RATIO) * total), "exact to the neuron"
        assert [len(row) for row in kept] == plan.width_after
        with silenced(dense, kept):
            expected = logits(dense)
        narrow = pruning.narrow(copy.deepcopy(dense), kept)
        torch.testing.assert_close(logits(narrow), expected)
        assert models.count_parameters(narrow) == plan.parameters
        if allocation in seen:
            continue
        seen.add(allocation)
        folder = tmp_path / allocation
        export.save_checkpoint(narrow, NoTokenizer(), folder / "own")
        assert torch.equal(logits(hfprune_nb.load(folder / "own")), logits(narrow)), (name, allocation)
        remote = AutoModelForCausalLM.from_pretrained(folder / "own", trust_remote_code=allocation != "uniform")
        assert torch.equal(logits(remote), logits(narrow))
        assert [mlp.width for mlp in models.gated_mlps(remote)] == plan.width_after
        export.save_checkpoint(narrow, NoTokenizer(), folder / "padded", padded=True)
        padded = AutoModelForCausalLM.from_pretrained(folder / "padded")
        assert type(padded) is type(dense) and padded.config.intermediate_size == max(plan.width_after)
        torch.testing.assert_close(logits(padded), logits(narrow))
    assert {"uniform", "global", "global_50"} <= seen


def assert_close(found, expected):
    for name, rows in expected.items():
        for layer, (row, other) in enumerate(zip(found[name], rows, strict=True)):
            torch.testing.assert_close(row, other, rtol=1e-6, atol=1e-12, msg=lambda words, at=(name, layer): f"{at}: {words}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_depend_on_no_batch_no_chunk_and_no_interruption(architecture, tiny, token_windows, tmp_path):
    model, settings, token_windows = tiny(architecture, "float64"), {"progress": False, "seed": 3}, token_windows[:3]
    expected = scoring.score(model, token_windows, criteria.names(), batch_size=3, **settings).importance
    for batch, chunk in ((1, 128), (2, 5)):
        found = scoring.score(model, token_windows, criteria.names(), batch_size=batch, chunk_size=chunk, **settings)
        assert_close(found.importance, expected)
    for _ in range(2):  # the second one reads all of the first one's sums
        found = scoring.score(model, token_windows, criteria.names(), batch_size=3, checkpoint=tmp_path, **settings).importance
        assert all(torch.equal(row, other) for name in expected for row, other in zip(found[name], expected[name], strict=True))


def test_scores_of_two_processes_are_those_of_one(token_windows, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = {"dtype": "float64", "device": "cpu", "batch_size": 2, "seed": 3, "progress": False}
    one, two = (
        distributed.score(models.TINY, token_windows, criteria.names(), folder=tmp_path / str(n), processes=n, **settings)
        for n in (1, 2)
    )
    assert_close(two.importance, one.importance)
