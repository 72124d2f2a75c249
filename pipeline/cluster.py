"""Ray started on this machine, or joined where it runs; quiet either way.

Commands that follow each other in one process (the demo) share one Ray.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cafe
from cafe.errors import IncompleteError, UserError, quote
from cafe.pipeline.settings import ClusterSettings

CONNECT_SECONDS = 5.0
TOO_SLOW = "timed out during startup"  # Ray's words
LOOK_SECONDS = 1.0  # between two looks at what an autoscaler has brought
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads make a step five times slower where cores are shared
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # back-to-back reports otherwise wait 2 s each
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # within a job of Ray's, what a command says of its workers holds
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that is late must not start a Ray of its own after this one was left
}
TOKEN = Path("~/.ray/auth_token")  # where Ray keeps the one that all nodes of a cluster share
LOCAL = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}  # nobody takes this machine away; a process less per training


def set_environment(settings: ClusterSettings) -> None:
    """Say to libraries how to work, here and in every process that is started; to be called before they are imported."""
    for name, value in (ENVIRONMENT if settings.address else ENVIRONMENT | LOCAL).items():
        os.environ.setdefault(name, value)
    if (
        settings.address
        and TOKEN.expanduser().exists()
        and not os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    ):
        os.environ.setdefault(
            "RAY_AUTH_MODE", "token"
        )  # as `ray start` does where there is a token, and a client does not


@contextmanager
def connect(settings: ClusterSettings) -> Iterator[None]:
    """Start Ray here or join the cluster at `settings.address`, and leave it at the end; raise `UserError`."""
    set_environment(settings)
    import ray

    if ray.is_initialized():
        yield
        return
    if settings.address:
        _join(settings.address)
    else:
        _start(settings.num_cpus)
    try:
        yield
    finally:
        ray.shutdown()


def _start(cores: int | None) -> None:
    """Start Ray on this machine; raise `IncompleteError` where it does not come up in time."""
    import ray

    try:
        ray.init("local", num_cpus=cores, include_dashboard=False, **_find_loudness())
    except Exception as error:  # Ray has no class for it
        if TOO_SLOW not in str(error):
            raise
        raise IncompleteError(
            "Ray did not start in its time, most likely because this machine is too busy: give the same command again."
        ) from None


def _find_loudness() -> dict[str, int]:
    """Return what Ray reports: errors alone, unless the program asks for information."""
    verbose = logging.getLogger().isEnabledFor(logging.INFO)
    return {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}


def _join(address: str) -> None:
    """Join a cluster, whose workers then run the code of this command, in its environment; raise `UserError`."""
    import ray
    from ray.exceptions import RayError

    if address == "auto":  # a job's own cluster, where several have nodes here
        address = os.environ.get("RAY_ADDRESS", address)
    _check_answer(address)
    _check_node(address)
    workers = {"py_modules": [*cafe.__path__], "env_vars": {name: os.environ[name] for name in ENVIRONMENT}}
    try:
        ray.init(address, runtime_env=workers, **_find_loudness())
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise UserError(
            f"Ray does not let this command into the cluster at {address!r} ({quote(error)}): check the address, and "
            "that RAY_AUTH_MODE and RAY_AUTH_TOKEN are those of the cluster."
        ) from None


def _check_answer(address: str) -> None:
    """Raise `UserError` at once when nothing listens at an address; Ray itself would try for many minutes."""
    if address.startswith("ray://"):
        raise UserError(
            f"Ray Data does not run over Ray Client ({address!r}): submit the command as a job (`ray job submit`), or give "
            "HOST:PORT on a node of the cluster."
        )
    host, _, port = address.rpartition(":")
    if not host:
        if address == "auto":
            return
        raise UserError(f"Cannot read the address {address!r}: give HOST:PORT or auto.")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError):
        raise UserError(
            f"No Ray cluster answers at {address!r}: start one with `ray start --head`, or leave out --address."
        ) from None


def _check_node(address: str) -> None:
    """Raise `UserError` where no node of Ray's runs: a driver needs one beside it, and Ray would abort the process."""
    import psutil

    if not any(process.info["name"] == "raylet" for process in psutil.process_iter(["name"])):
        raise UserError(
            f"This machine is no node of the Ray cluster at {address!r}: submit the command as a job (`ray job submit`), or "
            f"run `ray start --address {address} --num-cpus 0` here first."
        )


class WorkerDiedError(Exception):
    """A process of Ray's that ended in the middle of its work: it crashed, was killed, or its node is gone."""


def quieten(library: str) -> None:
    """Silence the progress notes of `ray.data` or `ray.train`, which set their own log level when first imported."""
    logging.getLogger(library).setLevel(logging.CRITICAL)


def count(resource: str) -> int:
    """Return how many of a resource (`CPU`, `GPU`) the connected cluster has."""
    import ray

    return int(ray.cluster_resources().get(resource, 0))


def share(workers: int, there: int) -> float:
    """Return what each of so many workers has of one core or GPU, such that all find room on those there are."""
    return 1 / -(-workers // there) if there else 0.0


def gpu_memory() -> int:
    """Return the bytes of memory of a GPU of the connected cluster, whose GPUs are taken to be alike."""
    import ray

    return int(ray.get(ray.remote(_own_gpu_memory).options(num_cpus=0, num_gpus=0.01).remote()))


def _own_gpu_memory() -> int:
    import torch

    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0


def device() -> str:
    """Return `cuda` in a worker that was given a GPU, else `cpu`: Ray leaves GPUs visible to those without any."""
    import ray

    return "cuda" if ray.is_initialized() and ray.get_gpu_ids() else "cpu"


def wants_gpu(use_gpu: bool | None, least: int = 1, minutes: int = 0) -> bool:
    """Return whether to compute on GPUs: as asked for, else where there are enough; raise `UserError` for too few."""
    there = _gather("GPU", least, minutes) if use_gpu else count("GPU")
    if use_gpu and there < least:
        raise UserError(
            f"--gpu needs {least} GPUs and the cluster has {there}: use fewer workers, --cpu, or --scale-minutes where an "
            "autoscaler brings more."
        )
    return there >= least if use_gpu is None else use_gpu


def check_cores(workers: int, minutes: int = 0) -> None:
    """Raise `UserError` for more workers than the cluster has cores, for which Ray would wait without a word."""
    if (there := _gather("CPU", workers, minutes)) < workers:
        raise UserError(
            f"{workers} workers need as many cores and the cluster has {there}: use fewer workers, or --scale-minutes where "
            "an autoscaler brings more."
        )


def _gather(resource: str, wanted: int, minutes: int) -> int:
    """Return how many of a resource there are; where too few are, ask an autoscaler and wait for it so many minutes."""
    from ray.autoscaler.sdk import request_resources

    end = time.monotonic() + 60 * minutes
    if minutes and (there := count(resource)) < wanted:
        logging.getLogger(__name__).warning(
            "Waiting %d minutes for %d more of the cluster's %ss.", minutes, wanted - there, resource
        )
        request_resources(bundles=[{resource: 1}] * wanted)
    while (there := count(resource)) < wanted and time.monotonic() < end:
        time.sleep(LOOK_SECONDS)
    return there


def user_error(error: BaseException | None) -> UserError | None:
    """Return what a user can fix among the causes of an error that crossed Ray: a mistake, or a process that was killed."""
    from ray.exceptions import RayError, RayTaskError

    if error is None:
        return None
    names = ("cause", "_base_exc", "__cause__", "health_check_failure", "controller_failure")  # some are Ray Train's
    workers = getattr(error, "worker_failures", {}).values()
    causes = [*(getattr(error, name, None) for name in names), *workers]
    found = next((mistake for cause in causes if (mistake := user_error(cause))), None)
    # Ray gives its own error the class of the cause too, with a traceback for a sentence: the cause comes first.
    if found or isinstance(error, UserError):
        return found or error  # type: ignore[return-value]
    if isinstance(error, RayError) and not isinstance(error, RayTaskError):
        return IncompleteError(
            f"A process of Ray's ended in the middle of its work ({quote(error)}): give the same command again, and "
            "where memory is short, fewer workers."
        )
    return None
