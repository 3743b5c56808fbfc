"""Find or redact personal data and secrets in text.

The values found are never returned, logged or stored. Patterns are narrow. Numbers that have a
checksum or a registry are checked against it, because a filter that drops every long number would
drop arithmetic, code and dates. Every repetition is bounded, so the time is linear in the length of
the text.

Not supported: names and street addresses, which patterns cannot recognize.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Callable

_EMAIL = re.compile(
    r"(?<![\w.+-])[\w.%+-]{1,64}@(?:[a-z0-9-]{1,63}\.){1,5}[a-z]{2,24}(?![\w-])", re.IGNORECASE
)
# International numbers with their plus, or the North American grouping; ten bare digits could be
# anything.
_PHONE = re.compile(
    r"(?<![\w+])\+[1-9](?:[ .()/-]{0,2}[0-9]){7,14}(?![0-9])"
    r"|(?<![\w.-])(?:1[ .-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[ .-])"
    r"[2-9][0-9]{2}[ .-][0-9]{4}(?![\w-])"
)
# Grouped as printed on cards (4-4-4-4, 4-4-4-4-3, 4-6-5) or not at all: lists of small numbers are
# no cards. The look-ahead finds overlapping candidates, so a number in front of a card does not
# hide it.
_CARD = re.compile(
    r"(?<![\w.+])"
    r"(?=([2-6][0-9]{3}([ -]?)[0-9]{4}\2[0-9]{4}\2[0-9]{4}(?:\2[0-9]{3})?(?!\w|\.[0-9])"
    r"|3[47][0-9]{2}([ -]?)[0-9]{6}\3[0-9]{5}(?!\w|\.[0-9])))"
)
_IBAN = re.compile(r"(?<!\w)([A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]){11,30})")
# ISO 13616: each country's code and the length of its numbers.
_IBAN_REGISTRY = """
    AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20
    EG29 ES24 FI18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30
    KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24
    PL28 PS29 PT25 QA29 RO24 RS22 SA24 SC31 SE24 SI19 SK24 SM27 ST25 SV28 TL23 TN24 TR26 UA29 VA22
    VG24 XK20
"""
_IBAN_LENGTHS = {entry[:2]: int(entry[2:]) for entry in _IBAN_REGISTRY.split()}
_SSN = re.compile(r"(?<![\w-])(?!000|666|9)[0-9]{3}-(?!00)[0-9]{2}-(?!0000)[0-9]{4}(?![\w-])")
_IPV4 = re.compile(r"(?<![\w.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![\w]|\.[0-9])")
_IPV6 = re.compile(r"(?<![\w:])[23][0-9a-f]{3}:[0-9a-f:]{2,35}(?![\w:])", re.IGNORECASE)
_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # Amazon
    r"|\bAIza[\w-]{35}(?![\w-])"  # Google
    r"|\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{40,100}|glpat-[\w-]{20,40})"
    r"|\bxox[abprs]-[\w-]{10,80}"  # Slack
    r"|\bhf_[A-Za-z]{30,40}\b"
    # OpenAI, Anthropic; the required digit excludes kebab-case words.
    r"|\bsk-(?=[A-Za-z_-]{0,40}[0-9])[\w-]{20,200}"
    r"|\beyJ[\w-]{10,2000}\.eyJ[\w-]{10,4000}\.[\w-]{10,1000}"  # JSON web token
)


# Checks of a match: each returns how many of its characters are a finding, 0 for none.


def _card_length(match: str) -> int:
    """Return the length of a match whose Luhn checksum is right."""
    digits = [int(c) for c in match if c.isdigit()]
    doubled = [d * 2 - 9 * (d > 4) for d in digits[-2::-2]]
    valid = len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0
    return len(match) if valid else 0


def _iban_length(match: str) -> int:
    """Return the length of the IBAN that a match begins with.

    ISO 13616: letters become 10..35, the first four characters move to the end, and the number is 1
    modulo 97. The match may extend into words in capitals, so the country's length decides where
    the IBAN ends.
    """
    length = _IBAN_LENGTHS.get(match[:2], 0)
    indices = [i for i, character in enumerate(match) if character != " "][:length]
    compact = "".join(match[i] for i in indices)
    if len(compact) < max(length, 1):
        return 0
    number = int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4]))
    return indices[-1] + 1 if number % 97 == 1 else 0


def _public_address_length(match: str) -> int:
    """Return the length of a match that is a public IP address."""
    try:
        return len(match) if ipaddress.ip_address(match).is_global else 0
    except ValueError:
        return 0


# (kind, a character without which the pattern cannot match, the pattern, its check)
_KINDS: list[tuple[str, str, re.Pattern[str], Callable[[str], int]]] = [
    ("email", "@", _EMAIL, len),
    ("phone", "", _PHONE, len),
    ("card", "", _CARD, _card_length),
    ("iban", "", _IBAN, _iban_length),
    ("ssn", "-", _SSN, len),
    ("ip", ".", _IPV4, _public_address_length),
    ("ip", ":", _IPV6, _public_address_length),
]
_DIGIT = re.compile("[0-9]")


def find_pii(text: str) -> list[str]:
    """Return the kind of each finding in `text`, in order of position.

    The kinds are email, phone, card, iban, ssn, ip and key. Full-width and other compatibility
    forms of letters and digits are read as the plain ones.
    """
    return [kind for _, _, kind in _spans(_plain(text))]


def redact(text: str) -> tuple[str, list[str]]:
    """Return `text` with each finding replaced by its kind, such as [EMAIL], and the kinds.

    The kinds are those of `find_pii`. Text with a finding is returned in compatibility form (NFKC),
    in which the finding was made; other text is not changed.
    """
    plain = _plain(text)
    spans = _spans(plain)
    if not spans:
        return text, []
    pieces, end = [], 0
    for start, stop, kind in spans:
        pieces += [plain[end:start], f"[{kind.upper()}]"]
        end = stop
    return "".join([*pieces, plain[end:]]), [kind for _, _, kind in spans]


def _plain(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFKC", text)


def _spans(plain: str) -> list[tuple[int, int, str]]:
    """Return (start, end, kind) of the findings, in order; overlapping ones are merged."""
    found = [(match.start(), match.end(), "key") for match in _KEY.finditer(plain)]
    digits = _DIGIT.search(plain) is not None
    for kind, needed, pattern, check in _KINDS:
        if needed in plain and (digits or kind == "email"):
            for match in pattern.finditer(plain):
                group = 1 if pattern.groups else 0
                if length := check(match[group]):
                    found.append((match.start(group), match.start(group) + length, kind))
    spans: list[tuple[int, int, str]] = []
    for start, stop, kind in sorted(found):
        if spans and start < spans[-1][1]:
            first, end, first_kind = spans[-1]
            spans[-1] = (first, max(end, stop), first_kind)
        else:
            spans.append((start, stop, kind))
    return spans
