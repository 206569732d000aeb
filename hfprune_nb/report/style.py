"""How every figure looks, and how it is written."""

import functools
import itertools
import json
import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from hfprune_nb import allocations, criteria
from hfprune_nb.errors import UserError
from hfprune_nb.families import BASES

# Okabe and Ito's palette, wine, navy and brown: together with markers and dashes told apart with any colour vision, markers
# and dashes alone in grey print. The first three looks are those of the paper's criteria.
COLOURS = ("#E69F00", "#009E73", "#0072B2", "#CC79A7", "#882255", "#56B4E9", "#D55E00", "#000080", "#663300")
MARKERS = ("s", "^", "o", "D", "X", "v", "P", "*", "<", ">", "p", "h", "d", (4, 1, 0), (3, 1, 0), (6, 1, 0), "8", (5, 1, 36), "H")
DASHES = ((5, 1.5), (3, 1, 1, 1), (), (1, 1), (1, 2.5), (6, 2, 1, 2), (8, 2))
GREYS = ("#222222", "#6E6E6E", "#A6A6A6")  # of what is no criterion
# Markers from one allocation of a criterion to the next: no criterion that shares the colour comes to share the marker as well.
ALLOCATION_STEP = 5
DENSE, DENSE_COLOUR, UNIFORM = "dense", "#000000", "uniform"
REFERENCE = "entropy"  # the criterion of HFPrune, with which every other one is compared
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "hfprune_nb",
    "svg.fonttype": "path",
    "figure.constrained_layout.use": True,
}
DOTS_PER_INCH = 180
WIDTH = 7.2  # inches: on a page of 700 pixels the words of a figure are still as high as those around it
CROWD = len(COLOURS)  # criteria in one figure whose lines an eye can follow
# Significant digits of written numbers: float32 sums in another order, as on another processor, move the sixth.
DIGITS = 5
AXIS_LABELS = {
    "task": "accuracy, %\n(higher is better)",
    "average": "average of tasks, %\n(higher is better)",
    "perplexity": "perplexity, log scale\n(lower is better)",
    "js": "JS distance to dense\n(lower is better)",
    "kl": "KL to dense, nats (lower is better)",
    "jaccard15": "top-15 Jaccard with dense (higher is better)",
    "top1": "top-1 agreement with dense, % (higher is better)",
}


def look(index: int) -> dict:
    """Return colour, marker and dashes of the criterion in place `index` of a study; they repeat after the last marker."""
    index %= len(MARKERS)
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index], "linestyle": _dashes(index)}


def neutral(index: int) -> dict:
    """Return grey, marker and dashes of what is no criterion, such as an allocation or a batch size."""
    index %= len(MARKERS)
    return {"color": GREYS[index % len(GREYS)], "marker": MARKERS[index - 5], "linestyle": _dashes(index + 2)}


def _dashes(index: int) -> tuple | str:
    dash = DASHES[index % len(DASHES)]
    return (0, dash) if dash else "solid"


@functools.cache
def _plain(name: str) -> criteria.Variant:
    return criteria.variants([name])[0]


def _by_name(family, specs: Iterable) -> dict:
    distinct = {json.dumps(spec, sort_keys=True): spec for spec in specs}
    return {variant.name: variant for variant in family.variants(distinct.values())}


class Legend:
    """A study's criteria in reading order: how each is called and drawn, and which of them are compared.

    `specs` are those of the study's artifacts, each a criterion's (`criteria.variants`), a pair of it and its allocation's, or a
    triple with what else tells a model apart (`apart.told_apart`). Names are those of `series`; a name that is not among the
    specs is the criterion's own. The place among the study's criteria gives each its look, and the paper's three keep theirs
    whatever else is there.
    """

    def __init__(self, specs: Iterable = ()):
        given = [spec if isinstance(spec, tuple) else (spec, UNIFORM) for spec in specs]
        self._criteria = _by_name(criteria, (spec for spec, *_ in given))
        self._allocations = _by_name(allocations, (spec for _, spec, *_ in given if spec != UNIFORM))
        names = {series(_name(spec), _name(allocation), *further) for spec, allocation, *further in given}
        alone = dict.fromkeys(name.partition("@")[0] for name in self.in_order(names))
        others = [name for name in alone if not self._is_of_paper(name)]
        self._ways = sorted({name.partition("@")[2] for name in names} - {""})
        self._places = {name: 3 + index for index, name in enumerate(others)}

    def _criterion(self, name: str) -> criteria.Variant:
        name = name.partition("@")[0]
        return self._criteria.get(name) or _plain(name)

    def parts(self, way: str) -> tuple[str, str]:
        """Return the allocation and the further parameters, in words, of what follows the `@` in a name."""
        allocation, _, further = way.partition(", ")
        return (allocation, further) if allocation in self._allocations else (UNIFORM, "" if way == UNIFORM else way)

    def _is_of_paper(self, name: str) -> bool:
        variant = self._criterion(name)
        return variant.member.rank < 3 and not variant.changed and "@" not in name

    def order(self, name: str) -> tuple:
        """Return the sort key of a criterion: dense, the paper's three, the others, the baselines."""
        if name == DENSE:
            return (-1,)
        allocation, further = self.parts(name.partition("@")[2])
        return *self._criterion(name).order, "" if allocation == UNIFORM else allocation, natural(further)

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Return the distinct `names` in the order of every table and figure."""
        return sorted(set(names), key=self.order)

    def label(self, name: str) -> str:
        """Return a criterion's name for readers, with its allocation where that is not the uniform one, and what follows."""
        if name == DENSE:
            return "Dense"
        return self._criterion(name).label + self._following(name.partition("@")[2])

    def short(self, name: str, longest: int = 40) -> str:
        """Return a criterion's label with its words cut to `longest` letters, what follows whole: for the axis of a crowd."""
        criterion, _, way = name.partition("@")
        return textwrap.shorten(self.label(criterion), longest, placeholder=" …") + self._following(way)

    def _following(self, way: str) -> str:
        allocation, further = self.parts(way)
        words = further if allocation == UNIFORM else self.allocation(way)
        return f", {words}" if words else ""

    def allocation(self, way: str) -> str:
        """Return an allocation's name for readers, with the further parameters that tell its models apart."""
        name, further = self.parts(way)
        label = self._allocations[name].label if name in self._allocations else name.capitalize()
        return f"{label}, {further}" if further else label

    def settings(self, names: Iterable[str]) -> list[str]:
        """Return a sentence for each of `names` on the numbers that it depends on, defaults too, and on a basis that is not its
        authors' own formula.
        """
        told = []
        for name in dict.fromkeys(name.partition("@")[0] for name in self.in_order(names) if name != DENSE):
            variant, known = self._criterion(name), self._criterion(name).member.settings
            words = [known[key].label(key, value) for key, value in variant.settings.items() if known[key].choices is None]
            if basis := BASES[variant.member.basis]:
                words.insert(0, f"{basis} ({variant.member.source})")
            told += [f"{variant.member.label}: {', '.join(words)}."] if words else []
        return told

    def variants(self, criterion: str, names: Iterable[str]) -> list[str]:
        """Return those of `names` that are `criterion` with settings of their own, in order."""
        found = [name for name in self.in_order(names) if name != DENSE]
        return [name for name in found if self._criterion(name).member.name == criterion and self._criterion(name).changed]

    def compared(self, names: Iterable[str]) -> list[str]:
        """Return those of `names` that are held against each other, in order: all but the dense model and the baselines."""
        return [name for name in self.in_order(names) if name != DENSE and not self._criterion(name).member.baseline]

    def reference(self, names: Iterable[str]) -> str:
        """Return the criterion with which the others of `names` are compared: entropy, or the first where it is not there."""
        found = [name.partition("@")[0] for name in self.compared(names)]
        return REFERENCE if REFERENCE in found or not found else found[0]

    def pairs(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """Return the pairs of `names` to compare, each in order.

        Under one allocation those are the paper's own and every other criterion with entropy, for one criterion every other
        allocation with the uniform one, and every model with further parameters with the one without. All pairs would cost each
        of them its power: Holm's correction counts them all.
        """
        names, reference = self.compared(names), self.reference(names)

        def asked(a: str, b: str) -> bool:
            (left, _, one), (right, _, two) = a.partition("@"), b.partition("@")
            if one != two:
                differ = [set(pair) for pair in zip(self.parts(one), self.parts(two), strict=True) if len(set(pair)) > 1]
                return left == right and len(differ) == 1 and bool(differ[0] & {UNIFORM, ""})
            return reference in (left, right) or (self._is_of_paper(left) and self._is_of_paper(right))

        return [pair for pair in itertools.combinations(names, 2) if asked(*pair)]

    def look(self, name: str) -> dict:
        """Return colour, marker and dashes of a criterion, the same in every figure of a study.

        Another allocation than the uniform one, or a further parameter, keeps the colour and gets a marker and dashes of its own.
        """
        if name == DENSE:
            return {"color": DENSE_COLOUR, "marker": "none", "linestyle": "solid"}
        criterion, _, way = name.partition("@")
        own = look(self._place(criterion))
        if not way:
            return own
        shifted = self._place(criterion) + ALLOCATION_STEP * (1 + self._ways.index(way) if way in self._ways else 1)
        return look(shifted) | {"color": own["color"]}

    def pair_look(self, a: str, b: str) -> dict:
        """Return the look of a pair: that of what is held against entropy or the uniform allocation, neutral of another one."""
        (left, _, _), (right, _, _) = a.partition("@"), b.partition("@")
        if left == right:
            return self.look(max(a, b))
        if REFERENCE in (left, right):
            return self.look(b if left == REFERENCE else a)
        return neutral(self._place(left) + self._place(right))

    def forwards(self, name: str, rounds: int = 1, layers: int = 0, windows: int = 1) -> float:
        """Return how many forward passes over the calibration text a criterion and its allocation take, a backward pass as two.

        rounds : how often the text is scored; layers, windows : of the model and of the text, for an allocation that measures.
        What an allocation reads beside shares the criterion's forward pass. Infinite for a criterion that silences every neuron
        in turn.
        """
        own, allocation = self._criterion(name).passes, self._allocations.get(self.parts(name.partition("@")[2])[0])
        if own.per_neuron:
            return float("inf")
        read = [variant.passes for variant in criteria.variants(allocation.member.reads)] if allocation else []
        scoring = max([own.forward, *(passes.forward for passes in read)])
        scoring += 2 * (own.backward + sum(passes.backward for passes in read))
        measured = 0.0
        if allocation and issubclass(allocation.member, allocations.MeasuredRule):
            measured = (1 + allocation.member.measurements * layers / 2) * allocation.settings["windows"] / windows
        return rounds * scoring + measured

    def _place(self, name: str) -> int:
        if self._is_of_paper(name):
            return self._criterion(name).member.rank
        return self._places.get(name, 3 + len(self._places))

    def colour(self, name: str) -> str:
        """Return the one colour that a criterion has in every figure of a study."""
        return self.look(name)["color"]


def way(allocation: str = UNIFORM, further: str = "") -> str:
    """Return the name of an allocation with the further parameters that tell its models apart, in words."""
    return ", ".join(part for part in (allocation if allocation != UNIFORM else "", further) if part) or UNIFORM


def series(criterion: str, allocation: str = UNIFORM, further: str = "") -> str:
    """Return the name under which frames and figures know a criterion with an allocation and further parameters.

    That is `criterion`, or `criterion@way` where `way` says more than that widths are uniform.
    """
    name = way(allocation, further)
    return criterion if name == UNIFORM else f"{criterion}@{name}"


def natural(text: str) -> list:
    """Return a sort key of `text` under which a number stands for its value: 8 before 16."""
    return [float(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", text))]


def _name(spec: str | dict) -> str:
    return spec if isinstance(spec, str) else spec.get("as") or next(iter(spec))


def per_model(name: str, models: Iterable[str], draw: Callable[[str], Figure | None]) -> dict[str, Figure]:
    """Return `draw(model)` for each model by file name: `name`, or `name-<model>` where there are several models.

    Without any model the one figure says that nothing was computed; a model of which `draw` gives None has no figure.
    """
    models = list(models)
    if not models:
        return {name: message(f"{name.replace('_', ' ')}: this study computed nothing of this kind.")}
    names = [f"{name}-{re.sub(r'[^A-Za-z0-9.]+', '-', model).strip('-')}" for model in models] if models[1:] else [name]
    drawn = zip(names, map(draw, models), strict=True)
    return {own: figure for own, figure in drawn if figure is not None}


def shown(figures: Iterable[Figure]) -> list:
    """Return figures with the caption of each below it, for IPython's `display`."""
    from IPython.display import Markdown

    return [part for figure in figures for part in (figure, Markdown(figure.get_label()))]


def handles_of(axes) -> dict:
    """Return one legend handle per label of all panels."""
    return {text: handle for ax in axes.flat for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)}


def message(sentence: str) -> Figure:
    """Return an empty figure that says why there is nothing to see."""
    with mpl.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(7, 1.2))
        ax.set_axis_off()
        ax.text(0.5, 0.5, sentence, ha="center", va="center", wrap=True)
    return closed(fig)


def closed(fig: Figure, caption: str = "") -> Figure:
    """Return a figure that pyplot has let go of; its label is the caption, one sentence that says what to see."""
    # A figure that pyplot still holds would be shown twice by a notebook and kept in memory.
    plt.close(fig)
    fig.set_label(caption)
    return fig


def save(fig: Figure, folder: Path, name: str, data: pd.DataFrame | None = None) -> list[Path]:
    """Write `<name>.png`, `<name>.svg`, its caption as `<name>.txt` and, given the data behind it, `<name>.csv`.

    Equal figures give equal bytes; a figure without a caption has no such file.
    """
    folder = Path(folder)
    if not name or Path(name).name != name:
        raise UserError(f"figure name {name!r} is not a plain file name: use letters, digits, '-' and '_'")
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{name}.png", folder / f"{name}.svg"]
    with mpl.rc_context(STYLE):
        fig.savefig(written[0], dpi=DOTS_PER_INCH, bbox_inches="tight", metadata={"Software": None})
        fig.savefig(written[1], bbox_inches="tight", metadata={"Date": None})
    if fig.get_label():
        written.append(folder / f"{name}.txt")
        written[-1].write_text(f"{fig.get_label()}\n", encoding="utf-8")
    if data is not None:
        written.append(folder / f"{name}.csv")
        data.to_csv(written[-1], index=False, float_format=f"%.{DIGITS}g")
    return written
