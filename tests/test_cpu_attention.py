"""Attention in blocks for shapes that the scored architectures of the other tests do not have."""

import pytest
import torch

from hfprune_nb.models import cpu_attention


@pytest.mark.parametrize("size", [4, 8, 12])
def test_values_may_have_another_size_than_queries_and_keys(size, monkeypatch):
    """Multi-head latent attention: output and all gradients are those of torch's own function."""
    monkeypatch.setattr(cpu_attention, "_BLOCK", 5)
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 6, 13, 8), (2, 3, 13, 8), (2, 3, 13, size))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    query, key, value = inputs
    found = cpu_attention._CausalBlocks.apply(query, key, value, 0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), is_causal=True, scale=0.3
    )
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(*(torch.autograd.grad(output, inputs, upstream) for output in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("setting", [{"is_causal": False}, {"position_bias": torch.randn(1, 2, 7, 7)}])
def test_what_is_more_than_causal_attention_is_left_to_torch(setting):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, key, value = (torch.randn(1, 2, 7, 8) for _ in range(3))
    found, _ = cpu_attention._forward(torch.nn.Module(), query, key, value, None, **setting)
    torch.testing.assert_close(found, sdpa_attention_forward(torch.nn.Module(), query, key, value, None, **setting)[0])
    plain, _ = cpu_attention._forward(torch.nn.Module(), query, key, value, None)
    assert not torch.allclose(found, plain)
