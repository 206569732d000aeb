"""lm-eval's Hugging Face model with one change: what requests have in common is computed once."""

import copy
import logging
import math

import torch
import torch.distributed
from lm_eval.models.huggingface import HFLM

from hfprune_nb import processes
from hfprune_nb.inputs import tokenization
from hfprune_nb.models import Head, agree, check_tokens, head, widened
from hfprune_nb.progress import bar

logger = logging.getLogger(__name__)

POSITIONS_AT_ONCE = 256
# Requests that begin with this many equal tokens, or with half of theirs, belong together: mostly the choices of a question.
SHARED_TOKENS = 8
# Long rows cost attention, short ones are padded: questions are joined in rows of at least so many tokens, and what
# belongs together is parted beyond so many.
ROW_TOKENS, TOGETHER_TOKENS = 64, 256
# A beginning of all requests of a task is worth a key-value cache from this length on.
CACHED_TOKENS = 32


class Row:
    """Token sequences as one trie, laid out in a row of the batch: every distinct prefix is one token of it."""

    def __init__(self):
        self.tokens: list[int] = []
        self._parents: list[int] = []
        self._places: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, sequence: list[int]) -> list[int]:
        """Return the places of the sequence's tokens in the row, which grows by those that are not there yet."""
        path = [-1]
        for token in sequence:
            place = self._places.setdefault((path[-1], token), len(self))
            if place == len(self):
                self.tokens.append(token)
                self._parents.append(path[-1])
            path.append(place)
        return path[1:]

    def visible(self, width: int) -> torch.Tensor:
        """Return (width, width) booleans: which tokens each token sees, its ancestors and itself; padding sees itself."""
        seen = torch.eye(width, dtype=torch.bool)
        for place, parent in enumerate(self._parents):
            if parent >= 0:
                seen[place] |= seen[parent]
        return seen


class SharedPrefixLM(HFLM):
    """HFLM that computes every prefix that requests share once, and puts in front of contexts what `tokenization.prefix` gives.

    Requests that begin alike are merged into a trie (`Row`); a mask lets every token see its own ancestors, and its position
    is its depth. A beginning that all requests of a task share is read once and kept as keys and values. Logits are taken in
    float32, and only where a continuation is predicted. Log-likelihoods equal HFLM's within float error. `batch_size` counts
    questions. Requests that do not fit `max_length`, or the sliding window of the model, go to HFLM, as does generation.
    In a process group the harness shares the items among its processes. `task` : what its progress bars are called.
    """

    task = "log-likelihoods"

    def __init__(self, model, tokenizer, batch_size: int = 16, max_length: int = 2048, bos: bool | str = tokenization.AUTO):
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, softmax_dtype="float32"
        )  # fmt: skip
        self._prefix = tokenization.prefix(tokenizer, bos)
        self._rank, self._world_size = processes.rank_and_world_size()
        self._head: Head = head(model)
        config = model.config.get_text_config()
        self._window = getattr(config, "sliding_window", None)
        self._longest = min(max_length, self._window or max_length)
        if config._attn_implementation not in ("sdpa", "eager"):
            self._longest = 0  # other kernels do not take a mask of our own
        elif not self._keeps_apart_in_float32():
            logger.warning("requests are read apart: layers of %s ignore what separates them in a row", type(model).__name__)
            self._longest = 0

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_
    ) -> list[int]:
        """Return the token ids of a text, after the prefix unless the text spells it out or `add_special_tokens` is false."""
        ids = self.tokenizer.encode(string, add_special_tokens=False)
        if add_special_tokens is not False and ids[: len(self._prefix)] != self._prefix:
            ids = self._prefix + ids
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, truncation: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and mask (texts, longest text) of what a model goes on to write; nothing is truncated on the right."""
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    @torch.no_grad()
    def _keeps_apart_in_float32(self) -> bool:
        with widened(self.model):
            return self._keeps_apart()

    def _keeps_apart(self) -> bool:
        """Whether sequences that share a row are read as they are apart, also after a beginning that was kept.

        Linear attention, state spaces and convolutions go by the order of tokens and not by mask and positions.
        """
        decoder, shared = self.model.get_decoder(), list(range(6))
        sequences = [[*shared, 6, 7, 8], [*shared, 9, 10], [11, 12]]

        def read(sequence, **settings):
            return decoder(input_ids=torch.tensor([sequence], device=self.device), **settings)

        apart = [read(sequence, use_cache=False).last_hidden_state[0] for sequence in sequences]
        kept = read(shared[:3], use_cache=True).past_key_values
        for cached, cache, count in ((0, None, 3), (3, kept, 2)):
            rows = [Row(), Row()]
            paths = [rows[0].add(sequence[cached:]) for sequence in sequences[:count]]
            rows[1].add(sequences[0][cached : cached + 2])
            try:
                hidden = self._hidden(rows, cached, cache)[0]
            except Exception:  # such layers take no mask of this shape, each in its own way
                return False
            if not all(agree(hidden[path], states[cached:]) for path, states in zip(paths, apart, strict=False)):
                return False
        return True

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensors (one number each) of all processes, on the CPU."""
        own = tensor.to(processes.collective_device())
        gathered = [torch.zeros_like(own) for _ in range(self.world_size)]
        torch.distributed.all_gather(gathered, own)
        return torch.stack(gathered).cpu()

    def barrier(self) -> None:
        """Wait for all processes."""
        torch.distributed.barrier()

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        check_tokens(self.model.config, [max(context + continuation) for _, context, continuation in requests])
        fits = [len(context) + len(continuation) - 1 <= self._longest for _, context, continuation in requests]
        cached, cache = self._read_once([context for (_, context, _), fit in zip(requests, fits, strict=True) if fit])
        # The last token of a continuation predicts nothing.
        sequences = {i: (requests[i][1] + requests[i][2][:-1])[cached:] for i, fit in enumerate(fits) if fit}
        questions = _questions(sequences)
        answers = [None] * len(requests)
        with bar(len(sequences), "sequence", self.task, enabled=not disable_tqdm) as progress:
            for start in range(0, len(questions), self.batch_size):
                rows, paths = _rows(questions[start : start + self.batch_size], sequences)
                hidden = self._hidden(rows, cached, cache)
                for index, answer in self._answers(hidden, paths, requests):
                    answers[index] = answer
                    if (strings := requests[index][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", strings, answer)
                    progress.update()
        if left := [index for index, fit in enumerate(fits) if not fit]:
            stock = super()._loglikelihood_tokens([requests[index] for index in left], disable_tqdm, override_bs)
            for index, answer in zip(left, stock, strict=True):
                answers[index] = answer
        return answers

    def _read_once(self, contexts):
        """Return how many tokens all contexts begin with, and their keys and values; (0, None) where it is not worth it."""
        # The last token of each context stays outside, because its hidden state predicts.
        size = _shared(min(contexts)[:-1], max(contexts)[:-1]) if contexts and not self._window else 0
        if size < CACHED_TOKENS:
            return 0, None
        beginning = torch.tensor([contexts[0][:size]], device=self.device)
        return size, self.model.get_decoder()(input_ids=beginning, use_cache=True).past_key_values

    def _answers(self, hidden, paths, requests):
        """Yield (index, (log-likelihood, is greedy)) of requests whose tokens lie at `paths` of hidden (rows, width, hidden)."""
        width = hidden.shape[1]
        continuations = {index: requests[index][2] for index in paths}
        wanted = [row * width + place for i, (row, path) in paths.items() for place in path[-len(continuations[i]) :]]
        targets = [token for continuation in continuations.values() for token in continuation]
        log_p, greedy = self._predict(hidden.flatten(0, 1), torch.tensor(wanted), torch.tensor(targets))
        lengths = [len(continuation) for continuation in continuations.values()]
        for index, likelihoods, is_greedy in zip(paths, log_p.split(lengths), greedy.split(lengths), strict=True):
            yield index, (float(likelihoods.sum()), bool(is_greedy.all()))

    def _hidden(self, rows, cached, cache):
        """Return the final hidden states (rows, width, hidden) after the `cached` tokens that all rows begin with."""
        width = max(map(len, rows))
        tokens = torch.tensor([row.tokens + [0] * (width - len(row)) for row in rows])
        seen = torch.stack([row.visible(width) for row in rows])
        position_ids = seen.sum(-1) - 1 + cached
        seen = torch.cat([torch.ones(len(rows), width, cached, dtype=torch.bool), seen], -1)
        dtype = self.model.dtype
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]
        if cache is not None:
            cache = copy.deepcopy(cache)
            cache.batch_repeat_interleave(len(rows))
        return self.model.get_decoder()(
            input_ids=tokens.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=position_ids.to(self.device),
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def _predict(self, hidden, wanted, targets):
        """Return the log-probability of each target at its place in `hidden` (tokens, hidden), and if it is the likeliest."""
        places, slots = torch.unique(wanted, return_inverse=True)
        log_p, greedy = torch.empty(len(wanted), dtype=torch.float64), torch.empty(len(wanted), dtype=torch.bool)
        # One product with the head for many places: read apart for every continuation, its weight would cost the most.
        for start in range(0, len(places), POSITIONS_AT_ONCE):
            logits = self._head.logits(hidden[places[start : start + POSITIONS_AT_ONCE]])
            here = (slots >= start) & (slots < start + POSITIONS_AT_ONCE)
            row, target = (part[here].to(logits.device) for part in (slots - start, targets))
            log_p[here] = (logits[row, target] - logits.logsumexp(-1)[row]).double().cpu()
            greedy[here] = (logits.argmax(-1)[row] == target).cpu()
        return log_p, greedy


def _shared(one: list[int], other: list[int]) -> int:
    """Return how many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _questions(sequences: dict[int, list[int]]) -> list[tuple[int, list[int]]]:
    """Group the sequences that begin alike; return (tokens, indices) of each group, the largest first."""
    groups: list = []
    previous: list = []
    for index in sorted(sequences, key=sequences.__getitem__):
        sequence = sequences[index]
        length, shared = len(sequence), _shared(previous, sequence)
        alike = shared >= min(SHARED_TOKENS, max(1, length // 2))
        if alike and groups[-1][0] + length - shared <= max(TOGETHER_TOKENS, 2 * length):
            size, members = groups[-1]
            groups[-1] = (size + length - shared, [*members, index])
        else:
            groups.append((length, [index]))
        previous = sequence
    return sorted(groups, key=lambda group: -group[0])


def _rows(questions, sequences) -> tuple[list[Row], dict[int, tuple[int, list[int]]]]:
    """Spread questions, largest first, evenly over rows; return the rows and each sequence's row and places in it."""
    sizes = [size for size, _ in questions]
    rows = [Row() for _ in range(math.ceil(sum(sizes) / max(ROW_TOKENS, sizes[0])))]
    paths = {}
    for _, members in questions:
        shortest = min(range(len(rows)), key=lambda row: len(rows[row]))
        for index in members:
            paths[index] = shortest, rows[shortest].add(sequences[index])
    return rows, paths
