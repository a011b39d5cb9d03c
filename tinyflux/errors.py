"""Every error that TinyFlux raises on purpose.

A message is one sentence or two: what is wrong, where, and what to do. The command line prints it
without a traceback and exits with status 2; a library caller catches :class:`TinyFluxError` or a
subclass, each of which is also the builtin exception that a caller would expect.
"""


class TinyFluxError(Exception):
    """Base of all deliberate errors."""


class ConfigError(TinyFluxError, ValueError):
    """A configuration that cannot work: an unknown key, sizes that do not fit together."""


class InputError(TinyFluxError, ValueError):
    """User data that cannot be used: a broken picture, an empty or too long prompt, a bad shape."""


class CheckpointError(TinyFluxError, ValueError):
    """A checkpoint that is missing, broken or made for another model."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are not as they were written; an older one may be whole."""


class CacheError(TinyFluxError, ValueError):
    """A cache that is missing, incomplete, damaged or made for another model."""


class HubError(TinyFluxError, OSError):
    """A repository or directory of weights that cannot be opened."""


class StorageError(TinyFluxError, RuntimeError):
    """A place at a URL that cannot be reached, or that holds something else than it should."""


class TrainingError(TinyFluxError, RuntimeError):
    """A run that cannot go on, such as one whose loss stays non-finite."""


class OverloadedError(TinyFluxError, RuntimeError):
    """More work than a server has room for.

    Attributes:
        retry_after: seconds after which there may be room.
    """

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class ServingError(TinyFluxError, RuntimeError):
    """A picture that will not come: it was cancelled, or the engine is closed or broken."""


class RayLostError(TinyFluxError, RuntimeError):
    """A Ray that died under a job which cannot do without it."""


class MissingDependencyError(TinyFluxError, ImportError):
    """An optional package that the requested feature needs."""
