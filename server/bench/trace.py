"""What is sent and when, from a seed: lengths from distributions, arrivals, prompts of so many tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from server.bench.errors import BenchmarkError

Tokenize = Callable[[str], int]
"""Text -> number of its tokens."""

WORDS = """the of and to in a is that for it was on are as with his they at be this from have or by one had not but
what all were when we there can an your which their said if do will each about how up out them then she many some so
these would other into has more her two like him see time could no make than first been its who now people my made
over did down only way find use may water long little very after words called just where know""".split()
"""Words that are one token in the usual vocabularies."""

MAX_FITTINGS = 50

DISTRIBUTIONS: dict[str, tuple[str, Callable[..., float]]] = {
    "fixed": ("LENGTH", lambda rng, length: length),
    "uniform": ("MIN:MAX", lambda rng, low, high: rng.uniform(low - 0.5, high + 0.5)),
    "lognormal": ("MEDIAN:SIGMA", lambda rng, median, sigma: median * rng.lognormvariate(0.0, sigma)),
}
"""Name -> what its numbers are, and what draws a length with a random generator and these numbers."""
FORMS = ", ".join(f"{name}:{form}" for name, (form, _) in DISTRIBUTIONS.items())


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens."""

    name: str
    numbers: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """`512`, or a distribution's name and its numbers. Raises ValueError."""
        name, _, rest = text.partition(":") if ":" in text else ("fixed", "", text)
        try:
            numbers = tuple(float(number) for number in rest.split(":"))
            form, _draw = DISTRIBUTIONS[name]
        except (ValueError, KeyError):
            raise ValueError(f"{text} is neither a number of tokens nor one of {FORMS}") from None
        if len(numbers) != len(form.split(":")) or not all(0 <= number < 1e7 for number in numbers) or numbers[0] < 1:
            raise ValueError(f"{text} is not {name}:{form} with numbers of tokens from 1 on")
        if name == "uniform" and numbers[0] > numbers[1]:
            raise ValueError(f"{text}: the first number is the smaller one")
        return cls(name, numbers)

    @property
    def length(self) -> int | None:
        """The only length; None if there are several."""
        return int(self.numbers[0]) if self.name == "fixed" else None

    def draw(self, rng: random.Random) -> int:
        return max(1, round(DISTRIBUTIONS[self.name][1](rng, *self.numbers)))

    def __str__(self) -> str:
        return ":".join([self.name, *(f"{number:g}" for number in self.numbers)])


@dataclass(frozen=True)
class Plan:
    """One request to come."""

    at_s: float
    """Seconds after the start; 0 where requests wait for each other instead."""
    prompt: str
    max_new_tokens: int


@dataclass(frozen=True)
class Shape:
    """What the requests of a trace have in common."""

    prompt: Lengths
    output: Lengths
    num_shared: int = 0
    """Tokens that all prompts begin with."""


def make_trace(shape: Shape, num_requests: int, rate: float | None, seed: str, tokenize: Tokenize | None) -> list[Plan]:
    """Requests that arrive as a Poisson process of `rate` per second, or, with None, whenever there is room.

    Raises BenchmarkError if no text has a length that was drawn.
    """
    rng = random.Random(seed)
    shared = make_prompt(shape.num_shared, rng, tokenize)
    plans, at_s = [], 0.0
    for _ in range(num_requests):
        at_s += rng.expovariate(rate) if rate else 0.0
        num_own = max(0 if shared else 1, shape.prompt.draw(rng) - shape.num_shared)
        text = " ".join(part for part in (shared, make_prompt(num_own, rng, tokenize)) if part)
        plans.append(Plan(at_s, text, shape.output.draw(rng)))
    return plans


def make_prompt(num_tokens: int, rng: random.Random, tokenize: Tokenize | None) -> str:
    """A text of exactly so many tokens, or, without a tokenizer, words. Raises BenchmarkError if there is none."""
    words = rng.choices(WORDS, k=num_tokens)
    if tokenize is None or not words:
        return " ".join(words)
    return _fitted(words, num_tokens, rng, tokenize)


def _fitted(words: list[str], num_tokens: int, rng: random.Random, tokenize: Tokenize) -> str:
    """The words with some taken off or added until they are `num_tokens` tokens. Raises BenchmarkError."""
    for _ in range(MAX_FITTINGS):
        num_now = tokenize(" ".join(words))
        if num_now == num_tokens:
            return " ".join(words)
        num_words = max(1, round(abs(num_now - num_tokens) * len(words) / num_now))
        words = words[num_words:] if num_now > num_tokens else words + rng.choices(WORDS, k=num_words)
        words = words or rng.choices(WORDS, k=1)
    raise BenchmarkError(f"no text of {num_tokens} tokens was found: this tokenizer adds tokens of its own")
