"""The pages of exported results: a README for each study and one over all of them, and the same as HTML for local reading.

They are made of exported files alone, so that a checkout makes them anew without any artifact.
"""

import html
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import yaml

from hfprune_nb.files import read_json

CONTENTS = "contents.json"  # notebook -> the tables and figures of the study that it made, as paths in its folder
TOP = ("hero", "overview")  # a study's page begins with them
LONG = 20  # rows; a longer table is folded
STYLE = """:root{color-scheme:light dark}
body{font:1rem/1.5 sans-serif;max-width:62rem;margin:auto;padding:0 1rem 2rem;overflow-wrap:break-word}
nav{border-bottom:1px solid #8888;padding:.5rem 0;font-size:.9rem}nav a{margin-right:1rem;display:inline-block}
table{display:block;overflow-x:auto;border-collapse:collapse;font-size:.85rem}
th,td{text-align:left;vertical-align:top;padding:.2rem .8rem .2rem 0;border-bottom:1px solid #8884}
img,svg{max-width:100%;height:auto;background:#fff}
pre{overflow-x:auto;background:#8882;padding:.5rem;font-size:.85rem}.output_stderr pre{opacity:.7}
.prompt,.anchor-link{display:none}summary{cursor:pointer;font-weight:bold;margin:.5rem 0}"""
_MADE_BY = "Made by "
_BLOCK = re.compile(r"(<!-- generated: (\S+)(?: (?:rows|of) ([^\n]+))? -->\n).*?(<!-- end -->)", re.DOTALL)
_LINK = re.compile(r'href="(?![a-z]+:)([^"#]*?)(README\.md|\.md|\.ipynb)(#[^"]*)?"')


def write(results: Path, studies: Iterable[str] | None = None) -> list[str]:
    """Write the pages of `studies` in the folder `results`, and the one over all; return the names of the exported studies.

    Without `studies`, those of every study are written.
    """
    exported = sorted(path.parent.name for path in results.glob(f"*/{CONTENTS}"))
    for name in exported if studies is None else studies:
        _write_study(results / name)
    text = overview([results / name for name in exported])
    _put(results / "README.md", text)
    _put(results / "index.html", _page("Results", _from_markdown(text), {}))
    return exported


def overview(folders: Iterable[Path]) -> str:
    """Return the Markdown page over all studies in `folders`: what each asks and its verdict."""
    parts = ["# Results", "What each study found. Behind its name: tables, figures and the notebooks that made them."]
    for folder in folders:
        parts += [f"## [{folder.name}]({folder.name}/README.md)", _description(folder), _verdict(folder), _protocol(folder)]
    return _joined(parts)


def study_page(folder: Path) -> str:
    """Return the Markdown page of an exported study: verdict, protocol, every table and figure, and what made them."""
    parts = [f"# Study {folder.name}", _description(folder), _verdict(folder), _protocol(folder)]
    contents, made_by = read_json(folder / CONTENTS), _made_by(folder)
    seen: set[str] = set()
    first = [file for name in TOP for file in made_by if Path(file).stem == name]
    parts += [_shown(folder, file, made_by[file], seen) for file in first]
    for notebook, files in contents.items():
        parts += [f"## {_title(folder, notebook)}"]
        parts += [_shown(folder, file, made_by[file], seen) for file in files if file not in first]
    others = sorted({path.stem for path in (folder / "notebooks").iterdir()} - set(contents))
    parts += ["## How it was made", _made(folder)]
    if others:
        links = "\n".join(f"- {_notebook_link(folder, name)}: {_title(folder, name)}" for name in others)
        parts += ["One executed notebook of each kind that made the models and measured them:", links]
    files = {
        "study.yaml": "what was asked",
        "cards.json": "machine, versions, commit and time of every run",
        "run.log": "the log",
    }
    shown = [f"- [{name}]({name}): {what}" for name, what in files.items() if (folder / name).is_file()]
    parts += ["\n".join([*shown, "- [all studies](../README.md)"])]
    return _joined(parts)


def fill(text: str, project: Path) -> str:
    """Return `text` with its generated parts made anew; files are named as seen from `project`, and may be missing.

    A part stands between `<!-- generated: WHAT -->` and `<!-- end -->`. WHAT is `criteria`, `allocations`, `protocol of STUDY`,
    `forecast of STUDY, STUDY`, or a Markdown file: plain text, or a table, of which `rows A, B` takes the rows with such a cell.
    """
    return _BLOCK.sub(lambda found: f"{found[1]}{_part(found[2], found[3], project)}{found[4]}", text)


def _part(what: str, listed: str, project: Path) -> str:
    wanted = listed.split(", ") if listed else []
    if what in ("criteria", "allocations"):
        rows = _family(what)
    elif what == "protocol":
        rows = _protocol(project / "results" / wanted[0]).splitlines()
    elif what == "forecast":
        rows = _forecast(wanted)
    else:
        text = (project / what).read_text(encoding="utf-8") if (project / what).is_file() else ""
        rows = [line for line in text.splitlines() if line.startswith("|")] or text.splitlines()
        if wanted:
            rows = rows[:2] + [row for row in rows[2:] if {cell.strip() for cell in row.split("|")} & set(wanted)]
    return "".join(f"{row}\n" for row in rows)


def _family(name: str) -> list[str]:
    """Return a family as a Markdown table, one row for each member: what a study calls it, what it is, where it is from."""
    from hfprune_nb import allocations, criteria

    family = {"criteria": criteria, "allocations": allocations}[name]
    rows = []
    for variant in sorted(family.variants(family.names()), key=lambda variant: variant.order):
        member = variant.member
        line = " ".join(sys.modules[member.__module__].__doc__.strip().split("\n\n")[0].split())
        kind = [member.kind] if name == "criteria" else []
        source = re.sub(r"arXiv (\d{4}\.\d{5})", r"[\g<0>](https://arxiv.org/abs/\1)", member.source)
        cells = [f"[`{variant.name}`]({member.__module__.replace('.', '/')}.py)", *kind, line, source]
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    head = [member.noun, *(["kind"] if name == "criteria" else []), "what it is", "source"]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows]


def _forecast(names: list[str]) -> list[str]:
    """Return what `study plan` says of studies as a Markdown table, a row for each and one for all of them together."""
    from hfprune_nb.runs import forecast, grid, study

    loaded = [study.load(name) for name in names]
    stages = ("scoring", "evaluation", "recovery")
    rows = [["study", *stages, "1 GPU", "8 GPUs", "64 GPUs", "GPU memory"], ["---"] * 8]
    for label, studies in [*((each.name, [each]) for each in loaded), (f"all {len(loaded)}", loaded)]:
        tables = [forecast.forecast_table(each) for each in studies]
        hours = [sum(table.loc[stage, "hours"] for table in tables) for stage in stages]
        needs = {f"{each.name}/{job}": need for each in studies for job, need in forecast.needs(each).items()}
        depends_on = {
            f"{each.name}/{job.reference}": tuple(f"{each.name}/{other}" for other in job.depends_on)
            for each in studies
            for job in grid.plan(each)
        }
        hours += [forecast.total(needs, depends_on, workers) for workers in (1, 8, 64)]
        memory = max(table["memory"].max() for table in tables)
        rows.append([label, *map(forecast.in_words, hours), f"{memory:.0f} GB"])
    return [f"| {' | '.join(row)} |" for row in rows]


def _write_study(folder: Path) -> None:
    """Write README.md, index.html, and a page for each table and notebook."""
    notebooks = {path.stem: _notebook_link(folder, path.stem) for path in sorted((folder / "notebooks").iterdir())}
    readme, made_by = study_page(folder), _made_by(folder)
    _put(folder / "README.md", readme)
    trail = {"Results": "../README.md", folder.name: "README.md"} | {name: f"notebooks/{name}.ipynb" for name in notebooks}
    below = {name: f"../{target}" for name, target in trail.items()}
    for path in (folder / "tables").glob("*.md"):
        text = _signed(path, made_by.get(f"tables/{path.name}"))
        _put(path.with_suffix(".html"), _page(path.stem, _from_markdown(text), below))
    for path in (folder / "notebooks").glob("*.ipynb"):
        _put(path.with_suffix(".html"), _page(path.stem, _from_notebook(path), below))
    _put(folder / "index.html", _page(f"Study {folder.name}", _from_markdown(readme), trail))


def _made_by(folder: Path) -> dict[str, str]:
    """Return file -> link to the notebook that made it, for tables and figures."""
    contents = read_json(folder / CONTENTS)
    return {file: _notebook_link(folder, notebook) for notebook, files in contents.items() for file in files}


def _signed(path: Path, notebook: str | None) -> str:
    """Return the text of a table's file, whose last line from now on leads to the notebook that made it and to its study."""
    text = path.read_text(encoding="utf-8")
    if notebook and path.stem != "verdict":
        unsigned, study = text.partition(f"\n{_MADE_BY}")[0], path.parent.parent.name
        text = f"{unsigned}\n{_MADE_BY}{notebook.replace('](', '](../')} of [{study}](../README.md).\n"
        _put(path, text)
    return text


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def _description(folder: Path) -> str:
    return yaml.safe_load((folder / "study.yaml").read_text(encoding="utf-8")).get("description", "")


def _verdict(folder: Path) -> str:
    path = folder / "tables" / "verdict.md"
    if path.is_file():
        return path.read_text(encoding="utf-8").strip()
    older = "No verdict: this study is older than verdicts, and its tables rest on the statistics of their time."
    return older if path.with_name("paired.md").is_file() else ""


def _made(folder: Path) -> str:
    """Return when a study was computed and with which commits of the kit, as its cards say; empty without cards."""
    path = folder / "cards.json"
    cards = read_json(path).values() if path.is_file() else []
    days = sorted({card["finished"][:10] for card in cards})
    commits = dict.fromkeys(card["git"]["commit"][:7] for card in cards if card["git"]["commit"])
    return f"Computed {' to '.join(dict.fromkeys([days[0], days[-1]]))}, at {', '.join(commits) or 'no commit'}." if days else ""


def _protocol(folder: Path) -> str:
    """Return what was measured, how, and on how much as three lines; empty where the study has no such protocol."""
    path = folder / "tables" / "protocol.json"
    if not path.is_file():
        return ""
    facts = read_json(path)
    settings, models = facts["settings"], facts["models"]
    distinct = {name: list(dict.fromkeys(row[name] for row in models)) for name in ("model", "criterion", "ratio")}
    ratios = ", ".join(f"{100 * ratio:g}" for ratio in sorted(distinct["ratio"]) if ratio)
    text = [
        f"{value['n_windows']} windows of {value['seq_len']} tokens of {value['corpus']}"
        for value in settings.get("calibration", [])
    ]
    limits = [f"the first {limit} items of each" for limit in settings.get("limit", []) if limit]
    corpora = [f"{windows} windows of {corpus}" for corpus, windows in facts["held_out_windows"].get("perplexity", {}).items()]
    versions = [f"{name} {' and '.join(settings[name])}" for name in ("torch", "transformers") if settings.get(name)]
    measured = [_counted(len({row["task"] for row in facts["tasks"]}), "task"), *limits, *corpora]
    made = [*settings.get("dtype", []), *settings.get("device", []), *versions]
    lines = [
        f"**Models:** {', '.join(distinct['model'])}; {', '.join(distinct['criterion'])}; {ratios} % of all parameters removed.",
        f"**Scored on** {' and '.join(text) or 'no text'}; {_counted(len(facts['calibration_seeds']), 'calibration seed')}.",
        f"**Measured on** {', '.join(measured)}; {', '.join(made)}.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _notebook_link(folder: Path, name: str) -> str:
    """Return the link to an executed notebook; before notebooks themselves were exported there was a page of each."""
    suffix = ".ipynb" if (folder / "notebooks" / f"{name}.ipynb").is_file() else ".html"
    return f"[{name}](notebooks/{name}{suffix})"


def _title(folder: Path, name: str) -> str:
    path = folder / "notebooks" / f"{name}.ipynb"
    if not path.is_file():
        return name
    cells = read_json(path)["cells"]
    text = "".join(line for cell in cells if cell["cell_type"] == "markdown" for line in [*cell["source"], "\n"])
    return next((line[2:] for line in text.splitlines() if line.startswith("# ")), name)


def _shown(folder: Path, file: str, notebook: str, seen: set[str]) -> str:
    """Return a table or figure as Markdown; empty for other files, and for the verdict, with which the page begins.

    seen : the notes that stand on the page already, which no table repeats.
    """
    path = Path(file)
    if path.suffix == ".png":
        return _figure(folder, path, notebook)
    return _table(folder, path, notebook, seen) if path.suffix == ".md" and path.stem != "verdict" else ""


def _figure(folder: Path, file: Path, notebook: str) -> str:
    caption = (folder / file).with_suffix(".txt")
    said = caption.read_text(encoding="utf-8").strip() if caption.is_file() else ""
    kinds = [file.with_suffix(suffix) for suffix in (".svg", ".csv") if (folder / file).with_suffix(suffix).is_file()]
    links = ", ".join([*(f"[{kind.suffix[1:].upper()}]({kind})" for kind in kinds), notebook])
    return _joined([f"![{said or file.stem}]({file})", f"{said} ({links})".strip()]).rstrip()


def _table(folder: Path, file: Path, notebook: str, seen: set[str]) -> str:
    """Return a table with its notes, folded where it is long; its protocol is the study's and stands in its own file."""
    title, body, *notes = (folder / file).read_text(encoding="utf-8").strip().split("\n\n")
    new = [note for note in notes if note not in seen and not note.startswith(("Protocol.", _MADE_BY))]
    seen.update(new)
    rows, title = max(0, body.count("\n") - 1), title.strip("*")
    begin, end = f"### {title}", ""
    if rows > LONG:
        begin, end = f"<details><summary>{html.escape(title, quote=False)} ({rows} rows)</summary>", "</details>"
    links = f"[with all notes]({file}), [CSV]({file.with_suffix('.csv')}), {notebook}"
    return _joined([begin, body, *new, f"({links})", end]).rstrip()


def _from_markdown(text: str) -> str:
    from nbconvert.filters.markdown_mistune import markdown2html_mistune

    return markdown2html_mistune(text)


def _from_notebook(path: Path) -> str:
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="basic")
    body, _ = exporter.from_filename(str(path))
    formulas = f'<script async src="{exporter.mathjax_url}"></script>' if "$" in body else ""
    return body + formulas


def _page(title: str, body: str, trail: dict[str, str]) -> str:
    """Return a whole page, with `trail` (words -> target) as its navigation and links that lead to the HTML of the same thing."""
    links = "".join(f'<a href="{target}">{html.escape(name)}</a>' for name, target in trail.items())
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style>"
    )
    text = f"<nav>{links}</nav>\n<main>{body}</main>" if links else f"<main>{body}</main>"
    text = _LINK.sub(lambda found: f'href="{found[1]}{"index" if found[2] == "README.md" else ""}.html{found[3] or ""}"', text)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{text}\n</body></html>\n'


def _put(path: Path, text: str) -> None:
    """Write a page whole: runners of several studies write the one over all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
