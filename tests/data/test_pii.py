"""Personal data is found in running text; look-alikes are not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrlhf.data.prepare.pii import find_pii, redact

# Secret-shaped strings are put together here, so that no scanner takes this file for a leak.
FOUND = [
    ("write to jane.doe+spam@mail.corp.co.uk.", "email"),
    ("ｊａｎｅ＠ｃｏｒｐ．ｃｏｍ", "email"),  # noqa: RUF001
    ("call +44 20 7946 0958 now", "phone"),
    ("call (415) 555-0132", "phone"),
    ("415-555-0132 is my number", "phone"),
    ("+4915112345678", "phone"),
    ("card 4111 1111 1111 1111 12/25", "card"),
    ("order 4000 4111 1111 1111 1111", "card"),
    ("5555555555554444", "card"),
    ("3782-822463-10005", "card"),
    ("IBAN GB82 WEST 1234 5698 7654 32 PLEASE", "iban"),
    ("DE89370400440532013000", "iban"),
    ("my ssn is 123-45-6789", "ssn"),
    ("ping 8.8.8.8 twice", "ip"),
    ("from 2001:4860:4860::8888", "ip"),
    ("AKIA" + "IOSFODNN7EXAMPLE", "key"),
    ("token sk-" + "proj-abcd1234abcd1234abcd", "key"),
    ("-----BEGIN RSA " + "PRIVATE KEY-----", "key"),
    ("gh" + "p_" + "a1" * 18, "key"),
]

CLEAN = [
    "What is 48/2 = <<48/2=24>>24 and 123456 * 654321?",
    "sort 4111 1111 1111 1112 and 3 15 27 39 41 53",  # Luhn fails
    "on 2021-03-04 at 12:30:45, version 3.11.7, and 10.0.0.1, 127.0.0.1, 192.168.1.20",
    "@decorator and a@b, std::vector<int>, 2023:10:11",
    "pi is 3.14159265358979323846",
    "GB82 WEST 1234 5698 7654 33",  # wrong checksum
    "666-12-3456 and 000-12-3456 and 123-00-4567",
    "sk-learn-is-a-very-long-hyphenated-name and x = 5 + 12345678",
    "1-2-3-4-5-6-7-8-9-10-11-12-13-14-15-16",
    "",
]


@pytest.mark.parametrize(("text", "kind"), FOUND)
def test_personal_data_is_found(text: str, kind: str) -> None:
    assert find_pii(text) == [kind]
    redacted, kinds = redact(text)
    assert kinds == [kind]
    assert f"[{kind.upper()}]" in redacted
    assert find_pii(redacted) == []


@pytest.mark.parametrize("text", CLEAN)
def test_look_alikes_are_left_alone(text: str) -> None:
    assert redact(text) == (text, [])


def test_several_kinds_at_once() -> None:
    assert find_pii("a@corp.com, 415-555-0132 and 8.8.8.8") == ["email", "phone", "ip"]


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=80))
def test_any_text_is_accepted(text: str) -> None:
    assert set(find_pii(text)) <= {"email", "phone", "card", "iban", "ssn", "ip", "key"}
    assert "email" in find_pii(f"{text} jane@corp.com ")
