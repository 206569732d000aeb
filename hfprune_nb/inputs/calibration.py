"""Corpus -> documents -> token windows, the same for calibration and for held-out evaluation text.

A window is `seq_len` consecutive tokens of one document; windows never overlap, so that no text is counted twice. A document
gives one window, or up to `windows_per_document`.
Everything random comes from `seed`: the same arguments give the same bytes.
"""

import difflib
import gzip
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import safe_open
from safetensors.numpy import save_file

from hfprune_nb import text_files
from hfprune_nb.errors import UserError
from hfprune_nb.files import claim
from hfprune_nb.inputs import assets, benchmarks, chat, hub, hub_data, tokenization
from hfprune_nb.inputs.tokenization import TOKENIZER_BATCH, document_hash
from hfprune_nb.progress import bar as progress_bar

SPLITS = ("calibration", "evaluation")
TASK_PROMPTS = "task-prompts"
TEXT_CORPORA = ("c4", "c4-sample", "wikitext", TASK_PROMPTS)
LOCAL_SUFFIXES = (".txt", *text_files.RECORD_SUFFIXES)
# Where a corpus has no held-out split of its own, one document in this many is kept for evaluation, chosen by its hash.
EVALUATION_SHARE = 10
# Of a longer document so many characters are tokenised, drawn by the seed: a window wants a few thousand of them, and a picture
# that is spelt out in a page has millions.
LONGEST_TEXT = 400_000
# So many records without the text's column are no accident.
RECORDS_WITHOUT_COLUMN = 1000
CHECKPOINT_EVERY = 4096  # windows between two savings


@dataclass
class Windows:
    """Token windows and where each comes from; row i of every field is window i.

    `ids` (n_windows, seq_len) int64; `document_hashes` as `document_hash` gives them; `starts` the token at which the
    window begins in its document, or in the `LONGEST_TEXT` characters that were read of it; `document_lengths` in tokens, without
    BOS. `passed_over` counts the documents that gave no window, by the reason.
    """

    ids: np.ndarray
    document_hashes: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    document_lengths: list[int] = field(default_factory=list)
    passed_over: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def table(self) -> pd.DataFrame:
        """Return one row per window: document_hash, start, document_length (tokens)."""
        return pd.DataFrame(
            {"document_hash": self.document_hashes, "start": self.starts, "document_length": self.document_lengths}
        )

    def save(self, folder: str | Path) -> None:
        """Write `windows.safetensors` (ids, and the counts as its metadata) and `windows.parquet` (the table) into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        ids = np.ascontiguousarray(self.ids, dtype=np.int64)
        save_file({"ids": ids}, folder / "windows.safetensors", {"passed_over": json.dumps(self.passed_over)})
        self.table().to_parquet(folder / "windows.parquet", index=False)

    @classmethod
    def load(cls, folder: str | Path) -> "Windows":
        """Read what `save` wrote; raises UserError when a file is missing or damaged."""
        try:
            with safe_open(Path(folder) / "windows.safetensors", "numpy") as saved:
                ids, passed_over = saved.get_tensor("ids"), json.loads(saved.metadata()["passed_over"])
            table = pd.read_parquet(Path(folder) / "windows.parquet")
        except Exception as error:
            raise UserError(f"the windows in {folder} are missing or damaged: delete that folder and rerun") from error
        hashes, starts, lengths = (table[column].tolist() for column in ("document_hash", "start", "document_length"))
        return cls(ids, hashes, starts, lengths, passed_over)


def documents(
    corpus: str | Path,
    split: str = "calibration",
    text_column: str = "text",
    seed: int = 0,
    chat_tokenizer=None,
    passed_over: Counter | None = None,
) -> Iterator[str]:
    """Yield the documents of a corpus in an order shuffled by `seed`, those of its calibration or its evaluation split.

    corpus        calibration                     evaluation
    `c4`          hub, allenai/c4 en train        its validation split; of both, whole files chosen by `seed`
    `c4-sample`   asset c4-calibration            asset c4-held-out less the documents that both have
    `wikitext`    WikiText-2 raw train, by page   its test pages
    task-prompts  none                            prompts of six local benchmarks in turns, without any answer
    local file    nine documents in ten           one in ten, chosen by `document_hash`
    hub id        train split                     its validation or test split, else one document in ten as above

    A local file is .txt (documents separated by blank lines; without any blank line, one document per line), or of records
    (`text_files.read_records`) with the text in `text_column`; a relative path is looked up in the working directory, then in the
    project. A hub id may carry a configuration, and the split to share out: `owner/name:configuration:split`.
    chat_tokenizer : renders `text_column` with its chat template, as that holds conversations.
    passed_over : counts records without text and conversations that spell out a special token, which are left out.
    Raises UserError for an unknown split or one that the corpus has not, a corpus that is missing, a text column that does not
    exist, and one that holds anything but text.
    """
    corpus, passed_over = str(corpus), Counter() if passed_over is None else passed_over
    if split not in SPLITS:
        raise UserError(f"split={split!r} is unknown: choose one of {', '.join(SPLITS)}")
    if chat_tokenizer is not None and is_plain(corpus):
        raise UserError(f"corpus {corpus!r} holds plain text and no conversations: set chat_template=False")
    if corpus == "c4":
        return _hub_dataset(hub.REPOSITORIES[corpus], split, "text", seed, None, passed_over)
    if corpus == "c4-sample":
        return _shuffled(_c4_sample(split), seed)
    if corpus == "wikitext":
        return _shuffled(_wikitext(split), seed)
    if corpus == TASK_PROMPTS:
        if split == "calibration":
            raise UserError(f"corpus {TASK_PROMPTS!r} is for evaluation only: calibrate on other text than the tasks' own")
        return _shuffled(benchmarks.prompts(), seed)
    if file := text_files.find(corpus, "corpus", LOCAL_SUFFIXES):
        if text_files.suffix(file) == ".txt":
            return _shuffled(_share(_paragraphs(file), split), seed)
        records = text_files.read_records(file, "corpus")
        return _shuffled(_share(_texts(records, text_column, f"corpus {file}", chat_tokenizer, passed_over), split), seed)
    return _hub_dataset(corpus, split, text_column, seed, chat_tokenizer, passed_over)


def is_plain(corpus: str | Path) -> bool:
    """Return whether a corpus holds plain text, so that it has no column and no conversations."""
    return str(corpus) in TEXT_CORPORA or text_files.suffix(corpus) == ".txt"


def windows(
    tokenizer,
    corpus: str | Path,
    n_windows: int,
    seq_len: int,
    seed: int,
    bos: bool | str = tokenization.AUTO,
    split: str = "calibration",
    text_column: str = "text",
    chat_template: bool = False,
    vocab_size: int | None = None,
    progress: bool = True,
    scratch: Path | None = None,
    windows_per_document: int = 1,
) -> Windows:
    """Cut one window of `seq_len` tokens at a random place out of each of `n_windows` documents.

    The paper's setting is corpus c4, 43,128 windows of 1024 tokens. Documents come in the order of `documents`; those shorter
    than a window, and repeated ones, are passed over. Every window begins with what `tokenization.prefix` gives for `bos`, and
    the text gives so many tokens less. No other special token is added, nothing is padded.
    chat_template : `text_column` holds conversations, which the tokenizer's chat template renders.
    windows_per_document : a document gives as many windows, side by side at random places, as it is long enough for; so a small
    corpus lasts for more seeds that share less of it.
    vocab_size : rows of the model's embedding; text that spells out a token beyond them is refused.
    scratch : a folder from which a run with the same arguments that was killed goes on.
    Raises UserError when the corpus is empty, has too few documents that are long enough, or the tokenizer lacks what is asked.
    """
    corpus = str(corpus)
    least_values = (("n_windows", n_windows, 1), ("seq_len", seq_len, 2), ("seed", seed, 0))
    for name, value, least in (*least_values, ("windows_per_document", windows_per_document, 1)):
        if not isinstance(value, Real) or value % 1:
            raise UserError(f"{name}={value!r} is no whole number")
        if value < least:
            raise UserError(f"{name}={value} is too small: it must be at least {least}")
    prefix = tokenization.prefix(tokenizer, bos)
    text_length = seq_len - len(prefix)
    # A stream of its own, so that window starts do not depend on how the documents were shuffled.
    random = np.random.default_rng([seed, 1])
    found, read = Windows(np.empty((0, seq_len), dtype=np.int32)), 0
    passed_over: Counter = Counter()
    rows, longest, short = [], 0, "shorter than a window"
    if scratch:
        settings = {"corpus": corpus, "split": split, "n_windows": n_windows, "seq_len": seq_len, "seed": seed, "prefix": prefix}
        settings |= {"text_column": text_column, "chat_template": chat_template, "tokenizer": tokenizer.name_or_path}
        settings |= {"windows_per_document": windows_per_document}
        claim(scratch, settings)
    checkpoint = scratch / "windows.partial.safetensors" if scratch else None
    if checkpoint and checkpoint.is_file():
        with safe_open(checkpoint, "numpy") as saved:
            rows, state = list(saved.get_tensor("ids")), json.loads(saved.metadata()["state"])
        read, longest, random.bit_generator.state = state["read"], state["longest"], state["random"]
        passed_over[short] = state["short"]
        found.document_hashes, found.starts, found.document_lengths = state["table"]
    texts = documents(corpus, split, text_column, seed, tokenizer if chat_template else None, passed_over)
    texts = _embedded(texts, tokenizer, vocab_size) if vocab_size else texts
    with progress_bar(n_windows, "window", f"{corpus} {split}", enabled=progress) as bar:
        bar.n = bar.initial = bar.last_print_n = len(rows)
        began, read_before = time.monotonic(), read
        for digest, ids in _tokenized(tokenizer, texts, seed, chat_template, passed_over, read):
            read += 1
            # A rendered conversation brings its own BOS.
            ids = ids[len(prefix) :] if chat_template and ids[: len(prefix)] == prefix else ids
            longest = max(longest, len(ids))
            if len(ids) < text_length:
                passed_over[short] += 1
                continue
            before, count = len(rows), min(windows_per_document, len(ids) // text_length)
            gaps = np.sort(random.integers(len(ids) - count * text_length + 1, size=count))
            for start in (gaps + text_length * np.arange(count)).tolist()[: n_windows - before]:
                rows.append(np.array(prefix + ids[start : start + text_length], dtype=np.int32))
                found.document_hashes.append(digest)
                found.starts.append(start)
                found.document_lengths.append(len(ids))
            speed = (read - read_before) / max(time.monotonic() - began, 1e-9)
            bar.set_description_str(f"{corpus} {split}, {read:,} documents at {speed:,.0f} a second", refresh=False)
            bar.update(len(rows) - before)
            if len(rows) == n_windows:
                found.ids, found.passed_over = np.stack(rows).astype(np.int64), dict(passed_over)
                return found
            if checkpoint and len(rows) // CHECKPOINT_EVERY > before // CHECKPOINT_EVERY:
                table = [found.document_hashes, found.starts, found.document_lengths]
                state = {"read": read, "longest": longest, "short": passed_over[short], "table": table}
                state["random"] = random.bit_generator.state
                partial = checkpoint.with_suffix(".new")
                save_file({"ids": np.stack(rows)}, partial, {"state": json.dumps(state)})
                partial.replace(checkpoint)
    if longest == 0:
        raise UserError(f"corpus {corpus!r} is empty: its {split} split has no text, choose another corpus")
    unit = "; a .txt document ends at a blank line" if text_files.suffix(corpus) == ".txt" else ""
    if not rows:
        raise UserError(
            f"seq_len={seq_len} is longer than every document of corpus {corpus!r} ({split}), of which the longest has "
            f"{longest} tokens: lower seq_len{unit}"
        )
    raise UserError(
        f"corpus {corpus!r} ({split}) has {len(set(found.document_hashes))} documents of at least {text_length} tokens, fewer "
        f"than n_windows={n_windows}: lower n_windows or seq_len, or raise windows_per_document{unit}; "
        f"{passed_over_words(passed_over)}"
    )


def passed_over_words(counts: dict[str, int]) -> str:
    """Return `Windows.passed_over` in words."""
    return "passed over: " + (", ".join(f"{count:,} {reason}" for reason, count in counts.items()) or "nothing")


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


def _embedded(texts: Iterable[str], tokenizer, vocab_size: int) -> Iterator[str]:
    """Yield the texts; raise UserError for one that spells out a token without a row: its author meant a model that has it."""
    beyond = {token: place for token, place in tokenizer.get_added_vocab().items() if place >= vocab_size}
    for text in texts:
        if token := next((token for token in beyond if token in text), None):
            raise UserError(
                f"model: its tokenizer has {token!r}, which the text holds, as id {beyond[token]}, and its embedding has "
                f"{vocab_size} rows: use the tokenizer that it was trained with, or enlarge it with resize_token_embeddings"
            )
        yield text


def _tokenized(
    tokenizer, texts: Iterable[str], seed: int, control_tokens: bool, passed_over: Counter, skipped: int = 0
) -> Iterator[tuple[str, list[int]]]:
    """Yield (document hash, token ids) of every distinct, non-empty document but the first `skipped`, tokenised in batches."""
    seen = set()
    texts = iter(texts)
    while batch := list(itertools.islice(texts, TOKENIZER_BATCH)):
        fresh = {}
        for text in batch:
            if not text.strip():
                passed_over["without text"] += 1
            elif (digest := document_hash(text)) in seen:
                passed_over["repeated"] += 1
            else:
                seen.add(digest)
                room = max(0, len(text) - LONGEST_TEXT)
                start = int(np.random.default_rng([seed, int(digest, 16)]).integers(room + 1)) if room else 0
                fresh[digest] = text[start : start + LONGEST_TEXT]
        passed, fresh = min(skipped, len(fresh)), dict(itertools.islice(fresh.items(), skipped, None))
        skipped -= passed
        if fresh:
            encoded = tokenization.encode(tokenizer, list(fresh.values()), control_tokens)
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
    held_out = assets.path("c4-held-out")
    for text in _texts(text_files.read_records(held_out), "text", str(held_out)):
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


def _paragraphs(file: Path) -> list[str]:
    text = text_files.read_text(file, "corpus").strip()
    blocks = re.split(r"\n\s*\n", text)
    return blocks if len(blocks) > 1 else text.split("\n")


def _texts(
    records: Iterable[tuple[str, dict]], column: str, source: str, chat_tokenizer=None, passed_over: Counter | None = None
) -> Iterator[str]:
    """Yield the text in `column` of every (place, record) that has any; conversations as the tokenizer's template has them."""
    passed_over = Counter() if passed_over is None else passed_over
    names: dict = {}
    found, count = False, 0
    for count, (place, record) in enumerate(records, 1):
        if not found:
            found = column in record
            names |= dict.fromkeys(record)
            if not found and count == RECORDS_WITHOUT_COLUMN:
                break
        value = record.get(column)
        # Tables hold "not a number" where nothing is.
        if value is None or value != value or value == [] or (isinstance(value, str) and not value.strip()):
            passed_over["without text"] += 1
        elif chat_tokenizer is not None:
            turns = chat.turns(value, place)
            # Rendered, it would end the turn or begin another.
            if any(token in turn["content"] for turn in turns for token in chat_tokenizer.all_special_tokens):
                passed_over["with a special token in a turn"] += 1
            else:
                yield chat.render(chat_tokenizer, turns, place)
        elif chat.is_turns(value):
            raise UserError(
                f"{place}: {column} holds chat turns: set chat_template=True, which renders them as the model's tokenizer does"
            )
        elif not isinstance(value, str):
            raise UserError(
                f"{place}: {column} is {json.dumps(value, default=str)[:40]}, not text: correct or leave out the record, or set "
                "text_column to a column of text"
            )
        else:
            yield value
    if count and not found:
        hint = " (with chat_template=True for conversations)" if names.keys() & set(chat.COLUMNS) else ""
        raise UserError(f"{source} has no column {column!r}: set text_column to one of {', '.join(map(str, names))}{hint}")


def _hub_dataset(corpus: str, split: str, text_column: str, seed: int, chat_tokenizer, passed_over: Counter) -> Iterator[str]:
    if "/" not in corpus:
        near = difflib.get_close_matches(corpus, TEXT_CORPORA, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}" if near else f"choose one of {', '.join(TEXT_CORPORA)}"
        raise UserError(f"corpus {corpus!r} is unknown: {hint}, or give a file or OWNER/NAME of a data set of the hub")
    repository, _, rest = corpus.partition(":")
    configuration, _, chosen = rest.partition(":")
    data = hub_data.find(f"{repository}:{configuration}")
    held_out = next((name for name in ("validation", "test") if name in data.splits and not chosen), None)
    hub_split = chosen or (held_out if held_out and split == "evaluation" else "train")
    if hub_split not in data.splits:
        names = list(data.splits)
        raise UserError(
            f"corpus {corpus!r} has no split {hub_split!r}: name one of {', '.join(names)}, as in {repository}:{configuration}:"
            f"{names[0]}, of which one document in ten is then held out"
        )
    texts = _texts(hub_data.records(data, hub_split, seed), text_column, f"corpus {corpus!r}", chat_tokenizer, passed_over)
    return texts if held_out else _share(texts, split)
