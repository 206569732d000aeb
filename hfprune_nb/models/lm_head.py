"""The language-model head: from final hidden states to float32 logits, and from a gradient for logits back to hidden states."""

import contextlib
import dataclasses

import torch
from torch import nn

from hfprune_nb.errors import UserError

_TILE = 2048  # rows of a half-precision head that are float32 at once on the CPU: such a tile stays in its cache


@dataclasses.dataclass(frozen=True)
class Head:
    """The map from final hidden states to float32 logits of one model, with the model's own logit scaling and capping."""

    module: nn.Linear
    multiplier: float = 1.0
    softcap: float | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The matrix (vocabulary, hidden), in the dtype of the model."""
        return self.module.weight

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits (positions, vocabulary) of final hidden states (positions, hidden), in float32 or wider.

        Half-precision inputs are multiplied exactly and summed in float32. out : memory for them where no
        gradient is asked for, of that dtype and shape.
        """
        hidden = hidden.to(self.weight.device)
        if self.weight.dtype in (torch.float32, torch.float64):
            scores = torch.mm(hidden.to(self.weight.dtype), self.weight.t(), out=out)
        elif torch.is_grad_enabled() and hidden.requires_grad:
            scores = torch.mm(hidden.float(), self.weight.float().t())
        elif hidden.is_cuda and hidden.dtype == self.weight.dtype:
            scores = torch.mm(hidden, self.weight.t(), out_dtype=torch.float32, out=out)
        else:
            scores = self._logits_in_tiles(hidden, out)
        if self.module.bias is not None:
            scores = scores + self.module.bias
        if self.multiplier != 1:
            scores = scores * self.multiplier
        return self.softcap * torch.tanh(scores / self.softcap) if self.softcap else scores

    def _logits_in_tiles(self, hidden, out):
        """Multiply as on CUDA, one small float32 tile of the head after the other: no float32 copy of the head."""
        scores = hidden.new_empty(len(hidden), len(self.weight), dtype=torch.float32) if out is None else out
        wide, tile = hidden.float(), self.weight.new_empty(_TILE, self.weight.shape[1], dtype=torch.float32)
        with matmul_precision(torch.promote_types(hidden.dtype, self.weight.dtype)):
            for start in range(0, len(self.weight), _TILE):
                rows = self.weight[start : start + _TILE]
                torch.mm(wide, tile[: len(rows)].copy_(rows).t(), out=scores[:, start : start + _TILE])
        return scores

    def hidden_gradient(self, logits: torch.Tensor, logit_gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient (positions, hidden) for the hidden states, given `logits` and the gradient for them."""
        return torch.mm(self.product_gradient(logits, logit_gradient).to(self.weight.dtype), self.weight)

    def product_gradient(self, logits: torch.Tensor, logit_gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient (positions, vocabulary) for the plain product with the head, before scaling and capping."""
        if self.softcap:
            logit_gradient = logit_gradient * (1 - (logits / self.softcap) ** 2)
        return logit_gradient * self.multiplier if self.multiplier != 1 else logit_gradient


@contextlib.contextmanager
def matmul_precision(dtype: torch.dtype):
    """Within the context, products of float32 tensors on the CPU are exact for values that `dtype` can hold.

    Of bfloat16 values nothing is lost when products take bfloat16 inputs, and the CPU's bfloat16 unit sums in float32: the same
    logits 2.4 times as fast. A CPU without that unit ignores the setting.
    """
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if dtype == torch.bfloat16 else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def head(model: nn.Module) -> Head:
    """Return the language-model head of `model`; raise UserError for a model that treats its logits in a way unknown here."""
    module, config = model.get_output_embeddings(), model.config.get_text_config()
    multiplier = 1.0
    if scaling := getattr(config, "logits_scaling", None):  # Granite divides
        multiplier /= scaling
    if scale := getattr(config, "logit_scale", None):  # Cohere multiplies
        multiplier *= scale
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and 3
    found = Head(module, multiplier, softcap)
    probe = torch.arange(4, device=model.get_input_embeddings().weight.device)[None]
    with torch.no_grad():
        expected, hidden = _logits_and_final_hidden(model, probe)
        actual = found.logits(hidden[0]).float()
    expected = expected[0].float()
    if (actual.to(expected.device) - expected).abs().max() > 0.03 * expected.abs().max():
        raise UserError(
            f"model: {type(model).__name__} is not supported: it changes its logits after `lm_head` in an unknown way."
        )
    return found


def _logits_and_final_hidden(model, token_ids):
    """Return the logits of the model's own forward pass and the hidden states that its head saw, in one reading."""
    seen = []
    handle = model.get_decoder().register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state))
    try:
        return model(input_ids=token_ids, use_cache=False).logits, seen[0]
    finally:
        handle.remove()


def final_hidden(model: nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
    """Return the hidden states (batch, seq, hidden) that enter the language-model head, of token_ids (batch, seq)."""
    return model.get_decoder()(input_ids=token_ids, use_cache=False).last_hidden_state
