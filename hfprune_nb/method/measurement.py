"""What allocations measure on a dense model: the divergence that silencing neurons causes, the influence of whole MLPs."""

from collections.abc import Sequence

import numpy as np
import torch

from hfprune_nb.errors import UserError
from hfprune_nb.method.scoring import ablation
from hfprune_nb.models import check_context
from hfprune_nb.progress import bar


class Measurement:
    """Measures on the first ones of `windows`, (windows, seq) token ids of calibration text, when it is asked.

    What was measured once is kept. The model must be dense still and, for small changes to show, in float32.
    """

    def __init__(self, model, windows: np.ndarray, progress: bool = True):
        self._model, self._windows, self._progress = model, np.asarray(windows), progress
        self._known: dict[tuple, float] = {}

    def divergence(self, ablations: list[dict[int, Sequence[int]]], windows: int) -> list[float]:
        """Return KL(dense || ablated) of each ablation, a mapping from layers to the neurons silenced there.

        The mean over the positions of the first `windows` windows, in nats. Raises UserError when there are fewer.
        """
        keys = [(windows, *((layer, *neurons) for layer, neurons in sorted(each.items()))) for each in ablations]
        asked = {key: each for key, each in zip(keys, ablations, strict=True) if key not in self._known}
        # Those that begin in the same layer share a forward pass from there.
        groups: dict[int, list] = {}
        for key, each in asked.items():
            groups.setdefault(min(each, default=0), []).append((key, each))
        totals = dict.fromkeys(asked, 0.0)
        with bar(len(asked) * windows, "ablation", "allocation", enabled=self._progress and bool(asked)) as progress_bar:
            for ids in self._batches(windows) if asked else ():
                measure = ablation.Ablator(self._model, ids, together=4)
                for group in groups.values():
                    found = measure([each for _, each in group]).sum(1).tolist()
                    for (key, _), value in zip(group, found, strict=True):
                        totals[key] += value / windows
                    progress_bar.update(len(group) * len(ids))
        self._known |= totals
        return [self._known[key] for key in keys]

    def influence(self, windows: int) -> list[float]:
        """Return `1 - cos` of the residual stream before and behind each layer's MLP, the mean over tokens."""
        found = [ablation.mlp_influence(self._model, ids) for ids in self._batches(windows)]
        return [sum(values) / windows for values in zip(*found, strict=True)]

    def _batches(self, windows):
        """Yield the windows one at a time, (1, seq), as the dense logits of a window are held."""
        if len(self._windows) < windows:
            raise UserError(f"windows {windows}: there are {len(self._windows)} calibration windows: lower it, or take more.")
        check_context(self._model.config, self._windows.shape[1])
        for window in self._windows[:windows]:
            yield torch.as_tensor(window, dtype=torch.long, device=self._model.device)[None]
