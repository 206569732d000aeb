"""What the forward pass alone tells: statistics of the neurons' activations, collected while it runs."""

import contextlib
from collections.abc import Iterator

import torch

from hfprune_nb.criteria import ActivationCriterion
from hfprune_nb.models.hooks import replaced


@contextlib.contextmanager
def collected(model, criteria: dict[str, ActivationCriterion]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Within the context, a forward pass over windows (batch, seq) fills what is yielded, in which no graph remains.

    `criterion/statistic` -> one tensor (batch, ...) for each layer, from h in float32 or wider.
    """
    found: dict[str, list[torch.Tensor]] = {}

    @torch.no_grad()
    def collect(_, hidden):
        wide = hidden.detach().to(torch.promote_types(hidden.dtype, torch.float32))
        for name, criterion in criteria.items():
            for statistic, rows in criterion.statistics(wide).items():
                found.setdefault(f"{name}/{statistic}", []).append(rows)
        return hidden

    with replaced(model, collect) if criteria else contextlib.nullcontext():
        yield found
