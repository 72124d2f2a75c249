"""Signs of life of the processes of Ray's, which itself waits without end for one that was stopped or hangs.

A thread of each, whatever it does (workers, tasks, what Ray Train and Ray Data run by themselves), changes a note in the
cluster's own store as long as its process runs, however long its work takes; it begins before the process works
(`cluster.PULSE`). The note's name says where that process is and when it began. The command watches the notes by its own
clock, and ends a process whose note no longer changes: it then counts as one that was killed, and its work is done again, or
the command ends with a sentence. Ray Train does as much for workers that share a training, and is given the same limit.
"""

from __future__ import annotations

import logging
import os
import signal
from concurrent.futures import Future
from contextlib import suppress
from threading import Thread
from time import monotonic, sleep

from cafe.pipeline.process.lease import find_start

BEAT_SECONDS = 2.0
NAMESPACE = "cafe.pulse"
LONGEST_LOOK = 3  # beats that count between two looks: while this command itself was stopped, it saw nobody


def begin() -> None:
    """Give signs of life from now on; to be called once in every process of Ray's."""
    import ray

    context, process = ray.get_runtime_context(), os.getpid()
    key = f"{context.get_job_id()}/{context.get_node_id()}/{process}/{_find_start(process)}".encode()
    Thread(target=_beat, args=(key,), daemon=True).start()


def _beat(key: bytes) -> None:
    from ray.experimental.internal_kv import _internal_kv_put

    number = 0
    while True:
        number += 1
        _internal_kv_put(key, str(number).encode(), overwrite=True, namespace=NAMESPACE)
        sleep(BEAT_SECONDS)


class Listener:
    """What a command hears of its processes, by a clock of its own; it ends one of which it hears nothing for so long."""

    def __init__(self, seconds: float) -> None:
        import ray

        self.seconds, self.last = seconds, monotonic()
        self.job = f"{ray.get_runtime_context().get_job_id()}/"
        self.notes: dict[bytes, tuple[bytes, float]] = {}  # the last of each, and the seconds since it changed

    def look(self) -> None:
        """Look at all notes; end the processes whose note has not changed for too long."""
        from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list

        passed, self.last = min(monotonic() - self.last, LONGEST_LOOK * BEAT_SECONDS), monotonic()
        for key in _internal_kv_list(self.job.encode(), namespace=NAMESPACE):
            note = _internal_kv_get(key, namespace=NAMESPACE)
            before, silent = self.notes.get(key, (b"", 0.0))
            self.notes[key] = (note, silent + passed if note == before else 0.0)
            if self.notes[key][1] >= self.seconds:
                _internal_kv_del(key, namespace=NAMESPACE)
                del self.notes[key]
                node, process, began = key.decode().removeprefix(self.job).split("/")
                _end(node, int(process), began, self.seconds)


def _end(node: str, process: int, began: str, seconds: float) -> None:
    """Kill a process where it is: one that was stopped does nothing that Ray asks of it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def say(killing: Future[bool]) -> None:
        if killing.exception() is None and killing.result():  # else it has ended, or its node has, and Ray knows
            logging.getLogger(__name__).warning(
                "Process %d gave no sign of life for %.0f seconds, as one that was stopped, and was ended.",
                process,
                seconds,
            )

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    killing = ray.remote(_kill).options(num_cpus=0, scheduling_strategy=there).remote(process, began)
    killing.future().add_done_callback(say)


def _kill(process: int, began: str) -> bool:
    """Kill a process of this machine, unless another has its number by now; return whether it was there."""
    if _find_start(process) != began:
        return False
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    return True


def _find_start(process: int) -> str:
    """Return when a process began, the same for all where the system does not say, but not for one that has ended."""
    try:
        return str(find_start(process))
    except OSError:
        return ""
