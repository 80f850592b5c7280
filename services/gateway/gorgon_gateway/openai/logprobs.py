"""Log-probabilities in OpenAI's two shapes, out of a `TokenMessage`'s."""

from typing import Any


def chat_logprobs(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat's choice."""
    return [{**_entry(entry), "top_logprobs": [_entry(top) for top in entry["top"]]} for entry in entries]


def _entry(entry: dict[str, Any]) -> dict[str, Any]:
    token: str = entry["token"]
    return {"token": token, "logprob": entry["logprob"], "bytes": entry.get("bytes") or list(token.encode())}


def _by_text(entry: dict[str, Any]) -> dict[str, float]:
    """The alternatives and, as OpenAI has it, the chosen token. Of several that are written alike, as parts of
    characters are, there is the chosen one, else the likeliest."""
    found: dict[str, float] = {}
    for top in entry["top"]:  # likeliest first
        found.setdefault(top["token"], top["logprob"])
    found[entry["token"]] = entry["logprob"]
    return found


class CompletionLogprobs:
    """Of one answer: knows how long its text is by now, for `text_offset`."""

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top
        self._offset = 0

    def take(self, fields: dict[str, Any]) -> dict[str, Any]:
        """`logprobs` of a completion's choice, for the tokens of one message. An offset is that of the text that the
        token released, which may begin later than the token (UTF-8, held-back stop strings)."""
        offsets: list[int] = []
        for piece in fields["pieces"]:
            offsets.append(self._offset)
            self._offset += len(piece)
        entries = fields["logprobs"] or []
        tops = [_by_text(entry) for entry in entries] if self._num_top else None
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": tops,
            "text_offset": offsets,
        }
