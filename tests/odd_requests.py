"""Requests as nobody means them, made from what an API says of itself."""

import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import httpx
from hypothesis import strategies as st

# JSON has escapes for halves of surrogate pairs.
TEXTS = st.text(st.characters(exclude_categories=()), max_size=40)
_SCALARS = st.one_of(
    TEXTS.map(json.dumps),
    st.text(st.characters(categories=["Cs"]), min_size=1, max_size=3).map(json.dumps),
    st.sampled_from(['"\\udfff"', '"red \\ud800 circle"', '"\\u0000"', '""', '"\\ud83d\\ude00"']),
    st.sampled_from(["null", "true", "false", "NaN", "Infinity", "-Infinity", "1e400", "-0.0"]),
    st.integers(-(2**70), 2**70).map(str),
    st.tuples(st.sampled_from(["", "-"]), st.integers(1, 6000)).map(lambda t: t[0] + "9" * t[1]),
    st.floats().map(json.dumps),
    st.sampled_from(["24x16", "0x0", "16x16x16", "99999x99999", "auto", "a" * 2000, "red circle"])
    .map(json.dumps),
)  # fmt: skip
_NESTED = st.integers(1, 3000).map(lambda depth: "[" * depth + "]" * depth)
# Text that a JSON parser may be given for one value; not all of it is JSON.
VALUES = st.one_of(
    _SCALARS,
    st.lists(_SCALARS, max_size=3).map(lambda parts: f"[{', '.join(parts)}]"),
    TEXTS.map(lambda key: f"{{{json.dumps(key)}: 1}}"),
    _NESTED,
    TEXTS.map(lambda text: text.encode(errors="replace").decode()),
)
# What a header's value may hold on its way here.
HEADER_VALUES = st.text(
    st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=40
)
HEADERS = ("accept", "content-type", "origin", "authorization", "cookie", "forwarded",
           "x-request-id", "x-session-id", "serve_multiplexed_model_id", "range",
           "x-request-timeout-seconds", "x-request-disconnect-disabled")  # fmt: skip
# Enough for each POST to be answered with a picture.
GOOD = {"prompt": '"red circle"'}


@dataclass(frozen=True)
class Address:
    """A method and a path, and what goes there: fields of the body, of the path, of the query."""

    method: str
    path: str
    fields: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Odd:
    """A request; ``content`` is bytes that need not be JSON."""

    method: str
    url: str
    content: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    def build(self, base: str, headers: dict[str, str]) -> httpx.Request:
        given = {**headers, **self.headers}
        raw = [(name.encode(), value.encode("latin-1")) for name, value in given.items()]
        return httpx.Request(self.method, f"{base}{self.url}", content=self.content, headers=raw)


def addresses(schema: dict[str, Any]) -> list[Address]:
    """Every address of an OpenAPI schema."""
    found = []
    for path, methods in schema["paths"].items():
        for method, says in methods.items():
            body = says.get("requestBody", {}).get("content", {}).get("application/json", {})
            name = body.get("schema", {}).get("$ref", "").rpartition("/")[2]
            fields = schema["components"]["schemas"][name]["properties"] if name else {}
            queries = [one["name"] for one in says.get("parameters", []) if one["in"] == "query"]
            found.append(Address(method.upper(), path, tuple(fields), tuple(queries)))
    return found


@st.composite
def odd_requests(draw: st.DrawFn, address: Address) -> Odd:
    """Good requests with one or more parts that are odd."""
    url = address.path
    while "{" in url:
        before, _, rest = url.partition("{")
        url = before + quote(draw(TEXTS), errors="replace", safe="") + rest.partition("}")[2]
    if address.queries and draw(st.booleans()):
        names = draw(st.lists(st.sampled_from(address.queries), max_size=2))
        url += "?" + "&".join(f"{name}={quote(draw(TEXTS), errors='replace')}" for name in names)
    odd = Odd(address.method, url, headers={"content-type": "application/json"})
    if address.method == "POST":
        odd.content = draw(st.one_of(_bodies(address.fields), st.binary(max_size=60)))
    if draw(st.booleans()):
        odd.headers[draw(st.sampled_from(HEADERS))] = draw(HEADER_VALUES).strip()
    return odd


@st.composite
def _bodies(draw: st.DrawFn, fields: tuple[str, ...]) -> bytes:
    members = {name: value for name, value in GOOD.items() if name in fields}
    for name in draw(st.lists(st.sampled_from(fields), min_size=1, max_size=2)):
        members[name] = draw(VALUES)
    if draw(st.integers(0, 4)) == 0:
        members[draw(TEXTS)] = draw(VALUES)
    return body_of(members)


def body_of(members: dict[str, str]) -> bytes:
    """An object whose values are text as it is."""
    pairs = (f"{json.dumps(name)}: {value}" for name, value in members.items())
    return f"{{{', '.join(pairs)}}}".encode()
