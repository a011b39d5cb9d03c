"""TinyFlux: distributed training, distillation and serving of a compact text-to-image model."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Where diffusers looks for a saved pipeline's classes; importing the package stays cheap.
    if name in ("TinyFluxPipeline", "TinyFluxTransformer"):
        from tinyflux.pipeline import pipeline, transformer

        return getattr(pipeline if name == "TinyFluxPipeline" else transformer, name)
    raise AttributeError(f"module 'tinyflux' has no attribute '{name}'")
