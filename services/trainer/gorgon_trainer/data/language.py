"""Whether a text is English, by a rule of thumb that needs no model.

Function words are a third to a half of English prose, and each language has its own. A text passes where its letters
are nearly all ASCII and its prose, the lines that are not code, holds enough English function words, more than those of
each other language. Short texts have too few words for a share; there the comparison decides alone.
"""

import re
from collections.abc import Mapping
from typing import Final

_MIN_ASCII: Final = 0.9  # share of the letters: names and quotations may have others
_MIN_ENGLISH: Final = 0.12  # share of the words
_FEW_WORDS: Final = 8
_MIN_SYMBOLS: Final = 0.08  # share of a line's characters, from which it is code

_FUNCTION_WORDS: Mapping[str, str] = {
    "English": """
        the of and to in is are was were be been it its that this these those you your i my we our they their he she his
        her for with on at by from as an a or not but if what which who how when where why can could will would should
        do does did have has had there than then so about into please me more some any all no one like between""",
    "Spanish": """
        el la los las de del que en un una es por con para como se su al lo más pero qué cómo hola mi sobre entre este
        esta cuando hay son eres puedes tu""",
    "French": """
        le la les de des du et un une est que qui dans pour pas sur au avec ce il je vous nous ne se plus par bonjour
        mon votre comment sont cette aux""",
    "German": """
        der die das und ist nicht ein eine zu den mit von für auf ich es sich dem im wie auch als wir sie bei eines
        einen einer oder mir bitte kannst schreibe über sind du""",
    "Portuguese": """
        os de que da em um uma para com não por mais dos como mas foi ao ele das seu sua ou quando muito você eu olá
        sobre são está é""",
    "Italian": """
        il lo la gli di che un una per con non sono del della dei le nel come più ma anche questo è si mi ciao puoi
        cosa alla""",
    "Dutch": """
        de het een en van ik te dat die niet met zijn je op aan er voor om ook als maar dan kunt hoe wat over uit bij
        naar deze""",
    "Polish": "nie na jest się że jak co po czy dla ale przez od tak mi być proszę",
    "Indonesian": "yang dan di untuk dengan dari ini itu pada adalah tidak dalam saya akan bisa apa bagaimana buatkan",
    "Turkish": "ve bir bu için ile da de ne çok daha olarak gibi nasıl mi olan",
    "Swedish": "och att det som en på är av för med till den inte om ett jag har kan",
    "Romanian": "și de în la cu pe un să nu ce este din care mai pentru",
    "Vietnamese": "và là của có cho không một các được với trong những tôi bạn",
}
_ENGLISH = frozenset(_FUNCTION_WORDS["English"].split())
# A word that is English as well tells nothing; nor does a single letter, which may be a variable or a choice.
_OTHERS = [frozenset(words.split()) - _ENGLISH for language, words in _FUNCTION_WORDS.items() if language != "English"]
_WORD = re.compile(r"[^\W\d_]+")
_FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_SYMBOLS = frozenset('{}()[]<>=;_$#\\/|&*+~^%@`"')


def is_english(text: str) -> bool:
    """Code, numbers and other text without prose count as English where their letters are ASCII."""
    letters = [character for character in text if character.isalpha()]
    if sum(character.isascii() for character in letters) < _MIN_ASCII * len(letters):
        return False
    words = _WORD.findall(_prose(text).casefold())
    num_english = sum(word in _ENGLISH for word in words)
    most_of_another = max(sum(word in others for word in words) for others in _OTHERS)
    if len(words) < _FEW_WORDS:
        return num_english >= most_of_another
    return num_english >= _MIN_ENGLISH * len(words) and num_english > most_of_another


def _prose(text: str) -> str:
    lines = _FENCED.sub("\n", text).splitlines()
    return "\n".join(line for line in lines if not _is_code(line))


def _is_code(line: str) -> bool:
    characters = [character for character in line if not character.isspace()]
    return sum(character in _SYMBOLS for character in characters) > _MIN_SYMBOLS * len(characters)
