"""The result of scoring, its files, and reading them again."""

import dataclasses
from pathlib import Path

import torch

from hfprune_nb.errors import UserError
from hfprune_nb.files import by_layer, load_tensors, save_tensors
from hfprune_nb.models import attention_groups, gated_mlps


@dataclasses.dataclass
class Scores:
    """Importance of every neuron under each criterion, by the variant's name.

    importance : for each layer (neurons,) float64, higher = keep.
    mean_value : mean of C over all positions, in nats (only criteria that are a function of the logits).
    tokens : calibration tokens that were scored, of all processes, each counted once however often a criterion has it read:
        tokens / seconds compares criteria, engine and published loops as `cost.timing` does, and a teacher that was kept or
        computed again does not change it. seconds : wall time, that before a resumed checkpoint included; batch_size : windows
        in a forward pass, as given or found.
    snapshots : n -> criterion -> importance after the first n windows, for n = the powers of two and the total; only criteria
        that read text, and of those that keep no snapshots the total alone. Self-distillation's student is at every n the one of
        the full first stage.
    notes : criterion -> what else is to be known of how its scores were found, by name.
    groups : criterion -> for each layer (groups,), the importance of attention's key-value groups where they were scored.
    """

    importance: dict[str, list[torch.Tensor]]
    mean_value: dict[str, float]
    tokens: int
    seconds: float
    batch_size: int = 0
    snapshots: dict[int, dict[str, list[torch.Tensor]]] = dataclasses.field(default_factory=dict)
    notes: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    groups: dict[str, list[torch.Tensor]] = dataclasses.field(default_factory=dict)

    def save(self, file: Path) -> None:
        """Write importance as safetensors with keys `criterion/layer`; raise UserError when the disk is full."""
        save_tensors(_by_key(self.importance), file)

    def save_groups(self, file: Path) -> None:
        """Write the importance of attention groups as `save` does that of neurons."""
        save_tensors(_by_key(self.groups), file)

    def save_snapshots(self, file: Path) -> None:
        """Write the snapshots as safetensors with keys `criterion/n/layer`; raise UserError when the disk is full."""
        flat = {f"{name}/{n}": rows for n, found in self.snapshots.items() for name, rows in found.items()}
        save_tensors(_by_key(flat), file)


def _by_key(layers: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{name}/{layer}": row for name, rows in layers.items() for layer, row in enumerate(rows)}


def load_importance(file: Path, criterion: str, model=None, units=gated_mlps) -> list[torch.Tensor]:
    """Read one criterion's importance, (neurons,) of each layer; raise UserError when criterion or model do not fit it.

    units : `attention_groups` for a file with the importance of those.
    """
    found = by_layer(load_tensors(file))
    if criterion not in found:
        raise UserError(f"criterion '{criterion}' is not in {file}, which holds {', '.join(sorted(found))}: score it first.")
    if model is not None:
        held, own = [len(row) for row in found[criterion]], units(model)
        expected = [unit.width for unit in own]
        if held != expected:
            held, expected = _shape(held), _shape(expected)
            raise UserError(
                f"scores: {file} was made for another model: it holds {held}, the model has {expected} {own[0].noun}s."
            )
    return found[criterion]


def load_groups(file: Path, criterion: str, model) -> list[torch.Tensor]:
    """Read one criterion's importance of attention groups, (groups,) of each layer; errors as `load_importance`."""
    if not Path(file).is_file():
        raise UserError(
            "attention_split: the scores hold no attention groups: run stage 02 with attention_groups true, or choose none."
        )
    return load_importance(file, criterion, model, attention_groups)


def load_snapshots(file: Path) -> dict[int, dict[str, list[torch.Tensor]]]:
    """Read what `Scores.save_snapshots` wrote; raise UserError for a missing or truncated file."""
    snapshots: dict = {}
    for key, rows in by_layer(load_tensors(file)).items():
        name, _, n = key.rpartition("/")
        snapshots.setdefault(int(n), {})[name] = rows
    return dict(sorted(snapshots.items()))


def _shape(widths):
    low, high = min(widths), max(widths)
    return f"{len(widths)} layers of {low if low == high else f'{low} to {high}'}"
