"""Records of eight lm-eval tasks, rebuilt from one pinned package into the columns that its task files read.

Four tasks lie there as the hub's own tables. ARC, OpenBookQA and BoolQ lie there as another harness's requests, whose
prompt frame ("Question: ... Answer:") is taken off again: that package's validation requests, treated the same way,
give back its validation tables record for record (tests/test_tasks.py).
"""

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


@dataclass(frozen=True)
class Benchmark:
    """One task: the `split` that lm-eval scores, how many `rows` it has, and the harness's own file below `tasks/`."""

    task: str
    split: str
    rows: int
    harness_file: str
    licence: str


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
    )
}


def benchmark_path(task: str) -> Path:
    """Return the task's records as a parquet file in the cache, built on first use from the asset `benchmarks`.

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
            "run `hfprune assets fetch benchmarks` to repair the download"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}.partial")
    pyarrow.parquet.write_table(table, partial)
    partial.replace(target)
    return target


def read_records(task: str, split: str) -> pyarrow.Table:
    """Return a split's records with the hub's columns: rebuilt from requests where there are any, else its table."""
    folder = assets.path("benchmarks")
    requests = folder / f"{task}_{split}_requests.jsonl.gz"
    if requests.is_file():
        return pyarrow.Table.from_pylist([_FROM_REQUEST[task](document) for document in _documents(requests)])
    with pyarrow.memory_map(str(folder / f"{task}_{split}.arrow")) as source:
        return pyarrow.ipc.open_stream(source).read_all()


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
