"""The token that guards a Ray of this machine."""

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from tinyflux.errors import ConfigError
from tinyflux.util.files import warn_if_readable


def guard_token(make: bool) -> None:
    """See that Ray's token, where one is used, is its owner's alone; warn where it is not.

    Args:
        make: for a new Ray, which wants a token unless told otherwise: write one where Ray would,
            which lets everyone on the machine read it.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "token" if make else "disabled").lower()
    if mode != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(path or Path.home() / ".ray" / "auth_token")
    if make and not path and not file.exists():
        _make_token(file)
    warn_if_readable(file, "Ray's token")


def _make_token(file: Path) -> None:
    """Write a new token, whole and for its owner alone, unless another job is first."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=".token.") as new:
            new.write(secrets.token_hex(32))
            new.flush()
            with contextlib.suppress(FileExistsError):
                os.link(new.name, file)
    except OSError as error:
        raise ConfigError(
            f"Ray's token cannot be written to {file}: {error.strerror}; let RAY_AUTH_TOKEN_PATH "
            "name a file that holds one"
        ) from error
