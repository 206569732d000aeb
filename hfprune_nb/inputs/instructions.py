"""Instruction data -> (prompt, response) records -> packed rows of tokens whose loss is taken on the responses only.

Several examples share a row and never see each other: positions restart with every example, from which transformers builds the
attention boundaries of a row that comes without an attention mask. So a packed row has the loss and the gradient of its
examples read apart.
"""

import bisect
import dataclasses
import itertools
import json
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from hfprune_nb import paths
from hfprune_nb.errors import UserError
from hfprune_nb.inputs import assets
from hfprune_nb.inputs.calibration import SHUFFLE_BUFFER, TOKENIZER_BATCH, document_hash

# The Alpaca template for an instruction without input.
TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
HUB = {"lamini": "MBZUAI/LaMini-instruction", "alpaca": "tatsu-lab/alpaca"}
OFFLINE = "instructlab-sdg"
SPLITS = ("train", "held_out")
# One record in this many is held out, chosen by the hash of its prompt: no prompt is on both sides.
HELD_OUT_SHARE = 50
NO_LOSS = -100
# How many unfilled rows are kept while packing: more fill rows better and cost time.
OPEN_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Record:
    """One instruction, already in the template, and the answer to be learned."""

    prompt: str
    response: str


@dataclasses.dataclass(frozen=True)
class Row:
    """One packed row: tokens, positions restarting with each example, and the next token where there is a loss, else -100."""

    # Four bytes a number: LaMini-instruction has some half a billion tokens.
    input_ids: array = dataclasses.field(default_factory=lambda: array("i"))
    position_ids: array = dataclasses.field(default_factory=lambda: array("i"))
    labels: array = dataclasses.field(default_factory=lambda: array("i"))


def records(data: str, n_records: int = 0, seed: int = 0, split: str = "train") -> list[Record]:
    """Return instruction records in an order shuffled by `seed`, of the training or the held-out split.

    data      `instructlab-sdg`: 24,545 single turns that need no hub, their constant system message left out; `lamini`, `alpaca`
              or a hub id: its train split; a local .jsonl or .json file (a list).
    n_records the first so many, 0 for all.

    A record has `messages` with one user and one assistant turn, or `instruction` (with `input`, if any, on a new line) and
    `response` or `output`. Empty responses are passed over. Raises UserError for a source that is missing, a record of another
    form, and too few records.
    """
    if split not in SPLITS:
        raise UserError(f"split={split!r} is unknown: choose one of {', '.join(SPLITS)}")
    if n_records < 0:
        raise UserError(f"n_records {n_records} is negative: give the number of records, or 0 for all.")
    found = (record for record in map(_record, _source(data, seed)) if record.response.strip())
    chosen = (record for record in found if (split == "held_out") == _is_held_out(record))
    kept = list(itertools.islice(chosen, n_records or None))
    if not kept or len(kept) < n_records:
        raise UserError(
            f"data {data!r} has {len(kept)} {split.replace('_', '-')} records, fewer than the {max(n_records, 1)} asked for: "
            "lower the number or choose other data."
        )
    return kept


def pack(tokenizer, chosen: Iterable[Record], seq_len: int) -> list[Row]:
    """Return `chosen` as packed rows of at most `seq_len` tokens, each example whole and in one row.

    Prompt and response are tokenised together, as they are read later; what the tokenizer puts in front (a BOS) stays, an EOS
    ends every response. Labels are the next token where that token belongs to a response. An example longer than a row is cut at
    its end (and has no EOS then); one whose prompt alone fills a row is left out. Raises UserError when nothing is left or the
    tokenizer has no EOS.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("model: its tokenizer has no EOS token, so no response could be taught to end: choose another model.")
    rows, room = [], []
    for input_ids, labels in _examples(tokenizer, chosen, seq_len):
        # `room` is kept ascending with the open rows beside it: the fullest row that still takes the example gets it.
        place = bisect.bisect_left(room, len(input_ids), key=lambda entry: entry[0])
        free, row = room.pop(place) if place < len(room) else (seq_len, Row())
        if not row.input_ids:
            rows.append(row)
        row.input_ids.extend(input_ids)
        row.position_ids.extend(range(len(input_ids)))
        row.labels.extend(labels)
        bisect.insort(room, (free - len(input_ids), row), key=lambda entry: entry[0])
        if len(room) > OPEN_ROWS:
            room.pop(0)
    if not rows:
        raise UserError(f"seq_len {seq_len} is shorter than every prompt of the data: raise it.")
    return rows


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Return rows as tensors input_ids, position_ids, labels, each (rows, longest row).

    Padding stands at the end, has no label, and is a sequence of its own at every token, which no other token sees.
    """
    width = max(len(row.input_ids) for row in rows)
    padding = {"input_ids": 0, "position_ids": 0, "labels": NO_LOSS}
    return {
        name: torch.tensor([[*getattr(row, name), *[value] * (width - len(row.input_ids))] for row in rows])
        for name, value in padding.items()
    }


def count_tokens(rows: list[Row]) -> tuple[int, int]:
    """Return how many tokens the rows hold, and how many of them a loss is taken on."""
    return sum(len(row.input_ids) for row in rows), sum(label != NO_LOSS for row in rows for label in row.labels)


def _examples(tokenizer, chosen: Iterable[Record], seq_len: int) -> Iterator[tuple[list[int], list[int]]]:
    chosen = iter(chosen)
    while batch := list(itertools.islice(chosen, TOKENIZER_BATCH)):
        texts = [record.prompt + record.response for record in batch]
        encoded = tokenizer(texts, return_offsets_mapping=True, verbose=False)
        for record, ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            # Special tokens have the offset (0, 0); a token across the border belongs to the prompt.
            answered = [start >= len(record.prompt) for start, _ in offsets]
            if ids[-1] != tokenizer.eos_token_id:
                ids, answered = [*ids, tokenizer.eos_token_id], [*answered, True]
            ids, answered = ids[:seq_len], answered[:seq_len]
            labels = [token if kept else NO_LOSS for token, kept in zip(ids[1:], answered[1:], strict=True)]
            if any(answered[1:]):
                yield ids, [*labels, NO_LOSS]


def _is_held_out(record: Record) -> bool:
    return int(document_hash(record.prompt), 16) % HELD_OUT_SHARE == 0


def _record(raw: dict) -> Record:
    if "messages" in raw:
        turns = [turn for turn in raw["messages"] if turn["role"] != "system"]
        if [turn["role"] for turn in turns] != ["user", "assistant"]:
            raise UserError("data: a record's messages are not one user and one assistant turn: split longer conversations.")
        instruction, response = (turn["content"] for turn in turns)
    else:
        response = raw.get("response", raw.get("output"))
        if not isinstance(raw.get("instruction"), str) or not isinstance(response, str):
            raise UserError(
                f"data: a record has {', '.join(map(str, raw))} and neither messages nor instruction with response or output: "
                "rename its fields."
            )
        instruction = "\n".join(part for part in (raw["instruction"], raw.get("input") or "") if part)
    return Record(TEMPLATE.format(instruction=instruction), response)


def _source(data: str, seed: int) -> Iterable[dict]:
    if data == OFFLINE:
        return _shuffled(_read(assets.path(OFFLINE)), seed)
    if Path(data).suffix in (".jsonl", ".json"):
        for file in (Path(data).expanduser(), paths.project() / data):
            if file.is_file():
                return _shuffled(_read(file), seed)
        raise UserError(f"data {data} does not exist: give {OFFLINE}, {', '.join(HUB)}, a hub id, or a .jsonl or .json file.")
    return _from_hub(data, seed)


def _read(file: Path) -> list[dict]:
    try:
        text = file.read_text(encoding="utf-8")
        # Split at line feeds only: JSON strings may hold other line separators.
        found = json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, OSError) as error:
        raise UserError(f"data {file} is not readable as {file.suffix[1:]} ({error}): check the file.") from error
    if not isinstance(found, list) or not all(isinstance(raw, dict) for raw in found):
        raise UserError(f"data {file} is no list of records: give one JSON object per line, or a list of them.")
    return found


def _shuffled(raw: list[dict], seed: int) -> Iterator[dict]:
    return (raw[index] for index in np.random.default_rng(seed).permutation(len(raw)))


def _from_hub(data: str, seed: int) -> Iterator[dict]:
    from datasets import load_dataset

    try:
        stream = load_dataset(HUB.get(data, data), split="train", streaming=True)
        yield from stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    # The hub's client raises many types that share no base class.
    except Exception as error:
        raise UserError(
            f"data {data!r} is neither {OFFLINE} nor a local file, and the hub did not give it ({type(error).__name__}): check "
            "the name and the connection, or choose one of those."
        ) from error
