"""Prompts of the program's own: enough to run every stage without a network, too few to make good heads."""

from gorgon_trainer.data.records import ChatRecord, Message, Record

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


def builtin_records() -> list[Record]:
    """Every topic with every question."""
    return [
        ChatRecord.of([Message(role="user", content=question.format(topic))], "builtin")
        for question in _QUESTIONS
        for topic in _TOPICS
    ]
