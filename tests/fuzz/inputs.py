"""What readers are fed with: valid files with some places changed, cut short, or with bytes exchanged."""

import json

from hypothesis import strategies as st

#: Values that readers forget: other types, ends of ranges, texts that steer terminals, paths.
VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    10**30,
    10**99,
    1.5,
    -0.0,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "x",
    "\x1b[2J\nerror: forged",
    "\ud800",
    "\0",
    "../../etc/passwd",
    "long" * 2000,
    [],
    {},
    [[]],
    {"kind": None},
    {"kind": "x"},
    [None, 1, "x"],
)
#: Texts that are no values at all for `json.dumps`.
RAW = ("[" * 100_000, '{"a":' * 100_000, "9" * 5000, "-", '"\\ud800', "1e999", "NaN", "\ufeff{}", "")


def _places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _changed(value, path, change):
    if not path:
        return change
    key, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    if not rest and change is _ABSENT:
        del copy[key]
    else:
        copy[key] = _changed(copy[key], rest, change)
    return copy


_ABSENT = object()


@st.composite
def json_bytes(draw, examples):
    """A JSON text, made from one of the `examples` by changing, removing and adding some values."""
    value = draw(st.sampled_from(examples))
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(list(_places(value))))
        change = draw(st.sampled_from((_ABSENT, *VALUES)))
        value = _changed(value, path, change) if path or change is not _ABSENT else value
    text = json.dumps(value)
    if draw(st.integers(0, 9)) == 0:  # a value that can't be written otherwise
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.sampled_from(RAW)) + text[place:]
    return draw(damaged(text.encode("utf-8", "surrogatepass")))


@st.composite
def damaged(draw, content, often=3):
    """Bytes with some exchanged, cut out or put in; mostly none."""
    content = bytearray(content)
    for _ in range(draw(st.integers(0, 2)) if draw(st.integers(0, often)) == 0 else 0):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from((0, 1, 1, 1, 8, 1000))))
        content[start:end] = draw(st.one_of(st.binary(max_size=16), st.sampled_from((b"\xff" * 8, b"\0" * 8, b"\n"))))
    return bytes(content)
