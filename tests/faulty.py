"""A real server that speaks S3, on loopback, with faults: some requests are answered 503, and for a while all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from threading import Lock, Thread
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUSY = b'<?xml version="1.0"?><Error><Code>ServiceUnavailable</Code><Message>Reduce your rate</Message></Error>'


class FaultyS3:
    """The server of moto behind a door that refuses `share` of all requests, half of them after they were carried out.

    From request `outage_at` on, every one is refused for `outage_seconds`.
    """

    def __init__(self) -> None:
        self.share, self.outage_at, self.outage_seconds = 0.0, 0, 0.0
        self.requests, self.refused, self.lost, self.down_until = 0, 0, 0, 0.0
        self.under_way = self.most = 0
        self.random, self.lock = random.Random(0), Lock()
        self.store: Any = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        self.thread = Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
        with self.lock:
            self.requests += 1
            if self.requests == self.outage_at:
                self.down_until = time.monotonic() + self.outage_seconds
            down, chance = time.monotonic() < self.down_until, self.random.random()
            lost = not down and (self.lost > 0 or chance < self.share / 2)  # carried out, but the answer is lost
            refuse = down or lost or chance < self.share
            self.refused, self.lost = self.refused + refuse, max(0, self.lost - 1)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        try:
            return self._answer(environ, start_response, refuse, lost)
        finally:
            self.under_way -= 1

    def _answer(self, environ: dict[str, Any], start_response: Any, refuse: bool, lost: bool) -> Iterable[bytes]:
        if not refuse:
            return list(self.store(environ, start_response))
        if lost:
            list(self.store(environ, lambda *_: None))
        else:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response(
            "503 Service Unavailable", [("Content-Type", "application/xml"), ("Content-Length", str(len(BUSY)))]
        )
        return [BUSY]

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
