"""One way into Ray for every job, and a way out when it has died."""

import atexit
import contextlib
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants

import tinyflux
from tinyflux.distributed.ray_token import guard_token
from tinyflux.errors import RayLostError

# Ray itself ends a process whose GCS is silent for 60 s, without a sentence.
_SILENCE_SECONDS = 45.0
_LOOK_SECONDS = 1.0
_END_SECONDS = 15  # for each part of the end
_TIDY_SECONDS = 60
# What Ray Data's pools put into the object store for their actors.
_POOL_ARGUMENTS = ("_map_transformer_ref", "_data_context_ref")


def ensure_ray() -> None:
    """Join the cluster that ``RAY_ADDRESS`` names, or start Ray on this machine only.

    Does nothing where Ray is already running in this process. Workers on this machine find the
    package where this process has it.
    """
    if ray.is_initialized():
        return
    # Ray would otherwise rebuild uv's environments on its own terms.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    # Ray Train would print every line of a worker a second time.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # It says that progress bars are off.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS")
    guard_token(make=address is None)
    options: dict[str, Any] = {"logging_level": logging.WARNING}
    if address is not None:
        ray.init(address=address, **options)
        return
    root = str(Path(tinyflux.__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "PYTHONPATH": os.pathsep.join(paths),
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away
        "TQDM_DISABLE": "1",  # one bar per loaded model and worker
        # Workers' gradients would pass by whichever address the machine's name stands for.
        "GLOO_SOCKET_IFNAME": socket.if_nameindex()[0][1],  # the kernel's first is the loopback
    }
    options.update(
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        runtime_env={"env_vars": environment},
    )
    # It says that a token guards this Ray, which is as it should be.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    with _on_loopback():
        ray.init(address="local", **options)  # never one that somebody started here


def quiet_data() -> None:
    """Let Ray Data work without bars and plans, and with actors that can be started anew."""
    from ray.data._internal.execution.operators import actor_pool_map_operator

    pools: Any = actor_pool_map_operator  # a module whose class is exchanged
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    pool = pools.ActorPoolMapOperator
    # Another Ray may be made otherwise, and then keeps its errors.
    if all(isinstance(getattr(pool, name, None), cached_property) for name in _POOL_ARGUMENTS):
        pools.ActorPoolMapOperator = _with_arguments(pool)


def _with_arguments(pool: type[Any]) -> type[Any]:
    """Ray Data's pool of actors, whose small arguments go with the calls.

    It would hand them over by the object store. An actor that is started anew after they were lost
    there fails, and Ray writes an error about that of every pool.
    """
    own = {
        "_map_transformer_ref": property(attrgetter("_map_transformer")),
        "_data_context_ref": property(attrgetter("data_context")),
    }
    return type("ActorsWithArguments", (pool,), own)


@contextlib.contextmanager
def train_knows_its_ray() -> Iterator[None]:
    """Within it, the processes of a Ray Train run are told which Ray they belong to.

    One of them asks once a second whether the run's controller lives, and frees the run's CPUs and
    GPUs if it does not. By itself it asks any Ray of the machine: beside another it ends with a
    traceback, or takes the run for dead.
    """
    from ray.train.v2._internal import constants

    # Another Ray may be made otherwise, and then asks as it does.
    told: set[str] = getattr(constants, "ENV_VARS_TO_PROPAGATE", set())
    before = os.environ.get("RAY_ADDRESS")
    told.add("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        told.discard("RAY_ADDRESS")
        if before is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = before


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that is started within listens on 127.0.0.1 alone.

    That is Ray's default on Windows and macOS. Where it thinks of clusters it replaces a loopback
    address by the machine's own and then listens on all of them.
    """
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


class RaySession:
    """The Ray that a process works with: its start, whether it lives, and its end.

    A Ray that this process started lives as long as its raylet and its GCS do, and all processes
    that came of it end with the session. A cluster's Ray lives while its GCS knows this node, and
    its processes are left alone.
    """

    def __init__(self) -> None:
        me = psutil.Process()
        before = set(me.children())
        ensure_ray()
        self._heads = [process for process in me.children() if process not in before]
        self._vital = [head for head in self._heads if head.name() in ("gcs_server", "raylet")]
        self._started: set[psutil.Process] = set()
        self._node = ray.get_runtime_context().get_node_id()
        self._dead, self._lost, self._heard = False, False, time.monotonic()
        self._ended = threading.Event()
        self._listener = _start_thread(self._listen)

    def check(self) -> None:
        """Raise if Ray has died.

        Raises:
            RayLostError: a process that it cannot do without is gone, or it is silent.
        """
        self._note_children(self._vital)  # all workers are the raylet's
        silence = time.monotonic() - self._heard
        if not all(_lives(process) for process in self._vital):
            reason = "its raylet or its GCS is gone"
        elif self._lost:
            reason = "this machine is not a node of the cluster any more"
        elif silence > _SILENCE_SECONDS:
            reason = f"the cluster has not answered for {silence:.0f} s"
        else:
            return
        self._dead = True
        raise RayLostError(f"Ray has died under this job: {reason}; start the job again")

    def run(
        self,
        work: Callable[[], None],
        seconds: float = math.inf,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Do ``work`` in a thread, and wait for it no longer than it can succeed.

        Calls into a dead Ray may never return.

        Args:
            seconds: how long to wait at most.
            stop: called every second; true ends the waiting.

        Returns:
            Whether the work was done.

        Raises:
            RayLostError: Ray died.
        """
        errors: list[BaseException] = []

        def do() -> None:
            try:
                work()
            except BaseException as error:  # raised again below
                errors.append(error)

        thread, deadline = _start_thread(do), time.monotonic() + seconds
        while thread.is_alive() and time.monotonic() < deadline and not stop():
            thread.join(_LOOK_SECONDS)
            self.check()
        if errors:
            raise errors[0]
        return not thread.is_alive()

    def end(self, tidy: Callable[[], None]) -> None:
        """Leave Ray, and kill what is left of one that this process started.

        Args:
            tidy: called in a cluster that lives; a Ray of our own takes everything with it.
        """
        self._ended.set()
        self._note_children(self._heads)
        if not self._dead:
            self._listener.join(_END_SECONDS)
            leaving = _start_thread(lambda: self._leave(tidy))
            leaving.join(_TIDY_SECONDS + _END_SECONDS)
            self._dead = leaving.is_alive()
        left = [process for process in self._started if _lives(process)]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=_END_SECONDS)
        if self._dead:
            _exit_without_ray()

    def _leave(self, tidy: Callable[[], None]) -> None:
        try:
            if not self._vital:
                tidy()
        finally:
            ray.shutdown()

    def _note_children(self, heads: list[psutil.Process]) -> None:
        """Remember who is there: an orphan's parent cannot be asked any more."""
        for head in heads:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._started.update([head, *head.children(recursive=True)])

    def _listen(self) -> None:
        """Ask the GCS for this node every second; the call may never return."""
        while not self._ended.wait(_LOOK_SECONDS):
            with contextlib.suppress(Exception):  # silence is told by its length
                nodes = ray.nodes()
                self._heard = time.monotonic()
                self._lost = not any(one["NodeID"] == self._node and one["Alive"] for one in nodes)


def _start_thread(work: Callable[[], None]) -> threading.Thread:
    """Start a thread that does not keep the process."""
    thread = threading.Thread(target=work, name="ray-session", daemon=True)
    thread.start()
    return thread


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _exit_without_ray() -> None:
    """Let nothing that waits for a dead Ray keep this process, which is about to end."""
    # The last that is registered is called first, before Ray's own.
    atexit.register(_exit_at_once)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(_END_SECONDS)


def _exit_at_once() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
