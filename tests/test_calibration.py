"""Windows come from real places of real documents, the same every time, and never from both splits."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hfprune_nb.errors import UserError
from hfprune_nb.inputs import calibration, chat, hub_data

CORPUS = "data/smoke/corpus.txt"
PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def project(monkeypatch):
    monkeypatch.setenv("HFPRUNE_HOME", str(PROJECT))


def hub_with(monkeypatch, splits):
    """Let every hub data set have these splits of 200 records; return what is asked of it."""
    asked = []

    def records(data, split, seed):
        asked.append((data.repository, data.configuration, split))
        order = np.random.default_rng(seed).permutation(200)
        return ((f"record {number}", {"text": f"{split} {number}"}) for number in order)

    def find(name):
        repository, _, configuration = name.partition(":")
        return hub_data.DataSet(repository, configuration, "0" * 40, {name: ["data.parquet"] for name in splits})

    monkeypatch.setattr(hub_data, "find", find)
    monkeypatch.setattr(hub_data, "records", records)
    return asked


def byte_tokenizer(**special):
    """One token per byte, so that a document's length in tokens is known and decoding is exact."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: rank for rank, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(bos_token="<s>")


def windows(tokenizer, corpus=CORPUS, n_windows=20, seq_len=64, seed=0, **settings):
    return calibration.windows(tokenizer, str(corpus), n_windows, seq_len, seed, progress=False, **settings)


@pytest.mark.parametrize("bos", [False, True])
def test_each_window_is_a_stretch_of_its_own_document(tokenizer, bos):
    texts = {calibration.document_hash(text): text for text in calibration.documents(CORPUS)}
    found = windows(tokenizer, bos=bos)
    assert found.ids.shape == (20, 64) and found.ids.dtype == np.int64
    assert len(set(found.document_hashes)) == 20
    for ids, digest, start, length in zip(found.ids, found.document_hashes, found.starts, found.document_lengths, strict=True):
        whole = texts[digest].encode()
        assert length == len(whole)
        assert (ids[0] == tokenizer.bos_token_id) == bos
        assert tokenizer.decode(ids[bos:]).encode() == whole[start : start + 64 - bos]


@pytest.mark.parametrize("most", [1, 3, 50])
def test_windows_of_one_document_lie_side_by_side(tokenizer, tmp_path, most):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(" ".join(f"w{n}x{m}" for m in range(40 + 90 * n)) for n in range(6)))
    found = calibration.windows(tokenizer, corpus, 5, 32, 0, bos=False, progress=False, windows_per_document=most)
    more = calibration.windows(
        tokenizer, corpus, 6 if most > 1 else 5, 32, 0, bos=False, progress=False, windows_per_document=most
    )
    assert (more.ids[:5] == found.ids).all(), "fewer windows are the first of more"
    for _, part in found.table().groupby("document_hash"):
        starts = np.sort(part["start"])
        assert len(part) <= most and (np.diff(starts) >= 32).all() and starts[-1] + 32 <= part["document_length"].iloc[0]
    assert len(set(found.document_hashes)) == 5 if most == 1 else len(set(found.document_hashes)) < 5


def test_same_arguments_same_bytes(tokenizer, tmp_path):
    for name in ("one", "two"):
        windows(tokenizer).save(tmp_path / name)
    for file in ("windows.safetensors", "windows.parquet"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_another_seed_another_choice(tokenizer):
    one, two = windows(tokenizer), windows(tokenizer, seed=1)
    assert one.document_hashes != two.document_hashes and one.starts != two.starts


def test_more_windows_begin_with_the_fewer(tokenizer):
    np.testing.assert_array_equal(windows(tokenizer, n_windows=30).ids[:20], windows(tokenizer).ids)


def test_starts_reach_both_ends(tokenizer, tmp_path):
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": f"{n:03d}567"}) + "\n" for n in range(400)))
    found = windows(tokenizer, tmp_path / "corpus.jsonl", n_windows=200, seq_len=4)
    assert set(found.starts) == {0, 1, 2}


def test_of_an_endless_document_only_a_stretch_is_read(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "LONGEST_TEXT", 1000)
    numbers = "".join(f"{n:05d}" for n in range(4000))
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": numbers}))
    found = [windows(tokenizer, tmp_path / "corpus.jsonl", 1, 100, seed) for seed in (0, 0, 1)]
    texts = [tokenizer.decode(one.ids[0]) for one in found]
    assert texts[0] == texts[1] != texts[2] and all(text in numbers for text in texts)
    assert all(one.document_lengths == [1000] and one.starts[0] <= 900 for one in found)


def test_saved_windows_come_back(tokenizer, tmp_path):
    found = windows(tokenizer)
    found.save(tmp_path)
    again = calibration.Windows.load(tmp_path)
    np.testing.assert_array_equal(again.ids, found.ids)
    pd.testing.assert_frame_equal(again.table(), found.table())


def test_truncated_windows_are_refused(tokenizer, tmp_path):
    windows(tokenizer).save(tmp_path)
    file = tmp_path / "windows.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="missing or damaged: delete that folder and rerun"):
        calibration.Windows.load(tmp_path)


def test_splits_are_disjoint_and_complete(tokenizer):
    splits = [set(map(calibration.document_hash, calibration.documents(CORPUS, split))) for split in calibration.SPLITS]
    assert not splits[0] & splits[1]
    assert len(splits[0] | splits[1]) == 120 and len(splits[1]) >= 5
    calibration.check_overlap(windows(tokenizer), windows(tokenizer, n_windows=5, split="evaluation"))


def test_overlap_is_counted(tokenizer):
    found = windows(tokenizer)
    with pytest.raises(UserError, match="share 20 documents"):
        calibration.check_overlap(found, found)


def test_a_hash_ignores_white_space_only():
    assert calibration.document_hash("a  b\n") == calibration.document_hash(" a b")
    assert calibration.document_hash("a b") != calibration.document_hash("ab")


def test_a_repeated_document_counts_once(tokenizer, tmp_path):
    (tmp_path / "corpus.txt").write_text("\n\n".join(["the same text again"] * 5 + ["some other text here", "third one, longer"]))
    with pytest.raises(UserError, match="has [123] documents of at least 8 tokens, fewer than n_windows=7"):
        windows(tokenizer, tmp_path / "corpus.txt", n_windows=7, seq_len=8)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_every_file_format_gives_the_same_windows(tokenizer, tmp_path, suffix):
    texts = (PROJECT / CORPUS).read_text().strip().split("\n\n")
    table = pd.DataFrame({"id": range(len(texts)), "body": texts})
    file = tmp_path / f"corpus.{suffix}"
    if suffix == "parquet":
        table.to_parquet(file)
    else:
        table.to_json(file, orient="records", lines=suffix == "jsonl")
    found = windows(tokenizer, file, text_column="body")
    np.testing.assert_array_equal(found.ids, windows(tokenizer).ids)
    with pytest.raises(UserError, match="no column 'text': set text_column to one of id, body"):
        windows(tokenizer, file)


def test_lines_are_documents_without_blank_lines(tmp_path):
    (tmp_path / "lines.txt").write_text("\n".join(f"line {n}" for n in range(50)))
    texts = [text for split in calibration.SPLITS for text in calibration.documents(str(tmp_path / "lines.txt"), split)]
    assert sorted(texts) == sorted(f"line {n}" for n in range(50))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"seq_len": 5_000},
            "seq_len=5000 is longer than every document of corpus .* has [0-9]+ tokens: lower seq_len",
        ),
        ({"n_windows": 500}, "documents of at least 64 tokens, fewer than n_windows=500: lower n_windows or seq_len"),
        ({"corpus": "data/smoke/none.txt"}, "corpus file data/smoke/none.txt does not exist"),
        ({"corpus": "c5"}, "corpus 'c5' is unknown: did you mean c4"),
        ({"corpus": "c4"}, "dataset 'allenai/c4' is not cached and HF_HUB_OFFLINE is set: unset it once to download"),
        ({"n_windows": 0}, "n_windows=0 is too small"),
        ({"seq_len": 1}, "seq_len=1 is too small"),
        ({"seed": -1}, "seed=-1 is too small"),
        ({"n_windows": "4"}, "n_windows='4' is no whole number"),
        ({"n_windows": 4.5}, "n_windows=4.5 is no whole number"),
        ({"corpus": ""}, "corpus '' is a folder"),
        ({"corpus": "task-prompts"}, "corpus 'task-prompts' is for evaluation only: calibrate on other text"),
        ({"chat_template": True}, "corpus 'data/smoke/corpus.txt' holds plain text and no conversations"),
        ({"corpus": "c4", "chat_template": True}, "corpus 'c4' holds plain text and no conversations"),
        ({"split": "test"}, "split='test' is unknown: choose one of calibration, evaluation"),
    ],
)
def test_bad_input_gets_one_sentence(tokenizer, settings, message):
    with pytest.raises(UserError, match=message):
        windows(tokenizer, **settings)


@pytest.mark.parametrize(
    ("corpus", "splits", "asked"),
    [
        ("c4", ["train", "validation"], [("allenai/c4", "en", "train"), ("allenai/c4", "en", "validation")]),
        ("owner/name", ["train", "test"], [("owner/name", "", "train"), ("owner/name", "", "test")]),
        ("owner/name:small", ["train"], [("owner/name", "small", "train")] * 2),
    ],
)
def test_hub_corpora_are_shuffled_and_held_out(tokenizer, monkeypatch, corpus, splits, asked):
    calls = hub_with(monkeypatch, splits)
    texts = [list(calibration.documents(corpus, split, seed=3)) for split in calibration.SPLITS]
    assert calls == asked
    assert not set(texts[0]) & set(texts[1]) and all(texts)
    assert texts[0] == list(calibration.documents(corpus, seed=3)) != list(calibration.documents(corpus, seed=4))
    with pytest.raises(UserError, match="no column 'body': set text_column to one of text"):
        windows(tokenizer, "owner/name", text_column="body")


@pytest.mark.parametrize("content", ["", " \n\n \n"])
def test_an_empty_corpus_is_refused(tokenizer, tmp_path, content):
    (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(UserError, match="is empty"):
        windows(tokenizer, tmp_path / "empty.txt")


def test_a_broken_file_is_refused(tokenizer, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(UserError, match="broken.jsonl, line 2 is no JSON"):
        windows(tokenizer, tmp_path / "broken.jsonl")


def test_bos_needs_a_bos_token():
    with pytest.raises(UserError, match="set bos=False"):
        windows(byte_tokenizer(), bos=True)


def test_token_statistics_count_every_token(tokenizer):
    found = windows(tokenizer)
    table = calibration.token_statistics(found, tokenizer)
    assert table["count"].sum() == found.ids.size and table["count"].is_monotonic_decreasing
    assert table["token"][0] == " " and table["cumulative_share"].iloc[-1] == pytest.approx(1)
    assert table["count"][0] == (found.ids == table["id"][0]).sum()


@pytest.mark.registry
@pytest.mark.parametrize(
    ("corpus", "counts"),
    [("c4-sample", {"calibration": 585, "evaluation": 299}), ("wikitext", {"calibration": 629, "evaluation": 62})],
)
def test_downloaded_corpora_are_whole_and_apart(registry, corpus, counts):
    texts = {split: list(calibration.documents(corpus, split)) for split in calibration.SPLITS}
    assert {split: len(found) for split, found in texts.items()} == counts
    hashes = [set(map(calibration.document_hash, found)) for found in texts.values()]
    assert not hashes[0] & hashes[1]


@pytest.mark.registry
def test_windows_of_task_prompts_are_the_same_every_time_and_know_their_text(registry, tokenizer):
    texts = {calibration.document_hash(text): text for text in calibration.documents("task-prompts", "evaluation")}
    found, again = (windows(tokenizer, "task-prompts", n_windows=6, seq_len=128, split="evaluation") for _ in range(2))
    np.testing.assert_array_equal(found.ids, again.ids)
    assert len(texts) == 62 and len(set(found.document_hashes)) == 6
    for ids, digest, start in zip(found.ids, found.document_hashes, found.starts, strict=True):
        assert tokenizer.decode(ids).encode() == texts[digest].encode()[start : start + 128]
    with pytest.raises(UserError, match="share 6 documents"):
        calibration.check_overlap(found, again)


# What is text


def write(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def test_records_without_text_are_left_out_and_counted(tokenizer, tmp_path):
    texts = [{"text": f"document number {n} has some text"} for n in range(30)]
    empty = [{"title": "none"}, {"text": None}, {"text": ""}, {"text": " \n"}, {"text": []}]
    file = write(tmp_path / "corpus.jsonl", [*empty, *texts, texts[0] | {"text": "short"}, texts[0]])
    found = [text for split in calibration.SPLITS for text in calibration.documents(file, split)]
    assert sorted(found) == sorted([record["text"] for record in [*texts, texts[0]]] + ["short"])
    usable = len(set(calibration.documents(file))) - ("short" in list(calibration.documents(file)))
    kept = windows(tokenizer, file, n_windows=usable, seq_len=16)
    kept.save(tmp_path)
    assert calibration.Windows.load(tmp_path).passed_over == kept.passed_over and kept.passed_over["without text"] == 5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["one", "two"], r'line 3: text is \["one", "two"\], not text: correct or leave out'),
        ({"body": "one"}, "line 3: text is .*, not text"),
        (31337, "line 3: text is 31337, not text"),
        (False, "line 3: text is false, not text"),
        ([{"role": "user", "content": "one"}], "line 3: text holds chat turns: set chat_template=True"),
        ("[{'from': 'human', 'value': 'one'}]", "line 3: text holds chat turns: set chat_template=True"),
        ('[{"content": "one", "role": "user"}]', "line 3: text holds chat turns: set chat_template=True"),
    ],
)
def test_what_is_no_text_is_refused_where_it_stands(tokenizer, tmp_path, value, message):
    file = write(tmp_path / "corpus.jsonl", [{"text": "some text"}, {"text": "[1] more"}, {"text": value}])
    with pytest.raises(UserError, match=message):
        windows(tokenizer, file)


TURNS = [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": "One."}]
TEMPLATE = "<s>{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}</s>{% endfor %}"


@pytest.mark.parametrize(
    "spelling",
    [
        TURNS,
        json.dumps(TURNS),
        str(TURNS),
        [{"from": "human", "value": "Say one."}, {"from": "gpt", "value": "One."}],
        [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS],
    ],
)
def test_conversations_are_rendered_where_asked_for(tmp_path, spelling):
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE)
    file = write(tmp_path / "corpus.jsonl", [{"messages": spelling, "source": n} for n in range(2)])
    (text,) = set(calibration.documents(file, text_column="messages", chat_tokenizer=tokenizer))
    assert text == "<s>user: Say one.</s>assistant: One.</s>"
    length = len("user: Say one.assistant: One.") + 2
    for bos in (True, False):
        whole = windows(tokenizer, file, 1, length + 1, text_column="messages", chat_template=True, bos=bos).ids[0]
        assert tokenizer.decode(whole) == text and (whole == tokenizer.bos_token_id).sum() == 1
    broken = [{"role": "user", "content": "End </s> here."}]
    write(tmp_path / "more.jsonl", [{"messages": broken}, {"messages": spelling}, {"messages": []}])
    more = windows(tokenizer, tmp_path / "more.jsonl", 1, 8, text_column="messages", chat_template=True)
    assert more.passed_over == {"with a special token in a turn": 1, "without text": 1}
    with pytest.raises(UserError, match="no column 'text': set text_column to one of messages, source .with chat_template=True"):
        windows(tokenizer, file)
    with pytest.raises(UserError, match="its tokenizer has no chat template"):
        windows(byte_tokenizer(), file, text_column="messages", chat_template=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("plain text", "line 1 holds text, not chat turns: give a list"),
        (["no turns"], "line 1 holds no chat turns"),
        ([{"who": "user", "says": "one"}], "line 1 has a turn of who, says without role and text"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "line 1 has a turn of role, content without"),
    ],
)
def test_text_and_broken_turns_are_not_rendered(tmp_path, value, message):
    file = write(tmp_path / "corpus.jsonl", [{"text": value}])
    with pytest.raises(UserError, match=message):
        windows(byte_tokenizer(chat_template=TEMPLATE), file, chat_template=True)


def test_text_with_tokens_that_the_model_lacks_is_refused(tmp_path):
    tokenizer = byte_tokenizer(additional_special_tokens=["<|turn|>"])
    rows = len(tokenizer) - 1
    plain = write(tmp_path / "plain.jsonl", [{"text": "no such token in this text"}] * 2)
    assert len(windows(tokenizer, plain, 1, 8, vocab_size=rows)) == 1, (
        "a token that no text holds, such as one for padding, is no harm"
    )
    file = write(tmp_path / "turns.jsonl", [{"text": "some text <|turn|> some more"}])
    assert len(windows(tokenizer, file, 1, 8, vocab_size=rows + 1)) == 1
    with pytest.raises(UserError, match=f"its tokenizer has '<.turn.>', .* as id {rows}, and its embedding has {rows} rows: use"):
        windows(tokenizer, file, 1, 8, vocab_size=rows)


def test_a_rendered_conversation_is_the_same_on_every_day():
    tokenizer = byte_tokenizer(chat_template="{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}")
    assert chat.render(tokenizer, TURNS, "here") == "26 Jul 2024 Say one."


def test_a_hub_data_set_without_a_train_split_never_calibrates_on_its_test_split(tokenizer, monkeypatch):
    hub_with(monkeypatch, ["train_sft", "test"])
    with pytest.raises(
        UserError, match="'owner/name' has no split 'train': name one of train_sft, test, as in owner/name::train_sft"
    ):
        windows(tokenizer, "owner/name")
    assert all(text.startswith("test ") for text in calibration.documents("owner/name", "evaluation"))
    texts = [set(calibration.documents("owner/name::train_sft", split)) for split in calibration.SPLITS]
    assert not texts[0] & texts[1] and texts[0] | texts[1] == {f"train_sft {n}" for n in range(200)}
    with pytest.raises(UserError, match="has no split 'dev'"):
        windows(tokenizer, "owner/name::dev")


@pytest.mark.parametrize(
    ("corpus", "plain"), [("c4", True), ("a/b.TXT.gz", True), ("a/b.jsonl", False), ("owner/name:chat", False)]
)
def test_plain_text_has_no_conversations(corpus, plain):
    assert calibration.is_plain(corpus) == plain
