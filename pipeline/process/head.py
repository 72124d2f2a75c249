"""The head of a cluster, without which nothing goes on: Ray ends a command a minute after its loss, without a word."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, get_ident, main_thread

from cafe.pipeline.process.pulse import BEAT_SECONDS

ANSWER_SECONDS = 5.0  # that it may take for an answer; a busy one takes milliseconds
UNEASY, GONE = 2, 7  # looks in a row without one, after which it is said, and after which none is expected


class ClusterHead:
    """What a command hears of the head of its cluster; where that is gone, the main thread of the command is interrupted.

    Looks are counted, not seconds: while this command itself was stopped, it heard nobody.
    """

    def __init__(self, address: str) -> None:
        self.address, self.silent, self.gone = address, 0, False
        self.main: int | None = None

    @contextmanager
    def interrupt(self) -> Iterator[None]:
        """Let its loss raise `KeyboardInterrupt` in the body, if that is run by the main thread.

        By a signal of its own: what a script starts in the background ignores that of Ctrl-C.
        """
        if current_thread() is not main_thread():
            yield
            return
        before, self.main = signal.signal(signal.SIGUSR1, signal.default_int_handler), get_ident()
        try:
            yield
        finally:
            self.main = None  # before the handler: without one the signal would end the process
            signal.signal(signal.SIGUSR1, before or signal.SIG_DFL)

    def ask(self) -> None:
        """Let it answer; raise Ray's `RayError` where it does not."""
        from ray.experimental.internal_kv import internal_kv_get_gcs_client

        internal_kv_get_gcs_client().internal_kv_get(b"", namespace=b"", timeout=ANSWER_SECONDS)
        if self.silent >= UNEASY:
            logging.getLogger(__name__).warning("The head of the cluster at %s answers again: going on.", self.address)
        self.silent = 0

    def miss(self, anew: bool) -> None:
        """Note that it did not answer, or that another has its address, as where a cluster was started `anew`."""
        self.silent += 1
        log = logging.getLogger(__name__)
        if anew:
            log.warning("The cluster at %s was started anew: this command ends; what is done is kept.", self.address)
        elif self.silent == UNEASY:
            log.warning(
                "The head of the cluster at %s does not answer: unless it does within %.0f seconds, this command ends; what "
                "is done is kept.",
                self.address,
                (GONE - UNEASY) * (BEAT_SECONDS + ANSWER_SECONDS),
            )
        self.gone = anew or self.silent >= GONE
        if self.gone and self.main is not None:
            signal.pthread_kill(self.main, signal.SIGUSR1)
