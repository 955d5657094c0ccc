"""The data of the demo's trained task, `booking`: a guest's message to one line of JSON.

::

    python bench/demo_task.py runs/booking-data
    prefixd train --model demo --data runs/booking-data/train.jsonl --task booking \\
      --num-virtual-tokens 10 --max-steps 220 --prefix-dtype float16 \\
      --init-text 'A message to one line of JSON: {"name": "Ada Bauer"}'
    cp runs/booking/prefix.safetensors server/prefixd_server/demo_data/booking.safetensors

The sentences are templates of our own, filled by a seeded generator. The names in the test's rows
are in none of the training's.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

_FIRST = """Ada Amir Anouk Bela Carla Chidi Dana Dmitri Elin Emeka Farah Felix Gita Goran Hana Hugo
Ines Ivo Jamal Jana Karim Kira Lars Leila Luca Maya Mateo Milan Nadia Noor Olga Omar Petra Pablo
Quinn Rosa Ravi Sana Sven Tara Tomas Uma Viktor Wanda Xavier Yara Yusuf Zoe"""
_LAST = """Adeyemi Andersson Bauer Bianchi Chen Costa Dimitrov Dubois Eriksen Fischer Fontana Garcia
Haddad Horvat Ito Ivanova Jansen Kaya Kowalski Lindqvist Lopez Mbeki Meyer Nakamura Novak Okafor
Olsen Papadakis Patel Quist Rahman Rossi Santos Silva Tanaka Torres Usman Varga Weber Yilmaz
Zhang"""
FIRST, LAST = _FIRST.split(), _LAST.split()
UNSEEN_FIRST = ("Beatrix", "Callum", "Esther", "Imran", "Judith", "Oskar", "Priya", "Selma")
UNSEEN_LAST = ("Abbott", "Delgado", "Fraser", "Hoffmann", "Kimura", "Moreau", "Petrov", "Whitfield")

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
HOURS = {5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}

MESSAGES = (
    "Hi, this is {name}. Could we have a table for {guests} on {day} at {time}?",
    "Hello, {name} here, I would like to book for {guests} people, {day} at {time}.",
    "Please keep a table for {guests} for {name} on {day}, {time}.",
    "My name is {name} and we are {guests}. Is {day} at {time} still free?",
    "{day} at {time}, {guests} of us, under {name}. Thanks!",
    "Good morning! A table on {day} for {guests}, please, at {time}. The name is {name}.",
    "We will be {guests} on {day}. We would come at {time}. Regards, {name}",
    "{name} calling: can you fit in {guests} of us at {time} on {day}?",
    "Do you have room for {guests} at {time} this {day}? It is for {name}.",
    "Could you put {name} down for {day}, {time}? There will be {guests} of us.",
)


def rows(
    count: int, seed: int, first: Sequence[str] = FIRST, last: Sequence[str] = LAST
) -> Iterator[dict[str, str]]:
    """``{"source": message, "target": JSON}``; every template comes up as often as any other."""
    draw = random.Random(seed)
    for index in range(count):
        name = f"{draw.choice(first)} {draw.choice(last)}"
        guests, day = draw.randrange(2, 11), draw.choice(DAYS)
        spoken, time = _time(draw)
        shown = NUMBERS[guests - 2] if draw.random() < 0.7 else str(guests)
        message = MESSAGES[index % len(MESSAGES)].format(
            name=name, guests=shown, day=day, time=spoken
        )
        booking = {"name": name, "guests": guests, "day": day, "time": time}
        yield {"source": message, "target": json.dumps(booking)}


def train_rows() -> Iterator[dict[str, str]]:
    return rows(300, 0)


def test_rows() -> Iterator[dict[str, str]]:
    return rows(50, 1, UNSEEN_FIRST, UNSEEN_LAST)


def _time(draw: random.Random) -> tuple[str, str]:
    """As a guest says it, and as the kitchen writes it."""
    hour, half = draw.choice(list(HOURS)), draw.random() < 0.5
    clock = f"{hour}:{'30' if half else '00'} pm"
    said = f"half past {HOURS[hour]}" if half else f"{HOURS[hour]} o'clock"
    written = f"{hour}:30 pm" if half else f"{hour} pm"
    return (said if draw.random() < 0.5 else written), clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in {"train": train_rows(), "test": test_rows()}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


if __name__ == "__main__":
    main()
