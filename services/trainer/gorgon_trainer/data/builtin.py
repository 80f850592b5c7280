"""Prompts of the program's own, free of any licence but its own.

`questions` are asked in a chat: enough to run every stage without a network, too few to make good heads. `openings` and
`statements` are to be continued as raw text: what a chat's prompts never lead to, and what a person who completes text
without a chat template begins with. Openings are the first words of anything; statements lack only their last word or
two, so that what follows is the end of a sentence.
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

_COUNTRIES = (
    "Japan", "Peru", "Kenya", "Norway", "Italy", "Spain", "Portugal", "Brazil", "Canada", "Mexico", "India", "China",
    "Egypt", "Turkey", "Greece", "Poland", "Sweden", "Finland", "Denmark", "Iceland", "Ireland", "Austria", "Hungary",
    "Chile", "Cuba", "Nigeria", "Ghana", "Morocco", "Vietnam", "Thailand", "Indonesia", "Australia", "New Zealand",
    "South Korea", "Russia", "Ukraine", "Germany", "Switzerland", "Belgium", "Israel", "Iran", "Pakistan", "Nepal",
)  # fmt: skip
_ELEMENTS = (
    "gold", "silver", "iron", "copper", "oxygen", "hydrogen", "helium", "carbon", "nitrogen", "sodium", "potassium",
    "calcium", "lead", "tin", "zinc", "mercury", "neon", "chlorine", "sulfur", "silicon", "uranium", "aluminum",
)  # fmt: skip
_ANIMALS = (
    "cow", "dog", "cat", "horse", "sheep", "goat", "pig", "duck", "goose", "swan", "lion", "bear", "deer", "fox",
    "wolf", "kangaroo", "frog", "eagle", "owl", "hen", "rabbit", "elephant", "whale", "seal", "bee", "ant", "fish",
    "crow",
)  # fmt: skip
_ADJECTIVES = (
    "hot", "big", "tall", "old", "fast", "light", "happy", "rich", "strong", "early", "wet", "hard", "clean", "full",
    "high", "wide", "near", "loud", "brave", "bright", "sharp", "thick", "heavy", "open", "right", "true", "first",
)  # fmt: skip
_VERBS = (
    "go", "run", "eat", "see", "write", "speak", "take", "give", "know", "begin", "drink", "swim", "sing", "drive",
    "fly", "grow", "break", "choose", "fall", "forget", "hide", "ride", "rise", "shake", "steal", "throw", "wear",
)  # fmt: skip
_WORKS = (
    "Hamlet", "Macbeth", "The Odyssey", "Don Quixote", "Moby-Dick", "Frankenstein", "Dracula", "Emma", "Walden",
    "War and Peace", "Great Expectations", "Oliver Twist", "Pride and Prejudice", "The Time Machine",
    "Treasure Island", "The Origin of Species", "Alice in Wonderland", "Robinson Crusoe", "Jane Eyre",
    "The Jungle Book", "Faust",
)  # fmt: skip
_THINGS = (
    "the sky", "grass", "snow", "blood", "coal", "the sun", "a banana", "a lemon", "a carrot", "chocolate", "milk",
    "an emerald", "a ruby", "the ocean", "sand", "an apple", "a strawberry", "a raven", "a polar bear", "copper wire",
)  # fmt: skip
_INVENTIONS = (
    "the telephone", "the light bulb", "the steam engine", "the printing press", "the airplane", "dynamite",
    "penicillin", "the telescope", "the microscope", "the radio", "the telegraph", "the bicycle", "the battery",
    "the World Wide Web",
)  # fmt: skip
_PLACES_IN_A_ROW = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "last")
_ROWS = (
    "month of the year", "day of the week", "letter of the alphabet", "planet from the Sun", "color of the rainbow",
    "book of the Bible", "president of the United States", "man on the Moon", "sign of the zodiac",
)  # fmt: skip
_DIGITS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve", "twenty", "a hundred")
_ABOUT_ONE = (
    (_COUNTRIES, (
        "The currency of {} is the", "The official language of {} is", "The national animal of {} is the",
        "The flag of {} is", "{} is located in", "The largest river in {} is the", "The highest mountain in {} is",
        "People in {} speak", "The national dish of {} is", "The president of {} is", "The national sport of {} is",
        "The continent of {} is", "The most popular food in {} is", "The people of {} are called", "{} borders",
        "The climate of {} is", "{} is famous for its", "The main religion of {} is", "The longest road in {} is",
        "The first king of {} was", "The main export of {} is", "The national flower of {} is the",
    )),
    (_ELEMENTS, (
        "The chemical symbol for {} is", "The atomic number of {} is", "At room temperature, {} is a",
        "The color of {} is",
    )),
    (_ANIMALS, (
        "A baby {} is called a", "The sound that a {} makes is called a", "A {} lives in a", "A {} likes to eat",
        "The female of the {} is called a", "The scientific name of the {} is", "The home of a {} is called a",
        "The {} is a kind of", "The number of legs of a {} is", "The natural enemy of the {} is the",
    )),
    (_ADJECTIVES, (
        "The opposite of {} is", "Another word for {} is", "The comparative of {} is", "The superlative of {} is",
        "The noun that belongs to {} is", "Something that is very {} is",
    )),
    (_VERBS, (
        "The past tense of {} is", "The past participle of {} is", "The verb to {} means to",
        "The person whose job is to {} is called a", "The opposite of to {} is to",
    )),
    (_WORKS, ("The author of {} is", "{} was written by", "The main character of {} is", "{} was published in")),
    (_THINGS, ("The color of {} is", "We all know that {} is", "The taste of {} is")),
    (_INVENTIONS, (
        "The inventor of {} was", "The person who invented {} was", "The year of {} was", "The purpose of {} is",
        "The name of the man who gave us {} is",
    )),
    (_NOUNS, (
        "The plural of {} is", "The {} is made of", "The smallest {} is called", "The name of the {} is",
        "The most famous {} in history is", "The color of the {} is", "The Latin word for {} is",
        "The Spanish word for {} is", "The size of the {} is", "The age of the {} is", "The best {} is the",
    )),
)  # fmt: skip
_ABOUT_TWO = (
    (_PLACES_IN_A_ROW, _ROWS, ("The {} {} is",)),
    (_DIGITS, _DIGITS, ("The sum of {} and {} is", "{} times {} is", "The difference between {} and {} is")),
)


def questions() -> Iterator[Record]:
    """Every topic with every question."""
    for question, topic in product(_QUESTIONS, _TOPICS):
        yield ChatRecord.of([Message(role="user", content=question.format(topic))], "builtin questions")


def openings() -> Iterator[Record]:
    """Every noun in every statement."""
    for statement, noun in product(_STATEMENTS, _NOUNS):
        yield TextRecord.of(statement.format(noun), "builtin openings")


def statements() -> Iterator[Record]:
    """Sentences of many kinds that lack their end, each once."""
    texts = [text.format(one) for ones, forms in _ABOUT_ONE for text, one in product(forms, ones)]
    for ones, others, forms in _ABOUT_TWO:
        texts += [text.format(one, other) for text, one, other in product(forms, ones, others)]
    for text in dict.fromkeys(texts):
        yield TextRecord.of(text[0].upper() + text[1:], "builtin statements")


BUILTIN: Mapping[str, Callable[[], Iterator[Record]]] = {
    "questions": questions,
    "openings": openings,
    "statements": statements,
}
