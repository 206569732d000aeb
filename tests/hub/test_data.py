"""Text of the hub: whole files chosen by the seed, read once, never half, and offline afterwards."""

import re

import pytest

WINDOWS = """
from pathlib import Path
from hub import contents

from hfprune_nb.inputs import calibration
tokenizer = contents.tokenizer(bos=True)
def cut(corpus="c4", n=12, seq_len=64, seed=0, **options):
    return calibration.windows(tokenizer, corpus, n, seq_len, seed, bos=True, progress=False, **options)
"""
SHARD = r"GET store .*"


def asked_shards(hub):
    return sorted({re.search(r"c4-\w+\.\d+", line)[0] for line in hub.asked(r"(GET|HEAD) hub .*resolve.*json\.gz")})


def test_c4_is_read_in_whole_files_that_seeds_and_models_share(hub, answer):
    code = (
        WINDOWS
        + """
held_out = [cut(split="evaluation", seed=seed).document_hashes for seed in (0, 0)]
answer = [cut(seed=0).ids.tolist(), cut(seed=0).ids.tolist(), cut(seed=1).document_hashes, cut(n=8).ids.tolist(), *held_out]
"""
    )
    first = answer(code)
    shards = asked_shards(hub)
    assert first[0] == first[1] and first[0][:8] == first[3] and len(first[2]) == 12
    assert first[4] == first[5] and not set(first[4]) & set(first[2])
    assert {name.split(".")[0] for name in shards} == {"c4-train", "c4-validation"}
    assert len(hub.asked(SHARD)) == len(shards) <= 12, "each file once"
    hub.requests.clear()
    assert answer(code) == first
    assert len(hub.asked("datasets")) == 1, "only which commit is the newest"
    assert answer(code, offline=True) == first
    hub.stop()
    try:
        assert answer(code) == first
    finally:
        hub.start()


def test_faults_change_no_window(hub, answer, forget):
    code = WINDOWS + "answer = [cut().ids.tolist(), cut('owner/pages', n=4).ids.tolist()]"
    calm = answer(code)
    faults = [
        ("GET hub /api/datasets/allenai/c4/revision", {"status": 503}),
        ("GET hub /api/datasets/owner/pages", {"status": 429, "headers": {"Retry-After": "1"}}),
        ("GET store", {"cut": 300}),
        ("GET store", {"cut": 300, "reset": True}),
        ("GET store", {"status": 502}),
        ("GET store", {"flip": True}),
        ("GET store", {"silent": 5}),
    ]
    forget()
    for pattern, what in faults:
        hub.fail(pattern, **what)
    assert answer(code) == calm
    assert all(fault.times == 0 for fault in hub.faults), "every fault was met"


def test_windows_go_on_where_they_were_interrupted(answer, tmp_path):
    code = (
        WINDOWS
        + f"""
calibration.CHECKPOINT_EVERY = 2
scratch = Path({str(tmp_path)!r})
whole, take, seen = cut(seq_len=500), calibration._tokenized, []
def interrupted(*arguments):
    for number, found in enumerate(take(*arguments)):
        seen.append(found[0])
        if number == stop:
            raise KeyboardInterrupt
        yield found
calibration._tokenized = interrupted
answer = []
for stop in (30, 10**9):
    seen.clear()
    try:
        again = cut(seq_len=500, scratch=scratch)
    except KeyboardInterrupt:
        answer.append(len(seen))
answer += [len(seen), whole.ids.tolist() == again.ids.tolist(), whole.table().equals(again.table())]
answer += [whole.passed_over == again.passed_over]
"""
    )
    before, after, *same = answer(code)
    assert all(same) and before == 31
    total = answer(WINDOWS + "windows = cut(seq_len=500)\nanswer = len(windows) + sum(windows.passed_over.values())")
    assert after < total, "what was read before is not tokenised again"


REFUSED = [
    ("owner/page", "dataset 'owner/page' is not on the hub: did you mean owner/pages"),
    ("owner/scripted", "dataset 'owner/scripted' is a script, which the datasets library no longer runs: choose a copy"),
    ("aps/super_glue:boolqq", "has no configuration 'boolqq': choose one of boolq, cb"),
    ("aps/super_glue", "has several configurations: name one of boolq, cb, as in aps/super_glue:boolq"),
    ("jannalu/crows_pairs_multilingual:english", "has no split 'train': name one of test, as in .*:english:test"),
    ("owner/pages:default:dev", "has no split 'dev': name one of train, test"),
    ("wikitxt", "corpus 'wikitxt' is unknown: did you mean wikitext"),
]


def test_what_the_hub_has_not_is_one_sentence_with_the_remedy(answer):
    names = [name for name, _ in REFUSED]
    told = answer(WINDOWS + f"answer = [said(cut, name) for name in {names!r}]")
    for (name, message), sentence in zip(REFUSED, told, strict=True):
        assert re.search(message, sentence) and "\n" not in sentence, (name, sentence)


def test_instructions_are_read_once_in_an_order_of_the_seed(hub, answer):
    code = """
    from hfprune_nb.inputs import instructions
    answer = [[record.prompt for record in instructions.records("lamini", 700, seed)] for seed in (0, 0, 1)]
    answer.append([record.prompt for record in instructions.records("alpaca", 20)])
    """
    first, again, other, alpaca = answer(code)
    assert first == again != other and len(set(first)) == 700 and len(alpaca) == 20
    assert len(hub.asked(SHARD)) == 4, "three files of LaMini and one of Alpaca"
    assert answer(code, offline=True) == [first, again, other, alpaca]


def test_data_without_a_connection(hub, answer):
    code = WINDOWS + "answer = said(cut)"
    assert "dataset 'allenai/c4' is not cached and HF_HUB_OFFLINE is set" in answer(code, offline=True)
    hub.stop()
    try:
        assert "dataset 'allenai/c4' is not cached and the hub is out of reach: connect once" in answer(code)
    finally:
        hub.start()


@pytest.mark.slow
def test_tasks_are_read_at_one_commit_and_need_no_hub_afterwards(hub, answer):
    code = """
    from hfprune_nb.measure import tasks
    answer = [tasks.describe(task) for task in tasks.load_tasks(["piqa", "race", "crows_pairs_english"], "hub").values()]
    """
    hub.fail("GET store", cut=200, reset=True)
    first = answer(code)
    for facts, name in zip(first, ("baber/piqa", "EleutherAI/race", "jannalu/crows_pairs_multilingual"), strict=True):
        commit = hub.repository("dataset", name).branches["main"]
        assert facts["items"] == 6 and facts["source"] == f"hub: {name} at {commit[:12]}"
    assert answer(code, offline=True) == first
    hub.stop()
    try:
        assert answer(code) == first
    finally:
        hub.start()
