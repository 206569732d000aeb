"""`hfprune study ...`: plan, run, status, verify and the rest."""

import argparse
import json
import logging
import os
import sys
import textwrap
from collections import Counter
from pathlib import Path

from hfprune_nb import paths
from hfprune_nb.cli.parsing import above_zero, command, positive, say
from hfprune_nb.errors import UserError

_RUN_EXAMPLES = """STUDY is a file, or the name of one in notebooks/studies.

examples:
  hfprune study run smoke
  hfprune study run offline --workers 4
  hfprune study run my_study.yaml --results results_on_scratch --no-fetch

Interrupt with Ctrl-C at any time: a second run continues where the first stopped.
Exit status: 0 everything is finished, 1 a job failed, 2 bad input, 130 interrupted.
"""
_VERIFY_EXAMPLES = """examples:
  hfprune study verify offline --dry-run   hashes every file of every artifact and lists what is corrupt
  hfprune study verify offline             computes the corrupt ones again, and nothing else

Exit status: 0 nothing is corrupt (any more), 1 something is, 2 bad input.
"""
_JOB_EXAMPLES = """JOB is `stage/key`, as `hfprune study graph` lists it. Its inputs must be
finished; a job that is finished itself is left as it is.

examples:
  hfprune study job smoke calibration/c9d1f1a0c1b2d3e4

Exit status: 0 the job is finished, 1 it failed, 2 bad input.
"""
_RATES_EXAMPLES = """examples:
  hfprune study rates results/offline/cards.json results/offline-qwen/cards.json
"""
_COMPARE_EXAMPLES = """examples:
  hfprune study compare offline                        with the tables of the last commit
  hfprune study compare offline --against 3af74d9      with those of another one
  hfprune study compare offline --against ~/kit/results/offline

Exit status: 0 every number agrees, up to rounding or inside the other's interval, 1 one does not, 2 bad input.
"""
_POWER_EXAMPLES = """examples:
  hfprune study power offline                                       0.5 points, 0.01 nats, 0.003 of JS distance at 20 %
  hfprune study power offline --detect 1.5 --detect-nats 0.02 --ratio 0.3
  hfprune study power offline --max-windows 60 --device cuda        no more text than that, by the rates of a GPU

Costs are what the study's own runs took, with --device the rates behind `plan`.
Exit status: 0 a plan was given, 2 bad input or too little to plan with.
"""
_CLEAN_EXAMPLES = """examples:
  hfprune study clean offline            shows what would go and asks
  hfprune study clean offline --yes      artifacts go, exported tables and figures stay
  hfprune study clean local              what notebooks made one by one
  hfprune study clean offline scoring/0123456789abcdef --yes     that artifact alone: the next run computes it again
"""
_PAGES_EXAMPLES = """The pages are made of exported files: no artifact is needed and nothing is computed.

examples:
  hfprune study pages
"""
_SHOWN = 20


def add_study(groups) -> None:
    """Add the command `study` and its actions to the parser's commands."""
    study = command(groups, "study", "studies: grids of notebooks").add_subparsers(metavar="ACTION", required=True)
    plan = command(study, "plan", "show what a study consists of, what is done, and what it will cost", run=_plan)
    run = command(study, "run", "compute what is missing of a study", _RUN_EXAMPLES + _members(), _run)
    status = command(study, "status", "show the state of every job", run=_status)
    clean = command(study, "clean", "delete the artifacts of a study", _CLEAN_EXAMPLES, _clean)
    verify = command(study, "verify", "hash every artifact and compute the corrupt ones again", _VERIFY_EXAMPLES, _verify)
    job = command(study, "job", "compute one job, as a workflow engine does", _JOB_EXAMPLES, _job)
    rates = command(study, "rates", "fit the rates behind `plan` to studies that ran", _RATES_EXAMPLES, _rates)
    compared = command(study, "compare", "hold every number of a rerun against another run's", _COMPARE_EXAMPLES, _compare)
    pages = command(study, "pages", "write the pages of all results and what is generated in README", _PAGES_EXAMPLES, _pages)
    pages.add_argument("--results", metavar="DIR", help="results folder of all studies (default: results)")
    compared.add_argument(
        "--against", default="HEAD", metavar="RUN", help="a study's results folder, or a commit (default: HEAD)"
    )
    power = command(study, "power", "plan the cheapest study that finds a stated difference", _POWER_EXAMPLES, _power)
    for name, measure, words in (
        ("--detect", "average", "points of the average of tasks"),
        ("--detect-nats", "perplexity", "nats per token of log-perplexity"),
        ("--detect-js", "js", "of JS distance to the dense model"),
        ("--detect-kl", "kl", "nats of KL to the dense model"),
    ):
        power.add_argument(name, dest=measure, type=above_zero, metavar="D", help=f"find a difference of D {words}")
    power.add_argument("--ratio", type=above_zero, default=0.0, help="of all parameters (default: the study's middle one)")
    power.add_argument("--family", type=positive, default=0, help="comparisons that Holm counts (default: pairs of criteria)")
    power.add_argument("--max-windows", type=positive, default=0, metavar="N", help="so many held-out windows there are")
    power.add_argument("--device", choices=("cpu", "cuda"), default="", help="hours by the rates of this kind of device")
    power.add_argument("--workers", type=positive, default=0, metavar="N", help="jobs at a time (default: as the file says)")
    rates.add_argument("cards", nargs="+", metavar="CARDS", help="exported cards.json of a study, its run.log beside it")
    graph = command(study, "graph", "print the jobs and what they wait for as JSON", run=_graph)
    for each in (plan, run, status, verify, clean, compared, power, job, graph):
        each.add_argument("study", metavar="STUDY", help="study file, or the name of one in notebooks/studies")
        each.add_argument("--results", metavar="DIR", help="results folder of all studies (default: results)")
    job.add_argument("job", metavar="JOB", help="stage/key")
    for each in (run, job):
        words = "give each notebook, of this machine's N GPUs, one for each of its processes"
        each.add_argument("--gpus", type=positive, default=0, metavar="N", help=words)
    for each in (run, verify):
        each.add_argument("--workers", type=positive, metavar="N", help="notebooks at a time (default: as the file says)")
    verify.add_argument("--dry-run", action="store_true", help="only list what is corrupt")
    run.add_argument(
        "--fetch",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="first fetch the assets that the study names (default: yes)",
    )
    clean.add_argument("artifacts", nargs="*", metavar="STAGE/KEY", help="only these, to have them computed again")
    clean.add_argument("--yes", action="store_true", help="do not ask")
    clean.add_argument("--exported", action="store_true", help="delete the exported tables, figures and pages too")


def _members() -> str:
    """Return what a study file may name: whatever lies in the folders of the families."""
    from hfprune_nb import allocations, criteria
    from hfprune_nb.runs.stages import STAGES

    families = {"criteria": criteria.names(), "allocations": allocations.names(), "stages": STAGES}
    return "\na study file may name:\n" + "".join(
        textwrap.fill(f"{family}: {', '.join(names)}", 100, initial_indent="  ", subsequent_indent="    ") + "\n"
        for family, names in families.items()
    )


def _plan(options) -> int:
    from hfprune_nb.runs import forecast
    from hfprune_nb.runs.parameters import edited
    from hfprune_nb.runs.stages import STAGES

    loaded = _load(options)
    rows = forecast.by_stage(loaded)
    say(f"study {loaded.name}: {loaded.description}".rstrip(": "))
    say(f"  {'stage':<12} {'jobs':>5} {'done':>5} {'tokens':>9} {'alone':>9} {'memory':>8} {'disk':>9}")
    for stage, row in rows.items():
        say(_plan_row(stage, row))
    total = {name: sum(row[name] for row in rows.values()) for name in ("jobs", "done", "tokens", "hours", "disk")}
    say(_plan_row("total", total | {"memory": max(row["memory"] for row in rows.values())}))
    counts = sorted({1, loaded.run["workers"], *forecast.WORKERS})
    times = ", ".join(f"{number}: {forecast.in_words(forecast.hours(loaded, number))}" for number in counts)
    left = forecast.in_words(forecast.hours(loaded, loaded.run["workers"], only_missing=True))
    say(f"whole study by workers or GPUs: {times}; what is missing, with {loaded.run['workers']}: {left}")
    if gigabytes := forecast.download(loaded.jobs):
        say(f"downloads from the hub, kept for every later run: {gigabytes:.1f} GB")
    late = forecast.overdue(loaded)
    if late:
        minutes = loaded.run["timeout_minutes"]
        say(f"too long for run.timeout_minutes {minutes:g}: {len(late)} jobs, such as {late[0].stage} {late[0].label}")
    for stage in rows:
        for name, (here, used) in edited(stage).items():
            say(f"{STAGES[stage].notebook} was edited: {name} is {here!r} there; the study uses {used!r}")
    kinds = sorted({forecast.device(job.parameters) for job in loaded.jobs if "device" in job.parameters})
    for kind in kinds:
        say(f"rates of the {kind}: {forecast.rates()['devices'][kind]['protocol']}")
        if warning := forecast.elsewhere(kind):
            say(warning)
    return 0


def _plan_row(name: str, row) -> str:
    from hfprune_nb.runs.forecast import in_words

    tokens = f"{row['tokens'] / 1e6:,.2f} M" if row["tokens"] else "-"
    disk = f"{row['disk']:.2f} GB"
    return (
        f"  {name:<12} {row['jobs']:>5.0f} {row['done']:>5.0f} {tokens:>9} {in_words(row['hours']):>9} "
        f"{row['memory']:>5.1f} GB {disk:>9}"
    )


def _rates(options) -> int:
    from hfprune_nb.runs import forecast

    fitted = forecast.refit([Path(name) for name in options.cards])
    for stage, seconds in fitted["seconds_per_unit"].items():
        say(f"{stage:<12} {seconds:.4g} s per unit of work")
    return 0


def _run(options) -> int:
    from hfprune_nb.runs import scheduler
    from hfprune_nb.runs.status import status

    loaded = _pinned(options)
    on_terminal = sys.stderr.isatty()
    if not on_terminal:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger = logging.getLogger("hfprune_nb.runs")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    if missing := [outcome.job for outcome in status(loaded) if outcome.state != "done"]:
        from hfprune_nb.cli import preflight

        if options.fetch:
            _fetch_missing(loaded.assets)
        preflight.check(missing, loaded)
    _say_shares(loaded)
    summary = scheduler.run(loaded, options.workers, on_terminal, options.gpus)
    say(summary.text())
    if loaded.folder.is_dir():
        say(f"results: {loaded.folder}")
    return 0 if summary.ok else 1


def _say_shares(loaded) -> None:
    """Say before anything runs which ratios take most of a model's neurons: of small models the embedding is the larger part."""
    from hfprune_nb.inputs import shares

    wanted = {(job.parameters["model"], job.parameters["ratio"]) for job in loaded.jobs if job.stage == "pruning"}
    for model, ratio in sorted(wanted):
        if sentence := shares.warning(model, ratio):
            say(sentence)


def _fetch_missing(names: list[str]) -> None:
    from hfprune_nb.inputs import assets

    for name in names:
        if not assets.is_cached(name):
            assets.fetch(name, progress=True)


def _status(options) -> int:
    from hfprune_nb.runs.status import status

    loaded = _load(options)
    outcomes = status(loaded)
    for outcome in outcomes:
        say(outcome.line())
    states = Counter(outcome.state for outcome in outcomes)
    say(f"{len(outcomes)} jobs: {', '.join(f'{number} {state}' for state, number in sorted(states.items()))}")
    return 0


def _verify(options) -> int:
    from hfprune_nb.runs import scheduler

    loaded = _load(options)
    corrupt, summary = scheduler.verify(loaded, not options.dry_run, options.workers, progress=sys.stderr.isatty())
    checked = sum((loaded.folder / job.reference).is_dir() for job in loaded.jobs)
    if not corrupt:
        say(f"study {loaded.name}: {checked} artifacts, every byte as it was written")
        return 0
    for job, wrong in corrupt:
        say(f"corrupt   {job.stage:<11}  {job.label:<52}  {wrong}")
    say(f"study {loaded.name}: {len(corrupt)} of {checked} artifacts are corrupt")
    if summary is None:
        return 1
    say(summary.text())
    return 0 if summary.ok else 1


def _job(options) -> int:
    from hfprune_nb.runs import scheduler

    loaded = _pinned(options)
    outcome = scheduler.run_job(loaded, options.job, options.gpus)
    say(outcome.line())
    return 0 if outcome.state in ("done", "computed") else 1


def _graph(options) -> int:
    from hfprune_nb.runs import forecast

    loaded = _pinned(options)
    say(json.dumps(forecast.graph(loaded), indent=1))
    return 0


def _compare(options) -> int:
    import tempfile

    from hfprune_nb.report import compare
    from hfprune_nb.runs import provenance

    loaded = _load(options)
    tables, other = loaded.folder / "tables", Path(options.against).expanduser()
    if not tables.is_dir():
        raise UserError(f"study {loaded.name} has no tables yet: run it first")
    with tempfile.TemporaryDirectory() as scratch:
        if not other.is_dir():
            other = provenance.committed(options.against, f"results/{loaded.name}/tables", Path(scratch))
        compared = compare.compare(tables, other / "tables")
    say(compare.summary(compared).to_string(index=False))
    wrong = compared[compared["state"].isin([compare.OUTSIDE, compare.LOST, compare.NEW])]
    for row in wrong.head(_SHOWN).to_dict("records"):
        say(f"{row['state']:<8} {row['table']}: {row['row']}, {row['column']} {row['ours']:.5g}, there {row['theirs']:.5g}")
    if len(wrong) > _SHOWN:
        say(f"... and {len(wrong) - _SHOWN} more")
    say(f"study {loaded.name}: {len(compared) - len(wrong):,} of {len(compared):,} numbers agree")
    return 0 if compare.reproduced(compared) else 1


def _pages(options) -> int:
    from hfprune_nb.runs import pages

    if options.results:
        os.environ["HFPRUNE_RESULTS"] = os.path.abspath(options.results)
    exported = pages.write(paths.results())
    say(f"pages of {', '.join(exported) or 'no study'}: {paths.results() / 'README.md'}")
    project = paths.project()
    for path in sorted({*project.glob("README.md"), *project.glob("docs/*.md")}):
        text = path.read_text(encoding="utf-8")
        if (filled := pages.fill(text, project)) != text:
            path.write_text(filled, encoding="utf-8")
            say(f"generated parts of {path.relative_to(project)} are new")
    return 0


def _power(options) -> int:
    from hfprune_nb.report import power, results
    from hfprune_nb.runs import lineage
    from hfprune_nb.runs.artifacts import Artifact

    loaded = _load(options)
    made = [Artifact(loaded.folder / job.reference) for job in loaded.jobs if job.stage == "evaluation"]
    if not (made := [artifact for artifact in made if artifact.done]):
        raise UserError(f"study {loaded.name} has no finished evaluation yet: run it first, its variances decide the plan")
    measured = results.collect(artifact.folder for artifact in made)
    costs, workers = {}, options.workers or loaded.run["workers"]
    for model in measured.model_names:
        found = lineage.unit_hours(made, model, measured.compared(model), options.device, own=not options.device)
        if found:
            costs[model] = power.Costs(**found, workers=workers)
    given = {measure: value for measure in ("average", "perplexity", "js", "kl") if (value := getattr(options, measure))}
    most = options.max_windows or power.MOST_WINDOWS
    table = power.power_table(measured, costs, given or power.DETECT, options.ratio, options.family, most)
    if table.display.empty:
        raise UserError(f"study {loaded.name} has no two criteria with two seeds on one measure: nothing to plan with")
    say(table.display.to_string(index=False))
    for note in table.notes:
        say(textwrap.fill(note, 130))
    for model in costs:
        if (table.long["measure"] == "average").any():
            say(textwrap.fill(power.paper_sentence(table, model), 130))
    return 0


def _clean(options) -> int:
    from hfprune_nb.runs import scheduler

    try:
        folder = _load(options).folder
    except UserError:
        # What notebooks made one by one lies in the results without a study file.
        folder = paths.results() / Path(options.study).name
        if options.study.startswith(".") or "/" in options.study or not folder.is_dir():
            raise
    doomed = scheduler.removable(folder, options.exported)
    if options.artifacts:
        doomed = [path for path in doomed if f"{path.parent.name}/{path.name.lstrip('.').partition('.')[0]}" in options.artifacts]
        if missing := {*options.artifacts} - {f"{path.parent.name}/{path.name}" for path in doomed}:
            raise UserError(
                f"study {folder.name} has no artifact {min(missing)}: `hfprune study graph {options.study}` lists them"
            )
    if not doomed:
        say(f"study {folder.name}: nothing to delete")
        return 0
    for path in doomed:
        say(str(path))
    if not options.yes:
        if not sys.stdin.isatty():
            raise UserError("nothing was deleted: give --yes to delete these without being asked")
        if input(f"Delete these {len(doomed)}? [y/N] ").strip().lower() not in ("y", "yes"):
            say("nothing was deleted")
            return 0
    scheduler.remove(folder, doomed)
    say(f"deleted {len(doomed)}")
    return 0


def _load(options):
    """Return the checked study; the results folder is set for this process and its kernels."""
    # Imported here as in every action, so that `--help` and bad options answer at once.
    from hfprune_nb.runs import study

    if options.results:
        os.environ["HFPRUNE_RESULTS"] = os.path.abspath(options.results)
    return study.load(options.study)


def _pinned(options):
    """Return the checked study, each of its hub repositories at one commit: that of its first run, else the newest."""
    from hfprune_nb.runs import pins

    loaded = _load(options)
    if not loaded.run["offline"] and (refused := pins.resolve(loaded)):
        raise UserError("\n".join(refused))
    return _load(options)
