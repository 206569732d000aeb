"""lm-eval's Hugging Face model with one change: the choices of a question share the computation of the question."""

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from hfprune_nb.inputs.models import Head, head

POSITIONS_AT_ONCE = 128


class SharedPrefixLM(HFLM):
    """HFLM that reads a context once for all its continuations.

    A row of the batch is the context followed by every continuation; the attention mask lets each continuation see the context
    and itself only, and positions restart after the context. Logits are taken in float32, and only where a continuation is
    predicted. Log-likelihoods equal HFLM's within float error. Requests that do not fit `max_length`, or the sliding window
    of the model, go to HFLM.
    """

    def __init__(self, model, tokenizer, batch_size: int = 16, max_length: int = 2048, bos: bool = False):
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, add_bos_token=bos,
            softmax_dtype="float32",
        )  # fmt: skip
        self._head: Head = head(model)
        config = model.config.get_text_config()
        self._longest = min(max_length, getattr(config, "sliding_window", None) or max_length)
        if config._attn_implementation not in ("sdpa", "eager"):
            self._longest = 0  # other kernels do not take a mask of our own

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, _) in enumerate(requests):
            groups.setdefault(tuple(context), []).append(index)
        answers = [None] * len(requests)
        rows, rest = [], []
        for context, members in groups.items():
            length = len(context) + sum(len(requests[index][2]) - 1 for index in members)
            fits = length <= self._longest
            (rows if fits else rest).append((length, context, members))
        rows.sort(key=lambda row: -row[0])
        left = [index for _, _, members in rest for index in members]
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm, mininterval=5) as progress:
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                for index, answer in self._score_rows(batch, requests):
                    answers[index] = answer
                    progress.update()
        if left:
            stock = super()._loglikelihood_tokens([requests[index] for index in left], disable_tqdm, override_bs)
            for index, answer in zip(left, stock, strict=True):
                answers[index] = answer
        else:
            for (strings, _, _), answer in zip(requests, answers, strict=True):
                if strings is not None:
                    self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    @torch.no_grad()
    def _score_rows(self, rows, requests):
        width = rows[0][0]
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        position_ids = torch.zeros(len(rows), width, dtype=torch.long)
        seen = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)
        wanted = []
        for row, (_, context, members) in enumerate(rows):
            size, end = len(context), len(context)
            tokens[row, :size] = torch.tensor(context)
            position_ids[row, :size] = torch.arange(size)
            seen[row, :size, :size] = torch.ones(size, size).tril().bool()
            for index in members:
                branch = requests[index][2][:-1]
                stop = end + len(branch)
                tokens[row, end:stop] = torch.tensor(branch, dtype=torch.long)
                position_ids[row, end:stop] = torch.arange(size, size + len(branch))
                seen[row, end:stop, :size] = True
                seen[row, end:stop, end:stop] = torch.ones(len(branch), len(branch)).tril().bool()
                wanted.append((index, [row * width + size - 1, *range(row * width + end, row * width + stop)]))
                end = stop
        dtype = self._head.module.weight.dtype
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]
        hidden = self.model.get_decoder()(
            input_ids=tokens.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=position_ids.to(self.device),
            use_cache=False,
        ).last_hidden_state.flatten(0, 1)
        # One product with the head for the whole batch: read apart for every continuation, its weight would cost the most.
        needed = [position for _, positions in wanted for position in positions]
        targets = torch.tensor([token for index, _ in wanted for token in requests[index][2]], device=self.device)
        log_p, greedy = [], []
        for start in range(0, len(needed), POSITIONS_AT_ONCE):
            logits = self._head.logits(hidden[needed[start : start + POSITIONS_AT_ONCE]])
            part = targets[start : start + POSITIONS_AT_ONCE]
            log_p.append(logits.gather(-1, part[:, None])[:, 0] - logits.logsumexp(-1))
            greedy.append(logits.argmax(-1) == part)
        sizes = [len(positions) for _, positions in wanted]
        pieces = zip(wanted, torch.cat(log_p).double().split(sizes), torch.cat(greedy).split(sizes), strict=True)
        for (index, _), likelihoods, is_greedy in pieces:
            yield index, (float(likelihoods.sum()), bool(is_greedy.all()))
