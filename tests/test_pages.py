"""The pages of results: what they show of exported files, that links lead somewhere, and that a number is near its notebook."""

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

from hfprune_nb import allocations
from hfprune_nb.cli.main import main
from hfprune_nb.files import read_json, write_json
from hfprune_nb.runs import pages

PROJECT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TABLE = "**{title} (measured)**\n\n| Ratio | Criterion |\n|:--|:--|\n{rows}\n\nIn points.\n\nProtocol. Long.\n"


@pytest.fixture
def results(tmp_path):
    """Two exported studies: `whole`, with a long and a short table, a figure and its caption, and an `older` one."""
    for name in ("whole", "older"):
        folder = tmp_path / "results" / name
        for kind in ("tables", "figures", "notebooks"):
            (folder / kind).mkdir(parents=True)
        (folder / "study.yaml").write_text(f"description: The {name} study.\n")
        (folder / "tables" / "overview.md").write_text(TABLE.format(title="Overview", rows="| 10 % | Entropy |\n| 20 % | CE |"))
        (folder / "tables" / "overview.csv").write_text("ratio\n0.1\n")
        (folder / "figures" / "forest.png").write_bytes(b"")
        card = {"finished": "2026-11-28T15:04:37+00:00", "git": {"commit": "0123456789"}}
        write_json(folder / "cards.json", {"figures/1": card, "evaluation/1": card | {"finished": "2026-11-27T01:00:00+00:00"}})
        made = ["figures/forest.png", "tables/overview.csv", "tables/overview.md"]
        write_json(folder / pages.CONTENTS, {"06_figures": made})
    (tmp_path / "results" / "older" / "notebooks" / "06_figures.html").write_text("<p>an older page</p>")
    long = TABLE.format(title="Pairs <A>", rows="\n".join(f"| {n} % | CE |" for n in range(40)))
    (folder.parent / "whole" / "tables" / "paired.md").write_text(long)
    whole = folder.parent / "whole"
    (whole / "tables" / "paired.csv").write_text("ratio\n0.1\n")
    write_json(whole / pages.CONTENTS, {"06_figures": ["figures/forest.png", "tables/overview.md", "tables/paired.md"]})
    (whole / "figures" / "forest.txt").write_text("Entropy lies left of zero.\n")
    (whole / "tables" / "verdict.md").write_text("Nothing is decided.\n")
    for name in ("06_figures", "02_scoring"):
        cells = [nbformat.v4.new_markdown_cell(f"# {name[:2]} A title\n\n$x$ and [next](02_scoring.ipynb)")]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), whole / "notebooks" / f"{name}.ipynb")
    return tmp_path / "results"


def targets(path):
    """The files that a Markdown or HTML page leads to, as absolute paths."""
    text = path.read_text(encoding="utf-8")
    pattern = r"\]\((?!https?:)([^)#\s]+)" if path.suffix == ".md" else r'(?:href|src)="((?!data:|https?:)[^"#]+)'
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        return {
            (path.parent / found).resolve() for cell in cells for found in re.findall(r"\]\(([\w./]+)\)", "".join(cell["source"]))
        }
    return {(path.parent / unquote(found)).resolve() for found in re.findall(pattern, text)}


def clicks(start, goal, ending):
    """How many links of pages with one `ending` lead from `start` to the file `goal`, at most three."""
    reached = {start}
    for number in range(1, 4):
        reached = {found for page in reached if page.suffix == ending for found in targets(page)}
        if goal in reached:
            return number
    return None


def test_a_study_begins_with_its_verdict_and_shows_every_table_and_figure(results):
    assert pages.write(results) == ["older", "whole"]
    text = (results / "whole" / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# Study whole\n\nThe whole study.\n\nNothing is decided.\n")
    assert text.index("### Overview (measured)") < text.index("## 06 A title") < text.index("![Entropy lies left of zero.]")
    assert "<summary>Pairs &lt;A&gt; (measured) (40 rows)</summary>\n\n| Ratio |" in text and text.count("<details>") == 1
    assert text.count("In points.") == 1 and "Protocol. Long." not in text
    assert "- [02_scoring](notebooks/02_scoring.ipynb): 02 A title" in text
    assert "Computed 2026-11-27 to 2026-11-28, at 0123456." in text
    over = (results / "README.md").read_text(encoding="utf-8")
    assert "[whole](whole/README.md)\n\nThe whole study.\n\nNothing is decided." in over and "[older](older/README.md)" in over


def test_pages_made_twice_are_the_same(results):
    pages.write(results)
    once = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    pages.write(results)
    assert once == {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    assert (
        (results / "whole" / "tables" / "overview.md")
        .read_text()
        .endswith("Made by [06_figures](../notebooks/06_figures.ipynb) of [whole](../README.md).\n")
    )


def test_every_link_of_every_page_leads_to_a_file(results):
    pages.write(results)
    shown = [path for path in results.rglob("*") if path.suffix in (".md", ".html") and path.name != "verdict.md"]
    assert len(shown) > 10
    for page in shown:
        assert all(target.is_file() for target in targets(page)), page
    assert (results / "older" / "notebooks" / "06_figures.html").read_text() == "<p>an older page</p>"
    formulas = [path.name for path in results.rglob("notebooks/*.html") if "mathjax" in path.read_text().lower()]
    assert sorted(formulas) == ["02_scoring.html", "06_figures.html"]


def test_generated_parts_are_made_anew_and_the_rest_stays(tmp_path):
    (tmp_path / "a.md").write_text(TABLE.format(title="A", rows="| 10 % | Entropy |\n| 20 % | CE |\n| 20 % | Entropy |"))
    (tmp_path / "verdict.md").write_text("Undecided.\n")
    text = (
        "mine\n<!-- generated: a.md rows 20 % -->\nold\n<!-- end -->\nmine\n<!-- generated: verdict.md -->\n<!-- end -->\n"
        "<!-- generated: missing.md -->\nold\n<!-- end -->\n<!-- generated: allocations -->\n<!-- end -->\n"
    )
    filled = pages.fill(text, tmp_path)
    table = "| Ratio | Criterion |\n|:--|:--|\n| 20 % | CE |\n| 20 % | Entropy |\n"
    assert filled.startswith(f"mine\n<!-- generated: a.md rows 20 % -->\n{table}<!-- end -->\nmine\n")
    assert "<!-- generated: verdict.md -->\nUndecided.\n<!-- end -->\n<!-- generated: missing.md -->\n<!-- end -->" in filled
    assert (
        "| [`uniform`](hfprune_nb/allocations/uniform.py) | The same for every layer" in filled
        and "HFPrune Algorithm 1 |" in filled
    )
    assert "OWL ([arXiv 2310.05175](https://arxiv.org/abs/2310.05175))" in filled
    assert all(f"[`{name}`]" in filled for name in allocations.names())
    assert pages.fill(filled, tmp_path) == filled


def test_the_command_writes_all_pages(results, monkeypatch, capsys):
    monkeypatch.setenv("HFPRUNE_HOME", str(results.parent))
    (results.parent / "README.md").write_text("<!-- generated: results/whole/tables/verdict.md -->\n<!-- end -->\n")
    assert main(["study", "pages", "--results", str(results)]) == 0
    assert "pages of older, whole" in capsys.readouterr().out
    assert "Nothing is decided." in (results.parent / "README.md").read_text()
    assert (results / "whole" / "index.html").is_file()


# What is committed


def committed(pattern):
    listed = subprocess.run(["git", "-C", PROJECT, "ls-files", "--", pattern], capture_output=True, text=True, check=True)
    return [PROJECT / name for name in listed.stdout.split()]


@pytest.mark.parametrize("ending", ["md", "html", "ipynb"])
def test_links_of_committed_pages_lead_to_committed_files(ending):
    files = set(committed("."))
    known = files | {parent for path in files for parent in path.parents}
    shown = [path for path in committed(f"*.{ending}") if path.suffix == ".md" or "notebooks" in path.parts]
    assert shown
    for page in shown:
        assert targets(page) <= known, (page, targets(page) - known)


@pytest.mark.parametrize("ending", [".md", ".html"])
@pytest.mark.parametrize("study", [path.parent.name for path in sorted((PROJECT / "results").glob("*/study.yaml"))])
def test_from_every_number_to_its_notebook_in_two_clicks(study, ending):
    folder = PROJECT / "results" / study
    first = "README.md" if ending == ".md" else "index.html"
    for notebook, made in read_json(folder / pages.CONTENTS).items():
        kinds = [".ipynb", ".html"] if ending == ".md" else [".html"]
        goal = next(
            folder / "notebooks" / f"{notebook}{kind}" for kind in kinds if (folder / "notebooks" / f"{notebook}{kind}").is_file()
        )
        assert clicks(folder / first, goal, ending) == 1
        assert clicks(folder.parent / first, goal, ending) == 2
        tables = [(folder / file).with_suffix(ending) for file in made if file.endswith(".md") and "verdict" not in file]
        assert tables and all(clicks(table, goal, ending) == 1 for table in tables)


@pytest.mark.parametrize("page, study", [("README.md", "offline"), ("docs/cost.md", "offline-cost")])
def test_from_the_first_pages_numbers_to_their_notebooks_in_two_clicks(page, study):
    folder = PROJECT / "results" / study
    for notebook in read_json(folder / pages.CONTENTS):
        (goal,) = {path for path in folder.glob(f"notebooks/{notebook}.*") if path in targets(folder / "README.md")}
        assert clicks(PROJECT / page, goal, ".md") == 2


def test_committed_notebooks_are_small_and_tell_no_folder_and_no_progress():
    shown = committed("results/*/notebooks/*.ipynb")
    assert shown
    for path in shown:
        text = path.read_text(encoding="utf-8")
        assert len(text) < 1_500_000, path
        outputs = [output for cell in json.loads(text)["cells"] for output in cell.get("outputs", [])]
        said = "".join("".join(output.get("text", [])) for output in outputs)
        assert outputs and not re.search(r"\d+%\|", said), path
        assert not re.search(r"(?<![\w.:/-])/(home|root|tmp|usr|var|work|opt|Users)/\w", text), path


# Runs in a frame 400 px wide for each page: how wide the page is, and of its links those that lead to nothing.
LOOK = """
onload = async () => {
  const found = {widths: {}, dead: [], clicks: {}};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, name = frame.dataset.name;
    found.widths[name] = page.documentElement.scrollWidth;
    const links = [...page.querySelectorAll("a[href]")].map(link => link.href.split("#")[0]);
    found.clicks[name] = links.filter(link => link.startsWith(location.origin));
    for (const link of new Set(found.clicks[name]))
      if (!(await fetch(link, {method: "HEAD"})).ok) found.dead.push(name + " -> " + link);
  }
  document.title = JSON.stringify(found);
}
"""


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_a_browser_reads_the_pages_on_a_narrow_screen_and_follows_their_links(tmp_path):
    (tmp_path / "results").symlink_to(PROJECT / "results")
    study = "results/offline"
    shown = ["results/index.html", *(f"{study}/{page}" for page in ("index.html", "tables/paired.html"))]
    shown += [f"{study}/notebooks/{name}.html" for name in ("02_scoring", "06_figures")]
    frames = "".join(f'<iframe width=400 height=800 data-name="{page}" src="{page}"></iframe>' for page in shown)
    (tmp_path / "look.html").write_text(f"<title></title>{frames}<script>{LOOK}</script>")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
        ]
        address = f"http://127.0.0.1:{server.server_port}"
        command += ["--virtual-time-budget=30000", f"{address}/look.html"]
        page = subprocess.run(command, capture_output=True, text=True, timeout=200).stdout
        server.shutdown()
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", page)[1]))
    assert max(found["widths"].values()) <= 400 and len(found["widths"]) == len(shown), found["widths"]
    assert not found["dead"]
    assert f"{address}/{study}/index.html" in found["clicks"]["results/index.html"]
    assert f"{address}/{study}/notebooks/06_figures.html" in found["clicks"][f"{study}/index.html"]
    assert f"{address}/{study}/notebooks/06_figures.html" in found["clicks"][f"{study}/tables/paired.html"]
