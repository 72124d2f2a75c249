"""Ray started on this machine, or joined where it runs; quiet either way.

Commands that follow each other in one process (the demo) share one Ray.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cafe
from cafe.errors import IncompleteError, UserError, quote
from cafe.pipeline.process import beside, pulse
from cafe.pipeline.process.head import ClusterHead
from cafe.pipeline.process.presence import Presence
from cafe.pipeline.settings import ClusterSettings

CONNECT_SECONDS = 5.0
TOO_SLOW = "timed out during startup"  # Ray's words
QUIET, STDERR = "RAY_BACKEND_LOG_LEVEL", 2
LOOK_SECONDS = 1.0  # between two looks at what an autoscaler has brought
SETTLE_SECONDS = 10.0  # after a death, until the cluster has noticed whether a node is gone
GATHER_SECONDS = 30.0  # in which another node has to come, or all are taken to be back
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads make a step five times slower where cores are shared
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # back-to-back reports otherwise wait 2 s each
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # within a job of Ray's, what a command says of its workers holds
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed",  # of which the command says a sentence itself
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that is late must not start a Ray of its own after this one was left
}
SILENCE = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
TOKEN = Path("~/.ray/auth_token")  # where Ray keeps the one that all nodes of a cluster share
TOKEN_VARIABLES = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}  # which Ray prefers to it
ANY_CLUSTER = "01" * 28  # names none: a client that asks for the name first would ask twenty times where it is refused
PULSE = {"worker_process_setup_hook": "cafe.pipeline.process.pulse.begin"}  # what every process of Ray's does first
LOCAL = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}  # nobody takes this machine away; a process less per training


def set_environment(settings: ClusterSettings) -> None:
    """Say to libraries how to work, here and in every process that is started; to be called before they are imported."""
    for name, value in (ENVIRONMENT if settings.address else ENVIRONMENT | LOCAL).items():
        os.environ.setdefault(name, value)
    os.environ[SILENCE] = str(settings.silent_seconds)
    if settings.address and (TOKEN.expanduser().exists() or os.environ.keys() & TOKEN_VARIABLES):
        # As `ray start` does where there is a token, and a client does not.
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@contextmanager
def connect(settings: ClusterSettings) -> Iterator[None]:
    """Start Ray here or join the cluster at `settings.address`, and leave it at the end; raise `UserError`."""
    set_environment(settings)
    import ray

    presence.begin(settings.scale_minutes)
    if ray.is_initialized():
        with _watch(settings):
            yield
        return
    if settings.address:
        _join(settings.address)
    else:
        _start(settings.num_cpus)
    try:
        with _watch(settings):
            yield
    finally:
        presence.end()  # before Ray: threads that wait for nodes would ask for them without it
        ray.shutdown()


@contextmanager
def _watch(settings: ClusterSettings) -> Iterator[None]:
    """End processes that are silent for too long, and say when all nodes are gone and some are back, while the body runs.

    Raises `IncompleteError` in the body where the cluster's head is gone.
    """
    import ray
    from ray.exceptions import AuthenticationError, RayError

    head, listener = ClusterHead(ray.get_runtime_context().gcs_address), pulse.Listener(settings.silent_seconds)

    def look() -> None:
        if head.gone:
            return
        try:
            head.ask()
            listener.look()
            if settings.address:
                _look_for_nodes()
        except RayError as error:
            head.miss(anew=isinstance(error, AuthenticationError))

    if settings.address:
        _look_for_nodes()
    try:
        with head.interrupt(), beside.repeat(look, pulse.BEAT_SECONDS):
            yield
    except KeyboardInterrupt:
        if not head.gone:
            raise
        raise IncompleteError(
            f"The head of the Ray cluster at {head.address} is gone, and what was under way with it; what is done is kept: "
            f"give the same command again{' when the cluster is back' if settings.address else ''}."
        ) from None


def _look_for_nodes() -> None:
    """Say when all nodes to work on are gone, as spot nodes may be, and when some are back."""
    for resource in ("CPU", "GPU"):
        if news := presence.note(resource, count(resource)):
            logging.getLogger(__name__).warning(news)


presence = Presence()  # of what this process is connected to, as Ray's own connection is one for all of it


def _start(cores: int | None) -> None:
    """Start Ray on this machine; raise `IncompleteError` where it does not come up in time."""
    import ray

    try:
        ray.init("local", num_cpus=cores, include_dashboard=False, runtime_env=PULSE, **_find_loudness())
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
    with _without_noise():
        _check_token(address)
        workers = {"py_modules": [*cafe.__path__], "env_vars": {name: os.environ[name] for name in ENVIRONMENT}}
        try:
            ray.init(address, runtime_env={**workers, **PULSE}, **_find_loudness())
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            raise UserError(
                f"Ray does not let this command into the cluster at {address!r} ({quote(error)}): check the address, and "
                "that every node has the same Ray and Python."
            ) from None


@contextmanager
def _without_noise() -> Iterator[None]:
    """Keep what the C++ side of Ray logs about a cluster off the terminal from now on, unless the program asks for it.

    It writes to the descriptor of the standard error past Python, at first that it will be quiet. What goes wrong reaches
    Python as an error all the same.
    """
    if logging.getLogger().isEnabledFor(logging.INFO) or QUIET in os.environ or sys.__stderr__ is None:
        yield
        return
    os.environ[QUIET] = "fatal"
    terminal, nowhere = os.dup(STDERR), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STDERR)
    try:
        yield
    finally:
        os.dup2(terminal, STDERR)
        os.close(terminal)
        os.close(nowhere)
        del os.environ[QUIET]


def _check_token(address: str) -> None:
    """Raise `UserError` at once where a cluster wants another token than this command has, or is none of Ray's.

    Ray itself would ask for 20 seconds, and abort the process where it is to use a token and there is none.
    """
    from ray._private.services import canonicalize_bootstrap_address
    from ray._raylet import AuthenticationTokenLoader, GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError, RpcError

    uses = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    remedy = "copy ~/.ray/auth_token here from its head node"
    if variables := " and ".join(sorted(os.environ.keys() & TOKEN_VARIABLES)):
        remedy += f", and unset {variables}"
    try:
        there = AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    except AuthenticationError:  # of a file that cannot be read
        there = False
    none = f"The Ray cluster at {address!r} lets in only who has its token, and this machine has none: {remedy}."
    if uses and not there:
        raise UserError(none)
    if not (place := canonicalize_bootstrap_address(address)):
        return
    try:
        GcsClient(address=place, cluster_id=ANY_CLUSTER).internal_kv_get(b"", namespace=b"", timeout=CONNECT_SECONDS)
    except AuthenticationError as error:
        if "WrongClusterID" in str(error):  # what it says to those whose token it knows
            return
        if there and not uses:
            raise UserError(
                f"The Ray cluster at {address!r} wants its token, which RAY_AUTH_MODE withholds: set RAY_AUTH_MODE=token."
            ) from None
        wrong = f"The Ray cluster at {address!r} does not accept this machine's token: {remedy}."
        raise UserError(wrong if there else none) from None
    except RpcError:
        raise UserError(
            f"What listens at {address!r} does not answer as a Ray cluster does: give the address that `ray start --head` "
            "printed, or wait until the cluster is less busy."
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


def persist(
    attempt: Callable[[], None], reached: Callable[[], str], retries: int, name: str, prepare: Callable[[], object]
) -> None:
    """Attempt again what died in the middle, as often as it takes while it advances.

    `attempt` raises `WorkerDiedError` of what Ray said; `reached` says how far the work was kept, and `prepare` waits for
    what another attempt needs. Raises `IncompleteError` after more than so many deaths at one place, and without any retry
    what Ray said; a user's mistake is never repeated.
    """
    died, place = 0, reached()
    while True:
        try:
            attempt()
            return
        except WorkerDiedError as error:
            said, log = user_error(error.__cause__), logging.getLogger(__name__)
            if not retries or (said and not isinstance(said, IncompleteError)):
                raise said or error.__cause__ or error from None
            before, place = place, reached()
            died = died + 1 if place == before else 1
            if died > retries:
                if not said:
                    log.error("A bug may have stopped %s.", name, exc_info=error)
                raise IncompleteError(
                    f"The workers of {name} died {died} times at {place} ({error}): give the same command again, and "
                    "where memory is short fewer workers, or --checkpoint-minutes that lie closer together."
                ) from None
            log.warning("A worker of %s died (%s): going on from %s.", name, error, place)
            prepare()


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
    if use_gpu is None and presence.had("CPU", 1):
        _gather("CPU", 1, 0)  # where all nodes are gone for a while, nothing says what they have
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


def await_return(resource: str, least: int = 1, all_of_them: bool = False) -> int:
    """Wait, in the middle of work of which a process died, until the cluster has what the work needs; return what there is.

    That may be long, since all nodes may be gone. They come back one after another: where work is cut by their number,
    `all_of_them` waits on while they do. Raises `InterruptedError` as soon as the cluster is left.
    """
    presence.pause(SETTLE_SECONDS)
    there, before = _gather(resource, least, 0), 0
    while all_of_them and before < there < presence.most.get(resource, 0):
        presence.pause(GATHER_SECONDS)
        there, before = _gather(resource, least, 0), there
    return there


def remaining(resource: str, wanted: int | None) -> int | None:
    """Return how many to work with where so many are wanted: fewer only where the cluster had them and has lost some.

    At least one of these is waited for.
    """
    return min(wanted, _gather(resource, 1, 0)) if wanted and presence.had(resource, wanted) else wanted


def _gather(resource: str, wanted: int, minutes: int) -> int:
    """Return how many of a resource there are; where too few are, ask an autoscaler and wait for it so many minutes.

    For what was there before it waits as long as `presence` says; raises `IncompleteError` where it does not come back.
    """
    from ray.autoscaler.sdk import request_resources

    had = presence.had(resource, wanted)
    minutes = presence.minutes if had else minutes
    end = time.monotonic() + 60 * minutes if minutes or not had else math.inf
    if (minutes or had) and (there := count(resource)) < wanted:
        _say_wait(resource, there, wanted, minutes, had)
        request_resources(bundles=[{resource: 1}] * wanted)
    while (there := count(resource)) < wanted and time.monotonic() < end:
        presence.pause(LOOK_SECONDS)
    if had and there < wanted:
        raise IncompleteError(
            f"The cluster has lost {resource}s and did not get them back within {minutes} minutes (--scale-minutes): "
            f"{wanted} are needed and {there} there; what is done is kept: give the same command again, with fewer workers "
            "where it stays so small."
        )
    return there


def _say_wait(resource: str, there: int, wanted: int, minutes: int, had: bool) -> None:
    """Say for what a command waits, and what can be done instead; that all are gone is said already."""
    log, more = logging.getLogger(__name__), wanted - there
    if not had:
        log.warning("Waiting %d minutes for %d more of the cluster's %ss.", minutes, more, resource)
    elif there:
        log.warning(
            "Waiting %s for %d more of the cluster's %ss, of which it has lost some and %d are needed (--scale-minutes): "
            "where it stays so small, end this command and give it again with fewer workers; it goes on from what is done.",
            presence.patience,
            more,
            resource,
            wanted,
        )


def user_error(error: BaseException | None) -> UserError | None:
    """Return what a user can fix among the causes of an error that crossed Ray: a mistake, or a process that was killed."""
    from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

    if error is None:
        return None
    names = ("cause", "_base_exc", "__cause__", "health_check_failure", "controller_failure")  # some are Ray Train's
    workers = getattr(error, "worker_failures", {}).values()
    causes = [*(getattr(error, name, None) for name in names), *workers]
    found = next((mistake for cause in causes if (mistake := user_error(cause))), None)
    # Ray gives its own error the class of the cause too, with a traceback for a sentence: the cause comes first.
    if found or isinstance(error, UserError):
        return found or error  # type: ignore[return-value]
    if type(error).__name__ == "WorkerHealthCheckTimeoutError":  # an internal class of Ray Train's
        return IncompleteError(
            f"A worker gave no sign of life for {os.environ[SILENCE]} seconds: it was stopped, or its machine hangs; end it "
            "and give the same command again, with more --silent-seconds where it was only slow."
        )
    if isinstance(error, RayError) and not isinstance(error, RayTaskError):
        # So called until the cluster has noticed the death, and where the network is cut.
        unavailable = "The actor died unexpectedly, or cannot be reached: " * isinstance(error, ActorUnavailableError)
        return IncompleteError(
            f"A process of Ray's ended in the middle of its work ({unavailable}{quote(error)}): give the same command "
            "again, and where memory is short, fewer workers."
        )
    return None
