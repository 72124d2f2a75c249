"""The one door to Ray: this machine alone, or a running cluster; quiet either way.

Commands that follow each other in one process (the demo) share one Ray.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from cafe.errors import UserError
from pipeline.settings import ClusterSettings

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads make a step five times slower where cores are shared
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # back-to-back reports otherwise wait 2 s each
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
}


@contextmanager
def connect(settings: ClusterSettings) -> Iterator[None]:
    """Start Ray here or join the cluster at `settings.address`, and leave it at the end; raise `UserError`."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    local = {} if settings.address else {"num_cpus": settings.num_cpus, "include_dashboard": False}
    try:
        ray.init(settings.address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    except ConnectionError:
        raise UserError(
            f"No Ray cluster answers at {settings.address!r}: start one with `ray start --head`, set RAY_AUTH_MODE=token if "
            "it asks for a token, or leave out --address."
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def quieten(library: str) -> None:
    """Silence the progress notes of `ray.data` or `ray.train`, which set their own log level when first imported."""
    logging.getLogger(library).setLevel(logging.CRITICAL)


def count(resource: str) -> int:
    """Return how many of a resource (`CPU`, `GPU`) the connected cluster has."""
    import ray

    return int(ray.cluster_resources().get(resource, 0))


def user_error(error: BaseException | None) -> UserError | None:
    """Return the user's mistake among the causes of an error that crossed Ray, if there is one."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None
