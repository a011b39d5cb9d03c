"""Short texts: of errors, sizes and times."""

_SIZES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
_HOUR = 3600


def first_line(error: object) -> str:
    """The first line of an error's message, or the error's name if it says nothing."""
    return _lines(error)[0]


def last_line(error: object) -> str:
    """The last line of an error's message, where Ray puts the reason; or the error's name."""
    return _lines(error)[-1]


def _lines(error: object) -> list[str]:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines or [repr(error)]


def rounded(value: float, digits: int = 2) -> str:
    """``value`` with so many significant digits: ``1234.5`` -> ``"1,200"``."""
    shown = float(f"{value:.{digits - 1}e}")
    exponent = int(f"{shown:e}".split("e")[1])
    return f"{shown:,.{max(0, digits - 1 - exponent)}f}"


def size(count: float) -> str:
    """Bytes with three significant digits: ``12_345_678`` -> ``"12.3 MB"``, a MB being 1e6."""
    for unit, one in _SIZES:
        if count >= 0.9995 * one:  # what rounds to one
            return f"{rounded(count / one, 3)} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """A time with two significant digits, in the unit that people would use: ``"16 s"``."""
    if seconds < 90:
        return f"{rounded(seconds)} s"
    if seconds < 1.5 * _HOUR:
        return f"{rounded(seconds / 60)} minutes"
    if seconds < 48 * _HOUR:
        return f"{rounded(seconds / _HOUR)} hours"
    return f"{rounded(seconds / (24 * _HOUR))} days"
