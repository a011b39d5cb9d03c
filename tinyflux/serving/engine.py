"""An engine as a server's settings ask for it."""

from tinyflux.distributed.weights import load_student
from tinyflux.errors import InputError
from tinyflux.inference.config import EngineConfig
from tinyflux.inference.engine import ImageEngine
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
    device = str(resolve_device(zoo.device))
    model = load_student(config.checkpoint, device, zoo.dtype, config.adapters)
    models = zoo.build(model.config)
    models.load_vae()
    models.load_t5()
    models.load_clip()
    config.check_defaults(models.downscale)
    largest = config.largest_picture(models.downscale)
    limits = EngineConfig(
        max_steps=config.max_steps,
        max_height=largest.height,
        max_width=largest.width,
        max_prompt_chars=config.max_prompt_chars,
        max_batch=config.max_batch,
        max_queue=config.max_queue,
        prompt_cache=config.prompt_cache,
    )
    return ImageEngine(model, models, limits)
