"""An engine as a server's settings ask for it."""

from dataclasses import fields

from tinyflux.distributed.weights import load_student
from tinyflux.errors import ConfigError, InputError
from tinyflux.inference.config import EngineConfig
from tinyflux.inference.engine import ImageEngine
from tinyflux.inference.request import SampleRequest
from tinyflux.model.config import ZooConfig
from tinyflux.serving.config import ServeConfig
from tinyflux.util.device import resolve_device


def open_engine(config: ServeConfig, zoo: ZooConfig) -> ImageEngine:
    """An engine for ``config.checkpoint``, with its models loaded and its threads running.

    Args:
        zoo: where the text encoders and the VAE are, and the precision and device of all.

    Raises:
        TinyFluxError: a limit makes no sense, the checkpoint or a model cannot be opened, or a
            request that says nothing would be refused.
    """
    if config.checkpoint is None:
        raise InputError("serve.checkpoint must be set")
    config.check_limits()
    model = load_student(config.checkpoint, str(resolve_device(zoo.device)), zoo.dtype)
    models = zoo.build(model.config)
    models.load_vae()
    models.load_t5()
    models.load_clip()
    limits = {item.name: getattr(config, item.name) for item in fields(EngineConfig)}
    engine = ImageEngine(model, models, EngineConfig(**limits))
    try:
        _check_defaults(config, engine)
    except ConfigError:
        engine.close(drain=False)
        raise
    return engine


def _check_defaults(config: ServeConfig, engine: ImageEngine) -> None:
    """Refuse a config whose defaults are outside of its limits, sizes included."""
    size, steps, guidance = config.default_size, config.default_steps, config.default_guidance
    try:
        engine.check(SampleRequest("a prompt", "", steps, guidance, size, size, 0))
    except InputError as error:
        raise ConfigError(
            f"a request that says nothing would be refused ({error}): set serve.default_size, "
            "serve.default_steps and serve.default_guidance within the server's limits"
        ) from error
