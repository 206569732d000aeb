"""Instruction data -> (prompt, response) records -> packed rows of tokens whose loss is taken on the responses only.

Several examples share a row and never see each other: positions restart with every example, from which transformers builds the
attention boundaries of a row that comes without an attention mask. So a packed row has the loss and the gradient of its
examples read apart.
"""

import bisect
import dataclasses
import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from hfprune_nb import text_files
from hfprune_nb.errors import UserError
from hfprune_nb.inputs import chat, hub, hub_data, tokenization
from hfprune_nb.inputs.tokenization import TOKENIZER_BATCH, document_hash

# The Alpaca template for an instruction without input.
TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
HUB = ("lamini", "alpaca")
OFFLINE = "instructlab-sdg"
# The field names in use, in the order in which they are looked for.
_INSTRUCTIONS, _INPUTS, _RESPONSES = ("instruction", "prompt"), ("input", "context"), ("response", "output", "completion")
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


def records(
    data: str | Path, n_records: int = 0, seed: int = 0, split: str = "train", passed_over: Counter | None = None
) -> list[Record]:
    """Return instruction records in an order shuffled by `seed`, of the training or the held-out split.

    data      `instructlab-sdg`: 24,545 single turns that need no hub, their constant system message left out; `lamini`, `alpaca`
              or a hub id: its train split; a local file of records (`text_files.read_records`).
    n_records the first so many, 0 for all.
    passed_over counts records without an instruction or a response, which are left out.

    A record has `messages` or `conversations` (`chat.turns`) of one user and one assistant turn, or `instruction` or `prompt`
    (with `input` or `context`, if any, on a new line) and `response`, `output` or `completion`. Raises UserError for a source
    that is missing, a record of another form, and too few records.
    """
    if split not in SPLITS:
        raise UserError(f"split={split!r} is unknown: choose one of {', '.join(SPLITS)}")
    if n_records < 0:
        raise UserError(f"n_records {n_records} is negative: give the number of records, or 0 for all.")
    data, kept, passed_over = str(data), [], Counter() if passed_over is None else passed_over
    for place, raw in _source(data, seed):
        record = _record(place, raw)
        if not record:
            passed_over["without text"] += 1
        elif (split == "held_out") == _is_held_out(record):
            kept.append(record)
            if len(kept) == n_records:
                break
    if not kept or len(kept) < n_records:
        raise UserError(
            f"data {data!r} has {len(kept)} {split.replace('_', '-')} records, fewer than the {max(n_records, 1)} asked for: "
            "lower the number or choose other data."
        )
    return kept


def pack(
    tokenizer, chosen: Iterable[Record], seq_len: int, bos: bool | str = tokenization.AUTO, context: int | None = None,
    alone: bool = False,
) -> list[Row]:  # fmt: skip
    """Return `chosen` as packed rows of at most `seq_len` tokens, each example whole and in one row, or in one of its own.

    Prompt and response are tokenised together, as they are read later, after what `tokenization.prefix` gives for `bos`; an EOS
    ends every response and is learned. Labels are the next token where that token belongs to a response. An example longer than
    a row, or than `context` tokens, is cut at its end (and has no EOS then); one whose prompt alone fills that is left out.
    Raises UserError when nothing is left, for a tokenizer without EOS, and for one that cannot say where in a text a token is.
    """
    if not tokenizer.is_fast:
        raise UserError("model: its tokenizer cannot tell prompt from response (it is not a fast one): choose another model.")
    if tokenizer.eos_token_id is None:
        raise UserError("model: its tokenizer has no EOS token, so no response could be taught to end: choose another model.")
    rows: list = []
    room: list = []
    for input_ids, labels in _examples(tokenizer, chosen, min(seq_len, context or seq_len), tokenization.prefix(tokenizer, bos)):
        # `room` is kept ascending with the open rows beside it: the fullest row that still takes the example gets it.
        place = len(room) if alone else bisect.bisect_left(room, len(input_ids), key=lambda entry: entry[0])
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


def _examples(tokenizer, chosen: Iterable[Record], longest: int, prefix: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    chosen = iter(chosen)
    while batch := list(itertools.islice(chosen, TOKENIZER_BATCH)):
        texts = [record.prompt + record.response for record in batch]
        encoded = tokenization.encode(tokenizer, texts, return_offsets_mapping=True)
        for record, ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            ids = [*prefix, *ids, tokenizer.eos_token_id][:longest]
            # A token across the border belongs to the prompt.
            answered = [*(False for _ in prefix), *(start >= len(record.prompt) for start, _ in offsets), True][:longest]
            labels = [token if kept else NO_LOSS for token, kept in zip(ids[1:], answered[1:], strict=True)]
            if any(answered[1:]):
                yield ids, [*labels, NO_LOSS]


def _is_held_out(record: Record) -> bool:
    return int(document_hash(record.prompt), 16) % HELD_OUT_SHARE == 0


def _record(place: str, raw: dict) -> Record | None:
    """Return the record, None where its instruction or its response has no text."""
    conversation = next((raw[name] for name in chat.COLUMNS if name in raw), None)
    if conversation is None and isinstance(raw.get("prompt"), list) and isinstance(raw.get("completion"), list):
        conversation = raw["prompt"] + raw["completion"]
    if conversation == []:
        return None
    if conversation is not None:
        turns = [turn for turn in chat.turns(conversation, place) if turn["role"] != "system"]
        if [turn["role"] for turn in turns] != ["user", "assistant"]:
            raise UserError(f"{place} is not one user and one assistant turn: split longer conversations.")
        instruction, response = (turn["content"] for turn in turns)
    else:
        instruction, further, response = (
            next((raw[name] for name in names if raw.get(name) is not None), "") for names in (_INSTRUCTIONS, _INPUTS, _RESPONSES)
        )
        if not raw.keys() & set(_RESPONSES) or not all(isinstance(part, str) for part in (instruction, further, response)):
            raise UserError(
                f"{place} has {', '.join(map(str, raw))} and neither messages nor text as {' or '.join(_INSTRUCTIONS)} with "
                f"{' or '.join(_RESPONSES)}: rename its fields."
            )
        instruction = "\n".join(part for part in (instruction, further) if part)
    return Record(TEMPLATE.format(instruction=instruction), response) if instruction.strip() and response.strip() else None


def _source(data: str, seed: int) -> Iterable[tuple[str, dict]]:
    if data == OFFLINE:
        # Training alone does without the libraries that fetch assets.
        from hfprune_nb.inputs import assets

        file = assets.path(OFFLINE)
    else:
        file = None if data in HUB else text_files.find(data, "data", text_files.RECORD_SUFFIXES)
    if file:
        return _shuffled(list(text_files.read_records(file, "data")), seed)
    return hub_data.records(hub_data.find(hub.REPOSITORIES.get(data, data)), "train", seed)


def _shuffled(raw: list[tuple[str, dict]], seed: int) -> Iterator[tuple[str, dict]]:
    return (raw[index] for index in np.random.default_rng(seed).permutation(len(raw)))
