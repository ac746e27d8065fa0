"""Personal data behind masks that say what was there: "write to <EMAIL> or call <PHONE>".

What can be checked is: cards by Luhn's sum and the issuers' ranges, IBANs by their remainder and their country's length, IP
addresses by being public ones. Telephone numbers cannot be; they are known by a leading + or 00, by a word before them, or by
the way a country writes its numbers. Versions, dates, ISBNs and the like must stay, which a test bounds.
"""

import ipaddress
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

from jaxllm.data.document import Document

# Chinese, Japanese, Korean, Thai and others write without spaces: a letter of theirs is no part of the number or address
# that it stands beside, so \w and \b do not tell where one ends
L = r"\dA-Za-z_\u00b5\u00c0-\u024f\u1e00-\u1eff"  # within [ ]: what numbers do not touch
SPACED = r"\W\u0e00-\u1c7f\u1c90-\u1dff\u2e80-\U0010ffff"  # within [^ ]: letters of scripts with spaces (1c80: Cyrillic)
EMAIL = re.compile(
    rf"(?:(?<![^{SPACED}])(?<![.+%'-]))(?:[^{SPACED}]|[+%-])(?:[^{SPACED}]|[.+%'-]){{0,63}}"
    rf"(?:@|\s?[\[(]\s?at\s?[\])]\s?)"
    rf"(?:(?:(?:[^{SPACED}]|-){{1,63}}|(?:[^\W\0-\u0dff]|-){{1,63}})(?:\.|\s?[\[(]\s?dot\s?[\])]\s?)){{1,5}}"
    r"(?!(?:png|jpe?g|gif|svg|webp|ico|css|js|ts|py|h|c|so|html?|json|xml|md|txt|service|socket|timer|target|mount)(?![a-z0-9_]))"
    rf"(?:[^\d_{SPACED}]{{2,24}}(?![^{SPACED}])|中国|中國|公司|网络|台湾|台灣|香港|한국|ไทย)",
    re.IGNORECASE)
MAY_BE_EMAIL = re.compile(r"@|[aA][tT]\s?[\])]")

KEYS = re.compile(r"""-----BEGIN [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----
(?:(?:(?!-----)[\s\S]){20,20000}-----END [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----|(?:\s{0,4}[A-Za-z0-9+/=]{30,80}){1,400})
|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36,251}\b|\bgithub_pat_\w{50,255}\b|\bglpat-[\w-]{20,}|\bxox[abeoprs]-[\w-]{10,250}
|\bAIza[\w-]{35}|\b[srp]k_(?:live|test)_\w{16,250}|\bsk-[\w-]{20,250}|\bhf_[A-Za-z0-9]{30,60}\b|\bnpm_[A-Za-z0-9]{36}\b|\bpypi-[\w-]{50,}
|\bSG\.[\w-]{16,64}\.[\w-]{30,}|\bSK[0-9a-f]{32}\b|\beyJ[\w-]{10,2000}\.eyJ[\w-]{10,4000}\.[\w-]{10,}
""".replace("\n", ""), re.ASCII)
KEY_MARKS = ("PRIVATE KEY", "AKIA", "ASIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat", "glpat-", "xox", "AIza",
             "k_live_", "k_test_", "sk-", "hf_", "npm_", "pypi-", "SG.", "SK", "eyJ")
# a value that its name says is secret
SECRET = re.compile(r"(?<![\w+/.-])(?=[A-Za-z+/_.-]{0,250}[0-9])[A-Za-z0-9+/_.-]{16,250}={0,2}", re.ASCII)
NAMES_SECRET = re.compile(
    r"(?i)(?:(?:api|access|auth|secret|private|client)[ _-]?(?:key|token|secret)(?:[ _-]?id)?|token|secret|passwd|password"
    r"|bearer)"
    r"""["']?\s{0,3}(?:[:=：]|=>|\s)\s{0,3}["']?$""")
SECRET_MARKS = ("key", "token", "secret", "passw", "bearer")
# of a shape that holds few digits, told by its name
GIVEN = re.compile(
    r"""(?i)((?:secret[_ ]?access[_ ]?key|account[_ ]?key)["']?\s{0,3}[:=]\s{0,3}["']?"""
    r"""|authorization["']?\s{0,3}[:=]\s{0,3}["']?basic\s{1,3})"""
    r"([A-Za-z0-9+/]{8,250}={0,2})")
IN_URL = re.compile(r"""(?<=://)([^\s/:@<>"'{}$]{0,64}:)[^\s/:@<>"'{}$]{1,128}(?=@[\w.-])""")  # scheme://user:password@host

IPV4 = re.compile(rf"(?<![{L}.-])(?:\d{{1,3}}\.){{3}}\d{{1,3}}(?![{L}-]|\.\d)")
IPV6 = re.compile(r"(?<![\w:.])[23][0-9a-fA-F]{3}:(?:[0-9a-fA-F]{0,4}:){1,6}[0-9a-fA-F]{0,4}(?![\w:])", re.ASCII)
IS_VERSION = re.compile(
    r"(?i)(?:version|release|revision|build|\bver|\bv|\brev|section|chapter|figure|table|clause"
    r"|版本|バージョン|버전|§)[ .:=]*$|==\s?$")
SAYS_IP = re.compile(
    r"(?i)(?<![a-z\d])(?:ip|ips|address|addr|host|server|dns|ping|from|nameserver|gateway|src|dst)(?![a-z\d])[^\n]{0,12}$")

CARD = re.compile(rf"(?<![{L}.,-])" r"(?:\d{4}([ -]?)\d{4}\1\d{4}\1\d{1,4}(?:\1\d{3})?"
                  r"|3\d{3}([ -]?)\d{6}\2\d{4,5})" rf"(?![{L}-]|[.,]\d)")
IBAN = re.compile(rf"(?<![{L}])" r"[A-Z]{2}\d{2}(?=[ A-Z0-9]{11})")
# ISO 13616: how long each country's is
IBAN_LENGTH = {
    "AD": 24, "AE": 23, "AT": 20, "BE": 16, "BG": 22, "BR": 29, "CH": 21, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "EE": 20,
    "ES": 24, "FI": 18, "FR": 27, "GB": 22, "GI": 23, "GR": 27, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IS": 26, "IT": 27,
    "KZ": 20, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "MC": 27, "MT": 31, "NL": 18, "NO": 15, "PL": 28, "PT": 25, "QA": 29,
    "RO": 24, "RS": 22, "SA": 24, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "TR": 26, "UA": 29,
}

_DIGITS = r"\(?\d[\d ().\u00a0/-]{4,20}\d" rf"(?![{L}]|[.,-]\d)"
PHONE_NEAR_WORD = re.compile(
    rf"(?i)((?:(?<![{L}])(?:(?:tele)?(?:phone|fon|fono|fone)|telefax|tel|fax|mobile|mobil|cell(?:ular)?|handy"
    r"|call(?:\s+(?:me|us))?(?:\s+(?:at|on))?|téléphone|tél|teléfono|móvil|portable|whatsapp|sms|phone\s+number)"
    r"|телефон|тел|моб|電話(?:番号)?|电话|手机|手機|携帯|전화|हेल्पलाइन)"
    r"(?:\s*(?:no|nr|number|numéro|nummer|号码|號碼|号|번호))?[.:：)]{0,3}\s{0,3}[:=：]?\s{0,2})(\+?" + _DIGITS + ")")
PHONE_ABROAD = re.compile(
    rf"(?<![{L}+.-])(?<!\d )" r"(?:\+|00(?=[1-9]))\(?[1-9][\d ().\u00a0/-]{5,19}\d" rf"(?![{L}]|[.,-]\d)")
PHONE_AT_HOME = re.compile(
    rf"(?<![{L}.,+/-])(?<!\d )(?:"
    r"(?:1[ -.])?\(?[2-9]\d{2}(?:\) ?|([-. ]))[2-9]\d{2}[-. ]\d{4}"  # North America
    r"|0[1-9](?:([ .-])\d{2})(?:\2\d{2}){3}"  # France
    r"|\(?0[1-9]\d{0,4}\)?([ /-])\d{3,8}(?:[ -]\d{3,6}){0,2}"  # United Kingdom, Germany, Italy, Australia, Japan, …
    r"|[6-9]\d{4}[ -]\d{5}"  # India
    r"|1[3-9]\d([ -])\d{4}\4\d{4}|(?<=[\u3000-\u9fff\uff1a])1[3-9]\d{9}"  # China
    rf")(?![{L}]|[.,/-]\d| \d)")
YEARS = re.compile(r"(?:(?:19|20)\d\d[ /-]*){2,}")
ZIP_CODE = re.compile(r"0\d{4}-\d{4}")
NUMBER = re.compile(r"\d[\d ().\u00a0/-]{4,}\d")  # what any of these has in it


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    email: bool = True  # e-mail addresses become <EMAIL>, also "name (at) example (dot) org"
    phone: bool = True  # telephone numbers become <PHONE>
    ip: bool = True  # public IPv4 and IPv6 addresses become <IP>; private, local and documentation ranges stay
    card: bool = True  # payment card numbers become <CARD>
    iban: bool = True  # bank accounts become <IBAN>
    key: bool = True  # private keys, access tokens and assigned secrets become <KEY>


class Privacy:
    """Masks personal data in place and tallies each kind; removes no document."""

    name = "privacy"

    def __init__(self, cfg: PrivacyConfig):
        kinds = {"key": mask_keys, "email": mask_emails, "iban": mask_ibans, "card": mask_cards, "ip": mask_ips,
                 "phone": mask_phones}
        self.masks = [(kind, mask) for kind, mask in kinds.items() if getattr(cfg, kind)]

    def __call__(self, doc: Document) -> None:
        doc.text, counts = self.masked(doc.text)
        for kind, n in counts.items():
            doc.counts[f"privacy.{kind}"] = doc.counts.get(f"privacy.{kind}", 0) + n

    def masked(self, text: str) -> tuple[str, dict[str, int]]:
        """Returns the text with its masks, and how many of each kind there are."""
        counts = {}
        for kind, mask in self.masks:
            text, n = mask(text)
            if n:
                counts[kind] = n
        return text, counts


def replaced(pattern: re.Pattern, decide: Callable[[re.Match], str | None], text: str) -> tuple[str, int]:
    """Returns the text with those matches replaced for which `decide` says by what, and how many."""
    n = 0

    def one(found: re.Match) -> str:
        nonlocal n
        becomes = decide(found)
        n += becomes is not None
        return found[0] if becomes is None else becomes

    return pattern.sub(one, text), n


def masked_near(marks: re.Pattern, before: int, after: int, mask: Callable, text: str) -> tuple[str, int]:
    """Returns `mask(text)`, asked only about the surroundings of `marks`, which are a small part of most text."""
    out, at, n = [], 0, 0
    spans: list[list[int]] = []
    for found in marks.finditer(text):
        start, end = max(0, found.start() - before), found.end() + after
        if spans and start <= spans[-1][1]:
            spans[-1][1] = end
        else:
            spans.append([start, end])
    for start, end in spans:
        masked, more = mask(text[start:end])
        out += [text[at:start], masked]
        at, n = end, n + more
    return ("".join(out) + text[at:], n) if n else (text, 0)


def mask_emails(text: str) -> tuple[str, int]:
    return masked_near(MAY_BE_EMAIL, 100, 400, lambda part: EMAIL.subn("<EMAIL>", part), text)


def mask_keys(text: str) -> tuple[str, int]:
    n = assigned = 0
    if any(mark in text for mark in KEY_MARKS):
        text, n = replaced(KEYS, lambda found: "<KEY>" if is_key(found[0]) else None, text)
    lower = text.lower()
    if any(mark in lower for mark in SECRET_MARKS):
        def named(found: re.Match) -> str | None:
            said = looks_random(found[0]) and NAMES_SECRET.search(text[max(0, found.start() - 40):found.start()])
            return "<KEY>" if said else None

        text, assigned = replaced(SECRET, named, text)
    given = in_urls = 0
    if "key" in lower or "basic" in lower:
        text, given = replaced(GIVEN, lambda found: found[1] + "<KEY>" if is_given(found) else None, text)
    if "://" in text and "@" in text:
        text, in_urls = IN_URL.subn(r"\1<KEY>", text)
    return text, n + assigned + given + in_urls


def is_key(value: str) -> bool:
    """Returns whether a value that begins as keys do goes on like one: sk-learn-contrib-project-2 does not."""
    digits = any(map(str.isdigit, value))
    return digits and (not value.startswith("sk-") or value != value.lower() or n_changes(value) >= 4)


def is_given(found: re.Match) -> bool:
    long_enough = "basic" in found[1].lower() or len(found[2]) >= 40
    return long_enough and any(c.isdigit() or c.isupper() for c in found[2][1:])


def n_changes(value: str) -> int:
    return sum(a.isdigit() != b.isdigit() for a, b in itertools.pairwise(value))


def looks_random(value: str) -> bool:
    """Returns whether a value mixes digits and letters the way keys do, and names, paths and numbers do not."""
    return n_changes(value) >= 4 and len(set(value)) >= 8 and not re.search(r"[a-z]{7}|[./-]{2}|^\d+[.-]", value)


def mask_ips(text: str) -> tuple[str, int]:
    text, n = masked_near(NUMBER, 48, 4, mask_ipv4, text)
    if "::" not in text and text.count(":") < 7:
        return text, n
    # one that ends in :: is a network's
    text, n6 = replaced(IPV6, lambda found: "<IP>" if is_public(found[0]) and found[0][-1] != ":" else None, text)
    return text, n + n6


def mask_ipv4(text: str) -> tuple[str, int]:
    def public(found: re.Match) -> str | None:
        parts = found[0].split(".")
        before = text[max(0, found.start() - 24):found.start()]
        if IS_VERSION.search(before):
            return None
        low = int(parts[0]) < 32 or parts.count("0") > 1
        if low and re.search(r"\w/$", before) and text[found.end():found.end() + 1] != ":":
            return None  # Chrome/120.0.0.0
        if all(int(part) < 32 for part in parts) and not SAYS_IP.search(before):  # 1.2.3.4 is a version
            return None
        return "<IP>" if is_public(found[0]) else None

    return replaced(IPV4, public, text)


def is_public(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
        return found.is_global and not found.is_multicast
    except ValueError:  # 999.1.1.1, 01.02.03.04
        return False


def mask_cards(text: str) -> tuple[str, int]:
    def card(found: re.Match) -> str | None:
        return "<CARD>" if is_card(re.sub(r"\D", "", found[0])) else None

    return masked_near(NUMBER, 4, 4, lambda part: replaced(CARD, card, part), text)


def is_card(digits: str) -> bool:
    """Returns whether an issuer has numbers of this beginning and length, and Luhn's sum is right."""
    two, four = int(digits[:2]), int(digits[:4])
    lengths = (
        (16, 19) if digits[0] == "4"  # Visa
        else (16,) if 51 <= two <= 55 or 2221 <= four <= 2720 or 3528 <= four <= 3589  # Mastercard, JCB
        else (15,) if two in (34, 37) else (14,) if two in (36, 38, 39) or 3000 <= four <= 3059  # American Express, Diners
        else (16,) if four == 6011 or two == 65 or 6440 <= four <= 6499 else range(16, 20) if two == 62 else ())  # UnionPay
    doubled = (int(d) * (1 + i % 2) for i, d in enumerate(digits[::-1]))
    return len(digits) in lengths and len(set(digits)) > 1 and sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


def mask_ibans(text: str) -> tuple[str, int]:
    out, at, n = [], 0, 0
    for found in IBAN.finditer(text):
        end = iban_end(text, found.start())
        if end and found.start() >= at:
            out += [text[at:found.start()], "<IBAN>"]
            at, n = end, n + 1
    return ("".join(out) + text[at:], n) if n else (text, 0)


def iban_end(text: str, start: int) -> int:
    """Returns where an IBAN that begins at `start` ends, 0 where none does."""
    length, held, at = IBAN_LENGTH.get(text[start:start + 2], 0), "", start
    while len(held) < length and at < len(text) and ((text[at].isascii() and text[at].isalnum()) or text[at] == " "):
        held += text[at].strip()
        at += 1
    if not length or len(held) < length or re.match(f"[{L}]", text[at:at + 1]):
        return 0
    return at if int("".join(str(int(c, 36)) for c in held[4:] + held[:4])) % 97 == 1 else 0


def mask_phones(text: str) -> tuple[str, int]:
    return masked_near(NUMBER, 48, 4, mask_phones_here, text)


def mask_phones_here(text: str) -> tuple[str, int]:
    def near_word(found: re.Match) -> str | None:
        return found[1] + "<PHONE>" if 6 <= n_digits(found[2]) <= 15 and not YEARS.fullmatch(found[2]) else None

    def abroad(found: re.Match) -> str | None:
        return "<PHONE>" if 8 <= n_digits(found[0]) <= 15 and ")." not in found[0] and ". " not in found[0] else None

    def at_home(found: re.Match) -> str | None:
        right = 9 <= n_digits(found[0]) <= 11 and not counts_up(found[0]) and not ZIP_CODE.fullmatch(found[0])
        return "<PHONE>" if right else None

    n = 0
    for pattern, decide in ((PHONE_NEAR_WORD, near_word), (PHONE_ABROAD, abroad), (PHONE_AT_HOME, at_home)):
        text, more = replaced(pattern, decide, text)
        n += more
    return text, n


def n_digits(text: str) -> int:
    return sum(map(str.isdigit, text))


def counts_up(text: str) -> bool:
    """Returns whether the groups of digits are 01 02 03 …, as in a table's head."""
    groups = [int(g) for g in re.findall(r"\d+", text)]
    return len(groups) > 3 and all(b - a == 1 for a, b in itertools.pairwise(groups))
