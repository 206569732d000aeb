"""Text -> token ids, in one way for windows, tasks, sample prompts and tuning: BOS as asked, and text that stays text."""

import hashlib
import itertools

from hfprune_nb.errors import UserError

AUTO = "auto"
TOKENIZER_BATCH = 64  # texts


def prefix(tokenizer, bos: bool | str = AUTO) -> list[int]:
    """Return the token ids that stand in front of every text.

    bos : true: the BOS token; false: nothing; `auto`: what the tokenizer's own post-processor puts there, which is how the model
    was trained, and nothing for most tokenizers without BOS. Raises UserError for another value, and where there is no BOS token
    to put.
    """
    if bos == AUTO:
        special = set(tokenizer.all_special_ids)
        return list(itertools.takewhile(special.__contains__, tokenizer("a")["input_ids"]))
    if not isinstance(bos, bool):
        raise UserError(f"bos={bos!r} is unknown: choose auto, true or false")
    if bos and tokenizer.bos_token_id is None:
        raise UserError("bos=True needs a tokenizer with a BOS token and this one has none: set bos=False")
    return [tokenizer.bos_token_id] if bos else []


def encode(tokenizer, texts: list[str], control_tokens: bool = False, **settings):
    """Return the tokenizer's encoding of `texts` alone: nothing is added, cut or padded.

    control_tokens : whether a special token that is spelt out, such as `<s>`, becomes that token, as rendered conversations want;
    in any other text it is text, such as a tag of HTML.
    """
    # verbose=False: texts longer than the model's context are expected here, only windows reach the model.
    return tokenizer(
        texts, add_special_tokens=False, truncation=False, verbose=False, split_special_tokens=not control_tokens, **settings
    )


def document_hash(text: str) -> str:
    """Return the first 16 hex digits of the SHA-256 of `text` with every run of white space made one space."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]
