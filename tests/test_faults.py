"""Faults on toy studies: whatever is killed, corrupt, full, hanging or run twice, a resumed study has the same bytes."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter

import psutil
import pytest
import toys
from faults import PACKAGE, Runner, kill_and_resume, same

from hfprune_nb.errors import UserError
from hfprune_nb.runs import locks, parameters, stage, study, worker
from hfprune_nb.runs.artifacts import Writer
from hfprune_nb.runs.locks import Lock
from hfprune_nb.runs.status import status as status_of

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="process groups and SIGKILL are POSIX features")]


def toy_runner(project, name="toy"):
    """A toy study in a project of its own."""
    return Runner(project / "results" / name, HFPRUNE_HOME=str(project))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The study `toy`, run once without any fault; read-only."""
    toy = toy_runner(toys.write_project(tmp_path_factory.mktemp("undisturbed")))
    status, said = toy.run()
    assert status == 0 and "12 computed" in said, said
    return toy


@pytest.fixture
def corrupt(undisturbed, tmp_path):
    """A copy of the finished study that a test may damage."""
    shutil.copytree(undisturbed.environment["HFPRUNE_HOME"], tmp_path / "copy", copy_function=shutil.copy2)
    return toy_runner(tmp_path / "copy")


def test_killed_at_any_moment_and_resumed_gives_the_same_bytes(undisturbed, tmp_path):
    kill_and_resume(toy_runner(toys.write_project(tmp_path)), undisturbed, moments=4, longest=4, seed=1)


def run_together(project, undisturbed, runners):
    toy = toy_runner(toys.write_project(project))
    processes = [toy.begin("run", "--workers", "1") for _ in range(runners)]
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * runners, said
    computed = toy.events("computed")
    assert len(computed) == 12 and set(computed.values()) == {1}, computed
    assert len(list(toy.folder.glob("log/*.jsonl"))) == runners
    same(toy, undisturbed)


def test_two_runners_share_a_folder_and_compute_every_job_once(undisturbed, tmp_path):
    run_together(tmp_path, undisturbed, 2)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_four_runners_share_a_folder_and_compute_every_job_once(undisturbed, tmp_path):
    run_together(tmp_path, undisturbed, 4)


def test_a_worker_that_is_killed_costs_no_job(undisturbed, tmp_path):
    toy = toy_runner(toys.write_project(tmp_path), "small")
    toys.write_study(tmp_path, "small", seeds=[0], criteria=["entropy"])
    process = toy.begin()
    workers = []
    while not workers:
        assert process.poll() is None
        time.sleep(0.1)
        if toy.events("start"):
            children = psutil.Process(process.pid).children()
            workers = [child for child in children if any("spawn_main" in part for part in child.cmdline())]
    workers[0].kill()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "6 computed" in said, said
    expected = undisturbed.digests()
    assert all(expected.get(reference, digest) == digest for reference, digest in toy.digests().items())


# -- damage


def overwrite(path, content):
    """Change a file's bytes and keep its times, as a failing disk does."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_verify_finds_damage_and_reruns_just_that(corrupt, undisturbed):
    first = {name: sorted((corrupt.folder / name).glob("[0-9a-f]*"))[0] for name in ("scoring", "pruning", "evaluation")}
    value = (first["pruning"] / "value.txt").read_bytes()
    overwrite(first["pruning"] / "value.txt", bytes([value[0] ^ 1]) + value[1:])
    overwrite(first["scoring"] / "value.txt", b"")
    (first["evaluation"] / "notebook.ipynb").write_bytes(b"{")
    sealed = corrupt.sealed()
    status, said = corrupt.run("verify", "--dry-run")
    assert status == 1 and corrupt.sealed() == sealed
    assert all(f"{name}/{folder.name}" in said for name, folder in first.items()) and "3 of 12" in said
    status, said = corrupt.run("verify")
    assert status == 0 and corrupt.events("computed") - undisturbed.events("computed") == Counter(
        f"{name}/{folder.name}" for name, folder in first.items()
    ), said
    again = corrupt.sealed()
    assert {folder for folder in sealed if again[folder] != sealed[folder]} == set(first.values())
    same(corrupt, undisturbed)
    assert corrupt.run("verify") == (0, "study toy: 12 artifacts, every byte as it was written\n")


def test_a_damaged_manifest_is_damage(corrupt, undisturbed):
    (done,) = (corrupt.folder / "figures").glob("[0-9a-f]*/DONE")
    overwrite(done, done.read_bytes()[:20])
    assert corrupt.run("verify")[0] == 0
    same(corrupt, undisturbed)


# -- what kills leave behind


@pytest.fixture
def calibration(tmp_path, monkeypatch):
    """Return a function that begins a calibration in this process, as a notebook does."""
    monkeypatch.setenv("HFPRUNE_HOME", str(toys.write_project(tmp_path)))
    monkeypatch.delenv("HFPRUNE_RESULTS", raising=False)
    return lambda: stage.start("calibration", study="toy", **parameters.complete("calibration", {}))


def test_killed_between_the_two_renames(calibration):
    """The old artifact stepped aside, the new one did not step in: it is complete and counts."""
    run = calibration()
    run.path("value.txt").write_text("new")
    sealed = run.finish().folder
    sealed.rename(sealed.with_name(f"{sealed.name}.abcd.partial"))
    again = calibration()
    assert again.done and again.path("value.txt").read_text() == "new"


def test_damaged_partial_folders_count_for_nothing(calibration):
    run = calibration()
    run.path("value.txt").write_text("new")
    sealed = run.finish().folder
    (sealed / "value.txt").write_text("other")
    sealed.rename(sealed.with_name(f"{sealed.name}.abcd.partial"))
    assert not calibration().done
    assert not list(sealed.parent.glob("*.partial"))


def test_scratch_outlives_a_killed_kernel_and_goes_with_the_run(tmp_path, calibration):
    before = (
        "count = run.scratch() / 'count'\nseen = int(count.read_text()) if count.exists() else 0\n"
        "count.write_text(str(seen + 1))\nif seen < 2:\n    import os; os._exit(9)"
    )
    toys.write_stage(tmp_path, "calibration", "01_calibration.ipynb", (toys.CALIBRATION[0], "seen"), before=before)
    for _ in range(2):
        with pytest.raises(stage.StageError, match="kernel died"):
            stage.execute("calibration", "toy", {})
    artifact = stage.execute("calibration", "toy", {})
    assert artifact.path("value.txt").read_text() == "2"
    assert not stage.scratch_folder(artifact).exists()


def test_a_hanging_job_is_stopped_and_the_others_go_on(tmp_path, monkeypatch):
    toy = toy_runner(toys.write_project(tmp_path))
    hang = "import time\nif seed == 1:\n    time.sleep(600)"
    toys.write_stage(tmp_path, "calibration", "01_calibration.ipynb", toys.CALIBRATION, before=hang)
    toys.write_study(tmp_path, criteria=["entropy"], run={"workers": 2, "offline": True, "timeout_minutes": 0.1})
    status, said = toy.run()
    assert status == 1 and "stopped after 0.1 minutes: raise run.timeout_minutes" in said
    monkeypatch.setenv("HFPRUNE_HOME", str(tmp_path))
    states = Counter(outcome.state for outcome in status_of(study.load("toy")))
    assert states["failed"] == 1 and states["done"] == 5 and not states["running"]


# -- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 MB; skipped only where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"A FULL DISK NEEDS A MOUNT, which this user may not make: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_told_and_resumed_when_there_is_room(undisturbed, small_disk, tmp_path):
    toy = toy_runner(toys.write_project(tmp_path / "project"))
    toy.environment["HFPRUNE_RESULTS"] = str(small_disk)
    toy.folder = small_disk / "toy"
    process, filler, deadline = toy.begin(), small_disk / "filler", time.monotonic() + 120
    while not list(toy.folder.glob("log/*.jsonl")) and time.monotonic() < deadline:  # the check before the run has passed
        time.sleep(0.1)
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 1 and ("No space left" in said or "no disk space left" in said), said
    assert "Traceback" not in said
    filler.unlink()
    status, said = toy.run()
    assert status == 0, said
    same(toy, undisturbed)


# -- locks

CHILD = "import sys, time; from pathlib import Path; from hfprune_nb.runs.locks import Lock\nlock = Lock(Path(sys.argv[1]))\n"


def child(path, code):
    command = [sys.executable, "-c", CHILD + code, str(path)]
    environment = os.environ | {"PYTHONPATH": PACKAGE}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    return process


def test_a_lock_has_one_owner_and_a_dead_owner_has_none(tmp_path):
    lock = Lock(tmp_path / ".0.lock")
    owner = child(lock.path, "print(lock.take(), flush=True); time.sleep(60)")
    assert not lock.take() and lock.taken() and f"process {owner.pid} on " in lock.owner()
    owner.kill()
    owner.wait()
    assert not lock.taken() and lock.take() and lock.held
    lock.release()
    assert not lock.held and not lock.path.exists()


def test_a_lock_without_heartbeat_is_taken_over_after_a_while(tmp_path, monkeypatch):
    """An owner on another machine cannot be asked whether it lives."""
    monkeypatch.setattr(locks, "LEASE_SECONDS", 1.0)
    path = tmp_path / ".1.lock"
    owner = child(path, "from hfprune_nb.runs import locks\nprint(lock.take(), flush=True); time.sleep(60)")
    marker = re.sub("host=.*", "host=elsewhere", path.read_text()).replace("duration=60.0", "duration=1.0")
    owner.kill()
    owner.wait()
    path.write_text(marker)
    lock = Lock(path)
    assert not lock.take() and lock.taken()
    time.sleep(1.1)
    assert lock.take() and lock.held
    lock.release()


def test_a_job_waits_until_all_its_gpus_are_free_and_holds_none_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    owner = child(tmp_path / "hfprune-gpus" / ".1.lock", "print(lock.take(), flush=True); sys.stdin.read(); lock.release()")
    with worker.gpus_for(3, {"device": "cuda", "processes": 2}) as chosen:
        assert chosen == {"CUDA_VISIBLE_DEVICES": "0,2"}
    first = tmp_path / "hfprune-gpus" / ".0.lock"
    waits = threading.Thread(target=lambda: stack.enter_context(worker.gpus_for(2, {"device": "balanced"})))
    with contextlib.ExitStack() as stack:
        waits.start()
        assert any(time.sleep(0.05) or (waits.is_alive() and not first.exists()) for _ in range(100))
        owner.stdin.close()
        waits.join(timeout=30)
        assert not waits.is_alive() and first.exists()
    owner.wait()
    with worker.gpus_for(3, {"device": "cpu", "processes": 2}) as chosen:
        assert chosen == {"CUDA_VISIBLE_DEVICES": "0"}
    too_many = {"device": "cuda", "processes": 4}
    with pytest.raises(UserError, match="processes 4 are more than the 3 GPUs of --gpus"), worker.gpus_for(3, too_many):
        pass


def test_who_lost_the_lock_seals_nothing(calibration, caplog):
    run = calibration()
    run.path("value.txt").write_text("late")
    path = stage.lock(run.artifact).path
    path.write_text("the lock of another process")
    with pytest.raises(UserError, match="another process took over calibration/.*: its result counts"):
        run.finish()
    assert not run.artifact.done


def test_a_notebook_run_by_hand_waits_for_the_one_that_computes_and_takes_its_result(calibration, caplog):
    run = calibration()
    path = stage.lock(run.artifact).path
    run._lock.release()
    owner = child(path, "print(lock.take(), flush=True); time.sleep(1.5); lock.release()")
    Writer(run.artifact.folder).path("value.txt").write_text("unfinished")
    began = time.monotonic()
    again = calibration()
    assert time.monotonic() - began > 0.5 and not again.done
    assert f"is being computed by process {owner.pid}" in caplog.text
    owner.wait()
