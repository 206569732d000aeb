"""One model and its scores in memory; every question is answered by the dense and all pruned models in one batch, by masks."""

import dataclasses
import itertools
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from hfprune_nb import allocations, criteria, models, paths
from hfprune_nb.allocations import Allocation
from hfprune_nb.errors import UserError
from hfprune_nb.inputs import tokenization
from hfprune_nb.measure import fidelity
from hfprune_nb.method import selection
from hfprune_nb.models.hooks import silenced_rows
from hfprune_nb.report import results, style
from hfprune_nb.runs import artifacts, stage


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the dense model, under the name `dense`, and each pruned one, under its criterion's, make of a prompt.

    positions : one row for each model and token of the prompt (name, position, token), with the distribution of the next token
        behind it beside the dense model's, as `fidelity.compare` does; `likeliest` and its `probability`; `nll`, of the token
        that follows in nats, NaN at the last.
    next_tokens : name, rank (from 1), token, probability, behind the whole prompt.
    written : name -> the likeliest continuation, token by token.
    plans : criterion -> its `Allocation`; kept : criterion -> for each layer the indices of the neurons that stay.
    seconds : wall time.
    """

    positions: pd.DataFrame
    next_tokens: pd.DataFrame
    written: dict[str, str]
    plans: dict[str, Allocation]
    kept: dict[str, list[np.ndarray]]
    seconds: float


class Session:
    """A model in memory with the importance of its neurons.

    network, tokenizer : of a dense model. importance : criterion -> for each layer (neurons,), higher = keep; specs : of these
    criteria, where they are more than names. name : what the model is called.
    """

    def __init__(self, network, tokenizer, importance: dict, specs=None, name: str = "model"):
        self.network, self.tokenizer, self.importance, self.name = network, tokenizer, importance, name
        self.variants = {variant.name: variant for variant in criteria.variants(specs or list(importance))}
        self.legend = style.Legend([variant.spec for variant in self.variants.values()])
        self._head = models.head(network)

    @classmethod
    def load(
        cls, model: str, study: str = "local", scores: str = "", scored: list | None = None, seed: int = 0,
        dtype: str = "float32", device: str = "auto",
    ) -> "Session":  # fmt: skip
        """Load a model and its scores, which stages 01 and 02 make where they are missing: minutes, but only once.

        study : the one that holds the scores. scores : reference "scoring/<key>" of them; empty: stage 02 with its defaults but
        for `scored`, its criteria, and this model, seed, dtype and device. Errors as `models.load` and `runs.stage.execute`;
        raises UserError also for scores that are missing or of another model.
        """
        network, tokenizer = models.load(model, dtype=dtype, device=device)
        models.check_neurons(network)
        if scores:
            folder = artifacts.open_artifact(paths.results() / study / scores).folder
        else:
            wanted = {"model": model, "seed": seed, "dtype": dtype, "device": device} | ({"criteria": scored} if scored else {})
            folder = stage.execute("scoring", study, wanted).folder
        return cls.of_artifact(network, tokenizer, folder, model)

    @classmethod
    def of_artifact(cls, network, tokenizer, folder: Path, name: str) -> "Session":
        """Return the session of a loaded model with the scores in a scoring artifact's folder; errors as `load`."""
        facts, importance = results.scores(folder)
        widths = [mlp.width for mlp in models.gated_mlps(network)]
        if facts["widths"] != widths:
            raise UserError(
                f"scores: {folder} holds those of {facts['model']}, not of {name}: leave scores empty, or name others."
            )
        return cls(network, tokenizer, importance, facts["criteria"], name)

    def allocations(self) -> list[str]:
        """Return the allocations that need no measurement and no scores that are not there."""
        specs = [variant.spec for variant in self.variants.values()]
        members = {name: allocations.create(name) for name in allocations.names()}
        return [
            name
            for name, member in members.items()
            if "measure" not in member.needs and all(criteria.named(specs, spec) for spec in member.reads)
        ]

    @property
    def highest_ratio(self) -> float:
        """The largest ratio, in whole per cent, at which every layer keeps a neuron."""
        mlps = models.gated_mlps(self.network)
        share = sum((mlp.width - 1) * mlp.parameters_per_neuron for mlp in mlps) / models.count_parameters(self.network)
        return int(100 * share) / 100

    def tokens(self, prompt: str) -> tuple[list[int], list[str]]:
        """Return the token ids of a prompt, behind what the tokenizer puts in front, and the part of the text of each."""
        prefix = tokenization.prefix(self.tokenizer)
        encoded = tokenization.encode(self.tokenizer, [prompt], return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"][0]]  # tokens of one letter share their span: the first has it
        texts = [prompt[start:end] for start, end in itertools.pairwise([0, *ends])]
        return prefix + encoded["input_ids"][0], [self.tokenizer.decode([token]) for token in prefix] + texts

    @torch.no_grad()
    def ask(
        self, prompt: str, chosen: list[str], ratio: float = 0.2, allocation: str | dict = "uniform", new_tokens: int = 12,
        top: int = 10,
    ) -> Answer:  # fmt: skip
        """Return what the dense model and one pruned by each criterion of `chosen` make of a prompt.

        Nothing is loaded or cut: in a batch with one row for each model the neurons that go are zero. ratio, allocation : as in
        `selection.allocate`. new_tokens : length of the continuations; top : number of likeliest next tokens. Raises UserError
        for an empty prompt or one that does not fit the context, criteria that were not scored, and as `selection.allocate`.
        """
        started = time.perf_counter()
        ids, texts = self.tokens(prompt)
        if not ids:
            raise UserError("prompt: there is no token in it: write some text.")
        if new_tokens < 1:
            raise UserError(f"new_tokens {new_tokens} is too small: it must be at least 1.")
        models.check_context(self.network.config, len(ids) + new_tokens)
        plans, kept = {}, {}
        for name in chosen:
            plans[name] = self._plan(name, ratio, allocation)
            kept[name] = [row.numpy() for row in selection.kept_neurons(self.importance[name], plans[name].width_after)]
        whole = [range(mlp.width) for mlp in models.gated_mlps(self.network)]
        with silenced_rows(self.network, [whole, *kept.values()]):
            hidden, written = self._read(ids, 1 + len(kept), new_tokens)
        logits = dict(zip([style.DENSE, *kept], map(self._head.logits, hidden), strict=True))
        positions = [
            self._positions(ids, own, logits[style.DENSE]).assign(token=texts, name=name) for name, own in logits.items()
        ]
        following = [self._likeliest(own[-1], top).assign(name=name) for name, own in logits.items()]
        return Answer(
            pd.concat(positions, ignore_index=True),
            pd.concat(following, ignore_index=True),
            {name: self._continuation(ids, row) for name, row in zip(logits, written.tolist(), strict=True)},
            plans,
            kept,
            time.perf_counter() - started,
        )

    def _plan(self, name, ratio, allocation):
        if name not in self.importance:
            raise UserError(f"criterion '{name}' was not scored: choose one of {', '.join(self.importance)}, or score it first.")
        specs = [variant.spec for variant in self.variants.values()]
        scores = selection.read_scores(allocation, specs, self.importance.__getitem__)
        importance = [torch.as_tensor(row) for row in self.importance[name]]
        return selection.allocate(
            self.network,
            ratio,
            allocation=allocation,
            importance=importance,
            criterion=self.variants[name].spec,
            scores={spec: [torch.as_tensor(row) for row in rows] for spec, rows in scores.items()},
        )

    def _read(self, ids, rows, new_tokens):
        """Return final hidden states (rows, positions, hidden) of the prompt, and what each row then writes, (rows, tokens)."""
        decoder = self.network.get_decoder()
        found = decoder(input_ids=torch.tensor([ids] * rows, device=self.network.device), use_cache=True)
        hidden, written = found.last_hidden_state, []
        for left in range(new_tokens, 0, -1):
            written.append(self._head.logits(found.last_hidden_state[:, -1]).argmax(-1, keepdim=True))
            if left > 1:
                token = written[-1].to(self.network.device)
                found = decoder(input_ids=token, past_key_values=found.past_key_values, use_cache=True)
        return hidden, torch.cat(written, 1)

    def _positions(self, ids, logits, dense_logits):
        best = logits.softmax(-1).max(-1)
        follows = torch.tensor(ids[1:], device=logits.device)
        nll = torch.nn.functional.cross_entropy(logits[:-1], follows, reduction="none").tolist()
        own = {
            "position": range(len(ids)),
            "likeliest": [self.tokenizer.decode([token]) for token in best.indices.tolist()],
            "probability": best.values.tolist(),
            "nll": [*nll, np.nan],
        }
        return fidelity.compare(logits, dense_logits).assign(**own)

    def _likeliest(self, logits, top):
        best = logits.softmax(-1).topk(min(top, len(logits)))
        tokens = [self.tokenizer.decode([token]) for token in best.indices.tolist()]
        return pd.DataFrame({"rank": range(1, len(tokens) + 1), "token": tokens, "probability": best.values.tolist()})

    def _continuation(self, ids, tokens):
        """Return the text of written tokens behind those of the prompt, up to the end that the model itself sets."""
        end = self.tokenizer.eos_token_id
        tokens = tokens[: tokens.index(end)] if end in tokens else tokens
        # A token alone may lose the space in front of it.
        return self.tokenizer.decode(ids + tokens)[len(self.tokenizer.decode(ids)) :]
