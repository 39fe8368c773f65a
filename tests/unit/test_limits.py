"""Hostile bytes cost no more than their size, and what JSON leaves open is refused."""

from __future__ import annotations

import json
import pickle
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from outbox.errors import ConfigurationError, MalformedMessage
from outbox.limits import Limits

LIMITS = Limits()

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**80), 10**80)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")), inner
        )
    ),
)


@given(ANYTHING, st.booleans(), st.sampled_from([None, 1]))
@example({'a"b\\': ['\\"', "\\\\", ":", "[{,"]}, True, None)
def test_json_of_any_layout_is_read_as_it_is(value: Any, ascii_only: bool, indent: Any) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    assert LIMITS.parse(body) == value


@given(st.binary(max_size=200))
def test_random_bytes_are_read_or_refused_and_nothing_else(body: bytes) -> None:
    try:
        LIMITS.parse(body)
    except MalformedMessage:
        return
    json.loads(body)


@given(st.text(alphabet='"\\[]{}:,eE0123456789.+-u tralsn', max_size=60))
def test_bytes_that_look_like_json_are_read_as_json_reads_them_or_refused(text: str) -> None:
    try:
        value = LIMITS.parse(text.encode())
    except MalformedMessage:
        return
    assert json.loads(text) == value


FLAT = st.dictionaries(
    st.text('ab,:{[ "', max_size=3),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text('a,:{[ "\x00\ud800', max_size=4),
    max_size=4,
)  # fmt: skip


@given(FLAT, st.sampled_from([(",", ":"), (", ", ": "), (",", " :")]), st.booleans())
def test_what_is_taken_at_a_glance_is_what_a_full_look_takes(
    value: dict[str, Any], separators: tuple[str, str], twice: bool
) -> None:
    text = json.dumps(value, separators=separators, ensure_ascii=False)
    if twice and value:
        text = f"{text[:-1]},{text[1:]}"
    check_at_a_glance(text.encode(errors="surrogatepass"))


@given(st.text(alphabet='"\\[]{}:,eE019.- ab', max_size=30))
@example('"a":1,"a":2')
@example('"a" :1,"a":2')
@example('"a":1e999')
@example('"a":1e0000')
@example('"a":{}')
def test_what_looks_like_an_object_is_taken_at_a_glance_only_if_a_full_look_takes_it(
    text: str,
) -> None:
    check_at_a_glance(f"{{{text}}}".encode())


def check_at_a_glance(body: bytes) -> None:
    for limits in (
        LIMITS,
        Limits(size=20),
        Limits(nodes=3),
        Limits(number_length=11),
        Limits(depth=0),
    ):
        value = limits.parse_flat(body)
        if value is not None:
            assert repr(value) == repr(limits.parse(body))


def test_a_short_object_of_texts_and_integers_is_taken_at_a_glance() -> None:
    for value in (
        {"id": 7, "note": "at 10:11:12"},
        {"id": None, "ok": True, "note": "this, that"},
        {"id": 7},
    ):
        for separators in ((",", ":"), (" , ", " : ")):
            body = json.dumps(value, separators=separators).encode()
            assert LIMITS.parse_flat(body) == value


BOMBS = {
    "depth of arrays": (b"[" * 65 + b"]" * 65, "nests more than 64"),
    "depth of objects": (b'{"a":' * 65 + b"1" + b"}" * 65, "nests more than 64"),
    "depth that is never closed": (b"[" * 500_000, "limit is 100,000"),
    "depth behind a string full of quotes": (
        b'["' + b'\\"' * 5_000 + b'",' + b"[" * 65 + b"]" * 66,
        "nests more than 64",
    ),
    "nodes": (b"[" + b"0," * 100_000 + b"0]", "limit is 100,000"),
    "empty objects": (b"[" + b"{}," * 60_000 + b"{}]", "limit is 100,000"),
    "number": (b"1" * 401, "number of more than 400"),
    "negative number": (b'{"a":-' + b"1" * 400 + b"}", "number of more than 400"),
    "fraction": (b"[0." + b"1" * 400 + b"]", "number of more than 400"),
    "number that Python would not read": (b"9" * 5_000, "number of more than 400"),
    "exponent": (b'{"a":1e99999}', "exponent is out of range"),
    "capital exponent": (b"[1E+99999]", "exponent is out of range"),
    "tiny exponent": (b"[1e-99999]", "exponent is out of range"),
    "infinity by exponent": (b"[1e999]", "out of range"),
    "minus infinity by exponent": (b'{"a":[-1e400]}', "out of range"),
    "infinity by digits": (b"9" * 398 + b".0", "out of range"),
    "size": (b" " * 1_048_577, "1,048,577 bytes; the limit is 1,048,576"),
    "NUL": (b'{"a":"\x00"}', "NUL"),
    "escaped NUL": (rb'{"a":"x\u0000"}', "NUL"),
    "escaped NUL after a backslash": (rb'{"a":"\\\u0000"}', "NUL"),
    "escaped NUL in a name": (rb'{"\u0000":1}', "NUL"),
    "half surrogate pair": (rb'{"a":"\ud800"}', "no JSON"),
    "other half": (rb'{"a":"\udc00"}', "no JSON"),
    "encoded half surrogate pair": (b'{"a":"\xed\xa0\x80"}', "no JSON"),
    "NaN": (b'{"a":NaN}', "no JSON"),
    "Infinity": (b"[-Infinity]", "no JSON"),
    "not UTF-8": (b'{"a":"\xff"}', "no JSON"),
    "UTF-16": ('{"a":1}'.encode("utf-16-le"), "NUL"),
    "byte order mark": (b'\xef\xbb\xbf{"a":1}', "no JSON"),
    "name twice": (b'{"a":1,"a":2}', "same name twice"),
    "name twice in depth": (b'{"a":[{"b":{"c":1,"d":":","c":1}}]}', "same name twice"),
    "name twice, escaped once": (rb'{"a":1,"\u0061":2}', "same name twice"),
    "name twice, spaced": (b'{"a" : 1,\n"a"\t: 2}', "same name twice"),
    "pickle": (pickle.dumps({"a": 1}), "NUL"),
    "pickle of old": (pickle.dumps({"a": 1}, protocol=0), "no JSON"),
    "nothing": (b"", "no JSON"),
    "blank": (b" \n", "no JSON"),
    "two values": (b"{}{}", "no JSON"),
    "trailing comma": (b"[1,]", "no JSON"),
    "comment": (b"[1] // one", "no JSON"),
    "control character": (b'"\x01"', "no JSON"),
    "unclosed string": (b'{"a":"', "no JSON"),
    "backslash at the end": (b'"\\', "no JSON"),
}


@pytest.mark.parametrize(("body", "reason"), BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_is_refused_with_its_reason(body: bytes, reason: str) -> None:
    with pytest.raises(MalformedMessage, match=reason):
        LIMITS.parse(body)
    assert LIMITS.parse_flat(body) is None


LOOKALIKES = {
    "escaped backslash before u0000": rb'{"a":"\\u0000"}',
    "brackets in a string": b'"' + b"[{" * 1_000 + b'"',
    "digits in a string": b'"' + b"1" * 1_000 + b'"',
    "exponent in a string": b'["1e99999", "9e0000-4"]',
    "commas in a string": b'"' + b"," * 200_000 + b'"',
    "colons in a string": b'{"a":"10:11:12","b":"a\\":1"}',
    "the same name in two objects": b'[{"a":1},{"a":{"a":2}}]',
    "the longest number": b"1" * 400,
    "the deepest nesting": b"[" * 64 + b"]" * 64,
    "a whole surrogate pair": rb'"\ud83d\ude00"',
    "the largest float": b"1.7976931348623157e308",
}


@pytest.mark.parametrize("body", LOOKALIKES.values(), ids=LOOKALIKES.keys())
def test_what_only_looks_like_a_bomb_is_read(body: bytes) -> None:
    assert LIMITS.parse(body) == json.loads(body)


SLOW = {
    "quotes that are never closed": b'"' + b'\\"' * 524_287,
    "quotes and a backslash at the end": b'"' + b'\\"' * 524_286 + b"\\",
    "backslashes": b"\\" * 1_048_576,
    "backslashes before u0000": b'"' + b"\\" * 1_048_000 + b'u0000"',
    "quotes": b'"' * 1_048_576,
    "digits": b"1" * 400 + b"," + b"1" * 1_048_000,
    "brackets": b"[]" * 49_999,
    "names": b"{" + b",".join(b'"%d":0' % n for n in range(90_000)) + b"}",
    "one long string": b'"' + b"a" * 1_048_574 + b'"',
}


@pytest.mark.parametrize("body", SLOW.values(), ids=SLOW.keys())
def test_a_megabyte_made_to_be_slow_is_not(body: bytes) -> None:
    """Each took between seconds and days with a regular expression for strings; now it is some milliseconds."""
    began = time.process_time()
    with suppress(MalformedMessage):
        LIMITS.parse(body)
    assert time.process_time() - began < 1


def test_limits_can_be_set() -> None:
    tight = Limits(size=20, depth=2, nodes=4, number_length=11)
    assert tight.parse(b"[[1,2],-1234567890]") == [[1, 2], -1_234_567_890]
    for body in (b"[" + b" " * 20 + b"]", b"[[[]]]", b"[1,2,3,4,5]", b"123456789012"):
        with pytest.raises(MalformedMessage):
            tight.parse(body)


def test_a_limit_that_an_envelope_itself_may_break_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="number_length is 10: with less than 11"):
        Limits(number_length=10)
