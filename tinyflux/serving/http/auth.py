"""API keys: who may ask. Keys are kept as digests and never logged."""

import hashlib
import hmac
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from tinyflux.errors import ConfigError
from tinyflux.serving.config import ServeConfig

MIN_KEY = 16  # characters
# What OpenAPI calls an address that needs no key, beside what is told of all of them.
KEYLESS: dict[str, Any] = {"security": [{}]}


class ApiKeys:
    """The keys of a server; without any, everyone who can reach it may ask."""

    def __init__(self, digests: list[bytes]):
        self._digests = digests

    def __bool__(self) -> bool:
        return bool(self._digests)

    def admit(self, authorization: str) -> bool:
        """Whether the header ``Authorization`` holds one of the keys.

        Takes as long for a right key as for a wrong one: all are compared, as digests.
        """
        scheme, _, given = authorization.partition(" ")
        digest = hashlib.sha256(given.strip().encode()).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return found and scheme.lower() == "bearer"


def read_keys(path: str | None) -> ApiKeys:
    """The keys in a file, one a line; empty lines and lines that begin with ``#`` are none.

    Raises:
        ConfigError: the file cannot be read, has no key, or one that is too short.
    """
    if path is None:
        return ApiKeys([])
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"serve.api_keys_file '{path}' cannot be read: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"serve.api_keys_file '{path}' has no key: write one a line")
    if any(len(key) < MIN_KEY for key in keys):
        raise ConfigError(
            f"serve.api_keys_file '{path}' has a key of less than {MIN_KEY} characters: make keys "
            "with `openssl rand -hex 24`"
        )
    return ApiKeys([hashlib.sha256(key.encode()).digest() for key in keys])


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(config: ServeConfig) -> None:
    """Refuse to serve the network without keys, unless the config says so.

    Raises:
        ConfigError: the host is not loopback, and there are no keys.
    """
    if not (is_loopback(config.host) or config.api_keys_file or config.allow_public):
        raise ConfigError(
            f"serve.host {config.host} lets others in: set serve.api_keys_file, or "
            "serve.allow_public if everyone may draw"
        )
