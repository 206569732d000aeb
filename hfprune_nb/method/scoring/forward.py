"""What the forward pass alone tells: statistics of the neurons' activations, collected while it runs."""

import contextlib
import functools
from collections.abc import Iterator

import torch

from hfprune_nb.criteria import ActivationCriterion
from hfprune_nb.models import gated_mlps
from hfprune_nb.models.hooks import replaced


@contextlib.contextmanager
def collected(model, criteria: dict[str, ActivationCriterion], units=gated_mlps) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Within the context, a forward pass over windows (batch, seq) fills what is yielded, in which no graph remains.

    `criterion/statistic` -> one tensor (batch, ...) for each layer, from h in float32 or wider, or from what `units`, as those of
    `hooks.replaced`, say.
    """
    found: dict[str, list[torch.Tensor]] = {}
    with_output = {name: criterion for name, criterion in criteria.items() if criterion.needs_output}
    waiting = {}

    def add(of, wide, **output):
        for name, criterion in of.items():
            for statistic, rows in criterion.statistics(wide, **output).items():
                found.setdefault(f"{name}/{statistic}", []).append(rows)

    @torch.no_grad()
    def collect(layer, hidden):
        wide = _wide(hidden)
        add({name: criterion for name, criterion in criteria.items() if name not in with_output}, wide)
        if with_output:
            waiting[layer] = wide
        return hidden

    @torch.no_grad()
    def leave(layer, _module, _args, output):
        add(with_output, waiting.pop(layer), output=_wide(output[0] if isinstance(output, tuple) else output))

    with contextlib.ExitStack() as stack:
        if criteria:
            stack.enter_context(replaced(model, collect, units))
        if with_output:
            for index, layer in enumerate(model.get_decoder().layers):
                stack.callback(layer.register_forward_hook(functools.partial(leave, index)).remove)
        yield found


def _wide(states):
    return states.detach().to(torch.promote_types(states.dtype, torch.float32))
