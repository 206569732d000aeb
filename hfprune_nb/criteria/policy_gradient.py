"""Bypass back-propagation: probabilities of staying, learnt from the loss of random masks by forward passes alone."""

import math

from hfprune_nb.criteria import noise
from hfprune_nb.criteria.base import Passes, SearchCriterion
from hfprune_nb.criteria.wanda import Wanda
from hfprune_nb.families import Setting


class PolicyGradient(SearchCriterion):
    """Each neuron's probability s of staying after a policy gradient on the cross-entropy of masks drawn from s.

    A step reads a batch under each of several masks m and moves s against
    `sum over masks of (L - b) (m - s) / sqrt(s (1 - s)) / (masks - 1)`, as the authors' code does: it divides by the root of what
    the score function has there. Then s is projected on the budget, `sum s = keep * neurons`, where the code
    does so only for sums above it. The baseline b is a running mean of
    losses, or the mean of the other masks' losses, which is unbiased. A neuron is seen only after about (spread of L over its own
    effect)^2 masks: with few passes the result is its start, which is why the rank correlation between the two is reported.
    """

    name = "policy_gradient"
    label = "Policy gradient"
    source = "Bypass back-propagation (arXiv 2406.10576)"
    start = Wanda()
    settings = {
        "keep": Setting(0.8, "the fraction of neurons that masks keep", low=0, open=True, high=0.99),
        "epochs": Setting(10, "how often the search reads the windows, under each mask", low=1),
        "batch": Setting(8, "windows of a step", low=1),
        "masks": Setting(2, "masks of a step", low=2),
        "rate": Setting(0.002, "the largest step of a probability, for a loss of one above the baseline", low=0, open=True),
        "initial": Setting(
            "wanda", "the probabilities at the start", choices={"wanda": "starting at Wanda", "flat": "flat start"}
        ),
        "baseline": Setting(
            "running", "what losses are compared with", choices={"running": "running mean", "others": "mean of the other masks"}
        ),
        "budget": Setting("model", "where the budget holds", choices={"model": "in the model", "layer": "in each layer"}),
    }

    def __init__(self, **settings):
        super().__init__(**settings)
        self.passes = Passes(forward=self.start.passes.forward + self.epochs * self.masks)
        self.between_layers = self.budget == "model"

    def search(self, loss, start, windows, seed):
        from torch import arange, cat  # a family's files load without torch

        widths, scores = [len(row) for row in start], cat(list(start)).double()
        parts = [sum(widths)] if self.budget == "model" else widths

        def projected(probabilities):
            return cat([self._projected(part) for part in probabilities.split(parts)])

        chances = ((scores - scores.mean()) / scores.std()).sigmoid() if self.initial == "wanda" else scores * 0 + self.keep
        chances, average = projected(chances), None
        batches = math.ceil(windows / self.batch)
        steps = self.epochs * batches
        for step in range(steps):
            first = step % batches * self.batch
            numbers = range(first, min(first + self.batch, windows))
            keys = noise.mixed(noise.mixed(arange(1) + seed) + step)
            keys = noise.mixed(noise.spread(keys, self.masks)[0])
            drawn = (noise.uniform(noise.spread(keys, len(chances))) < chances).to(chances)
            losses = [loss(numbers, mask.split(widths)) for mask in drawn]
            mean = sum(losses) / len(losses)
            average = mean if average is None else 0.8 * average + 0.2 * mean
            others = [(sum(losses) - each) / (len(losses) - 1) for each in losses]
            against = others if self.baseline == "others" else [average] * len(losses)
            slope = sum((each - base) * (mask - chances) for each, base, mask in zip(losses, against, drawn, strict=True))
            slope = slope / ((chances + 1e-7) * (1 - chances + 1e-7)).sqrt() / (self.masks - 1)
            rate = self.rate * (1 + math.cos(math.pi * step / steps)) / 2
            chances = projected(chances - rate * slope)
        return list(chances.split(widths))

    def _projected(self, chances):
        """Return the nearest probabilities of which `keep` is the mean: all moved by one number, and clipped."""
        low, high = float(chances.min()) - 1, float(chances.max())
        for _ in range(50):
            shift = (low + high) / 2
            low, high = (shift, high) if (chances - shift).clamp(0, 1).mean() > self.keep else (low, shift)
        return (chances - high).clamp(0, 1)
