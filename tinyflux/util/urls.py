"""Places that are a path of this machine or a URL."""

import re

from tinyflux.errors import ConfigError


def is_url(location: str) -> bool:
    """Whether this names a place that is no path of this machine."""
    return "://" in location


def join(location: str, path: str) -> str:
    """What is at ``path`` below a path or URL, which may end with ``?options``."""
    place, mark, options = location.partition("?") if is_url(location) else (location, "", "")
    return f"{place.rstrip('/')}/{path}{mark}{options}"


def check_url(location: str) -> None:
    """Refuse a URL with a password, which would be kept with the run's config; ConfigError."""
    if re.match(r"[^/]+://[^/]*:[^/]*@", location):
        scheme, _, rest = location.partition("://")
        raise ConfigError(
            f"the URL '{scheme}://...@{rest.rpartition('@')[2]}' holds a password: leave it out, "
            f"and give it in the environment, as the storage's own tools want it"
        )
