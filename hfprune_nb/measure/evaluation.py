"""What a model can still do: benchmark items, perplexity, fidelity to the dense model, next tokens on sample prompts."""

import dataclasses
import logging
from pathlib import Path

import lm_eval
import numpy as np
import pandas as pd
import torch
from lm_eval.tasks import TaskManager
from safetensors.torch import save_file

from hfprune_nb.errors import UserError
from hfprune_nb.inputs.models import Head, final_hidden, head
from hfprune_nb.measure import fidelity
from hfprune_nb.measure.harness import SharedPrefixLM
from hfprune_nb.measure.tasks import describe, load_tasks
from hfprune_nb.progress import bar

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "She opened the door and saw",
    "The opposite of hot is",
    "In 1969, the first man walked on the",
)


@dataclasses.dataclass
class HeldOut:
    """Measurements on held-out windows.

    perplexity : one row per window (window, tokens, nll in nats summed over the window).
    fidelity : one row per window (window, positions, js, kl, jaccard15, top1), means over the window's compared positions; None
        without a dense reference.
    hidden : (windows, positions compared, hidden) final hidden states, which are the reference for other models.
    """

    perplexity: pd.DataFrame
    fidelity: pd.DataFrame | None
    hidden: torch.Tensor


@torch.no_grad()
def held_out(
    model,
    windows: np.ndarray,
    compared_positions: int = 32,
    reference: torch.Tensor | None = None,
    reference_head: Head | None = None,
    batch_size: int = 4,
    progress: bool = True,
) -> HeldOut:
    """Measure perplexity on windows (windows, seq) and, with a reference, fidelity to the dense model there.

    Perplexity reads every position but the last; fidelity reads `compared_positions` evenly spaced ones of each window.
    reference, reference_head : `HeldOut.hidden` and `models.head` of the dense model on the same windows. Raises UserError when
    the reference does not fit, or a size is not positive.
    """
    _check_positive(batch_size=batch_size, fidelity_positions=compared_positions)
    count, seq_len = windows.shape
    places = fidelity.positions(seq_len, compared_positions)
    if reference is not None and reference.shape[-1] != reference_head.module.in_features:
        raise UserError("reference: its hidden states do not fit the dense model's head: name an evaluation of this dense model.")
    if reference is not None and reference.shape[:2] != (count, len(places)):
        raise UserError(
            f"reference: the dense model was evaluated on {reference.shape[0]} windows at {reference.shape[1]} positions, this "
            f"one on {count} at {len(places)}: evaluate both with the same parameters."
        )
    own_head = head(model)
    device = own_head.weight.device
    nll_rows, fidelity_rows, kept_hidden = [], [], []
    with bar(windows.size, "tok", "held-out text", enabled=progress) as progress_bar:
        for start in range(0, count, batch_size):
            batch = torch.as_tensor(windows[start : start + batch_size], dtype=torch.long, device=device)
            hidden = final_hidden(model, batch)
            for row in range(len(batch)):
                index = start + row
                logits = own_head.logits(hidden[row])
                nll = torch.nn.functional.cross_entropy(logits[:-1], batch[row, 1:], reduction="none").sum(dtype=torch.float64)
                nll_rows.append({"window": index, "tokens": seq_len - 1, "nll": float(nll)})
                kept_hidden.append(hidden[row, places].cpu())
                if reference is not None:
                    dense_logits = reference_head.logits(reference[index].to(hidden))
                    means = fidelity.compare(logits[places], dense_logits).mean()
                    fidelity_rows.append({"window": index, "positions": len(places), **means})
            progress_bar.update(batch.numel())
    return HeldOut(
        pd.DataFrame(nll_rows), pd.DataFrame(fidelity_rows) if reference is not None else None, torch.stack(kept_hidden)
    )


def stack(frames: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the frames of several corpora as one, with the column `corpus` in front."""
    parts = [frame.assign(corpus=corpus) for corpus, frame in frames.items()]
    joined = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"corpus": []})
    return joined[["corpus", *(column for column in joined if column != "corpus")]]


def save_reference(hidden: dict[str, torch.Tensor], file: Path) -> None:
    """Write `HeldOut.hidden` of each corpus as safetensors, the reference for the fidelity of other models."""
    save_file({corpus: states.contiguous() for corpus, states in hidden.items()}, file)


def benchmark_items(
    model, tokenizer, names: list[str], source: str = "auto", limit: int = 0, batch_size: int = 16, bos: bool = False,
    max_length: int = 2048,
) -> tuple[pd.DataFrame, dict]:  # fmt: skip
    """Run lm-eval tasks on an in-memory model, and keep every item.

    names, source : tasks and where their records come from, as in `tasks.load_tasks`; limit : the first so many items of each
    task (0 = all). Returns one row per item and metric (task, doc_id, doc_hash, metric, value), and the protocol of each task
    (metric that the tables show, shots, version, number of items in all, source). Raises UserError for an unknown task.
    """
    _check_positive(batch_size=batch_size)
    if limit < 0:
        raise UserError(f"limit {limit} is negative: give the number of items per task, or 0 for all.")
    if not names:
        return pd.DataFrame(columns=["task", "doc_id", "doc_hash", "metric", "value"]), {}
    chosen = load_tasks(names, source)
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    results = lm_eval.simple_evaluate(
        model=SharedPrefixLM(model, tokenizer, batch_size, min(max_length, _context_length(model, max_length)), bos),
        tasks=list(chosen.values()),
        task_manager=TaskManager(include_defaults=False),
        limit=limit or None,
        log_samples=True,
        bootstrap_iters=0,
    )
    rows, protocol = [], {}
    for name, task in chosen.items():
        facts = describe(task)
        metrics = [metric for metric in facts.pop("metrics") if metric in results["samples"][name][0]]
        protocol[name] = {"metric": "acc_norm" if "acc_norm" in metrics else metrics[0], **facts}
        rows += [
            {"task": name, "doc_id": s["doc_id"], "doc_hash": s["doc_hash"], "metric": metric, "value": float(s[metric])}
            for s in results["samples"][name]
            for metric in metrics
        ]
    return pd.DataFrame(rows), protocol


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name} {value} is too small: it must be at least 1.")


def _context_length(model, default: int) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or default


@torch.no_grad()
def next_tokens(model, tokenizer, prompts=PROMPTS, top: int = 10) -> pd.DataFrame:
    """Return the `top` likeliest next tokens after each prompt: prompt_id, prompt, rank (from 1), token, probability."""
    own_head, rows = head(model), []
    for number, prompt in enumerate(prompts):
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(own_head.weight.device)
        probability = torch.softmax(own_head.logits(final_hidden(model, ids)[0, -1:])[0], -1)
        best = probability.topk(min(top, len(probability)))
        rows += [
            {"prompt_id": number, "prompt": prompt, "rank": rank, "token": tokenizer.decode([token]), "probability": value}
            for rank, (token, value) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True), start=1)
        ]
    return pd.DataFrame(rows)
