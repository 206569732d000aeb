"""`hfprune prune`: from a model to a smaller one in a folder, with a card that says what was done and what it cost."""

import argparse
import contextlib
import shutil
from pathlib import Path

from hfprune_nb.cli.parsing import command, positive, say
from hfprune_nb.errors import UserError

_EXAMPLES = """examples:
  hfprune prune smollm2-135m --ratio 0.2 --out smollm2-pruned
  hfprune prune ./my-model --ratio 0.3 --out my-model-30 --corpus my-text.jsonl --recipe hfprune
  hfprune prune meta-llama/Llama-3.2-1B --ratio 0.2 --out llama-20 --corpus c4 --windows 1024 --multiple-of 128

Interrupt with Ctrl-C at any time: the same command continues. FOLDER appears when
everything in it is written and was read back. To publish it: hf upload NAME FOLDER.
"""
_PARTIAL = ".partial"
_LOADING = {
    "plain": 'AutoModelForCausalLM.from_pretrained("FOLDER")',
    "plain, padded": 'AutoModelForCausalLM.from_pretrained("FOLDER")',
    "hfprune_nb.load": 'hfprune_nb.load("FOLDER"), or AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)',
}
_CARD = """---
base_model: {model}
library_name: transformers
pipeline_tag: text-generation
tags: [pruned, hfprune]
---

# {model}, {removed} smaller

{removed} of all parameters ({neurons} of the MLP neurons) are removed: {dense_parameters:,} became {parameters:,}. Made by
`hfprune prune` of hfprune_nb {version}; the weights of the original model keep their licence.

| | |
|---|---|
| criterion | {criterion} |
| allocation | {allocation}; {widths} |
| compensation | {compensation} |
| calibration | {windows} windows of {seq_len} tokens of {corpus}, seed {seed} |
| computed in | {dtype} on {device} |

| {held_out_windows} held-out windows of {seq_len} tokens | perplexity before | perplexity after | KL(before, after), nats |
|---|---|---|---|
{rows}

Nothing was trained: recovery on text of the task brings a part of the loss back.

## How to load it

```python
{code}
```

{note}
"""
_NOTES = {
    "plain": "It is an ordinary checkpoint: whatever reads the original architecture reads this one.",
    "plain, padded": "Layers have different widths and are padded with zero neurons to the widest, for any tool that reads the "
    "original architecture; size and speed are those of the padded model.",
    "hfprune_nb.load": "Layers have different widths: plain `from_pretrained` without `trust_remote_code` stops at a per-layer "
    "`intermediate_size`.",
}


def add_prune(groups) -> None:
    """Add the command `prune` to the parser's commands."""
    prune = command(groups, "prune", "prune a model and save it with its card", _EXAMPLES + _recipes(), _prune)
    prune.add_argument("model", metavar="MODEL", help="alias, hub id or local folder")
    prune.add_argument("--revision", default="main", metavar="COMMIT", help="branch, tag or commit of a hub model")
    prune.add_argument("--out", required=True, metavar="FOLDER", help="the checkpoint, README.md in it")
    size = prune.add_mutually_exclusive_group(required=True)
    size.add_argument("--ratio", type=float, default=0.0, help="fraction of ALL parameters to remove")
    size.add_argument("--neuron-ratio", type=float, default=0.0, help="fraction of the MLP neurons to remove")
    prune.add_argument("--recipe", default="recommended", help="criterion, allocation, compensation (default: recommended)")
    for name, what in (("criterion", "name or {name: {setting: value}}"), ("allocation", "the same"), ("compensation", "name")):
        prune.add_argument(f"--{name}", type=_spec, metavar="SPEC", help=f"in place of the recipe's: {what}")
    prune.add_argument("--multiple-of", type=positive, default=1, metavar="N", help="kept widths are multiples of N")
    prune.add_argument("--levels", type=positive, default=0, metavar="N", help="at most N different widths (default: any)")
    prune.add_argument("--padded", action="store_true", help="pad layers of different widths, for plain from_pretrained")
    prune.add_argument("--corpus", default="c4-sample", help="calibration text (default: c4-sample)")
    prune.add_argument("--windows", type=positive, default=64, metavar="N", help="calibration windows (default: 64)")
    prune.add_argument("--seq-len", type=positive, default=256, metavar="N", help="tokens in a window (default: 256)")
    held_out = "text for perplexity and KL, held out (default: c4-sample wikitext)"
    prune.add_argument("--held-out", nargs="+", default=["c4-sample", "wikitext"], metavar="CORPUS", help=held_out)
    prune.add_argument("--held-out-windows", type=positive, default=32, metavar="N", help="of each corpus (default: 32)")
    prune.add_argument("--seed", type=int, default=0, help="of the windows, and of a criterion that draws (default: 0)")
    prune.add_argument("--dtype", default="float32", help="of the computation; the checkpoint keeps the model's own")
    prune.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def _recipes() -> str:
    from hfprune_nb.runs import recipes

    return f"\nrecipes: {', '.join(recipes.names())}\n"


def _spec(text: str):
    import yaml

    with contextlib.suppress(yaml.YAMLError):
        if isinstance(spec := yaml.safe_load(text), str | dict):
            return spec
    raise argparse.ArgumentTypeError(f"{text!r} is no name, nor {{name: {{setting: value}}}}: put it in quotes")


def _prune(options) -> int:
    from hfprune_nb import allocations
    from hfprune_nb.files import claim, write_json
    from hfprune_nb.inputs import hub, shares
    from hfprune_nb.runs import recipes

    changes = {name: getattr(options, name) for name in ("criterion", "allocation", "compensation")}
    recipe = recipes.find(options.recipe, **changes)
    allocations.check_windows(recipe.allocation, options.windows)
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists already: name a new folder")
    for name in ("ratio", "neuron_ratio"):
        if not 0 <= getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must lie between 0 and 1: write 20 % as 0.2")
    if repository := hub.repository(options.model):
        # Of the commit, not the branch: a killed run must not go on with other weights.
        options.revision = hub.commit(repository, "model", options.revision)
        hub.pin({repository: options.revision})
    if sentence := shares.warning(options.model, options.ratio):
        say(sentence)
    partial = out.with_name(out.name + _PARTIAL)
    settings = {name: value for name, value in vars(options).items() if name not in ("command", "out")}
    claim(partial / "scratch", settings | {"recipe": recipe.axes})
    try:
        facts = _make(options, recipe, partial)
    except UserError:
        if not (partial / "scratch" / "scores").exists():  # nothing here would be of use to another attempt
            shutil.rmtree(partial)
        raise
    shutil.rmtree(partial / "scratch")
    write_json(partial / "pruning.json", facts)
    (partial / "README.md").write_text(_card(options, recipe, facts), encoding="utf-8")
    if out.exists():
        out.rmdir()
    partial.rename(out)
    for line in _outcome(facts):
        say(line)
    say(f"saved: {facts['loading'].replace('FOLDER', str(out))}")
    return 0


def _make(options, recipe, folder: Path) -> dict:
    """Write the pruned model into `folder`, read it back, and return what the card says of it."""
    import copy

    from hfprune_nb import criteria, models
    from hfprune_nb.inputs import calibration, hub
    from hfprune_nb.measure import evaluation
    from hfprune_nb.method import export, measurement, pruning, scoring, selection
    from hfprune_nb.method.compensation import compensate

    def measured(network, reference=None):
        found = {}
        for corpus, windows in held_out.items():
            states = reference[corpus].hidden if reference else None
            found[corpus] = evaluation.held_out(network, windows.ids, reference=states, reference_head=dense_head)
        return found

    network, tokenizer = models.load(options.model, dtype=options.dtype, device=options.device)
    if recipe.compensation.endswith("bias"):
        pruning.check_takes_bias(network)
    selection.allocate(network, options.ratio, options.neuron_ratio, options.multiple_of)
    text = calibration.windows(tokenizer, options.corpus, options.windows, options.seq_len, options.seed)
    held_out = {
        corpus: calibration.windows(
            tokenizer, corpus, options.held_out_windows, options.seq_len, options.seed, split="evaluation"
        )
        for corpus in options.held_out
    }
    for windows in held_out.values():
        calibration.check_overlap(text, windows)
    dense_head = copy.deepcopy(models.head(network))
    dense = measured(network)
    spec, allocation = recipe.criterion.spec, recipe.allocation.spec
    scored = criteria.with_missing([spec], recipe.allocation.member.reads)
    scores = scoring.score(network, text.ids, scored, seed=options.seed, checkpoint=folder / "scratch" / "scores")
    importance = scores.importance[recipe.criterion.name]
    plan = selection.allocate(
        network,
        options.ratio,
        options.neuron_ratio,
        options.multiple_of,
        allocation,
        importance,
        spec,
        levels=options.levels,
        scores=selection.read_scores(allocation, scored, scores.importance.__getitem__),
        measure=measurement.Measurement(network, text.ids),
    )
    kept = selection.kept_neurons(importance, plan.width_after)
    repaired, _ = compensate(recipe.compensation, network, text.ids, kept)
    pruning.narrow(network, kept)
    if repaired:
        pruning.repair(network, repaired)
    network.to(models.configuration(options.model).dtype or network.dtype)
    export.save_checkpoint(network, tokenizer, folder, options.padded)
    parameters = models.count_parameters(network)  # without padding
    del network
    reread, _ = models.load(folder, dtype=options.dtype, device=options.device)
    pruned = measured(reread, dense)
    return {
        "model": options.model,
        "revision": options.revision if hub.repository(options.model) else "",
        "criterion": recipe.criterion.label,
        "allocation": recipe.allocation.label,
        "compensation": recipe.compensation,
        "achieved_ratio": plan.achieved_ratio,
        "neuron_ratio": plan.neuron_ratio,
        "dense_parameters": plan.dense_parameters,
        "parameters": parameters,
        "width_before": plan.width_before,
        "widths": plan.width_after,
        "loads_with": (loads_with := export.loads_with(plan.width_after, options.padded)),
        "loading": _LOADING[loads_with],
        "scoring_seconds": scores.seconds,
        "device": str(reread.device),
        "held_out": {
            corpus: {
                "dense_perplexity": _perplexity(dense[corpus].perplexity),
                "perplexity": _perplexity(found.perplexity),
                "kl": float(found.fidelity.query("positions == 'all'")["kl"].mean()),
            }
            for corpus, found in pruned.items()
        },
    }


def _perplexity(windows) -> float:
    import numpy as np

    return float(np.exp(windows["nll"].sum() / windows["tokens"].sum()))


def _outcome(facts: dict) -> list[str]:
    """Return what was removed and what it cost, a line each."""
    before, after = facts["dense_parameters"], facts["parameters"]
    lines = [f"{100 * facts['achieved_ratio']:.1f} % of all parameters removed: {before:,} -> {after:,}"]
    for corpus, found in facts["held_out"].items():
        change = f"{found['dense_perplexity']:.4g} -> {found['perplexity']:.4g}"
        lines.append(f"{corpus}: perplexity {change}, KL to the dense model {found['kl']:.3f} nats")
    return lines


def _card(options, recipe, facts: dict) -> str:
    from hfprune_nb import __version__

    widths = sorted(set(facts["widths"]))
    loads_with = facts["loads_with"]
    imports = "import hfprune_nb" if loads_with == "hfprune_nb.load" else "from transformers import AutoModelForCausalLM"
    rows = (
        f"| {corpus} | {found['dense_perplexity']:.2f} | {found['perplexity']:.2f} | {found['kl']:.3f} |"
        for corpus, found in facts["held_out"].items()
    )
    name = Path(options.model).name if Path(options.model).exists() else options.model
    return _CARD.format(
        **facts
        | {
            "model": name,
            "removed": f"{100 * facts['achieved_ratio']:.1f} %",
            "neurons": f"{100 * facts['neuron_ratio']:.1f} %",
            "widths": f"{widths[0]} neurons in every layer"
            if len(widths) == 1
            else f"{widths[0]} to {widths[-1]} neurons in a layer",
            "version": __version__,
            "rows": "\n".join(rows),
            "code": f"{imports}\n\nmodel = {facts['loading'].split(', or ')[0]}",
            "note": _NOTES[loads_with],
        },
        **{key: getattr(options, key) for key in ("windows", "seq_len", "corpus", "seed", "dtype", "held_out_windows")},
    )
