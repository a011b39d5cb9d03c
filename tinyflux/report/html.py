"""What HTML pages share: the filling in of a template, one style, and pictures that are inside."""

import base64
import io
from pathlib import Path

import jinja2
from PIL import Image

_HERE = Path(__file__).parent


def fill(template: Path, **values: object) -> str:
    """A page from a Jinja template, which may include its neighbours and ``style.css``.

    Every text is escaped, and a name that has no value is an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _HERE]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template.name).render(**values)


def data_url(png: bytes) -> str:
    """A PNG as an address that a page has inside itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def twice_its_width(png: bytes) -> int:
    """The pixels across at which a grid of small pictures is shown."""
    with Image.open(io.BytesIO(png)) as image:
        width: int = image.width
    return 2 * width
