"""The embedded dataset: its shape, no repetitions, a mix in every split, and every stated number recomputed."""

import json
import math
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest

NUMBER = r"(-?\d+(?:\.\d+)?)"

# every unit in the size of a base unit that each dimension has for itself
UNITS = {
    "metric length": {"millimeters": 1, "centimeters": 10, "meters": 1000, "kilometers": 1_000_000},
    "imperial length": {"inches": 1, "feet": 12, "yards": 36, "miles": 63_360},
    "metric mass": {"milligrams": 1, "grams": 1000, "kilograms": 1_000_000, "metric tons": 1_000_000_000},
    "imperial mass": {"ounces": 1, "pounds": 16},
    "metric volume": {"milliliters": 1, "liters": 1000},
    "imperial volume": {"cups": 1, "pints": 2, "quarts": 4, "gallons": 16},
    "time": {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86_400, "weeks": 604_800},
    "calendar": {"months": 1, "years": 12, "decades": 120, "centuries": 1200},
    "money": {"cents": 1, "dollars": 100},
    "information": {"bits": 1, "bytes": 8},
}

# what an output may state, and the value that must follow from its other numbers
STATEMENTS = {
    r"^{n} \+ {n} = {n}\.": lambda a, b: a + b,
    r"^{n} - {n} = {n}\.": lambda a, b: a - b,
    r"^{n} \* {n} = {n}\.": lambda a, b: a * b,
    r"^{n} / {n} = {n}\.": lambda a, b: a / b,
    r"sum of {n} and {n} is {n}\.": lambda a, b: a + b,
    r"total of {n}, {n}, and {n} is {n}\.": lambda a, b, c: a + b + c,
    r"difference between {n} and {n} is {n}\.": lambda a, b: a - b,
    r"product of {n} and {n} is {n}\.": lambda a, b: a * b,
    r"quotient of {n} and {n} is {n}\.": lambda a, b: a / b,
    r"remainder when {n} is divided by {n} is {n}\.": lambda a, b: a % b,
    r"square of {n} is {n}\.": lambda a: a**2,
    r"cube of {n} is {n}\.": lambda a: a**3,
    r"square root of {n} is {n}\.": lambda a: a**0.5,
    r"^Half of {n} is {n}\.": lambda a: a / 2,
    r"^A quarter of {n} is {n}\.": lambda a: a / 4,
    r"^Double {n} is {n}\.": lambda a: 2 * a,
    r"^{n} percent of {n} is {n}\.": lambda a, b: a * b / 100,
    r"average of {n}, {n}, and {n} is {n}\.": lambda a, b, c: (a + b + c) / 3,
    r"^{n} degrees Celsius is {n} degrees Fahrenheit\.": lambda c: 1.8 * c + 32,
}


@pytest.fixture(scope="module")
def text() -> str:
    return (files("instruct_lm") / "data" / "sample.json").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def entries(text: str) -> list[dict[str, str]]:
    return json.loads(text)


def normalised(*parts: str) -> str:
    return " ".join(re.findall(r"\w+", " ".join(parts).lower()))


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(NUMBER, text)]


def test_every_entry_has_the_three_keys_and_an_answer(entries: list[dict[str, str]]) -> None:
    assert len(entries) >= 500
    for entry in entries:
        assert set(entry) == {"instruction", "input", "output"}
        assert all(isinstance(value, str) and value == value.strip() for value in entry.values()), entry
        assert entry["instruction"], entry
        assert 1 <= len(entry["output"].split()) <= 40, entry
        assert entry["output"] != entry["input"], entry


def test_one_entry_stands_on_one_line(text: str, entries: list[dict[str, str]]) -> None:
    lines = text.splitlines()
    assert [lines[0], lines[-1]] == ["[", "]"]
    assert [json.loads(line.strip().rstrip(",")) for line in lines[1:-1]] == entries


def test_no_two_entries_are_alike(entries: list[dict[str, str]]) -> None:
    prompts = Counter(normalised(entry["instruction"], entry["input"]) for entry in entries)
    assert [prompt for prompt, count in prompts.items() if count > 1] == []
    inputs = Counter(normalised(entry["input"]) for entry in entries if entry["input"])
    assert [text for text, count in inputs.items() if count > 1] == []


def test_no_two_entries_differ_only_in_their_numbers(entries: list[dict[str, str]]) -> None:
    # signs of operation stay: "35 + 48" and "200 - 75" ask different things
    def shape(entry: dict[str, str]) -> str:
        return re.sub(NUMBER, "#", f"{entry['instruction']} {entry['input']}".lower())

    shapes = Counter(map(shape, entries))
    assert [text for text, count in shapes.items() if count > 1] == []


def test_no_entry_is_taken_from_the_real_data(entries: list[dict[str, str]], shared_dir: Path) -> None:
    real = json.loads((shared_dir / "data" / "instruction-data.json").read_text(encoding="utf-8"))
    real_prompts = {normalised(entry["instruction"], entry["input"]) for entry in real}
    real_inputs = {normalised(entry["input"]) for entry in real if entry["input"]}
    for entry in entries:
        assert normalised(entry["instruction"], entry["input"]) not in real_prompts, entry
        assert not entry["input"] or normalised(entry["input"]) not in real_inputs, entry


def test_every_split_mixes_the_kinds(entries: list[dict[str, str]]) -> None:
    train, test = int(0.85 * len(entries)), int(0.10 * len(entries))
    for split in (entries[:train], entries[train : train + test], entries[train + test :]):
        share = sum(bool(entry["input"]) for entry in split) / len(split)
        assert 0.35 <= share <= 0.65
        openings = Counter(" ".join(entry["instruction"].split()[:2]) for entry in split)
        assert len(openings) >= 15
        assert max(openings.values()) <= 0.25 * len(split)


@pytest.mark.parametrize("pattern", STATEMENTS)
def test_stated_arithmetic_is_right(entries: list[dict[str, str]], pattern: str) -> None:
    regex = re.compile(pattern.replace("{n}", NUMBER))
    matches = [match for entry in entries if (match := regex.search(entry["output"]))]
    assert matches, "no entry states this: remove the pattern"
    for match in matches:
        *operands, result = map(float, match.groups())
        assert result == pytest.approx(STATEMENTS[pattern](*operands)), match.string


def test_an_answer_to_a_calculation_repeats_its_numbers(entries: list[dict[str, str]]) -> None:
    patterns = [re.compile(pattern.replace("{n}", NUMBER)) for pattern in STATEMENTS]
    for entry in entries:
        if any(regex.search(entry["output"]) for regex in patterns):
            stated = Counter(numbers(entry["output"]))
            assert not Counter(numbers(entry["instruction"])) - stated, entry


def test_conversions_are_right(entries: list[dict[str, str]]) -> None:
    unit = "(" + "|".join(name for table in UNITS.values() for name in table) + ")"
    regex = re.compile(rf"^{NUMBER} {unit} is {NUMBER} {unit}\.$")
    matches = [(entry, match) for entry in entries if (match := regex.match(entry["output"]))]
    assert len(matches) >= 20
    for entry, match in matches:
        amount, source, result, target = match.groups()
        [table] = [table for table in UNITS.values() if source in table and target in table]
        assert math.isclose(float(amount) * table[source], float(result) * table[target]), entry
        assert numbers(entry["instruction"]) == [float(amount)], entry
        assert source in entry["instruction"], entry
        assert target in entry["instruction"], entry


def test_sorted_lists_are_sorted(entries: list[dict[str, str]]) -> None:
    kinds = {
        "ascending|smallest to|increasing|lowest to": (float, False),
        "descending|largest to|decreasing|highest to": (float, True),
        "reverse alphabetical": (str.lower, True),
        "alphabetical": (str.lower, False),
        "shortest to": (len, False),
        "longest to": (len, True),
    }
    seen = set()
    for entry in entries:
        kind = next((words for words in kinds if re.search(words, entry["instruction"])), None)
        if kind is None or ", " not in entry["input"]:
            continue
        key, reverse = kinds[kind]
        assert entry["output"].split(", ") == sorted(entry["input"].split(", "), key=key, reverse=reverse), entry
        seen.add(kind)
    assert seen == set(kinds)


def test_no_odd_one_out_answer_is_missing_from_its_list(entries: list[dict[str, str]]) -> None:
    answers = [(entry, re.match(r'The odd one out is "(\w+)"\.', entry["output"])) for entry in entries]
    found = [(entry, match[1]) for entry, match in answers if match]
    assert found
    for entry, answer in found:
        assert answer in entry["input"].split(", "), entry
