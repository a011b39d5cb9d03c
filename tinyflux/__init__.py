"""TinyFlux: distributed training, distillation and serving of a compact text-to-image model."""

__version__ = "0.1.0"
