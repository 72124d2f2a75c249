"""The one door to Ray: this machine alone, or a running cluster; quiet either way.

Commands that follow each other in one process (the demo) share one Ray. How far long work is goes to a callback, which a bar
gives. What a process may use of its machine is counted here too.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

import cafe
from cafe.errors import IncompleteError, UserError, quote
from cafe.pipeline.settings import ClusterSettings

Progress = Callable[[int, int], None]  # (done, total)
Bar = Callable[[str, str], AbstractContextManager[Progress]]  # (title, unit)

CONNECT_SECONDS = 5.0
TOO_SLOW = "timed out during startup"  # Ray's words
LOOK_SECONDS = 1.0  # between two looks at what an autoscaler has brought
LIBRARIES = ("numpy", "open_clip_torch", "pillow", "timm", "torch", "torchvision")
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads make a step five times slower where cores are shared
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # back-to-back reports otherwise wait 2 s each
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # within a job of Ray's, what a command says of its workers holds
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that is late must not start a Ray of its own after this one was left
}
LOCAL = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}  # nobody takes this machine away; a process less per training
CGROUP = Path("/sys/fs/cgroup")
# Limit, use and the line of the statistics that says what of the use can be dropped: of version 2 and of version 1.
LAYOUTS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


@contextmanager
def no_bar(title: str, unit: str) -> Iterator[Progress]:
    """Show nothing."""
    yield lambda done, total: None


def set_environment(settings: ClusterSettings) -> None:
    """Say to libraries how to work, here and in every process that is started; to be called before they are imported."""
    for name, value in (ENVIRONMENT if settings.address else ENVIRONMENT | LOCAL).items():
        os.environ.setdefault(name, value)


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


@cache
def versions() -> dict[str, str]:
    """Return what numbers depend on besides the settings: the versions of libraries, and a digest of this code itself."""
    code = hashlib.sha256()
    root = Path(cafe.__path__[0])
    for folder, _, names in sorted(os.walk(root, followlinks=True)):  # in a checkout two packages are links
        for path in sorted(Path(folder, name) for name in names if name.endswith(".py")):
            code.update(f"{path.relative_to(root)} {path.stat().st_size} ".encode() + path.read_bytes())
    return {"cafe": code.hexdigest()[:12], **{library: version(library) for library in LIBRARIES}}


def check_versions(drivers: Mapping[str, str]) -> None:
    """Raise `UserError` where this node computes with other code or libraries than the driver planned with."""
    for name, wanted in drivers.items():
        if (here := versions().get(name)) != wanted:
            raise UserError(
                f"Node {socket.gethostname()} has {name} {here}, and the command was given with {name} {wanted}: install "
                "the same on every node."
            )


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


def own_device(use_gpu: bool | None) -> str:
    """Return `cuda` where this process is to compute on a GPU, else `cpu`; raise `UserError` where there is none."""
    import torch

    there = torch.cuda.is_available()
    if use_gpu and not there:
        raise UserError("--gpu needs a GPU and this machine has none: use --cpu.")
    return "cuda" if there and use_gpu is not False else "cpu"


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
    """Return what a user can mend among the causes of an error that crossed Ray: a mistake, or a process that was killed."""
    from ray.exceptions import RayError, RayTaskError

    if error is None:
        return None
    workers = getattr(error, "worker_failures", {}).values()  # of a training
    causes = [getattr(error, "cause", None), getattr(error, "_base_exc", None), error.__cause__, *workers]
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


def cores() -> int:
    """Return the cores this process may use: fewer than the machine has where its container or its affinity say so."""
    import joblib

    return int(joblib.cpu_count())


def free_memory(cgroup: Path = CGROUP) -> int:
    """Return the bytes this process may still take of its machine or container.

    Of several workers on a node each may take its share, which is that of its threads in the cores.
    """
    import psutil
    import torch

    free = int(psutil.virtual_memory().available)
    for limit, used, statistics, droppable in LAYOUTS:
        with suppress(OSError, ValueError, KeyError):  # no such file, or no limit
            numbers = dict(line.split() for line in (cgroup / statistics).read_text().splitlines())
            in_use = int((cgroup / used).read_text()) - int(numbers[droppable])
            free = min(free, max(0, int((cgroup / limit).read_text()) - in_use))
    return free * min(torch.get_num_threads(), cores()) // cores()
