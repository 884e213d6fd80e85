"""The prompts of the diorama: a small English grammar, and its inverse.

>>> describe(scene, numpy.random.default_rng(0))
'a small red ball bounces on the sand at night while it is snowing'
>>> parse("a small red ball bounces on the sand at night while it is snowing")
{'shape': 'ball', 'colour': 'red', 'size': 'small', 'motion': 'bounces', ...}
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from streamvid.world.scene import ATTRIBUTES, Scene

# What an attribute's value may be called. Phrases within one attribute never occur inside another value's.
NOUNS: dict[str, tuple[str, ...]] = {
    "ball": ("ball", "sphere"),
    "cube": ("cube", "box", "block"),
    "cone": ("cone", "pyramid"),
    "star": ("star",),
    "heart": ("heart",),
    "ring": ("ring", "donut", "hoop"),
}
COLOURS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rosy"),
    "white": ("white",),
}
SIZES: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
}
MOTIONS: dict[str, tuple[tuple[str, str], ...]] = {  # after 'it', and after 'a ball is'
    "stands still": (
        ("stands still", "standing still"),
        ("rests", "resting"),
        ("waits quietly", "waiting quietly"),
    ),
    "rolls left": (("rolls left", "rolling left"), ("rolls to the left", "rolling to the left")),
    "rolls right": (("rolls right", "rolling right"), ("rolls to the right", "rolling to the right")),
    "bounces": (("bounces", "bouncing"), ("jumps up and down", "jumping up and down"), ("hops", "hopping")),
    "floats": (("floats", "floating"), ("hovers", "hovering"), ("hangs in the air", "hanging in the air")),
    "circles": (("circles", "circling"), ("moves in circles", "moving in circles"), ("loops", "looping")),
}
GROUNDS: dict[str, tuple[str, ...]] = {
    "meadow": ("on a meadow", "on the grass", "on green grass", "in a grassy field"),
    "sand": ("on the sand", "in the desert", "on a sandy beach"),
    "ice": ("on the ice", "on a frozen lake", "on blue ice"),
    "rock": ("on the rocks", "on rocky ground", "on bare stone"),
}
SKIES: dict[str, tuple[str, ...]] = {
    "day": ("by day", "in daylight", "at noon", "under a bright sky"),
    "sunset": ("at sunset", "in the evening", "at dusk"),
    "night": ("at night", "under a night sky", "after dark", "by moonlight"),
    "dawn": ("at dawn", "at sunrise", "early in the morning"),
}
WEATHERS: dict[str, tuple[str, ...]] = {  # all may follow the sentence, 'it is ...' needs a joining word
    "clear": ("in clear weather", "with no rain or snow", "it is dry"),
    "rain": ("in the rain", "in rainy weather", "it is raining", "rain is falling"),
    "snow": ("in the snow", "in snowy weather", "it is snowing", "snow is falling"),
}
LINKING = frozenset(  # words that name nothing by themselves
    re.findall(r"\w+", "a an and is it that the there while, after in on to up with, no or ground")
)
CLAUSE = re.compile(r"\bis\b")


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _subject(scene: Scene, rng: np.random.Generator) -> str:
    """'a small red ball', or now and then 'a red ball that is small'."""
    size = _pick(rng, SIZES[scene.size])
    colour = _pick(rng, COLOURS[scene.colour])
    noun = _pick(rng, NOUNS[scene.shape])
    if rng.random() < 0.12:
        return f"{_article(colour)} {colour} {noun} that is {size}"
    return f"{_article(size)} {size} {colour} {noun}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _joined(phrase: str, rng: np.random.Generator) -> str:
    """A phrase as it follows a sentence: a clause needs a joining word."""
    return f"{_pick(rng, ('while', 'and'))} {phrase}" if CLAUSE.search(phrase) else phrase


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """One of many prompts for the scene, in lower case and without a full stop.

    Every attribute is named, except that clear weather is left unsaid in three of five.
    """
    subject = _subject(scene, rng)
    verb, doing = _pick(rng, MOTIONS[scene.motion])
    ground = _pick(rng, GROUNDS[scene.ground])
    sky = _pick(rng, SKIES[scene.sky])
    weather = ""
    if scene.weather != "clear" or rng.random() < 0.4:
        weather = _pick(rng, WEATHERS[scene.weather])
    around = [phrase for phrase in (sky, weather) if phrase]
    if rng.random() < 0.5:
        around.reverse()
    template = int(rng.integers(5))
    if template == 0:  # a small red ball bounces on the sand at night while it is snowing
        return " ".join([subject, verb, ground, *(_joined(phrase, rng) for phrase in around)])
    if template == 1:  # at night, a small red ball bounces on the sand in the snow
        first, *rest = around
        return f"{first}, " + " ".join([subject, verb, ground, *(_joined(phrase, rng) for phrase in rest)])
    if template == 2:  # on the sand, a small red ball is bouncing at night
        return f"{ground}, " + " ".join([subject, "is", doing, *(_joined(phrase, rng) for phrase in around)])
    if template == 3:  # a small red ball on the sand, bouncing, at night, it is snowing
        return ", ".join([f"{subject} {ground}", doing, *around])
    # it is snowing and at night, on the sand, there is a small red ball bouncing
    return f"{' and '.join(around)}, {ground}, there is {subject} {doing}"


@lru_cache(maxsize=1)
def _phrases() -> tuple[tuple[str, str, str, re.Pattern], ...]:
    """(phrase, attribute, value, pattern) for all phrases, the longest first."""
    found = []
    tables: tuple[Mapping, ...] = (NOUNS, COLOURS, SIZES, MOTIONS, GROUNDS, SKIES, WEATHERS)
    for attribute, table in zip(ATTRIBUTES, tables, strict=True):
        for value, options in table.items():
            for option in options:
                for phrase in (option,) if isinstance(option, str) else option:
                    found.append((phrase, attribute, value, re.compile(rf"\b{re.escape(phrase)}\b")))
    return tuple(sorted(found, key=lambda entry: (-len(entry[0]), entry[0])))


def words(prompt: str) -> list[str]:
    """The words of a prompt in lower case, without punctuation."""
    return re.findall(r"[a-z]+", prompt.lower())


@lru_cache(maxsize=1)
def _telling_words() -> dict[str, tuple[str, str]]:
    """Words in the phrases of one value only, such as 'raining' or 'frozen', and its attribute and value."""
    meanings: dict[str, set[tuple[str, str]]] = {}
    for phrase, attribute, value, _ in _phrases():
        for word in words(phrase):
            meanings.setdefault(word, set()).add((attribute, value))
    return {word: min(found) for word, found in meanings.items() if len(found) == 1 and word not in LINKING}


def parse(prompt: str) -> dict[str, str]:
    """The value of each attribute that the prompt names, in the order of ATTRIBUTES.

    Phrases are found from the longest to the shortest and each part of the prompt is read once, so that 'on
    green grass' names a ground and no colour. The first of several values of one attribute counts. What no
    phrase names may be given by a telling word ('a frozen red ball').
    """
    text = " ".join(words(prompt))
    found: dict[str, tuple[int, str]] = {}
    for _, attribute, value, pattern in _phrases():
        for match in list(pattern.finditer(text)):
            text = text[: match.start()] + "#" * (match.end() - match.start()) + text[match.end() :]
            if attribute not in found or match.start() < found[attribute][0]:
                found[attribute] = (match.start(), value)
    for word in text.split():
        if word in _telling_words():
            attribute, value = _telling_words()[word]
            found.setdefault(attribute, (0, value))
    return {attribute: found[attribute][1] for attribute in ATTRIBUTES if attribute in found}


def _vocabulary() -> tuple[str, ...]:
    return tuple(sorted({word for phrase, *_ in _phrases() for word in words(phrase)} | LINKING))


VOCABULARY: tuple[str, ...] = _vocabulary()


def unknown_words(prompt: str) -> list[tuple[str, str]]:
    """(word, nearest known word) for each word outside the vocabulary, once each, in order of appearance."""
    unknown = [word for word in dict.fromkeys(words(prompt)) if word not in VOCABULARY]
    return [(word, difflib.get_close_matches(word, VOCABULARY, n=1, cutoff=0.0)[0]) for word in unknown]
