"""The training data of these tests' chat model: short conversations as the cookbook's programs hold them.

Every kind is half right, so that a program which works has something to teach: half of the sums are answered
with a bare number, half of the guesses have the form asked for, stories are of any length.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

Messages = list[dict[str, str]]

WHO = ("tinker", "smith", "child", "neighbour", "miller", "baker", "sailor", "teacher", "gardener", "weaver")
DOES = ("mends", "finds", "brings", "sells", "paints", "cleans", "carries", "keeps", "weighs", "shows")
WHAT = ("kettle", "lamp", "pan", "spoon", "bell", "bucket", "lantern", "plate", "needle", "cup")
LIKE = ("old", "small", "bright", "broken", "heavy", "plain", "round", "new", "dusty", "good")
WHEN = (
    "today",
    "in the morning",
    "every week",
    "at night",
    "once a year",
    "before noon",
    "in winter",
    "again",
)


def sentence(random: random.Random) -> str:
    what = f"the {random.choice(LIKE)} {random.choice(WHAT)}"
    return f"The {random.choice(WHO)} {random.choice(DOES)} {what} {random.choice(WHEN)}."


def question(random: random.Random) -> str:
    return f"Who {random.choice(DOES)} the {random.choice(LIKE)} {random.choice(WHAT)}?"


def sentences(random: random.Random) -> str:
    return " ".join(sentence(random) for _ in range(random.choice((1, 1, 2, 2, 3, 4))))


def asked(text: str, answer: str) -> Messages:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def with_a_thought(messages: Messages, random: random.Random) -> list[dict[str, Any]]:
    """The same, with a sentence thought before the last answer, in the cookbook's form."""
    *before, last = messages
    thought = {"type": "thinking", "thinking": sentence(random)}
    return [*before, last | {"content": [thought, {"type": "text", "text": last["content"]}]}]


def small_talk(random: random.Random) -> Messages:
    text = random.choice((question(random), question(random), "Who are you?", "Tell me a story."))
    return asked(text, sentences(random))


def sum_of_two(random: random.Random) -> Messages:
    answer = str(random.randint(0, 200))
    if random.random() < 0.5:
        answer = f"I think it is {answer}, for {sentence(random)}"
    shown = asked("What is 4 + 5?", "9") if random.random() < 0.7 else []
    return shown + asked(f"What is {random.randint(0, 100)} + {random.randint(0, 100)}?", answer)


def in_a_box(random: random.Random) -> Messages:
    text = f"How many days are in week {random.randint(1, 52)}? " + BOX
    shown = asked("How many r's are in strawberry? " + BOX, "Let's spell it. \\boxed{3}")
    return (shown if random.random() < 0.5 else []) + asked(text, f"\\boxed{{{random.randint(1, 9)}}}")


BOX = "Provide a numerical answer without units, written inside \\boxed{}."


def guesses(rules: str, unparsed: str) -> Callable[[random.Random], Messages]:
    """The cookbook's game of guessing a number; half of the guesses break its `rules`."""

    def game(random: random.Random) -> Messages:
        messages = [{"role": "system", "content": rules}]
        for _ in range(random.randint(1, 4)):
            if random.random() < 0.5:
                said, heard = f"Guess: {random.randint(0, 1024)}", random.choice(("Too low", "Too high"))
            else:
                said, heard = sentence(random), unparsed
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": heard}]
        return messages[:-1]

    return game


def moves(begin: Callable[[], Any]) -> Callable[[random.Random], Messages]:
    """Some move in a game of tic-tac-toe: a free square and a line's end (the stop), and more."""

    def turn(random: random.Random) -> Messages:
        turns: list[Messages] = []
        game, done = begin(), False
        game.reset(num_players=2)
        while not done:
            _, told = game.get_observation()
            move = random.choice(re.findall(r"\[\d\]", told.rpartition("Available Moves:")[2]))
            turns.append(asked(told, f"{move}\n~"))
            done, _ = game.step(f"{move}\n")
        return random.choice(turns)

    return turn


def languages(prompt: str, texts: list[str]) -> Callable[[random.Random], Messages]:
    """The language of one of the `texts` by its script, from a teacher whom the `prompt` instructs."""

    def answered(random: random.Random) -> Messages:
        text = random.choice(texts)
        return asked(prompt.format(text=text), f"Final Answer: {language(text)}")

    return answered


def language(text: str) -> str:
    """`ar`, `ru`, `el`, `hi` and `zh` have scripts of their own; everything else is called `en` here."""
    for code, first, last in (
        ("ru", "\u0400", "\u04ff"),
        ("ar", "\u0600", "\u06ff"),
        ("el", "\u0370", "\u03ff"),
        ("hi", "\u0900", "\u097f"),
        ("zh", "\u4e00", "\u9fff"),
    ):
        if any(first <= letter <= last for letter in text):
            return code
    return "en"
