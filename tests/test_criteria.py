"""The family of criteria: facts, settings and specs; closed-form gradients against autograd of formulas written anew."""

import json
import subprocess
import sys

import pytest
import torch

from hfprune_nb import criteria
from hfprune_nb.criteria import Criterion
from hfprune_nb.errors import UserError
from hfprune_nb.families import BASES, Family
from hfprune_nb.report.style import Legend
from hfprune_nb.runs.stages.base import source

LOGIT_CRITERIA = [
    ("one_hot_ce", {}),
    ("entropy", {}),
    ("entropy_topk", {"k": 5}),
    ("self_distillation", {}),
    ("self_distillation", {"alpha": 0.4, "temperature": 0.2}),
    ("self_distillation", {"alpha": 0.0}),
]
SDMPRUNE = {"self_distillation": {"alpha": 0.4, "temperature": 0.2}, "as": "sdmprune_20"}


def formula(name, z, y, teacher, alpha=1.0, temperature=1.0, k=0):
    if name == "entropy_topk":
        return formula("entropy", torch.sort(z, descending=True).values[:, :k], y * 0, teacher)
    p = torch.exp(z) / torch.exp(z).sum(-1, keepdim=True)
    q = torch.exp(teacher / temperature) / torch.exp(teacher / temperature).sum(-1, keepdim=True)
    cross_entropy = -torch.log(p[torch.arange(len(y)), y])
    if name == "one_hot_ce":
        return cross_entropy
    if name == "entropy":
        return -(p * torch.log(p)).sum(-1)
    return (1 - alpha) * cross_entropy + alpha * (q * (torch.log(q) - torch.log(p))).sum(-1)


def apply(criterion, logits, next_tokens=None, teacher_logits=None):
    """Hand the criterion what it needs, each position having a label."""
    given = {"next_tokens": next_tokens, "teacher_logits": teacher_logits, "label_weight": torch.ones_like(logits[:, 0])}
    return criterion.value_and_gradient(logits, **criterion.needed(given))


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    z, teacher = (4 * torch.randn(17, 23, generator=generator, dtype=torch.float64) for _ in range(2))
    return z, torch.randint(0, 23, (17,), generator=generator), teacher


@pytest.mark.parametrize(("name", "settings"), LOGIT_CRITERIA)
def test_gradient_and_value_equal_autograd(name, settings, logits):
    z, y, teacher = logits
    variable = z.clone().requires_grad_()
    expected = formula(name, variable, y, teacher, **settings)
    (gradient,) = torch.autograd.grad(expected.sum(), variable)
    before = z.clone(), teacher.clone()
    value, closed = apply(criteria.create(name, **settings), z, y, teacher)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(closed, gradient, rtol=1e-10, atol=1e-14)
    assert torch.equal(z, before[0]) and torch.equal(teacher, before[1]), "arguments were changed"


@pytest.mark.parametrize("name", ["one_hot_ce", "entropy", "self_distillation"])
def test_gradient_survives_extreme_logits(name):
    z = torch.tensor([[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4]], dtype=torch.float32)
    value, gradient = apply(criteria.create(name), z, torch.tensor([0, 1]), z.flip(-1))
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_teacher_gives_exactly_zero_gradient(dtype):
    z = 5 * torch.randn(11, 301, dtype=dtype)
    value, gradient = apply(criteria.create("self_distillation"), z, teacher_logits=z.clone())
    assert not gradient.any() and not value.any()


def test_uniform_distribution_has_largest_entropy_and_no_entropy_gradient():
    value, gradient = criteria.create("entropy").value_and_gradient(torch.zeros(2, 8, dtype=torch.float64))
    torch.testing.assert_close(value, torch.full((2,), torch.log(torch.tensor(8.0)).item(), dtype=torch.float64))
    assert gradient.abs().max() < 1e-15


def test_magnitude_is_the_norm_of_all_weights_of_a_neuron():
    gate, up, down = (torch.randn(5, 4, dtype=torch.float64) for _ in range(3))
    importance = criteria.create("magnitude").importance([gate, up], down.T)
    torch.testing.assert_close(importance, torch.cat([gate, up, down], dim=1).norm(dim=1))


def test_random_is_fixed_by_its_seed():
    draw = [criteria.create("random").importance([], torch.ones(2, 9), torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


# Facts


def test_names_finds_one_file_per_criterion():
    assert {"entropy", "magnitude", "one_hot_ce", "random", "self_distillation"} <= set(criteria.names())


def test_facts_wait_for_no_heavy_import():
    code = """
import sys
from hfprune_nb import criteria
facts = [(v.label, v.spec, v.order, v.passes, v.criterion.kind) for v in criteria.variants(criteria.names())]
print(sorted({"torch", "numpy", "pandas", "yaml"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", criteria.names())
def test_every_criterion_states_its_facts(name):
    criterion = criteria.create(name)
    assert (
        criterion.label
        and criterion.source
        and criterion.kind
        in {
            "logits",
            "activations",
            "weights",
            "weight_gradients",
            "gates",
            "measured",
            "search",
        }
    )
    assert criterion.reads_text == any(criterion.passes)
    assert criterion.basis in BASES
    assert all(setting.meaning and setting.check(name, key, setting.default) == setting.default
               for key, setting in criterion.settings.items())  # fmt: skip
    assert not (criterion.between_layers and criterion.kind in ("weights", "activations"))


def test_notes_say_which_formulas_are_not_their_authors_own():
    told = Legend().settings(["entropy", "llm_bip", "gblm", "wanda"])
    assert len(told) == 2 and told[0].startswith("GBLM-Pruner: a form for whole neurons of a published formula")
    assert told[1].startswith("LLM-BIP, our reading: our reading of a source whose formula is not public (LLM-BIP (arXiv")


def test_a_class_adds_its_settings_to_those_of_its_parent():
    assert {"aggregation", "alpha", "temperature", "first_stage_ratio"} <= criteria.create("self_distillation").settings.keys()
    assert criteria.create("entropy").settings.keys() < criteria.create("self_distillation").settings.keys()
    assert Criterion.settings == {}


# Specs


def test_variants_of_one_criterion_have_their_own_names_settings_and_labels():
    found = criteria.variants(
        ["self_distillation", SDMPRUNE, {"self_distillation": {"aggregation": "weight"}, "as": "by_weight"}]
    )
    assert [variant.name for variant in found] == ["self_distillation", "sdmprune_20", "by_weight"]
    assert [variant.label for variant in found] == [
        "Self-distillation",
        "Self-distillation (alpha 0.4, temperature 0.2)",
        "Self-distillation (weight-wise)",
    ]
    assert [variant.create().alpha for variant in found] == [1.0, 0.4, 1.0]


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("entropy", "entropy"),
        ({"entropy": {}}, "entropy"),
        ({"entropy": None, "as": "entropy"}, "entropy"),
        ({"self_distillation": {"alpha": 1}}, "self_distillation"),
        (SDMPRUNE | {"self_distillation": SDMPRUNE["self_distillation"] | {"first_stage_ratio": 0.025}}, SDMPRUNE),
        ({"entropy": {}, "as": "again"}, {"entropy": {}, "as": "again"}),
    ],
)
def test_a_spec_holds_what_differs_from_the_defaults_and_reads_back(spec, canonical):
    (variant,) = criteria.variants([spec])
    assert variant.spec == canonical
    assert criteria.variants([json.loads(json.dumps(variant.spec))]) == [variant] == criteria.variants([variant])


def test_order_is_the_papers_then_others_then_baselines_with_variants_behind_their_criterion():
    specs = ["random", "magnitude", SDMPRUNE, "entropy", "self_distillation", "one_hot_ce"]
    names = [variant.name for variant in sorted(criteria.variants(specs), key=lambda variant: variant.order)]
    assert names == ["one_hot_ce", "self_distillation", "sdmprune_20", "entropy", "magnitude", "random"]


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        (["entropie"], "did you mean 'entropy'"),
        ([{"self_distillation": {"alpha": 1.5}}], "alpha 1.5 is not a number of at least 0 and at most 1"),
        ([{"self_distillation": {"alpha": "much"}}], "alpha 'much' is not a number"),
        ([{"self_distillation": {"alpha": True}}], "alpha True is not a number"),
        ([{"self_distillation": {"temperature": 0.0}}], "temperature 0.0 is not a number above 0"),
        ([{"self_distillation": {"temprature": 0.5}}], "did you mean 'temperature'"),
        ([{"self_distillation": {"first_stage_ratio": 1.0}}], "first_stage_ratio"),
        ([{"entropy": {"aggregation": "weights"}}], "aggregation 'weights' is not one of activation, weight"),
        ([{"random": {"seed": 3}}], "it has none"),
        (["entropy", {"entropy": {"aggregation": "weight"}}], "'entropy' is named twice"),
        ([SDMPRUNE, SDMPRUNE], "'sdmprune_20' is named twice"),
        ([{"entropy": {}, "as": "a/b"}], "not a plain name"),
        ([{"entropy": {}, "random": {}}], "is no criterion"),
        ([{"as": "x"}], "is no criterion"),
        ([{"entropy": 3}], "is no criterion"),
        ([7], "is no criterion"),
    ],
)
def test_bad_specs_are_refused_in_one_sentence(specs, words):
    with pytest.raises(UserError, match=words) as caught:
        criteria.variants(specs)
    assert "\n" not in str(caught.value)


# Registered classes


def test_a_class_of_a_notebook_is_a_member_of_its_process():
    family = Family("hfprune_nb.criteria", Criterion, "criteria", criteria.Variant)

    class Guess(criteria.LogitCriterion):
        name, label, source = "guess", "Guess", "test"

        def value_and_gradient(self, logits):
            return logits[:, 0], logits

    assert family.register(Guess) is Guess and family.find("guess") is Guess
    (variant,) = family.variants([{"guess": {"reduction": "square"}, "as": "squared"}])
    assert variant.label == "Guess (squared per token)" and "guess" not in criteria.names()
    again = type("Again", (Guess,), {"name": "guess"})
    family.register(again)
    assert family.find("guess") is again, "a cell that is run again counts"


def test_what_is_no_whole_criterion_is_not_registered():
    family = Family("hfprune_nb.criteria", Criterion, "criteria", criteria.Variant)
    facts = {"name": "guess", "label": "Guess", "source": "test"}
    for wrong, words in (
        ("guess", "'guess' is no criterion: derive it"),
        (type("Loose", (), facts), "is no criterion: derive it"),
        (type("Nameless", (criteria.LogitCriterion,), {"label": "Guess"}), "Nameless lacks name, source, value_and_gradient"),
        (type("Twin", (type(criteria.create("entropy")),), {}), "'entropy' is there already: give Twin another name"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            family.register(wrong)
        assert "\n" not in str(caught.value) and not family.registered


def test_a_result_has_no_key_with_a_criterion_that_is_in_no_file():
    made = type("Guess", (criteria.LogitCriterion,), {"name": "guess", "__module__": "nowhere"})
    with pytest.raises(UserError, match="criterion 'guess' is in no file"):
        source(made)
    assert source(type(criteria.create("entropy"))).name == "entropy.py"
