"""Sizes of pictures as run files and prompt files say them: in pixels.

Some settings were in latents once: :class:`FormerSides` takes their names for one more release.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from tinyflux.errors import ConfigError, InputError
from tinyflux.util.limits import MAX_SIDE

SIDES = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})")


class PictureSize(NamedTuple):
    """Sides of a picture in pixels."""

    width: int
    height: int


def parse_size(value: object, name: str = "size") -> PictureSize:
    """The size that ``512`` (a square) or ``"640x480"`` (width and height) says.

    Args:
        value: what a person wrote.
        name: what it is called, for the message.

    Raises:
        InputError: it is neither.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return PictureSize(value, value)
    if isinstance(value, str) and (match := SIDES.fullmatch(value)):
        return PictureSize(int(match[1]), int(match[2]))
    raise InputError(
        f"{name} must be pixels, as a whole number such as 512 or as WIDTHxHEIGHT such as "
        f"640x480, not {value!r:.40}"
    )


def check_side(name: str, pixels: int, step: int, most: int) -> None:
    """Refuse a side that latents cannot fill, or that is too large, with an :class:`InputError`.

    Args:
        name: what the side is called, for the message.
        pixels: its length.
        step: pixels of a latent's side.
        most: the largest side, in pixels.
    """
    if pixels % step or not step <= pixels <= most:
        raise InputError(
            f"{name} must be a multiple of {step} from {step} to {most} pixels, not {pixels}"
        )


def fitting_size(value: object, setting: str, downscale: int) -> PictureSize:
    """The size that a setting says.

    Args:
        value: the setting's value, as :func:`parse_size` takes it.
        setting: its whole name, for the message.
        downscale: pixels of a latent's side.

    Raises:
        ConfigError: it is none, or latents cannot fill it.
    """
    try:
        size = parse_size(value, setting)
        check_side(f"{setting}: the width", size.width, downscale, MAX_SIDE * downscale)
        check_side(f"{setting}: the height", size.height, downscale, MAX_SIDE * downscale)
    except InputError as error:
        raise ConfigError(str(error)) from error
    return size


@dataclass(frozen=True)
class FormerSides:
    """Two settings in latents that one in pixels has taken the place of.

    Attributes:
        section: The section of run files that has them.
        new: The setting in pixels.
        height: The former setting of the height.
        width: The former setting of the width.
    """

    section: str
    new: str
    height: str
    width: str

    def check(self, settings: object) -> None:
        """Refuse a size that cannot be one, or that is said twice.

        Raises:
            ConfigError: it says which settings, and what they may be.
        """
        used = self._used(settings)
        if getattr(settings, self.new) is not None:
            if used:
                raise ConfigError(
                    f"{self._new} and {' and '.join(used)} are both set: keep {self._new}, which "
                    "is in pixels"
                )
            try:
                parse_size(getattr(settings, self.new), self._new)
            except InputError as error:
                raise ConfigError(str(error)) from error
        for name, latents in used.items():
            if not 1 <= latents <= MAX_SIDE:
                raise ConfigError(f"{name} must be from 1 to {MAX_SIDE} latents, not {latents}")

    def warning(self, settings: object) -> str | None:
        """What to tell whoever uses a former name, if one is used."""
        if not (used := self._used(settings)):
            return None
        verb = "is" if len(used) == 1 else "are"
        return (
            f"{' and '.join(used)} {verb} in latents and will not be known after this release: set "
            f"{self._new}, in pixels, instead"
        )

    def in_pixels(
        self, settings: object, downscale: int, default: int, former_default: int
    ) -> PictureSize:
        """The size that ``settings`` ask for, by the new name or a former one.

        Args:
            settings: the section.
            downscale: pixels of a latent's side.
            default: pixels of each side where they say nothing.
            former_default: latents of a side where they say the other one alone, in latents.

        Raises:
            ConfigError: latents cannot fill it.
        """
        if not self._used(settings):
            value = getattr(settings, self.new)
            return fitting_size(default if value is None else value, self._new, downscale)
        height = getattr(settings, self.height) or former_default
        width = getattr(settings, self.width) or former_default
        return PictureSize(width * downscale, height * downscale)

    @property
    def _new(self) -> str:
        return f"{self.section}.{self.new}"

    def _used(self, settings: object) -> dict[str, int]:
        """The former names that are given, with their latents."""
        values = {name: getattr(settings, name) for name in (self.height, self.width)}
        return {
            f"{self.section}.{name}": value for name, value in values.items() if value is not None
        }
