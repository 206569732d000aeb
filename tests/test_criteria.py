"""Closed-form gradients against autograd of independently written formulas, in float64."""

import pytest
import torch

from hfprune_nb import criteria
from hfprune_nb.errors import UserError

LOGIT_CRITERIA = [
    ("one_hot_ce", {}),
    ("entropy", {}),
    ("self_distillation", {}),
    ("self_distillation", {"alpha": 0.4, "temperature": 0.2}),
    ("self_distillation", {"alpha": 0.0}),
]


def formula(name, z, y, teacher, alpha=1.0, temperature=1.0):
    p = torch.exp(z) / torch.exp(z).sum(-1, keepdim=True)
    q = torch.exp(teacher / temperature) / torch.exp(teacher / temperature).sum(-1, keepdim=True)
    cross_entropy = -torch.log(p[torch.arange(len(y)), y])
    if name == "one_hot_ce":
        return cross_entropy
    if name == "entropy":
        return -(p * torch.log(p)).sum(-1)
    return (1 - alpha) * cross_entropy + alpha * (q * (torch.log(q) - torch.log(p))).sum(-1)


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
    value, closed = criteria.create(name, **settings).value_and_gradient(z, y, teacher)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(closed, gradient, rtol=1e-10, atol=1e-14)
    assert torch.equal(z, before[0]) and torch.equal(teacher, before[1]), "arguments were changed"


@pytest.mark.parametrize("name", ["one_hot_ce", "entropy", "self_distillation"])
def test_gradient_survives_extreme_logits(name):
    z = torch.tensor([[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4]], dtype=torch.float32)
    value, gradient = criteria.create(name).value_and_gradient(z, torch.tensor([0, 1]), z.flip(-1))
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_teacher_gives_exactly_zero_gradient(dtype):
    z = 5 * torch.randn(11, 301, dtype=dtype)
    value, gradient = criteria.create("self_distillation").value_and_gradient(z, torch.zeros(11).long(), z.clone())
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


def test_names_finds_one_file_per_criterion():
    assert criteria.names() == ["entropy", "magnitude", "one_hot_ce", "random", "self_distillation"]


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("entropie", {}, "did you mean 'entropy'"),
        ("self_distillation", {"alpha": 1.5}, "alpha"),
        ("self_distillation", {"temperature": 0.0}, "temperature"),
    ],
)
def test_bad_criteria_are_refused_in_one_sentence(name, settings, words):
    with pytest.raises(UserError, match=words) as caught:
        criteria.create(name, **settings)
    assert "\n" not in str(caught.value)
