"""Colours of the diorama: what things look like in white light, and how hour and weather tint them."""

from __future__ import annotations

from functools import lru_cache

Colour = tuple[float, float, float]  # red, green, blue in 0..255

SUBJECT: dict[str, Colour] = {
    "red": (222, 44, 44),
    "orange": (250, 134, 26),
    "yellow": (252, 220, 52),
    "green": (34, 158, 84),
    "blue": (44, 98, 226),
    "purple": (134, 66, 200),
    "pink": (255, 150, 200),
    "white": (248, 248, 248),
}
GROUND: dict[str, Colour] = {
    "meadow": (140, 206, 92),
    "sand": (240, 212, 144),
    "ice": (172, 222, 250),
    "rock": (150, 140, 136),
}
HILLS: dict[str, Colour] = {
    "meadow": (88, 160, 92),
    "sand": (214, 168, 104),
    "ice": (136, 180, 216),
    "rock": (112, 104, 108),
}
SKY_TOP: dict[str, Colour] = {
    "day": (84, 166, 240),
    "sunset": (104, 72, 150),
    "night": (16, 22, 60),
    "dawn": (136, 170, 222),
}
SKY_HORIZON: dict[str, Colour] = {
    "day": (204, 234, 252),
    "sunset": (255, 158, 84),
    "night": (60, 74, 136),
    "dawn": (255, 208, 206),
}
SUN: dict[str, Colour] = {
    "day": (255, 240, 150),
    "sunset": (255, 112, 60),
    "night": (244, 240, 214),
    "dawn": (255, 244, 228),
}
LIGHT: dict[str, Colour] = {  # what the hour's light does to a white thing, as a factor
    "day": (1.0, 1.0, 1.0),
    "sunset": (0.96, 0.73, 0.65),
    "night": (0.38, 0.43, 0.66),
    "dawn": (0.95, 0.82, 0.88),
}
VEIL: dict[str, tuple[Colour, float, float]] = {  # weather: colour of the air, share far away, share near by
    "clear": ((255, 255, 255), 0.0, 0.0),
    "rain": ((122, 136, 156), 0.5, 0.2),
    "snow": ((234, 240, 250), 0.42, 0.14),
}
CLOUD: Colour = (255, 255, 255)
EYE: Colour = (255, 255, 255)
PUPIL: Colour = (28, 26, 40)


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """First and second in the proportion 1 - share to share."""
    return tuple(a + (b - a) * share for a, b in zip(first, second, strict=True))  # type: ignore[return-value]


def shade(colour: Colour, factor: float) -> Colour:
    """Darker for a factor below 1; above 1 it moves towards white by what exceeds 1."""
    if factor > 1:
        return mix(colour, (255.0, 255.0, 255.0), factor - 1)
    return mix((0.0, 0.0, 0.0), colour, factor)


def lit(colour: Colour, sky: str, strength: float = 1.0) -> Colour:
    """The colour in the light of that hour; strength 0 leaves it as it is."""
    light = mix((1.0, 1.0, 1.0), LIGHT[sky], strength)
    return tuple(a * b for a, b in zip(colour, light, strict=True))  # type: ignore[return-value]


def veiled(colour: Colour, sky: str, weather: str, far: float) -> Colour:
    """The colour seen through the weather's air; far = 1 for the sky, 0 for the subject."""
    air, share_far, share_near = VEIL[weather]
    return mix(colour, lit(air, sky, 0.85), share_near + (share_far - share_near) * far)


@lru_cache(maxsize=4096)
def landscape(colour: Colour, sky: str, weather: str, far: float) -> Colour:
    """A landscape colour in light and weather."""
    return veiled(lit(colour, sky), sky, weather, far)


@lru_cache(maxsize=4096)
def subject(colour: Colour, sky: str, weather: str) -> Colour:
    """A subject colour in light and weather: it loses less light than the landscape, to stay readable."""
    return veiled(lit(colour, sky, 0.38), sky, weather, 0.0)
