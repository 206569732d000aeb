"""The result of scoring, its files, and reading them again."""

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import save_file

from hfprune_nb.errors import UserError
from hfprune_nb.files import full_disk_in_one_sentence, load_tensors
from hfprune_nb.models import gated_mlps


@dataclasses.dataclass
class Scores:
    """Importance of every neuron under each criterion.

    importance : criterion -> (layers, neurons) float64, higher = keep.
    mean_value : criterion -> mean of C over all positions, in nats (only criteria that are a function of the logits).
    tokens : calibration tokens that were scored, of all processes, each counted once however often a criterion has it read:
        tokens / seconds compares criteria, engine and published loops as `measure.speed` does, and a teacher that was kept or
        computed again does not change it. seconds : wall time, that before a resumed checkpoint included; batch_size : windows
        in a forward pass, as given or found.
    snapshots : n -> criterion -> importance after the first n windows, for n = the powers of two and the total; only criteria
        that read text. Self-distillation's student is at every n the one of the full first stage.
    """

    importance: dict[str, torch.Tensor]
    mean_value: dict[str, float]
    tokens: int
    seconds: float
    batch_size: int = 0
    snapshots: dict[int, dict[str, torch.Tensor]] = dataclasses.field(default_factory=dict)

    def save(self, file: Path) -> None:
        """Write the importance tensors as safetensors; raise UserError when the disk is full."""
        with full_disk_in_one_sentence(file):
            save_file({name: tensor.contiguous() for name, tensor in self.importance.items()}, file)

    def save_snapshots(self, file: Path) -> None:
        """Write the snapshots as safetensors with keys `criterion/n`; raise UserError when the disk is full."""
        tensors = {f"{name}/{n}": tensor.contiguous() for n, found in self.snapshots.items() for name, tensor in found.items()}
        with full_disk_in_one_sentence(file):
            save_file(tensors, file)


def load_importance(file: Path, criterion: str, model=None) -> torch.Tensor:
    """Read one criterion's importance (layers, neurons); raise UserError when criterion or model do not fit it."""
    tensors = load_tensors(file)
    if criterion not in tensors:
        raise UserError(f"criterion '{criterion}' is not in {file}, which holds {', '.join(sorted(tensors))}: score it first.")
    importance = tensors[criterion]
    if model is not None:
        mlps = gated_mlps(model)
        if importance.shape != (len(mlps), mlps[0].width):
            raise UserError(
                f"scores: {file} was made for another model: it holds {importance.shape[0]} layers of {importance.shape[1]} "
                f"neurons, the model has {len(mlps)} of {mlps[0].width}."
            )
    return importance


def load_snapshots(file: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Read what `Scores.save_snapshots` wrote; raise UserError for a missing or truncated file."""
    snapshots = {}
    for key, tensor in load_tensors(file).items():
        name, _, n = key.rpartition("/")
        snapshots.setdefault(int(n), {})[name] = tensor
    return dict(sorted(snapshots.items()))
