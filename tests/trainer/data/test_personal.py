"""What people paste and what only looks like it."""

import pytest

from gorgon_trainer.data.personal import personal_kind


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to jane.doe+spam@mail.example.co.uk, please", "email"),
        ("mailto:a@b.io", "email"),
        ("call (212) 555-0123 now", "phone"),
        ("212-555-0123", "phone"),
        ("1-212-555-0123", "phone"),
        ("my number is +44 20 7946 0958.", "phone"),
        ("+491701234567", "phone"),
        ("Tel. 030/1234567", "phone"),
        ("key: AKIAIOSFODNN7EXAMPLE", "key"),
        ("ghp_" + "a1B2" * 9, "key"),
        ("github_pat_11AAAAAAA0123456789_abcdefghijk", "key"),
        ("export OPENAI=sk-proj-" + "Ab1_" * 8, "key"),
        ("hf_" + "aBcDe" * 7, "key"),
        ("xoxb-1234567890-abcdef", "key"),
        ("AIza" + "Sy1_x" * 7, "key"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE", "key"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NSJ9.abc", "key"),
        ("password: hunter2024", "key"),
        ('"api_key" : "zx81spectrum"', "key"),
        ("the token is 9f8e7d6c5b", "key"),
        ("d41d8cd98f00b204e9800998ecf8427e", "key"),
        ("VGhpcyBpcyBhIGxvbmcgYmFzZTY0IHN0cmluZyB0aGF0IGdvZXMgb24gMTIzNDU2", "key"),
    ],
)
def test_personal_strings(text: str, kind: str) -> None:
    assert personal_kind(text) == kind


@pytest.mark.parametrize(
    "text",
    [
        "What happened between 1914 and 1918, on 2021-03-04 and at 10:30?",
        "3.14159265358979 and 1,000,000,000 and 192.168.100.200",
        "token = tokenizer.next_token()",
        "def get_password(user): pass",
        "the secret is to practise",
        "@property and user@localhost",
        "--------------------------------------------------",
        "a_very_long_identifier_that_goes_on_and_on_and_on_until_2024",
        "src/services/engine/models/loading/test_quantized_linear_layers_2024.py",
        "Pneumonoultramicroscopicsilicovolcanoconiosis",
        "array([1, 2, 3]) + 10 - 200 * 3000",
        "10000000000000000000000000000000000",
    ],
)
def test_what_is_not_personal(text: str) -> None:
    assert personal_kind(text) is None
