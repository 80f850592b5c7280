"""Text out of tokens as they come: never half a character, never part of a stop string.

Tokens are spelt as bytes and run through an incremental UTF-8 decoder, so each costs the same however long the text
is. Bytes that cannot become a character any more are replaced by U+FFFD at once, as `tokenizer.decode` does for
byte-level tokenizers. (For sentencepiece's byte tokens it replaces a whole run of them if one is bad, which a stream
cannot: there the good characters of the run are kept.)
"""

import codecs
from collections.abc import Sequence

from gorgon_engine.spelling import Spelling, TextStart
from gorgon_engine.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The text of one sequence. Special tokens are left out, as by `Tokenizer.decode`.

    Without a stop string, what `push` and `finish` return adds up to `Tokenizer.decode` of all tokens. With one, to
    the text before the stop string that is complete first, character by character (before the longest, where several
    end at once); so the result depends neither on how the text was tokenised nor on how it was pushed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str] = (),
        *,
        include_stop: bool = False,
        continues_text: bool = False,
    ) -> None:
        """include_stop: end the text behind the stop string instead of before it. continues_text: the tokens follow
        other text, so keep the leading space that sentencepiece tokenizers drop at the beginning of a text."""
        assert all(stop_strings), "an empty stop string would stop before anything"
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        self._include_stop = include_stop
        self._spelling: Spelling | TextStart = tokenizer.spelling if continues_text else TextStart(tokenizer.spelling)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped: str | None = None  # the stop string that ended the text
        self.num_consumed = 0  # of the tokens of the last push: those up to the one that completed the stop string

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that has become certain. Tokens behind a completed stop string are not looked at."""
        assert self.stopped is None, "pushed behind a stop string"
        self.num_consumed = 0
        text = ""
        for token_id in token_ids:
            self.num_consumed += 1
            text += self._release(self._decoder.decode(self._spell(token_id)))
            if self.stopped is not None:
                break
        return text

    def finish(self) -> str:
        """What was held back, when no more tokens come; nothing after a stop string."""
        if self.stopped is not None:
            return ""
        text = self._release(self._decoder.decode(b"", final=True))
        if self.stopped is None:
            text, self._held = text + self._held, ""
        return text

    def _spell(self, token_id: int) -> bytes:
        token = self._tokenizer.token(token_id)
        if token is None or self._tokenizer.is_special(token_id):
            return b""
        return self._spelling.spell(token)

    def _release(self, piece: str) -> str:
        """Take in new text; return what no stop string can begin in any more."""
        if not piece:
            return ""
        held = self._held + piece
        found = [(start + len(stop), start, stop) for stop in self._stop_strings if (start := held.find(stop)) >= 0]
        if found:
            end, start, self.stopped = min(found)
            self._held = ""
            return held[: end if self._include_stop else start]
        num_held = self._num_possible(held)
        self._held = held[len(held) - num_held :]
        return held[: len(held) - num_held]

    def _num_possible(self, text: str) -> int:
        """How many characters at the end of the text may be the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop_strings), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stop_strings):
                return length
        return 0
