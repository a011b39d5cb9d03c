"""The API's door to the sampler; it lives in :mod:`tinyflux.inference.sampler`."""

from tinyflux.inference.sampler import Sampler

__all__ = ["Sampler"]
