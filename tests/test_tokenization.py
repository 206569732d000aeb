"""BOS means one thing wherever text is read, and text that looks like a special token stays text."""

import pytest
import torch
from test_calibration import byte_tokenizer
from tokenizers.processors import TemplateProcessing

from hfprune_nb.errors import UserError
from hfprune_nb.inputs import calibration, instructions, tokenization
from hfprune_nb.inputs.instructions import Record
from hfprune_nb.measure import evaluation
from hfprune_nb.measure.harness import SharedPrefixLM

PIECES = {"none": "$A", "bos": "<s> $A", "bos and eos": "<s> $A </s>", "two": "<g> <s> $A"}


def make(adds):
    """A tokenizer of bytes whose post-processor adds what `PIECES` says."""
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="</s>", additional_special_tokens=["<g>"])
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<s>", "</s>", "<g>")}
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=PIECES[adds], special_tokens=list(ids.items()))
    return tokenizer, ids


@pytest.mark.parametrize("bos", ["auto", True, False])
@pytest.mark.parametrize("adds", PIECES)
def test_bos_is_the_same_in_windows_tasks_prompts_and_recovery(tiny, monkeypatch, adds, bos):
    tokenizer, ids = make(adds)
    own = {"none": [], "bos": ["<s>"], "bos and eos": ["<s>"], "two": ["<g>", "<s>"]}[adds]
    expected = [ids[name] for name in {"auto": own, True: ["<s>"], False: []}[bos]]
    assert tokenization.prefix(tokenizer, bos) == expected
    model, size = tiny(vocab_size=len(tokenizer)), len(expected)

    found = calibration.windows(tokenizer, "data/smoke/corpus.txt", 3, 32, 0, bos, progress=False).ids
    assert (found[:, :size] == expected).all() and not set(found[:, size:].flatten()) & set(ids.values())

    row = instructions.pack(tokenizer, [Record("ask ", "tell")], 64, bos)[0]
    assert list(row.input_ids) == [*expected, *tokenizer("ask tell", add_special_tokens=False).input_ids, ids["</s>"]]

    language_model = SharedPrefixLM(model, tokenizer, 2, 64, bos)
    plain = [tokenizer(text, add_special_tokens=False).input_ids for text in ("one", "and two")]
    assert language_model._encode_pair("one", " more")[0] == expected + plain[0]
    assert language_model.tok_encode("one", add_special_tokens=False) == plain[0]
    padded, mask = language_model.tok_batch_encode(["one", "and two"])
    assert [row[kept.bool()].tolist() for row, kept in zip(padded, mask, strict=True)] == [expected + text for text in plain]
    assert padded.shape[1] == size + len(plain[1]) and mask[0, 0] == 0

    read = []
    monkeypatch.setattr(evaluation, "final_hidden", lambda _, ids: read.append(ids) or torch.zeros(1, 1, 16))
    evaluation.next_tokens(model, tokenizer, ["one"], bos=bos)
    assert read[0].tolist() == [expected + plain[0]]


def test_a_context_that_spells_out_its_prefix_gets_no_other(tiny):
    tokenizer, ids = make("bos")
    found = SharedPrefixLM(tiny(vocab_size=len(tokenizer)), tokenizer).tok_encode("<s>one")
    assert found.count(ids["<s>"]) == 1 and found[0] == ids["<s>"]


@pytest.mark.parametrize(
    ("bos", "message"), [("yes", "choose auto, true or false"), (True, "needs a tokenizer with a BOS token")]
)
def test_a_bos_that_cannot_be_gets_one_sentence(bos, message):
    with pytest.raises(UserError, match=message):
        tokenization.prefix(byte_tokenizer(), bos)


def test_text_that_looks_like_a_special_token_stays_text():
    tokenizer, ids = make("bos")
    text = "HTML strikes <s>words</s> out"
    as_text = tokenization.encode(tokenizer, [text])["input_ids"][0]
    assert len(as_text) == len(text) and tokenizer.decode(as_text) == text
    rendered = tokenization.encode(tokenizer, [text], control_tokens=True)["input_ids"][0]
    assert ids["<s>"] in rendered and ids["</s>"] in rendered
    assert tokenizer(text).input_ids.count(ids["<s>"]) == 2, "the tokenizer itself is left as it was"


def test_an_end_is_learned_whether_or_not_the_tokenizer_adds_one():
    rows = [instructions.pack(make(adds)[0], [Record("ask ", "tell")], 64, False)[0] for adds in ("none", "bos and eos")]
    assert rows[0] == rows[1] and rows[0].labels[-2] == make("none")[1]["</s>"]
