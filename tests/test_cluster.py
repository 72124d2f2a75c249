"""What a process may use of its machine and of a cluster: as the container says, and never more than asked for."""

from __future__ import annotations

import inspect
import logging
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from itertools import count
from pathlib import Path
from threading import Event, Thread, current_thread
from types import SimpleNamespace

import psutil
import pytest
import ray
import ray._private.node
import torch
from ray.exceptions import AuthenticationError, RayError, RpcError
from test_store import ABOUT, MANIFEST

from cafe.errors import IncompleteError, UserError
from cafe.pipeline import cluster
from cafe.pipeline.benchmark.cells import Workers, count_slots
from cafe.pipeline.cluster import connect, share
from cafe.pipeline.features.extract import share_out, size_up
from cafe.pipeline.features.stream import PendingRows
from cafe.pipeline.process import beside, head, pulse
from cafe.pipeline.process.machine import available_memory, cores, free_memory
from cafe.pipeline.process.presence import Presence
from cafe.pipeline.settings import ClusterSettings, Execution, ExtractSettings
from cafe.pipeline.worker import LocalWorker, RayTeam

DEVICES = """
import ray
from cafe.errors import UserError
from cafe.pipeline import cluster
ray.init("local", num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False)
print(ray.get([ray.remote(cluster.device).options(num_gpus=gpus).remote() for gpus in (0, 1)]))
print(cluster.wants_gpu(None), cluster.wants_gpu(False))
print(cluster.gpu_memory())
for check, wanted in ((cluster.check_cores, 2), (lambda gpus: cluster.wants_gpu(True, gpus), 2), (cluster.check_cores, 1)):
    try:
        check(wanted)
        print("enough")
    except UserError as error:
        print(error)
"""


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.fixture(autouse=True)
def presence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test know what of a cluster another one saw."""
    monkeypatch.setattr(cluster, "presence", Presence())


def test_the_limit_of_a_container_counts_without_what_it_can_drop(tmp_path: Path) -> None:
    statistics = "anon 1\ninactive_file 20000000\n"
    write(tmp_path / "2", memory__max="100000000\n", memory__current="70000000\n", memory__stat=statistics)
    assert available_memory(tmp_path / "2") == 50_000_000
    write(
        tmp_path / "1" / "memory",
        memory__limit_in_bytes="100000000",
        memory__usage_in_bytes="130000000",
        memory__stat="total_inactive_file 20000000",
    )
    assert available_memory(tmp_path / "1") == 0


@pytest.mark.parametrize(
    ("own", "folder", "limit", "used", "droppable"),
    [
        ("0::/user/job", "user", "memory__max", "memory__current", "inactive_file"),  # a limit above counts too
        (
            "4:cpu,memory:/job\n0::/",
            "memory/job",
            "memory__limit_in_bytes",
            "memory__usage_in_bytes",
            "total_inactive_file",
        ),
    ],
)
def test_the_limit_of_a_batch_system_counts_where_no_container_shows_it(
    own: str, folder: str, limit: str, used: str, droppable: str, tmp_path: Path
) -> None:
    write(tmp_path / folder, **{limit: "100000000", used: "70000000", "memory__stat": f"{droppable} 20000000"})
    (tmp_path / "own").write_text(own)
    assert available_memory(tmp_path, tmp_path / "own") == 50_000_000


def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    write(tmp_path / "2", memory__max="max\n", memory__current="70000000\n", memory__stat="inactive_file 0\n")
    for place in ("2", "nowhere"):
        assert available_memory(tmp_path / place) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_a_worker_takes_the_share_of_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOKY_MAX_CPU_COUNT")  # all cores of this machine
    assert torch.get_num_threads() == 1
    assert free_memory() == pytest.approx(available_memory() // cores(), rel=0.2)


@pytest.mark.parametrize(
    ("gpus", "cores", "shards", "asked", "expected"),
    [
        (8, 64, 3, None, (3, 1.0)),  # never more than one GPU for a tower
        (4, 16, 100, None, (4, 1.0)),
        (2, 16, 100, 3, (3, 0.5)),  # three fit on two
        (2, 16, 100, 8, (8, 0.25)),
        (0, 6, 100, None, (6, 0.0)),
        (0, 6, 100, 5, (5, 0.0)),
        (0, 6, 2, None, (2, 0.0)),
    ],
)
def test_towers_share_gpus_such_that_all_of_them_fit(
    gpus: int, cores: int, shards: int, asked: int | None, expected: tuple[int, float]
) -> None:
    assert share_out(ExtractSettings(address="auto", num_actors=asked), shards, gpus, cores) == expected


def test_a_cluster_that_has_no_core_yet_is_waited_for_and_counted_then(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [PendingRows(MANIFEST, ABOUT, [[]], [0, 1, 2])]
    monkeypatch.setattr(ray, "cluster_resources", dict)
    for settings in (ExtractSettings(address="auto"), ExtractSettings(address="auto", num_actors=2)):
        with pytest.raises(UserError, match=r"workers need as many cores and the cluster has 0: use fewer workers"):
            size_up(rows, settings)
    there = iter([{}, {}, {}])  # of GPUs, and twice of cores; then a node has come
    monkeypatch.setattr(ray, "cluster_resources", lambda: next(there, {"CPU": 16.0}))
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: None)
    assert size_up(rows, ExtractSettings(address="auto", scale_minutes=1)) == (3, 0.0, 0, 16)


@pytest.mark.parametrize(
    ("counts", "first", "last"),
    [
        ([4, 4, 0, 0, 0, 0, 1, 3, 3, 4, 4, 4, 4], 1, 4),  # not the first alone that came back
        ([4, 4, 2, 2, 0, 0, 2], 2, 2),  # all go again while others are waited for
    ],
)
def test_nodes_that_were_there_are_waited_for_as_long_as_it_takes_and_that_is_said_once(
    counts: list[int], first: int, last: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen = iter(counts)

    def count_cores() -> dict[str, float]:
        cores = next(seen)
        if news := cluster.presence.note("CPU", cores):
            caplog.records.append(logging.makeLogRecord({"msg": news}))
        return {"CPU": float(cores)}

    monkeypatch.setattr(ray, "cluster_resources", count_cores)
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: None)
    for name in ("SETTLE_SECONDS", "GATHER_SECONDS", "LOOK_SECONDS"):
        monkeypatch.setattr(cluster, name, 0)
    cluster.check_cores(2)
    assert cluster.count("CPU") == 4
    assert cluster.await_return("CPU", all_of_them=True) == last
    assert [record.getMessage() for record in caplog.records] == [
        "The cluster has lost all its CPUs: what needs one waits as long as it takes for some to be back (--scale-minutes); "
        "what is done is kept, and after Ctrl-C the same command goes on from it, too.",
        f"The cluster has {first} CPUs again: going on.",
    ]


def test_where_no_node_is_gone_none_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.presence.note("CPU", 4)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(cluster, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(cluster, "GATHER_SECONDS", 600)
    assert cluster.await_return("CPU", all_of_them=True) == 4


def test_gpus_of_nodes_that_are_gone_for_a_while_are_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.presence.note("CPU", 8)
    there = iter([{}, {}, {}])
    monkeypatch.setattr(ray, "cluster_resources", lambda: next(there, {"CPU": 8.0, "GPU": 1.0}))
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: None)
    monkeypatch.setattr(cluster, "LOOK_SECONDS", 0)
    assert cluster.wants_gpu(None)


def test_a_cluster_that_never_had_enough_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.presence.note("CPU", 4)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    with pytest.raises(UserError, match="9 workers need as many cores and the cluster has 4"):
        cluster.check_cores(9)
    with pytest.raises(UserError, match="--gpu needs 1 GPUs and the cluster has 0"):
        cluster.wants_gpu(True)


@pytest.mark.parametrize("failed", [False, True])
def test_what_is_done_beside_a_body_is_done_again_and_again_and_ends_with_it(failed: bool) -> None:
    threads, twice = list[Thread](), Event()

    def work() -> None:
        threads.append(current_thread())
        if len(threads) > 1:
            twice.set()

    with suppress(ZeroDivisionError), beside.repeat(work, 0.001):
        assert twice.wait(10)
        assert 1 // (not failed)
    assert len(set(threads)) == 1
    assert threads[0] is not current_thread()
    assert not threads[0].is_alive()


AWAY = RpcError("Timed out while waiting for GCS to become available.")
ANOTHER = AuthenticationError("RPC error: WrongClusterID: Perhaps the client is accessing GCS after it has restarted.")
UNEASY = "The head of the cluster at 10.0.0.1:6379 does not answer: unless it does within 35 seconds, this command ends"


class Client:
    """Of a head: raises what Ray's own raises."""

    def __init__(self, answers: list[RayError | None]) -> None:
        self.waiting, self.answered = [*answers], Event()

    def internal_kv_get(self, key: bytes, namespace: bytes, timeout: float) -> None:
        if not self.waiting:
            self.answered.set()
        elif error := self.waiting.pop(0):
            raise error

    def internal_kv_keys(self, prefix: bytes, namespace: bytes) -> list[bytes]:
        return []


def answer_as_head(monkeypatch: pytest.MonkeyPatch, answers: list[RayError | None]) -> Client:
    """Let a head answer, and in the end say nothing wrong, of a cluster with one core."""
    client = Client(answers)
    context = SimpleNamespace(gcs_address="10.0.0.1:6379", get_job_id=lambda: "01")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr("ray.experimental.internal_kv.global_gcs_client", client)
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: None)
    return client


@pytest.mark.parametrize(
    ("answers", "gone", "said"),
    [
        ([None, *[AWAY] * head.GONE], True, [UNEASY]),
        ([ANOTHER], True, ["The cluster at 10.0.0.1:6379 was started anew: this command ends"]),
        (
            [*[AWAY] * (head.GONE - 1), None, AWAY, None],
            False,
            [UNEASY, "The head of the cluster at 10.0.0.1:6379 answers"],
        ),
    ],
)
def test_a_command_whose_clusters_head_is_gone_ends_with_a_sentence_and_waits_for_one_that_restarts(
    answers: list[RayError | None],
    gone: bool,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = answer_as_head(monkeypatch, answers)
    monkeypatch.setattr(pulse, "BEAT_SECONDS", 0.001)
    ends = pytest.raises(
        IncompleteError, match=r"at 10.0.0.1:6379 is gone.* what is done is kept: give the same command"
    )
    with ends if gone else nullcontext(), cluster._watch(ClusterSettings("10.0.0.1:6379")):
        assert client.answered.wait(20)  # which a head that is gone interrupts
    assert [record.getMessage()[: len(text)] for record, text in zip(caplog.records, said, strict=True)] == said


def test_a_head_that_is_lost_interrupts_nobody_after_the_body() -> None:
    heard, lost = list[int](), head.ClusterHead("10.0.0.1:6379")
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        with lost.interrupt():
            pass
        for _ in range(head.GONE):
            lost.miss(anew=False)
        assert (lost.gone, heard) == (True, [])
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_who_waits_for_nodes_ends_as_soon_as_the_cluster_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_as_head(monkeypatch, [])
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # other tests share one
    for name in ("init", "shutdown"):
        monkeypatch.setattr(ray, name, lambda *_, **__: None)
    waits = [lambda: cluster.await_return("CPU"), lambda: cluster._gather("CPU", 2, 60)]  # ten seconds, and an hour
    with ThreadPoolExecutor(len(waits)) as pool:
        with connect(ClusterSettings()):
            waiting = [pool.submit(wait) for wait in waits]
        began = time.monotonic()
        for wait in waiting:
            with pytest.raises(InterruptedError, match="has ended"):
                wait.result(20)
    assert time.monotonic() - began < cluster.SETTLE_SECONDS / 2  # also where others keep the cores busy


def test_towers_are_as_many_as_remain_and_as_many_as_were_asked_for_once_the_others_are_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [PendingRows(MANIFEST, ABOUT, [[]], [0, 1, 2])]
    for gpus, cpus, asked, towers in (
        (0, 8, ExtractSettings(address="auto", num_actors=3, use_gpu=False), {8: 3, 2: 2, 1: 1, 4: 3}),
        (3, 8, ExtractSettings(address="auto", num_gpus=3), {3: 3, 1: 1, 2: 2}),
    ):
        cluster.presence.note("CPU", cpus)
        cluster.presence.note("GPU", gpus)
        for there, expected in towers.items():
            now = {"CPU": float(cpus), "GPU": float(there)} if gpus else {"CPU": float(there)}
            monkeypatch.setattr(ray, "cluster_resources", now.copy)
            assert size_up(rows, asked)[0] == expected
    with pytest.raises(UserError, match="9 GPUs"):  # what never was there is not made less
        size_up(rows, ExtractSettings(address="auto", num_gpus=9))


def test_nodes_that_do_not_come_back_are_waited_for_as_long_as_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = count(step=30)
    monkeypatch.setattr(cluster, "presence", Presence(minutes=5))
    cluster.presence.note("CPU", 4)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: None)
    monkeypatch.setattr(cluster, "LOOK_SECONDS", 0)
    monkeypatch.setattr(cluster, "SETTLE_SECONDS", 0)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    assert cluster.await_return("CPU", all_of_them=False) == 2
    assert not caplog.records
    with pytest.raises(IncompleteError, match=r"within 5 minutes.*4 are needed and 2 there.*with fewer workers"):
        cluster.await_return("CPU", 4)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(
        "Waiting 5 minutes for 2 more of the cluster's CPUs, of which it has lost some and 4 are needed"
    )
    assert "give it again with fewer workers" in said
    assert 5 * 60 <= next(clock) <= 7 * 60


def test_a_worker_goes_on_to_a_cell_that_is_not_begun_and_makes_room_where_there_is_none() -> None:
    workers, first = Workers([Execution()] * 3, 2), LocalWorker("cpu")
    workers.left, workers.idle = 2, [first]  # after the first of three cells
    with workers.borrow(Execution()) as worker:
        assert worker is first
    assert (first.ended.is_set(), workers.idle) == (False, [first])
    with workers.borrow(Execution()) as worker:
        assert worker is first
    assert (first.ended.is_set(), workers.idle) == (True, [])  # a cell whose node is gone may wait for its core


def test_cells_that_ask_for_other_machines_have_workers_of_their_own() -> None:
    for other in (Execution(use_gpu=True), Execution(num_workers=2)):
        workers, first = Workers([Execution(), other, other], 1), LocalWorker("cpu")
        workers.idle = [first]
        with workers.borrow(Execution()):
            pass
        assert (first.ended.is_set(), workers.idle) == (True, [])


@pytest.mark.parametrize(("cores", "towers"), [(1, 1), (2, 1), (7, 1), (16, 4)])
def test_a_tower_on_this_machine_works_with_four_cores(cores: int, towers: int) -> None:
    assert share_out(ExtractSettings(), 100, 0, cores) == (towers, 0.0)


@pytest.mark.parametrize(
    ("gpus", "cores", "memory", "slots"),
    [
        (0, 6, 0, 6),
        (1, 16, 80, 8),  # two cores for each
        (1, 64, 80, 10),  # eight gigabytes for each
        (2, 16, 80, 8),
        (1, 1, 80, 1),
        (8, 64, 0, 8),  # of a memory that nobody knows
    ],
)
def test_as_many_cells_run_on_a_gpu_as_have_room(gpus: int, cores: int, memory: int, slots: int) -> None:
    assert count_slots(gpus, cores, memory * 2**30) == slots


@pytest.mark.parametrize(("workers", "there"), [(1, 2), (4, 2), (5, 2), (7, 6), (3, 1)])
def test_all_workers_find_room_on_whole_gpus_and_cores(workers: int, there: int) -> None:
    fit = there * int(1 / share(workers, there))
    assert fit >= workers


def test_what_asks_for_no_gpu_gets_none_and_what_asks_for_too_much_is_told() -> None:
    program = subprocess.run([sys.executable, "-c", DEVICES], capture_output=True, text=True, check=True)
    assert program.stdout.splitlines() == [
        "['cpu', 'cuda']",
        "True False",
        "0",  # Ray takes a GPU for granted that torch does not find
        "2 workers need as many cores and the cluster has 1: use fewer workers, or --scale-minutes where an autoscaler "
        "brings more.",
        "--gpu needs 2 GPUs and the cluster has 1: use fewer workers, --cpu, or --scale-minutes where an autoscaler brings "
        "more.",
        "enough",
    ]


def test_a_ray_that_does_not_start_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = re.findall(r'Exception\(\s*"(The current node .*?) "', inspect.getsource(ray._private.node))

    def time_out(*_: object, **__: object) -> None:
        raise Exception(words)  # as Ray does, which has no class for it

    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # other tests share one
    monkeypatch.setattr(ray, "init", time_out)
    with (
        pytest.raises(IncompleteError, match="most likely because this machine is too busy"),
        connect(ExtractSettings()),
    ):
        pass


def test_a_worker_of_a_shared_training_that_was_killed_or_stopped_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.exceptions import ActorDiedError, ActorUnavailableError
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

    died = ActorDiedError()
    killed = WorkerGroupError("rank 1", {1: WorkerHealthCheckFailedError("A worker does not answer.", died)})
    unavailable = ActorUnavailableError("RPC error: Socket closed", None)  # one that was killed a moment before
    for error in (killed, ControllerError(died), ControllerError(unavailable), unavailable):
        said = cluster.user_error(error)
        assert isinstance(said, IncompleteError)
        assert str(said).startswith("A process of Ray's ended in the middle of its work (The actor died unexpectedly")
    monkeypatch.setenv(cluster.SILENCE, "")
    cluster.set_environment(ClusterSettings(silent_seconds=20))
    silent = cluster.user_error(WorkerGroupError("rank 0", {0: WorkerHealthCheckTimeoutError("hanging")}))
    assert isinstance(silent, IncompleteError)
    assert str(silent).startswith("A worker gave no sign of life for 20 seconds: it was stopped, or its machine hangs")


@pytest.mark.parametrize(
    ("places", "deaths", "attempts", "said"),
    [
        ("aaaa", 4, 4, "The workers of run-1 died 4 times at a (killed): give the same command again"),
        ("abbcccddd", 7, 8, ""),  # seven deaths, never four at one place
        ("abbbbc", 9, 4, "The workers of run-1 died 4 times at b ("),
    ],
)
def test_deaths_are_counted_by_place_and_a_work_that_advances_goes_on(
    places: str, deaths: int, attempts: int, said: str
) -> None:
    from ray.exceptions import ActorDiedError

    made, waited, reached = list[int](), list[int](), iter(places)

    def wait() -> None:
        waited.append(len(made))

    def attempt() -> None:
        made.append(1)
        if len(made) <= deaths:
            raise cluster.WorkerDiedError("killed") from ActorDiedError()

    if said:
        with pytest.raises(IncompleteError, match="^" + re.escape(said)):
            cluster.persist(attempt, lambda: next(reached, places[-1]), 3, "run-1", wait)
    else:
        cluster.persist(attempt, lambda: next(reached), 3, "run-1", wait)
    assert len(made) == attempts
    assert waited == list(range(1, attempts))


def test_a_users_mistake_is_never_tried_again_and_alone_nothing_is() -> None:
    from ray.exceptions import ActorDiedError
    from ray.train import WorkerGroupError

    mistake, death = WorkerGroupError("rank 0", {0: UserError("The loss is NaN")}), ActorDiedError()
    for cause, retries, expected in ((mistake, 3, UserError), (death, 0, IncompleteError)):
        made = list[int]()

        def attempt(cause: Exception = cause, made: list[int] = made) -> None:
            made.append(1)
            raise cluster.WorkerDiedError("died") from cause

        with pytest.raises(expected):
            cluster.persist(attempt, str, retries, "run-1", pytest.fail)
        assert len(made) == 1


def test_workers_at_work_end_with_their_benchmark_and_begin_nothing_else() -> None:
    workers = Workers([Execution(num_workers=2)] * 2, 1)
    with workers.borrow(Execution(num_workers=2)) as worker:
        assert isinstance(worker, RayTeam)
        workers.end()
        assert worker.ended.is_set()  # so that the end of Ray is no death to go on after
    with pytest.raises(InterruptedError, match="has ended"), workers.borrow(Execution(num_workers=2)):
        pass


@pytest.mark.parametrize(("there", "mode"), [(True, "token"), (False, None)])
def test_the_token_of_this_machines_cluster_is_used_as_ray_start_does(
    there: bool, mode: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if there:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    cluster.set_environment(ClusterSettings("127.0.0.1:6379"))
    assert os.environ.get("RAY_AUTH_MODE") == mode
