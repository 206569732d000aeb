"""Records of lm-eval tasks, rebuilt from pinned packages into the columns that the harness's task files read.

Eight tasks are what the harness scores, and come from one package. Four of them lie there as the hub's own tables; ARC,
OpenBookQA and BoolQ as another harness's requests, whose prompt frame ("Question: ... Answer:") is taken off again: that
package's validation requests, treated the same way, give back its validation tables record for record
(tests/test_tasks.py). Two tasks are other editions of what the harness scores, and have names of their own.
"""

import csv
import gzip
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from hfprune_nb import paths
from hfprune_nb.errors import UserError
from hfprune_nb.inputs import assets

# That harness repeats every document without its question, to normalise by; those copies are numbered from here on.
UNCONDITIONED = 1_000_000
# Prompts of each task in one text of `prompts`: enough for a window of a thousand tokens.
PROMPTS_TOGETHER = 8


@dataclass(frozen=True)
class Benchmark:
    """One task: the `split` that lm-eval scores, how many `rows` it has, and the harness's own file below `tasks/`.

    `asset` holds the records; with `edition_of` they are another edition of that task's.
    """

    task: str
    split: str
    rows: int
    harness_file: str
    licence: str
    asset: str = "benchmarks"
    edition_of: str = ""


BENCHMARKS = {
    benchmark.task: benchmark
    for benchmark in (
        Benchmark("arc_challenge", "test", 1172, "arc/arc_challenge.yaml", "CC BY-SA 4.0"),
        Benchmark("arc_easy", "test", 2376, "arc/arc_easy.yaml", "CC BY-SA 4.0"),
        Benchmark("boolq", "validation", 3270, "super_glue/boolq/default.yaml", "CC BY-SA 3.0"),
        Benchmark("openbookqa", "test", 500, "openbookqa/openbookqa.yaml", "Apache-2.0"),
        Benchmark("piqa", "validation", 1838, "piqa/piqa.yaml", "AFL-3.0"),
        Benchmark("social_iqa", "validation", 1954, "siqa/siqa.yaml", "CC BY 4.0"),
        Benchmark("winogrande", "validation", 1267, "winogrande/default.yaml", "CC BY"),
        Benchmark("hellaswag", "validation", 10042, "hellaswag/hellaswag.yaml", "MIT"),
        Benchmark(
            "crows_pairs_1508", "test", 1508, "crows_pairs/crows_pairs_english.yaml", "CC BY-SA 4.0",
            "crows-pairs", "crows_pairs_english",
        ),
        Benchmark(
            "truthfulqa_mc2_pypi", "validation", 817, "truthfulqa/truthfulqa_mc2.yaml", "Apache-2.0",
            "truthfulqa", "truthfulqa_mc2",
        ),
    )
}  # fmt: skip


def benchmark_path(task: str) -> Path:
    """Return the task's records as a parquet file in the cache, built on first use from its asset.

    Raises UserError for a task that is not in `BENCHMARKS`, and for records whose number is not the harness's.
    """
    if task not in BENCHMARKS:
        raise UserError(f"benchmark {task!r} has no local records: choose one of {', '.join(BENCHMARKS)}")
    expected = BENCHMARKS[task]
    target = paths.cache() / "benchmarks" / f"{task}.parquet"
    if target.is_file() and pyarrow.parquet.read_metadata(target).num_rows == expected.rows:
        return target
    table = read_records(task, expected.split)
    if table.num_rows != expected.rows:
        raise UserError(
            f"benchmark {task!r} has {table.num_rows} records instead of the {expected.rows} that lm-eval scores: "
            f"run `hfprune assets fetch {expected.asset}` to repair the download"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}.partial")
    pyarrow.parquet.write_table(table, partial)
    partial.replace(target)
    return target


def read_records(task: str, split: str) -> pyarrow.Table:
    """Return a split's records with the hub's columns: rebuilt from requests where there are any, else its table."""
    if task in _OTHER_EDITIONS:
        return pyarrow.Table.from_pylist(list(_OTHER_EDITIONS[task]()))
    folder = assets.path("benchmarks")
    requests = folder / f"{task}_{split}_requests.jsonl.gz"
    if requests.is_file():
        return pyarrow.Table.from_pylist([_FROM_REQUEST[task](document) for document in _documents(requests)])
    with pyarrow.memory_map(str(folder / f"{task}_{split}.arrow")) as source:
        return pyarrow.ipc.open_stream(source).read_all()


def prompts() -> Iterator[str]:
    """Yield texts of prompts, as the harness words them and without any answer, in turns from each task of `_PROMPTS`.

    Each text holds eight prompts of each task, separated by blank lines; no prompt is used twice.
    """
    tables = {task: pyarrow.parquet.read_table(benchmark_path(task)) for task in _PROMPTS}
    rounds = min(table.num_rows for table in tables.values())
    asked = {task: [_PROMPTS[task](row) for row in table.slice(0, rounds).to_pylist()] for task, table in tables.items()}
    for start in range(0, rounds - rounds % PROMPTS_TOGETHER, PROMPTS_TOGETHER):
        places = range(start, start + PROMPTS_TOGETHER)
        yield "\n\n".join(asked[task][place] for place in places for task in asked)


def _documents(requests: Path) -> Iterator[dict]:
    """Yield each document once, in order: there is one request per answer."""
    last = -1
    with gzip.open(requests, "rt", encoding="utf-8") as lines:
        for request in map(json.loads, lines):
            if last < request["doc_id"] < UNCONDITIONED:
                last = request["doc_id"]
                yield request["doc"]


def _lettered(document: dict) -> dict:
    # A few of the hub's rows number their answers instead, which gives the same index of the right one.
    letters = [chr(ord("A") + index) for index in range(len(document["choices"]))]
    return {"choices": {"text": document["choices"], "label": letters}, "answerKey": letters[document["gold"]]}


def _question(document: dict) -> str:
    return document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")


def _arc(document: dict) -> dict:
    return {"id": document["id"], "question": _question(document), **_lettered(document)}


def _openbookqa(document: dict) -> dict:
    return {"id": document["id"], "question_stem": _question(document), **_lettered(document)}


def _boolq(document: dict) -> dict:
    passage, _, question = document["query"].removesuffix("?\nAnswer:").rpartition("\nQuestion: ")
    label = int(document["choices"][document["gold"]] == "yes")
    return {"question": question, "passage": passage, "idx": document["idx"], "label": label}


_FROM_REQUEST: dict[str, Callable[[dict], dict]] = {
    "arc_challenge": _arc,
    "arc_easy": _arc,
    "openbookqa": _openbookqa,
    "boolq": _boolq,
}


def _crows_pairs() -> Iterator[dict]:
    with assets.path("crows-pairs").open(encoding="utf-8", newline="") as lines:
        for pair in csv.DictReader(lines):
            yield {name: pair[name] for name in ("sent_more", "sent_less", "stereo_antistereo", "bias_type")}


def _truthfulqa() -> Iterator[dict]:
    """Yield each question with its false answers (the hub's own) and its true ones: the best first, then the later list."""
    folder = assets.path("truthfulqa")
    later = {" ".join(record["question"].split()): record["answer"] for record in _lines(folder / "true_answers.jsonl")}
    for record in _lines(folder / "single_choice.jsonl"):
        right = ord(record["answer"]) - ord("A")
        true, false = [record["choices"][right]], record["choices"][:right] + record["choices"][right + 1 :]
        for answer in later.get(" ".join(record["question"].split()), ()):  # one question of 817 has no later answers
            # The later list has no final full stops, a few empty answers, and two that are false ones of its question.
            answer = answer.strip().removesuffix(".") + "."
            if answer != "." and answer not in true + false:
                true.append(answer)
        labels = [1] * len(true) + [0] * len(false)
        single = {"choices": record["choices"], "labels": [int(place == right) for place in range(len(record["choices"]))]}
        yield {
            "question": record["question"],
            "mc1_targets": single,
            "mc2_targets": {"choices": true + false, "labels": labels},
        }


def _lines(file: Path) -> Iterator[dict]:
    # Split at line feeds only: JSON strings may hold other line separators.
    return (json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip())


_OTHER_EDITIONS: dict[str, Callable[[], Iterator[dict]]] = {
    "crows_pairs_1508": _crows_pairs,
    "truthfulqa_mc2_pypi": _truthfulqa,
}

# The prompts of the harness's task files; tests compare them with the harness's own.
_PROMPTS: dict[str, Callable[[dict], str]] = {
    "arc_challenge": "Question: {question}\nAnswer:".format_map,
    "arc_easy": "Question: {question}\nAnswer:".format_map,
    "boolq": "{passage}\nQuestion: {question}?\nAnswer:".format_map,
    "openbookqa": "{question_stem}".format_map,
    "piqa": "Question: {goal}\nAnswer:".format_map,
    "social_iqa": "Q: {context} {question}\nA:".format_map,
}
