"""Corpus -> documents -> token windows, the same for calibration and for held-out evaluation text.

A window is `seq_len` consecutive tokens of one document; a document gives one window, so that no text is counted twice.
Everything random comes from `seed`: the same arguments give the same bytes.
"""

import gzip
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm

from hfprune_nb import paths
from hfprune_nb.errors import UserError
from hfprune_nb.inputs import assets, benchmarks

SPLITS = ("calibration", "evaluation")
TASK_PROMPTS = "task-prompts"
LOCAL_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
# Where a corpus has no held-out split of its own, one document in this many is kept for evaluation, chosen by its hash.
EVALUATION_SHARE = 10
SHUFFLE_BUFFER = 10_000
TOKENIZER_BATCH = 64


@dataclass
class Windows:
    """Token windows and where each comes from; row i of every field is window i.

    `ids` (n_windows, seq_len) int64; `document_hashes` as `document_hash` gives them; `starts` the token at which the
    window begins in its document; `document_lengths` in tokens, without BOS.
    """

    ids: np.ndarray
    document_hashes: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    document_lengths: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def table(self) -> pd.DataFrame:
        """Return one row per window: document_hash, start, document_length (tokens)."""
        return pd.DataFrame(
            {"document_hash": self.document_hashes, "start": self.starts, "document_length": self.document_lengths}
        )

    def save(self, folder: str | Path) -> None:
        """Write `windows.safetensors` (ids) and `windows.parquet` (the table) into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"ids": np.ascontiguousarray(self.ids, dtype=np.int64)}, folder / "windows.safetensors")
        self.table().to_parquet(folder / "windows.parquet", index=False)

    @classmethod
    def load(cls, folder: str | Path) -> "Windows":
        """Read what `save` wrote; raises UserError when a file is missing or damaged."""
        try:
            ids = load_file(Path(folder) / "windows.safetensors")["ids"]
            table = pd.read_parquet(Path(folder) / "windows.parquet")
        except Exception as error:
            raise UserError(f"the windows in {folder} are missing or damaged: delete that folder and rerun") from error
        return cls(ids, *(table[column].tolist() for column in ("document_hash", "start", "document_length")))


def document_hash(text: str) -> str:
    """Return the first 16 hex digits of the SHA-256 of `text` with every run of white space made one space."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def documents(corpus: str, split: str = "calibration", text_column: str = "text", seed: int = 0) -> Iterator[str]:
    """Yield the documents of a corpus in an order shuffled by `seed`, those of its calibration or its evaluation split.

    corpus        calibration                     evaluation
    `c4`          hub, allenai/c4 en train        its validation split; both streamed, shuffled in a buffer
    `c4-sample`   asset c4-calibration            asset c4-held-out less the documents that both have
    `wikitext`    WikiText-2 raw train, by page   its test pages
    task-prompts  none                            prompts of six local benchmarks in turns, without any answer
    local file    nine documents in ten           one in ten, chosen by `document_hash`
    hub id        train split                     its validation or test split, else one document in ten as above

    A local file is .txt (documents separated by blank lines; without any blank line, one document per line), .jsonl,
    .json (a list of records) or .parquet, the last three with the text in `text_column`; a relative path is looked up
    in the working directory, then in the project. A hub id may carry a configuration: `owner/name:configuration`.
    Raises UserError for an unknown split or one that the corpus has not, a corpus that is missing, and a text column that
    does not exist.
    """
    if split not in SPLITS:
        raise UserError(f"split={split!r} is unknown: choose one of {', '.join(SPLITS)}")
    if corpus == "c4":
        return _from_hub("allenai/c4:en", {"calibration": "train", "evaluation": "validation"}[split], "text", seed)
    if corpus == "c4-sample":
        return _shuffled(_c4_sample(split), seed)
    if corpus == "wikitext":
        return _shuffled(_wikitext(split), seed)
    if corpus == TASK_PROMPTS:
        if split == "calibration":
            raise UserError(f"corpus {TASK_PROMPTS!r} is for evaluation only: calibrate on other text than the tasks' own")
        return _shuffled(benchmarks.prompts(), seed)
    if Path(corpus).suffix in LOCAL_SUFFIXES:
        return _shuffled(_share(_from_file(_local_file(corpus), text_column), split), seed)
    return _hub_dataset(corpus, split, text_column, seed)


def windows(
    tokenizer,
    corpus: str,
    n_windows: int,
    seq_len: int,
    seed: int,
    bos: bool = False,
    split: str = "calibration",
    text_column: str = "text",
    progress: bool = True,
) -> Windows:
    """Cut one window of `seq_len` tokens at a random place out of each of `n_windows` documents.

    The paper's setting is corpus c4, 43,128 windows of 1024 tokens. Documents come in the order
    of `documents`; those shorter than a window, and repeated ones, are passed over. With `bos` the first token of every
    window is the tokenizer's BOS and the text gives one token less. No other special token is added, nothing is padded.
    Raises UserError when the corpus is empty, has too few documents that are long enough, or the tokenizer has no BOS.
    """
    for name, value, least in (("n_windows", n_windows, 1), ("seq_len", seq_len, 2), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"{name}={value} is too small: it must be at least {least}")
    if bos and tokenizer.bos_token_id is None:
        raise UserError("bos=True needs a tokenizer with a BOS token and this one has none: set bos=False")
    prefix = [tokenizer.bos_token_id] if bos else []
    text_length = seq_len - len(prefix)
    # A stream of its own, so that window starts do not depend on how the documents were shuffled.
    random = np.random.default_rng([seed, 1])
    rows, chosen = [], Windows(np.empty((0, seq_len), dtype=np.int64))
    longest = 0
    bar = tqdm(total=n_windows, desc=f"{corpus} {split}", unit="window", disable=not progress)
    with bar:
        for digest, tokens in _tokenized(tokenizer, documents(corpus, split, text_column, seed)):
            longest = max(longest, len(tokens))
            if len(tokens) < text_length:
                continue
            start = int(random.integers(len(tokens) - text_length + 1))
            rows.append(prefix + tokens[start : start + text_length])
            chosen.document_hashes.append(digest)
            chosen.starts.append(start)
            chosen.document_lengths.append(len(tokens))
            bar.update()
            if len(rows) == n_windows:
                chosen.ids = np.array(rows, dtype=np.int64)
                return chosen
    if longest == 0:
        raise UserError(f"corpus {corpus!r} is empty: its {split} split has no text, choose another corpus")
    if not rows:
        raise UserError(
            f"seq_len={seq_len} is longer than every document of corpus {corpus!r} ({split}), of which the longest has "
            f"{longest} tokens: lower seq_len"
        )
    raise UserError(
        f"corpus {corpus!r} ({split}) has {len(rows)} documents of at least {text_length} tokens, fewer than "
        f"n_windows={n_windows}: lower n_windows or seq_len"
    )


def check_overlap(calibration: Windows, evaluation: Windows) -> None:
    """Raise UserError, which says how many, when the two share documents (compared by `document_hash`)."""
    if shared := set(calibration.document_hashes) & set(evaluation.document_hashes):
        raise UserError(f"calibration and evaluation text share {len(shared)} documents: choose another corpus for one of them")


def token_statistics(windows: Windows, tokenizer) -> pd.DataFrame:
    """Return one row per distinct token, most frequent first: id, token, count, share, cumulative_share."""
    ids, counts = np.unique(windows.ids, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    shares = counts[order] / counts.sum()
    return pd.DataFrame(
        {
            "id": ids[order],
            "token": [tokenizer.decode([token]) for token in ids[order].tolist()],
            "count": counts[order],
            "share": shares,
            "cumulative_share": shares.cumsum(),
        }
    )


def _tokenized(tokenizer, texts: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """Yield (document hash, token ids) of every distinct, non-empty document, tokenised in batches."""
    seen = set()
    texts = iter(texts)
    while batch := list(itertools.islice(texts, TOKENIZER_BATCH)):
        fresh = {}
        for text in batch:
            if text.strip() and (digest := document_hash(text)) not in seen:
                seen.add(digest)
                fresh[digest] = text
        if fresh:
            # verbose=False: a document longer than the model's context is expected here, only windows reach the model.
            encoded = tokenizer(list(fresh.values()), add_special_tokens=False, truncation=False, verbose=False)
            yield from zip(fresh, encoded["input_ids"], strict=True)


def _shuffled(texts: Iterable[str], seed: int) -> Iterator[str]:
    texts = list(texts)
    return (texts[index] for index in np.random.default_rng(seed).permutation(len(texts)))


def _share(texts: Iterable[str], split: str) -> Iterator[str]:
    """Keep the documents whose hash puts them into `split`."""
    for text in texts:
        if (int(document_hash(text), 16) % EVALUATION_SHARE == 0) == (split == "evaluation"):
            yield text


def _c4_sample(split: str) -> Iterator[str]:
    calibration = assets.path("c4-calibration").read_text(encoding="utf-8").split("\n")
    if split == "calibration":
        yield from calibration
        return
    known = set(map(document_hash, calibration))
    for text in _records(assets.path("c4-held-out"), "text"):
        if document_hash(text) not in known:
            yield text


def _wikitext(split: str) -> Iterator[str]:
    folder = assets.path("wikitext-2")
    if split == "calibration":
        lines = gzip.decompress((folder / "train.raw.gz").read_bytes()).decode().split("\n")
    else:
        lines = pd.read_parquet(folder / "test.parquet")["text"]
    page = ""
    for line in lines:
        # A level-one heading `= Title =` begins a page; deeper ones (`= = Section = =`) belong to it.
        if re.fullmatch(r" = [^=](.*[^=])? = ?", line.rstrip("\n")) and page.strip():
            yield page
            page = ""
        # The two packages write an empty line and a line's end differently.
        page += line.rstrip("\n").rstrip(" ") + "\n"
    yield page


def _local_file(corpus: str) -> Path:
    for file in (Path(corpus).expanduser(), paths.project() / corpus):
        if file.is_file():
            return file
    raise UserError(f"corpus file {corpus} does not exist: give a path to a {', '.join(LOCAL_SUFFIXES)} file")


def _from_file(file: Path, text_column: str) -> list[str]:
    if file.suffix != ".txt":
        return _records(file, text_column)
    text = file.read_text(encoding="utf-8").strip()
    blocks = re.split(r"\n\s*\n", text)
    return blocks if len(blocks) > 1 else text.splitlines()


def _records(file: Path, text_column: str) -> list[str]:
    try:
        if file.suffix == ".parquet":
            table = pd.read_parquet(file)
        elif file.suffix == ".jsonl":
            # Split at line feeds only: JSON strings may hold other line separators.
            lines = file.read_text(encoding="utf-8").split("\n")
            table = pd.DataFrame([json.loads(line) for line in lines if line.strip()])
        else:
            table = pd.DataFrame(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, OSError) as error:
        raise UserError(f"corpus file {file} is not readable as {file.suffix[1:]} ({error}): check the file") from error
    if table.empty:
        return []
    if text_column not in table:
        raise UserError(f"corpus file {file} has no column {text_column!r}: set text_column to one of {_names(table)}")
    return table[text_column].dropna().astype(str).tolist()


def _names(columns: Iterable) -> str:
    return ", ".join(map(str, columns))


def _hub_dataset(corpus: str, split: str, text_column: str, seed: int) -> Iterator[str]:
    from datasets import get_dataset_split_names

    repository, _, configuration = corpus.partition(":")
    with _hub_errors(corpus):
        names = get_dataset_split_names(repository, configuration or None)
    held_out = next((name for name in ("validation", "test") if name in names), None)
    if split == "evaluation" and held_out:
        return _from_hub(corpus, held_out, text_column, seed)
    train = _from_hub(corpus, "train" if "train" in names else names[0], text_column, seed)
    return train if held_out else _share(train, split)


def _from_hub(corpus: str, hub_split: str, text_column: str, seed: int) -> Iterator[str]:
    from datasets import load_dataset

    repository, _, configuration = corpus.partition(":")
    with _hub_errors(corpus):
        stream = load_dataset(repository, configuration or None, split=hub_split, streaming=True)
        for record in stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER):
            if text_column not in record:
                raise UserError(f"corpus {corpus!r} has no column {text_column!r}: set text_column to one of {_names(record)}")
            yield record[text_column] or ""


@contextmanager
def _hub_errors(corpus: str) -> Iterator[None]:
    """Turn whatever the hub's client raises into one sentence; its many exception types share no base class."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"corpus {corpus!r} is neither c4-sample, wikitext, {TASK_PROMPTS} nor a local file, and the hub did not give it "
            f"({type(error).__name__}): check the name and the connection, or choose one of those"
        ) from error
