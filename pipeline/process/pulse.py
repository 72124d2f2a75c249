"""Signs of life of workers in processes of Ray's, which itself waits without end for one that was stopped or hangs.

A thread of each worker changes a note in the cluster's own store as long as its process runs, however long its work takes.
The command watches the notes by its own clock, and ends a process whose note no longer changes: it then counts as one that
was killed, and its work is done again, or the command ends with a sentence. Ray Train does as much for workers that share a
training, and is told the same limit.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from time import monotonic, sleep

BEAT_SECONDS = 2.0
NAMESPACE = "cafe.pulse"
LONGEST_LOOK = 3  # beats that count between two looks: while this command itself was stopped, it saw nobody


def begin() -> None:
    """Give signs of life from now on, where this process is that of an actor of Ray's."""
    if (ray := sys.modules.get("ray")) is None or not ray.is_initialized():  # importing it takes a second
        return
    context = ray.get_runtime_context()
    if actor := context.get_actor_id():
        Thread(target=_beat, args=(f"{context.get_job_id()}/{actor}".encode(),), daemon=True).start()


def _beat(key: bytes) -> None:
    from ray.experimental.internal_kv import _internal_kv_put

    number = 0
    while True:
        number += 1
        _internal_kv_put(key, str(number).encode(), overwrite=True, namespace=NAMESPACE)
        sleep(BEAT_SECONDS)


@contextmanager
def watch(seconds: float) -> Iterator[None]:
    """End processes of this command that give no sign of life for so many seconds, while the body runs."""
    ended = Event()
    thread = Thread(target=_watch, args=(seconds, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _watch(seconds: float, ended: Event) -> None:
    import ray
    from ray._private.state import actors
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list

    job, last = f"{ray.get_runtime_context().get_job_id()}/", monotonic()
    notes: dict[bytes, tuple[bytes, float]] = {}  # the last of each worker, and the seconds since it changed
    while not ended.wait(BEAT_SECONDS):
        passed, last = min(monotonic() - last, LONGEST_LOOK * BEAT_SECONDS), monotonic()
        for key in _internal_kv_list(job.encode(), namespace=NAMESPACE):
            note = _internal_kv_get(key, namespace=NAMESPACE)
            before, silent = notes.get(key, (b"", 0.0))
            notes[key] = (note, silent + passed if note == before else 0.0)
            if notes[key][1] >= seconds:
                _internal_kv_del(key, namespace=NAMESPACE)
                del notes[key]
                actor = actors(key.decode().removeprefix(job))
                if actor and actor["State"] == "ALIVE":  # else it has ended, and Ray knows
                    _end(actor["Pid"], actor["Address"]["NodeID"], seconds)


def _end(process: int, node: str, seconds: float) -> None:
    """Kill a process where it is: one that was stopped does nothing that Ray asks of it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    logging.getLogger(__name__).warning(
        "Process %d gave no sign of life for %.0f seconds, as one that was stopped, and is ended.", process, seconds
    )
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    ray.remote(_kill).options(num_cpus=0, scheduling_strategy=there).remote(process)


def _kill(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
