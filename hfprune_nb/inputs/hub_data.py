"""Data sets of the hub, read from whole files that stay in the cache: shared by seeds, models and stages, offline afterwards."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from hfprune_nb import paths, text_files
from hfprune_nb.errors import UserError
from hfprune_nb.files import read_json, write_json
from hfprune_nb.inputs import hub

SHUFFLE_BUFFER = 10_000


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One configuration of a hub data set at one commit; `splits`: split -> the paths of its files."""

    repository: str
    configuration: str
    commit: str
    splits: dict[str, list[str]]


def find(name: str) -> DataSet:
    """Return the data set `OWNER/NAME` or `OWNER/NAME:CONFIGURATION`, at the commit of `hub.commit`.

    What its files are is asked once for each commit. Raises UserError for one that is missing, closed, without that
    configuration, or a script.
    """
    repository, _, configuration = name.partition(":")
    commit = hub.commit(repository, "dataset")
    listing = paths.cache() / "hub" / f"{repository}:{configuration}@{commit}.json".replace("/", "--").replace(":", "+")
    if listing.is_file():
        return DataSet(**read_json(listing))
    from datasets import load_dataset_builder

    with hub.errors("dataset", repository, commit):
        builder = hub.patiently(load_dataset_builder, repository, configuration or None, revision=commit)
    within = f"{repository}@{commit}/"
    splits = {str(split): [path.partition(within)[2] for path in files] for split, files in builder.config.data_files.items()}
    found = DataSet(repository, configuration, commit, splits)
    listing.parent.mkdir(parents=True, exist_ok=True)
    partial = listing.with_suffix(".partial")
    write_json(partial, dataclasses.asdict(found))
    partial.replace(listing)
    return found


def records(data: DataSet, split: str, seed: int) -> Iterator[tuple[str, dict]]:
    """Yield the records of a split and where each stands: whole files, in an order drawn by `seed`.

    A file is downloaded when its turn comes, and stirred through a buffer of 10,000 records. Raises UserError for a split that
    is not there, and a file that is not given or has no records of JSON or Parquet.
    """
    if split not in data.splits:
        raise UserError(f"dataset '{data.repository}' has no split '{split}': choose one of {', '.join(data.splits)}.")
    files, random = data.splits[split], np.random.default_rng(seed)
    for number in random.permutation(len(files)):
        yield from _stirred(_read(data, files[number]), random)


def _read(data: DataSet, path: str) -> Iterator[tuple[str, dict]]:
    if text_files.suffix(path) not in text_files.RECORD_SUFFIXES:
        raise UserError(
            f"dataset '{data.repository}': {path} is not one of {', '.join(text_files.RECORD_SUFFIXES)}: read its copy in "
            "Parquet, revision refs/convert/parquet."
        )
    yield from text_files.read_records(hub.file(data.repository, path, "dataset", data.commit), "dataset file")


def _stirred(found: Iterator, random: np.random.Generator) -> Iterator:
    held: list = []
    for record in found:
        if len(held) < SHUFFLE_BUFFER:
            held.append(record)
            continue
        place = int(random.integers(SHUFFLE_BUFFER))
        yield held[place]
        held[place] = record
    yield from (held[place] for place in random.permutation(len(held)))
