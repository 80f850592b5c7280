"""What people paste and should not be trained on: e-mail addresses, phone numbers, keys and passwords.

Patterns, so neither complete nor always right: a turn that only looks like one of them is lost too, which costs little.
"""

import re
from typing import Literal

PersonalKind = Literal["email", "phone", "key"]

_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}")
_PHONE = re.compile(
    r"""(?<![\w.+-])(?:
        \+\d(?:[ ().\-/]{0,2}\d){7,14}                      # +44 20 7946 0958
      | \(\d{3}\)[ ]?\d{3}[ .-]?\d{4}                       # (212) 555-0123
      | (?:1[ .-])?\d{3}([ .-])\d{3}\1\d{4}                 # 212-555-0123, 1-212-555-0123
      | 0\d{2,4}[ /-]\d{3,4}[ -]?\d{3,5}                    # 020 7946 0958, 030/1234567
    )(?![\w-])""",
    re.VERBOSE,
)
_KEY = re.compile(
    r"""-----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY
      | \b(?:AKIA|ASIA)[0-9A-Z]{16}\b                       # AWS
      | \bgh[oprsu]_[A-Za-z0-9]{30,} | \bgithub_pat_\w{20,} # GitHub
      | \bglpat-[\w-]{20,}                                  # GitLab
      | \bsk-[\w-]{20,} | \bsk_(?:live|test)_\w{16,}        # OpenAI and others, Stripe
      | \bhf_[A-Za-z0-9]{30,}                               # Hugging Face
      | \bxox[abeoprs]-[\w-]{10,}                           # Slack
      | \bAIza[\w-]{35}                                     # Google
      | \beyJ[\w-]{10,}\.[\w-]{10,}\.                       # JSON web tokens
    """,
    re.VERBOSE,
)
_ASSIGNED = re.compile(
    r"""(?:api[_ -]?key|access[_ -]?key|secret|token|passw(?:or)?d|pwd)["']?\s*(?:[:=]|=>|is)\s*["']?([^\s"',;]{8,})""",
    re.IGNORECASE,
)
_RUN = re.compile(r"[A-Za-z0-9+/_-]{32,}")


def personal_kind(text: str) -> PersonalKind | None:
    """Which kind of personal or secret string a text holds, the first that is found."""
    if _EMAIL.search(text):
        return "email"
    if _KEY.search(text) or any(_is_random(match[1]) for match in _ASSIGNED.finditer(text)):
        return "key"
    if any(_is_encoded(match[0]) for match in _RUN.finditer(text)):
        return "key"
    return "phone" if _PHONE.search(text) else None


def _is_random(word: str) -> bool:
    """Letters and digits in one word: `hunter2024`, not `get_token()`."""
    return any(c.isdigit() for c in word) and any(c.isalpha() for c in word) and "(" not in word


def _is_encoded(run: str) -> bool:
    """Hexadecimal or base64 of 16 bytes and more, not a path, a long identifier or a row of dashes."""
    stripped = run.strip("-_/+")
    digits = sum(c.isdigit() for c in stripped)
    if len(stripped) < 32 or digits < 4:
        return False
    if re.fullmatch(r"[0-9a-f]+|[0-9A-F]+", stripped):
        return digits < len(stripped)
    separators = sum(c in "-_/" for c in stripped)
    has_both_cases = any(c.islower() for c in stripped) and any(c.isupper() for c in stripped)
    return len(stripped) >= 40 and has_both_cases and separators * 12 <= len(stripped)
