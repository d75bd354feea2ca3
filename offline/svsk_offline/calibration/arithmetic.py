# SPDX-License-Identifier: Apache-2.0
"""Word problems with worked answers, made up by a seeded generator."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

__all__ = ["WordProblem", "word_problem"]


@dataclass(frozen=True)
class WordProblem:
    """A question and an answer that shows the way."""

    question: str
    answer: str


_NAMES: Final = (  # noqa: SIM905 - a literal would take a line for each
    "Amara Ben Chloe Dmitri Elena Farid Grace Hiro Ines Jonas Kavya Liam Mei Nadia Omar Priya Quinn"
    " Rosa Samuel Tariq Uma Viktor Wanda Xavier Yusuf Zoe"
).split()
_GOODS: Final = (  # noqa: SIM905
    "apples pencils marbles stickers oranges books postcards tomatoes candles eggs bottles cookies"
    " tickets notebooks bricks seashells"
).split()
_SHOPS: Final = (
    "market",
    "corner shop",
    "school fair",
    "bakery",
    "garden centre",
    "hardware store",
)


def word_problem(rng: random.Random) -> WordProblem:
    """One problem of a random kind, with random numbers and names."""
    return rng.choice(_KINDS)(rng)


def _money(cents: int) -> str:
    return f"${cents // 100}" if cents % 100 == 0 else f"${cents / 100:.2f}"


def _two_names(rng: random.Random) -> tuple[str, str]:
    first, second = rng.sample(_NAMES, 2)
    return first, second


def _sharing(rng: random.Random) -> WordProblem:
    first, second = _two_names(rng)
    goods = rng.choice(_GOODS)
    start, more, gone = rng.randint(12, 90), rng.randint(5, 60), rng.randint(3, 16)
    left = start + more - gone
    return WordProblem(
        f"{first} has {start} {goods}. {first} buys {more} more and then gives {gone} of them to"
        f" {second}. How many {goods} does {first} have now?",
        f"{first} starts with {start} {goods} and buys {more}, which makes {start} + {more} ="
        f" {start + more}. After giving away {gone} there are {start + more} - {gone} = {left}"
        f" left.\n\n**{left}**",
    )


def _shopping(rng: random.Random) -> WordProblem:
    name, shop = rng.choice(_NAMES), rng.choice(_SHOPS)
    (one, two), (few, many) = rng.sample(_GOODS, 2), (rng.randint(2, 9), rng.randint(2, 12))
    price_one, price_two = 5 * rng.randint(3, 80), 5 * rng.randint(3, 80)
    total = few * price_one + many * price_two
    paid = -(-total // 1000) * 1000
    return WordProblem(
        f"At the {shop}, {one} cost {_money(price_one)} each and {two} cost {_money(price_two)}"
        f" each. {name} takes {few} {one} and {many} {two} and pays with {_money(paid)}. How much"
        " change is there?",
        f"1. The {one} cost {few} × {_money(price_one)} = {_money(few * price_one)}.\n"
        f"2. The {two} cost {many} × {_money(price_two)} = {_money(many * price_two)}.\n"
        f"3. Together that is {_money(few * price_one)} + {_money(many * price_two)} ="
        f" {_money(total)}.\n"
        f"4. The change is {_money(paid)} - {_money(total)} = {_money(paid - total)}.\n\n"
        f"So {name} gets {_money(paid - total)} back.",
    )


def _speed(rng: random.Random) -> WordProblem:
    speed, hours, minutes = rng.randint(8, 24) * 5, rng.randint(1, 6), rng.choice((0, 12, 30, 45))
    distance = Fraction(speed) * (hours + Fraction(minutes, 60))
    time = f"{hours} hours" + (f" and {minutes} minutes" if minutes else "")
    decimal = f"{float(hours + Fraction(minutes, 60)):g}"
    return WordProblem(
        f"A {rng.choice(('train', 'bus', 'car', 'lorry'))} travels at a steady {speed} km/h for"
        f" {time}. How far does it go?",
        f"Distance is speed times time. The time is {decimal} hours, so the distance is"
        f" {speed} × {decimal} = {float(distance):g} km.\n\nThe answer is {float(distance):g} km.",
    )


def _percent(rng: random.Random) -> WordProblem:
    share, price = rng.choice((5, 10, 15, 20, 25, 30, 40, 60)), 20 * rng.randint(2, 60)
    off = price * share // 100
    name, thing = rng.choice(_NAMES), rng.choice(("coat", "bicycle", "desk", "phone", "lamp"))
    return WordProblem(
        f"A {thing} costs ${price}. In a sale it is {share}% cheaper. How much does {name} pay?",
        f"{share}% of ${price} is {price} × {share} / 100 = ${off}. The sale price is"
        f" ${price} - ${off} = ${price - off}.\n\n#### {price - off}",
    )


def _ages(rng: random.Random) -> WordProblem:
    old, young = _two_names(rng)
    factor, years, age = rng.randint(2, 5), rng.randint(2, 12), rng.randint(4, 15)
    return WordProblem(
        f"{old} is {factor} times as old as {young}. In {years} years the two will be"
        f" {age * (factor + 1) + 2 * years} years old together. How old is {young} today?",
        f"Let x be the age of {young} today, so {old} is {factor}x. In {years} years the sum is"
        f" (x + {years}) + ({factor}x + {years}) = {factor + 1}x + {2 * years}.\n"
        f"{factor + 1}x + {2 * years} = {age * (factor + 1) + 2 * years}\n"
        f"{factor + 1}x = {age * (factor + 1)}\nx = {age}\n\n{young} is {age} years old.",
    )


def _column(rng: random.Random) -> WordProblem:
    left, right = rng.randint(100, 9999), rng.randint(11, 999)
    sign, value = rng.choice((("+", left + right), ("-", left - right), ("×", left * right)))
    question = rng.choice(("What is {}?", "Compute {}.", "Calculate {} and give only the result."))
    asked = f"{left} {sign} {right}"
    if sign == "×":
        tens, ones = right // 10 * 10, right % 10
        steps = (
            f"{left} × {tens} = {left * tens}\n{left} × {ones} = {left * ones}\n"
            f"{left * tens} + {left * ones} = {value}"
        )
        answer = str(value) if "only" in question else f"{steps}\n\n{asked} = {value}"
    else:
        answer = str(value) if "only" in question else f"{asked} = {value}"
    return WordProblem(question.format(asked), answer)


def _division(rng: random.Random) -> WordProblem:
    goods, size, boxes = rng.choice(_GOODS), rng.randint(4, 24), rng.randint(6, 40)
    rest = rng.randint(1, size - 1)
    total = size * boxes + rest
    return WordProblem(
        f"{total} {goods} are packed into boxes of {size}. How many boxes are full, and how many"
        f" {goods} are left over?",
        f"{total} ÷ {size} = {boxes} remainder {rest}, because {size} × {boxes} = {size * boxes}"
        f" and {total} - {size * boxes} = {rest}.\n\n- full boxes: {boxes}\n- left over: {rest}",
    )


def _equation(rng: random.Random) -> WordProblem:
    a, b, x = rng.randint(2, 15), rng.randint(1, 60), rng.randint(-12, 25)
    right = a * x + b
    return WordProblem(
        f"Solve for x: {a}x + {b} = {right}",
        f"Subtract {b} from both sides: {a}x = {right} - {b} = {a * x}.\n"
        f"Divide by {a}: x = {a * x} / {a} = {x}.\n\nCheck: {a} · ({x}) + {b} = {right}. ✓",
    )


def _fractions(rng: random.Random) -> WordProblem:
    bottoms = rng.sample((2, 3, 4, 5, 6, 7, 8, 9, 10, 12), 2)
    left, right = (Fraction(rng.randrange(1, 2 * bottom, 2), bottom) for bottom in bottoms)
    common = left.denominator * right.denominator
    top_left, top_right = left.numerator * right.denominator, right.numerator * left.denominator
    total, sum_ = f"{top_left + top_right}/{common}", left + right
    return WordProblem(
        f"Add the fractions {left} and {right}.",
        f"With the common denominator {common}: {left} = {top_left}/{common} and"
        f" {right} = {top_right}/{common}. Their sum is ({top_left} + {top_right})/{common} ="
        f" {total}{'' if total == str(sum_) else f' = {sum_}'}.",
    )


def _mean(rng: random.Random) -> WordProblem:
    count = rng.choice((4, 5, 8, 10))
    values = [rng.randint(3, 60) for _ in range(count)]
    mean = Fraction(sum(values), count)
    listed, added = ", ".join(map(str, values)), " + ".join(map(str, values))
    ordered = sorted(values)
    median = Fraction(ordered[count // 2] + ordered[(count - 1) // 2], 2)
    return WordProblem(
        f"Find the mean and the median of {listed}.",
        f"**Mean:** ({added}) / {count} = {sum(values)} / {count} = {float(mean):g}\n\n"
        f"**Median:** in order the numbers are {', '.join(map(str, ordered))}; the middle is"
        f" {float(median):g}.",
    )


def _area(rng: random.Random) -> WordProblem:
    length, width, price = rng.randint(4, 40), rng.randint(3, 30), rng.randint(2, 25)
    area, around = length * width, 2 * (length + width)
    return WordProblem(
        f"A rectangular garden is {length} m long and {width} m wide. A fence costs ${price} per"
        " metre. What is the garden's area, and what does a fence around it cost?",
        f"The area is {length} × {width} = {area} m². The perimeter is 2 × ({length} + {width}) ="
        f" {around} m, so the fence costs {around} × ${price} = ${around * price}.",
    )


def _clock(rng: random.Random) -> WordProblem:
    start, length = rng.randint(6 * 60, 20 * 60), rng.randint(25, 210)
    end = start + length
    first, last = (f"{minutes // 60 % 24}:{minutes % 60:02d}" for minutes in (start, end))
    hours, minutes = divmod(length, 60)
    whole = f"{hours} h {minutes} min" if hours else f"{minutes} min"
    return WordProblem(
        f"A film starts at {first} and lasts {length} minutes. When does it end?",
        f"{length} minutes are {whole}. {first} plus {whole} is {last}. The film ends at {last}.",
    )


_KINDS: Final[tuple[Callable[[random.Random], WordProblem], ...]] = (
    _sharing,
    _shopping,
    _speed,
    _percent,
    _ages,
    _column,
    _division,
    _equation,
    _fractions,
    _mean,
    _area,
    _clock,
)
