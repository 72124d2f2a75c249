"""Only one driver at a time works on a run, a store or a benchmark; what a dead one left is taken over."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from threading import Barrier, Event, Thread

import pytest
from conftest import Cafe, draw_faces
from upath import UPath

from cafe.errors import UserError
from cafe.files import encode_json, read_json, write_file, write_json
from cafe.pipeline.features.extract import describe_store, look_up_tower
from cafe.pipeline.plan import plan_training
from cafe.pipeline.process import lease
from cafe.pipeline.process.lease import Lease, find_kernel, find_start, hold
from cafe.pipeline.settings import ExtractSettings, TrainSettings
from cafe.pipeline.workspace import Workspace


@pytest.fixture
def folder(tmp_path: Path) -> UPath:
    return UPath(tmp_path / "run")


def test_a_second_driver_is_told_who_works_there(folder: UPath) -> None:
    with (
        hold(folder) as check,
        pytest.raises(UserError, match=f"Process {os.getpid()} on {socket.gethostname()} works on {folder}: wait"),
        hold(folder),
    ):
        pass
    check()
    assert list(folder.iterdir()) == []
    with hold(folder):
        pass


def test_of_several_at_once_one_gets_it(folder: UPath) -> None:
    barrier, refused = Barrier(8), list[str]()

    def contend() -> None:
        barrier.wait()
        try:
            held.enter_context(hold(folder))
        except UserError as error:
            refused.append(str(error))

    with ExitStack() as held:
        threads = [Thread(target=contend) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 7


def test_of_several_that_take_over_a_dead_lease_at_once_one_gets_it(
    folder: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.0)  # whoever writes last must not count
    path, barrier, taken = folder / ".lease.json", Barrier(8), list[str]()
    dead = encode_json(asdict(Lease(kernel=find_kernel(), ticks=1)))
    for _ in range(20):
        write_file(path, dead)
        taken.clear()

        def contend(mine: Lease) -> None:
            barrier.wait()
            if lease._try(path, mine, lease._Watch()) is None:
                taken.append(mine.owner)

        leases = [Lease(kernel=find_kernel(), ticks=lease._own_start()) for _ in range(8)]
        threads = [Thread(target=contend, args=(mine,)) for mine in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert taken == [read_json(path)["owner"]]


def test_the_lease_of_a_process_that_ended_here_is_taken_over_at_once(folder: UPath) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write_json(folder / ".lease.json", asdict(Lease(process=ended.pid, kernel=find_kernel(), ticks=1)))
    with hold(folder):
        assert read_json(folder / ".lease.json")["process"] == os.getpid()


def test_the_lease_of_a_killed_process_that_nobody_has_buried_is_taken_over(folder: UPath) -> None:
    process = subprocess.Popen(["sleep", "60"])
    start = find_start(process.pid)
    assert start is not None
    there = Lease(process=process.pid, kernel=find_kernel(), ticks=start)
    assert there.alive
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert there.alive is False
    process.wait()


def test_the_lease_of_a_number_that_another_process_has_now_is_taken_over(folder: UPath) -> None:
    write_json(folder / ".lease.json", asdict(Lease(kernel=find_kernel(), ticks=1)))
    with hold(folder):
        pass


ELSEWHERE = {  # where the number of a process says nothing here
    "another machine": Lease(host="elsewhere", kernel=find_kernel(), process=2**22),
    "another boot": Lease(kernel=find_kernel().replace(find_kernel()[:8], "00000000"), process=2**22),
    "another container of this host's name": Lease(kernel=find_kernel().replace("pid:[", "pid:[1"), process=2**22),
    "a system that does not say": Lease(process=2**22),
}


@pytest.mark.parametrize("there", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_lease_that_changes_is_left_alone_and_one_that_does_not_is_taken_over(
    folder: UPath, there: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "WAIT_SECONDS", 0.02)
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.2)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.02)
    path, ended = folder / ".lease.json", Event()
    write_json(path, asdict(there))

    def renew() -> None:
        for number in count(1):
            if ended.wait(0.05):
                return
            write_json(path, asdict(replace(there, renewed=number)))

    holder = Thread(target=renew)
    holder.start()
    try:
        with pytest.raises(UserError, match=f"Process {there.process} on {there.host} works on"), hold(folder):
            pass
    finally:
        ended.set()
        holder.join()
    assert read_json(path)["owner"] == there.owner
    with hold(folder):
        assert read_json(path)["process"] == os.getpid()


@pytest.mark.parametrize("days", [-1.0, 1.0])
def test_no_clock_of_another_machine_counts(folder: UPath, days: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "WAIT_SECONDS", 0.02)
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.1)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.01)
    before = {"host": "elsewhere", "process": 7, "started": 1.0, "owner": "ab", "renewed": time.time() + days * 86_400}
    write_json(folder / ".lease.json", before)  # as earlier versions wrote it
    began = time.monotonic()
    with hold(folder):
        assert time.monotonic() - began > 0.1


def test_what_passes_while_nobody_can_look_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.1)
    watch, there = lease._Watch(), Lease(host="elsewhere")
    watch.look(there)
    time.sleep(0.2)  # the storage is away, for the holder as well
    assert watch.look(there) is None


def test_whoever_waits_follows_the_other(folder: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "WAIT_SECONDS", 0.01)
    order: list[str] = []

    def follow() -> None:
        with hold(folder, wait=True):
            order.append("second")

    with hold(folder):
        thread = Thread(target=follow)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_whoever_was_taken_over_ends_and_leaves_the_others_lease(
    folder: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.02)
    other = replace(Lease(), host="elsewhere")

    def work() -> None:
        with hold(folder) as check:
            before = read_json(folder / ".lease.json")["renewed"]
            while read_json(folder / ".lease.json")["renewed"] == before:
                time.sleep(0.01)  # it is renewed
            write_json(folder / ".lease.json", asdict(other))
            while True:
                check()
                time.sleep(0.01)

    with pytest.raises(UserError, match=f"Another process has taken over {folder}"):
        work()
    assert read_json(folder / ".lease.json") == asdict(other)


def test_a_command_whose_run_or_store_is_worked_on_ends_before_it_touches_it(tmp_path: Path, tiny_tower: str) -> None:
    cafe, workspace = Cafe(tmp_path / "work", ""), Workspace.at(str(tmp_path / "work"))
    cafe.succeed("data", "index", "folder", str(draw_faces(tmp_path / "faces", per_class=8)), "--name", "tiny")
    settings = ExtractSettings(backbone=tiny_tower)
    about = describe_store(workspace.load_manifest("tiny"), settings, look_up_tower(workspace, settings))
    store = workspace.features / "tiny" / about.folder
    run = plan_training(workspace, TrainSettings(source="tiny", method="image_only", targets="none")).run
    with hold(store), hold(run):
        assert f"works on {store}" in cafe.fail("extract", "tiny", "--backbone", tiny_tower)
        assert f"works on {run}" in cafe.fail(
            "train", "--source", "tiny", "--method", "image_only", "--targets", "none"
        )
    assert list(store.iterdir()) == []
    assert not (run / "status.json").exists()


def test_a_place_that_cannot_be_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "away").symlink_to(tmp_path / "disk")
    for place in ("file", "away", "away/below"):
        with pytest.raises(NotADirectoryError, match="Not a directory"), hold(UPath(tmp_path / place)):
            pass
