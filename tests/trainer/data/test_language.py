"""The English heuristic, on prose of several languages, code, and short turns."""

import pytest

from gorgon_trainer.data.language import is_english

ENGLISH = [
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "What's the difference between a list and a tuple in Python?",
    "Hi",
    "continue",
    "Make it shorter",
    "SEO keywords",
    "2 + 2 = ?",
    "Please explain what a café owner needs to know about GDPR, naïvely.",
    "The naïve résumé of Søren, translated into English by the author himself, is on the table.",
]
CODE = [
    "def add(a, b):\n    return a + b",
    "What does this do?\n```python\nfor i in range(10):\n    print(i ** 2)\n```",
    "SELECT name, COUNT(*) FROM users WHERE age > 3 GROUP BY name;",
    "fix this error please\n\nconst x = await fetch(url).then(r => r.json());\nconsole.log(x.map(y => y.id));",
    '<div class="row"><span id="x">1</span></div>',
]
OTHERS = [
    "Schreibe mir bitte eine kurze Geschichte über einen Mann, der am Meer wohnt.",
    "Kannst du mir das auf Deutsch erklären?",
    "Écris une histoire courte sur un homme qui vit au bord de la mer.",
    "Escribe un cuento corto sobre un hombre que vive en la playa con su perro.",
    "hola como estas",
    "Escreva uma história curta sobre um homem que mora na praia com o seu cachorro.",
    "Scrivi una breve storia di un uomo che vive con il suo cane vicino al mare.",
    "Schrijf een kort verhaal over een man die met zijn hond aan zee woont.",
    "Napisz krótką historię o człowieku, który mieszka nad morzem i nie lubi ludzi.",
    "Buatkan cerita pendek tentang seorang pria yang tinggal di pantai dengan anjing.",
    "Kirjoita lyhyt tarina miehestä joka asuu meren rannalla koiransa kanssa.",
    "Írj egy rövid történetet egy emberről, aki a tenger mellett lakik a kutyájával.",
    "Viết một câu chuyện ngắn về một người đàn ông sống bên bờ biển.",
    "写一个关于住在海边的人的短篇故事。",
    "海辺に住む男についての短い物語を書いてください。",
    "Напиши короткий рассказ о человеке, который живёт у моря.",
    "اكتب قصة قصيرة عن رجل يعيش على شاطئ البحر",
    "바닷가에 사는 남자에 대한 짧은 이야기를 써 주세요",
    "Γράψε μια μικρή ιστορία",
]


@pytest.mark.parametrize("text", ENGLISH)
def test_english(text: str) -> None:
    assert is_english(text)


@pytest.mark.parametrize("text", CODE)
def test_code_with_or_without_an_english_question(text: str) -> None:
    assert is_english(text)


@pytest.mark.parametrize("text", OTHERS)
def test_other_languages(text: str) -> None:
    assert not is_english(text)


def test_code_does_not_make_another_language_english() -> None:
    code = "\n".join(f"x_{n} = do_it({n}); // for the best of it" for n in range(30))
    assert not is_english(f"Bitte schreibe mir einen Kommentar zu dem Code, und erkläre ihn mir:\n{code}")
