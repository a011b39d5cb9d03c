"""Short texts out of long ones."""


def first_line(error: object) -> str:
    """The first line of an error's message, or the error's name if it says nothing."""
    return _lines(error)[0]


def last_line(error: object) -> str:
    """The last line of an error's message, where Ray puts the reason; or the error's name."""
    return _lines(error)[-1]


def _lines(error: object) -> list[str]:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines or [repr(error)]
