"""Prompts of the program's own, free of any licence but its own.

`questions` are asked in a chat: enough to run every stage without a network, too few to make good heads. `openings` are
the first words of plain statements, to be continued as raw text: what a chat's prompts never lead to, and what a person
who completes text without a chat template begins with.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import product

from gorgon_trainer.data.records import ChatRecord, Message, Record, TextRecord

_TOPICS = (
    "rain", "the moon", "bread", "bicycles", "volcanoes", "whales", "chess", "a compiler", "photosynthesis", "coffee",
    "bridges", "glass", "bees", "the violin", "earthquakes", "paper", "soap", "maps", "lighthouses", "a database",
    "honey", "trains", "the heart", "cheese", "clouds", "magnets", "libraries", "salt", "a garden", "owls",
    "batteries", "deserts", "poetry", "the tide", "wool", "a telescope", "mushrooms", "sleep", "rivers", "steam",
)  # fmt: skip
_QUESTIONS = (
    "Explain {} to a child.",
    "Write three short facts about {}.",
    "Why do people like {}?",
    "What would a beginner want to know about {}?",
    "Write a short story in which {} plays a part.",
    "Give me a list of five words that have to do with {}.",
)
_NOUNS = (
    "river", "mountain", "language", "planet", "animal", "bird", "tree", "flower", "metal", "gas", "color", "number",
    "shape", "machine", "engine", "book", "song", "painting", "building", "bridge", "road", "ship", "train", "city",
    "village", "farm", "forest", "island", "lake", "desert", "season", "month", "holiday", "meal", "fruit", "vegetable",
    "spice", "drink", "sport", "game", "team", "school", "teacher", "student", "doctor", "disease", "medicine", "cell",
    "bone", "muscle", "organ", "nerve", "law", "court", "judge", "king", "queen", "president", "parliament", "election",
    "war", "treaty", "army", "coin", "bank", "market", "company", "product", "price", "tax", "computer", "program",
    "network", "file", "screen", "phone", "camera", "battery", "light", "sound", "wave", "force", "atom", "molecule",
    "star", "galaxy", "comet", "cloud", "storm", "wind", "rock", "crystal", "fossil", "insect", "fish", "whale",
)  # fmt: skip
_STATEMENTS = (
    "The {}",
    "A {} is",
    "The largest {} in the world is",
    "The oldest known {} is",
    "The most common {} is",
    "The main purpose of a {} is to",
    "Every {} has",
    "The word {} comes from",
    "In most countries, the {}",
    "The first {} was",
    "One kind of {} is called",
    "My favorite {} is",
    "A good {} should",
    "There are many kinds of {}, such as",
    "The difference between a {} and",
    "Scientists who study the {} have found that",
)  # fmt: skip


def questions() -> Iterator[Record]:
    """Every topic with every question."""
    for question, topic in product(_QUESTIONS, _TOPICS):
        yield ChatRecord.of([Message(role="user", content=question.format(topic))], "builtin questions")


def openings() -> Iterator[Record]:
    """Every noun in every statement."""
    for statement, noun in product(_STATEMENTS, _NOUNS):
        yield TextRecord.of(statement.format(noun), "builtin openings")


BUILTIN: Mapping[str, Callable[[], Iterator[Record]]] = {"questions": questions, "openings": openings}
