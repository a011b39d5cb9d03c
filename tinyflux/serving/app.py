"""The server: Ray Serve deployments, and the command that runs them.

``api`` answers HTTP and calls ``model-NAME``, whose replicas hold an engine each; ``shared`` holds
what they share.
"""

import logging
import os
import re
import signal
import threading
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError

from tinyflux.distributed.ray_session import RaySession
from tinyflux.errors import ConfigError, TinyFluxError
from tinyflux.model.config import ZooConfig
from tinyflux.serving.client import EngineClient
from tinyflux.serving.config import ServeConfig
from tinyflux.serving.engine import open_engine
from tinyflux.serving.http.api import make_api
from tinyflux.serving.http.auth import check_exposure, read_keys
from tinyflux.serving.proxy import HOOK
from tinyflux.serving.replica import EngineReplica
from tinyflux.serving.shared import SharedState
from tinyflux.util.files import warn_if_readable
from tinyflux.util.text import last_line

logger = logging.getLogger(__name__)

APP_NAME = "tinyflux"
# Engines refuse what they have no room for, so nothing may wait where it cannot be refused.
_UNBOUNDED = 100_000
_DELETE_SECONDS = 60.0  # beyond the drawing
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def served_models(config: ServeConfig) -> dict[str, str]:
    """Checkpoints by the names that requests use; the first is the default.

    Raises:
        ConfigError: there is none, a name that cannot be one, or adapters for more than one.
    """
    models = {} if config.checkpoint is None else {APP_NAME: config.checkpoint}
    models |= config.models
    if not models:
        raise ConfigError("there is nothing to serve: set serve.checkpoint or serve.models")
    for setting, names in (("models", models), ("adapters", config.adapters)):
        for name in names:
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"serve.{setting}: '{name}' cannot be a name: use letters, digits, '_' and '-'"
                )
    if config.adapters and len(models) > 1:
        raise ConfigError(
            f"serve.adapters are of one student, and {', '.join(models)} are served: start a "
            "server of its own for each"
        )
    return models


def build_app(config: ServeConfig, zoo: ZooConfig) -> serve.Application:
    """The Ray Serve application; every replica of a model loads its checkpoint once.

    Raises:
        ConfigError: the config cannot work, or would serve the network without keys.
    """
    config.check_limits()
    config.check_defaults()
    check_exposure(config)
    read_keys(config.api_keys_file)
    if config.api_keys_file:
        warn_if_readable(config.api_keys_file, "the API keys")
    names, at = list(served_models(config)), _deployment_name
    free = {"num_cpus": 0}  # they wait, engines work
    quiet = {"enable_access_log": False}  # the API's own log has every request

    def api() -> FastAPI:
        app = serve.get_replica_context().app_name
        engines = {name: serve.get_deployment_handle(at(name), app) for name in names}
        return make_api(EngineClient(config, engines, serve.get_deployment_handle("shared", app)))

    state = serve.deployment(
        name="shared",
        num_replicas=1,
        ray_actor_options=free,
        max_ongoing_requests=_UNBOUNDED,
        logging_config=quiet,
    )
    shared = state(SharedState).bind(config)
    engines = [
        serve.deployment(
            name=at(name),
            ray_actor_options={
                "num_cpus": config.cpus_per_replica,
                "num_gpus": config.gpus_per_replica,
            },
            max_ongoing_requests=_UNBOUNDED,
            graceful_shutdown_timeout_s=config.timeout_s,
            health_check_period_s=2.0,
            logging_config=quiet,
            **_scale(config),
        )(EngineReplica).bind(config, zoo, name, checkpoint, shared)
        for name, checkpoint in served_models(config).items()
    ]
    door = serve.deployment(
        name="api",
        num_replicas=config.http_replicas,
        ray_actor_options=free,
        max_ongoing_requests=_UNBOUNDED,
        graceful_shutdown_timeout_s=config.timeout_s,
    )
    # Bound for their place in the application: the API finds them by name.
    return door(serve.ingress(api)()).bind(shared, *engines)


def _deployment_name(model: str) -> str:
    return f"model-{model}"


def _scale(config: ServeConfig) -> dict[str, Any]:
    """As many replicas as keep each one's batch about full."""
    if not 1 <= config.min_replicas <= config.max_replicas:
        raise ConfigError(
            f"serve.min_replicas {config.min_replicas} and serve.max_replicas "
            f"{config.max_replicas} must be at least 1, and in this order"
        )
    if config.min_replicas == config.max_replicas:
        return {"num_replicas": config.min_replicas}
    for name in ("scale_up_seconds", "scale_down_seconds"):
        if not getattr(config, name) >= 0:
            raise ConfigError(f"serve.{name} must be 0 or more, not {getattr(config, name)}")
    return {
        "autoscaling_config": {
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.max_batch,
            "upscale_delay_s": config.scale_up_seconds,
            "downscale_delay_s": config.scale_down_seconds,
        }
    }


def run_server(config: ServeConfig, zoo: ZooConfig) -> None:
    """Serve until interrupted or terminated; what was accepted is drawn before it ends.

    Raises:
        TinyFluxError: the checkpoint or the models cannot be opened, or the port is taken.
        RayLostError: Ray died; what it started on this machine for this server is gone, too.
    """
    application, models = build_app(config, zoo), served_models(config)
    for checkpoint in models.values():
        # A mistake is told here, not by a replica that restarts for ever.
        open_engine(replace(config, checkpoint=checkpoint), zoo).close(drain=False)
    # Ray Serve's five seconds are too few for a machine that is also training.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    for name, value in HOOK.items():
        os.environ.setdefault(name, value)
    session = RaySession()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        if session.run(lambda: _start(config, application), stop=stop.is_set):
            address = f"http://{config.host}:{config.port}"
            served = ", ".join(models.values())
            logger.info("serving %s at %s (docs at %s/docs)", served, address, address)
            while not stop.wait(1.0):
                session.check()
            logger.info("serving ends")
            # Drains; shutdown alone would cut requests off.
            session.run(lambda: serve.delete(APP_NAME), config.timeout_s + _DELETE_SECONDS)
    finally:
        session.end(tidy=serve.shutdown)


def _start(config: ServeConfig, application: serve.Application) -> None:
    try:
        serve.start(http_options={"host": config.host, "port": config.port})
        serve.run(application, name=APP_NAME, route_prefix="/")
    except (RuntimeError, OSError, RayError) as error:
        raise TinyFluxError(f"the server could not start: {last_line(error)}") from error
