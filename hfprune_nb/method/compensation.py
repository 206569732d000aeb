"""Light repair without training: the `down_proj` of each layer learns to make up for the neurons that it lost.

With h the neurons' activations, W the dense `down_proj`, and r and k the removed and the kept neurons, the repaired weight is
`W' = W_k + D`, where D minimises `sum over tokens of ||W_r h_r - D h_k - b||^2 + ridge * s * ||D||^2`, s being the mean of the
diagonal of `sum h_k h_k^T`. The penalty is on the change and not on the weight: at any ridge the error on the calibration text is
at most that of plain slicing (D = 0). All h are those of the dense model, so every layer is repaired by itself ("parallel"): one
forward pass does, and no layer answers for the errors of the layers before it.
"""

import math

import numpy as np
import pandas as pd
import torch

from hfprune_nb.errors import UserError
from hfprune_nb.method.pruning import check_takes_bias
from hfprune_nb.models import final_hidden, gated_mlps, kept_indices
from hfprune_nb.models.hooks import replaced
from hfprune_nb.progress import bar

KINDS = ("none", "least_squares", "least_squares_bias", "flap_bias")


def compensate(kind: str, model, windows: np.ndarray, kept, ridge: float = 0.1, progress: bool = True):
    """Return what `least_squares` does for the `kind` of compensation, nothing and an empty table for `none`.

    `flap_bias` fits b alone: the mean of what the removed neurons gave, as FLAP (arXiv 2312.11983).

    Raises UserError for an unknown kind.
    """
    if kind not in KINDS:
        raise UserError(f"compensation '{kind}' is unknown: choose one of {', '.join(KINDS)}.")
    if kind == "none":
        return {}, pd.DataFrame(columns=["layer", "tokens", "slicing", "repaired"], dtype=float)
    ridge = math.inf if kind == "flap_bias" else ridge
    return least_squares(model, windows, kept, kind != "least_squares", ridge, progress=progress)


def least_squares(
    model,
    windows: np.ndarray,
    kept,
    bias: bool = False,
    ridge: float = 0.1,
    batch_size: int = 4,
    progress: bool = True,
) -> tuple[dict[str, torch.Tensor], pd.DataFrame]:
    """Solve the repair of every layer of the dense `model` in float64 normal equations.

    windows : (windows, seq) token ids of calibration text; kept : ascending indices for each layer; bias : also fit b, which only
    architectures with MLP biases can save; ridge : infinite leaves D at 0. Memory: layers * intermediate_size^2 * 8 bytes beside
    the model.

    Returns the weights for `pruning.repair` in the model's dtype, and one row per layer: tokens, and the error of the layer's
    output on this text relative to its dense output, `sqrt(sum ||W h - W' h_k - b'||^2 / sum ||W h||^2)`, by plain `slicing`
    and `repaired`. Raises UserError for a ridge that is not positive, text that is missing, or biases that could not be saved.
    """
    if not ridge > 0:
        raise UserError(f"ridge {ridge} must be greater than 0: with fewer tokens than neurons the equations are singular.")
    windows = np.asarray(windows)
    if windows.ndim != 2 or windows.size == 0:
        raise UserError("compensation: it reads calibration text, so give at least one window.")
    if bias:
        check_takes_bias(model)
    mlps = gated_mlps(model)
    kept = kept_indices(mlps, kept)
    products, sums = _moments(model, windows, batch_size, progress)
    weights, rows = {}, []
    for mlp, product, total, indices in zip(mlps, products, sums, kept, strict=True):
        gone = torch.ones(mlp.width, dtype=torch.bool, device=product.device)
        gone[indices] = False
        gone = gone.nonzero()[:, 0]
        weight = mlp.down.weight.double()
        # Fitting b is the same as fitting the deviations from the mean.
        fitted = product - torch.outer(total, total) / windows.size if bias else product
        inner, cross = fitted[indices][:, indices], fitted[gone][:, indices]
        if math.isinf(ridge):
            change = torch.zeros_like(weight[:, indices])
        else:
            penalised = inner + ridge * inner.diagonal().mean() * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
            change = torch.linalg.solve(penalised, (weight[:, gone] @ cross).t()).t()
        shift = (weight[:, gone] @ total[gone] - change @ total[indices]) / windows.size
        weights[f"layers.{mlp.layer}.weight"] = (weight[:, indices] + change).to(mlp.down.weight).contiguous()
        if bias:
            before = 0 if mlp.down.bias is None else mlp.down.bias.double()
            weights[f"layers.{mlp.layer}.bias"] = (before + shift).to(mlp.down.weight)
        lost = torch.zeros_like(weight)
        lost[:, gone] = weight[:, gone]
        whole, sliced = _energy(weight, product), _energy(lost, product)
        lost[:, indices] = -change
        left = _energy(lost, product) - (windows.size * shift.square().sum() if bias else 0)
        relative = [float((part.clamp(min=0) / whole).sqrt()) for part in (sliced, left)]
        rows.append({"layer": mlp.layer, "tokens": windows.size, "slicing": relative[0], "repaired": relative[1]})
    return {name: tensor.cpu() for name, tensor in weights.items()}, pd.DataFrame(rows)


@torch.no_grad()
def _moments(model, windows, batch_size, progress):
    """Return `sum h h^T` (neurons, neurons) and `sum h` (neurons) over all tokens, for each layer, in float64."""
    mlps = gated_mlps(model)
    places = [{"dtype": torch.float64, "device": mlp.down.weight.device} for mlp in mlps]
    products = [torch.zeros(mlp.width, mlp.width, **place) for mlp, place in zip(mlps, places, strict=True)]
    sums = [torch.zeros(mlp.width, **place) for mlp, place in zip(mlps, places, strict=True)]

    def add(layer, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1]).double()
        products[layer].addmm_(flat.t(), flat)
        sums[layer] += flat.sum(0)
        return hidden

    with replaced(model, add), bar(windows.size, "tok", "compensation", enabled=progress) as progress_bar:
        for start in range(0, len(windows), batch_size):
            batch = torch.as_tensor(np.array(windows[start : start + batch_size]), dtype=torch.long, device=model.device)
            final_hidden(model, batch)
            progress_bar.update(batch.numel())
    return products, sums


def _energy(weight: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
    """Return `sum over tokens of ||weight h||^2`."""
    return ((weight @ product) * weight).sum()
