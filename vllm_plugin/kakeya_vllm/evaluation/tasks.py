"""Questions with answers: GSM8K and a needle in a haystack, and two caches compared on them.

A task is built once, from a tokenizer; each cache answers its prompts in an engine of its own
(:func:`run_task`); the texts are then compared (:func:`compare_task`). Prompts are token ids, so
that every engine sees the same ones and none adds special tokens a second time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kakeya_vllm.evaluation import generation
from kakeya_vllm.evaluation.metrics import interval
from kakeya_vllm.text import read_text

GSM8K_SHOTS = 4
GSM8K_MAX_TOKENS = 256
NEEDLE_MAX_TOKENS = 32
STOP = ("\nQuestion:",)  # a base model that is done with its answer invents the next question
_CITIES = """Amsterdam Athens Bangkok Bogota Cairo Chicago Dakar Dublin Geneva Hanoi Helsinki Kyoto
Istanbul Jakarta Lima Lisbon Madrid Manila Nairobi Oslo Prague Quito Seoul Vienna"""

# A sign counts only where it cannot be a subtraction: "20-15" ends in 15, not in -15.
_NUMBER = re.compile(
    r"(?:(?<![\w)])[-−]\$?|\$[-−]?)?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
)
# GSM8K's calculator annotations: "16-3=$<<16-3=13>>13".
_ANNOTATION = re.compile(r"<<[^>\n]*>>")
# What precedes a sentence, or a line; its end is where the sentence begins.
_SENTENCE = re.compile(r'[.!?]["”’)]?\s+(?=[^\sa-z])|\n\s*(?=\S)')


@dataclass
class Task:
    """What an engine is asked, and how its answers are judged."""

    name: str
    prompts: list[list[int]]  # token ids
    expected: list[str]
    max_tokens: int  # of an answer
    right: Callable[[str, str], bool]  # (text, expected): judges one answer
    stop: tuple[str, ...] = STOP
    # To break accuracies down by: axis ("length") and on it the label of every prompt ("4096").
    groups: dict[str, list[str]] = field(default_factory=dict)


def uses_chat(tokenizer: Any, chat: bool | None) -> bool:
    """``chat``; for None, whether there is a chat template. SystemExit for True without one."""
    has = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has:
        raise SystemExit("kakeya: the model's tokenizer has no chat template; use plain prompts")
    return has if chat is None else chat


def _encode_chat(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    # Reasoning models would spend the whole answer on thinking; templates without the switch ignore
    # it. The template writes special tokens itself, hence none are added.
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _check_window(prompt: int, answer: int, limit: int) -> None:
    if prompt + answer > limit:
        what = f"{prompt} tokens and {answer} of the answer"
        raise SystemExit(f"kakeya: {what} exceed the window of {limit} tokens")


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str  # the worked solution; its last line is "#### 18"
    expected: str  # the number, as extract_answer() gives it


def extract_answer(text: str) -> str | None:
    """The number after the first "####", else the last number of the text, else None. Without "$",
    thousands separators and zeros that mean nothing: "$1,200.50" is "1200.5", "18.0" is "18"."""
    _, mark, after = text.partition("####")
    found = _NUMBER.search(after.split("\n")[0]) if mark else None
    if found is None:
        *_, found = (None, *_NUMBER.finditer(text))
    return None if found is None else _normal(found.group())


def _normal(number: str) -> str:
    # By hand: floats would round, and a model that repeats itself writes numbers of 200 digits.
    digits = re.sub(r"[^0-9.]", "", number)
    whole, _, fraction = digits.partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    value = f"{whole}.{fraction}" if fraction else whole
    return f"-{value}" if value != "0" and re.search("[-−]", number) else value


def is_number(text: str, expected: str) -> bool:
    """Whether the answer extracted from ``text`` is the number ``expected``."""
    return extract_answer(text) == _normal(expected)


def load_gsm8k(path: str | Path) -> list[Problem]:
    """Problems of a JSONL file with "question" and "answer" on each line. SystemExit names the file
    and the line of what is not one."""
    problems = []
    # Not splitlines(): JSON strings may hold U+2028 and its like.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        try:
            problems += [_problem(line)] if line.strip() else []
        except ValueError as e:
            raise SystemExit(f"kakeya: {path}, line {number}: {e}") from None
    if not problems:
        raise SystemExit(f"kakeya: {path} holds no problems")
    return problems


def _problem(line: str) -> Problem:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON at column {e.colno}: {e.msg}") from None
    if not isinstance(row, dict):
        raise ValueError("not an object")
    for key in ("question", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f'"{key}" is missing or not a text')
    question, answer = row["question"].strip(), row["answer"].strip()
    if not _NUMBER.search(answer.partition("####")[2]):
        raise ValueError('"answer" does not end in "#### " and a number')
    return Problem(question, answer, extract_answer(answer))


def gsm8k_prompts(
    tokenizer: Any,
    problems: Sequence[Problem],
    shots: int = GSM8K_SHOTS,
    chat: bool | None = None,
    count: int | None = None,
) -> Task:
    """The first ``count`` problems (None: all) after ``shots`` worked examples.

    The examples are the last problems, which are then not asked; calculator annotations are taken
    out of them. ``chat``: see :func:`uses_chat`. SystemExit where problems do not suffice.
    """
    if shots < 0 or (count is not None and count < 1):
        raise ValueError(f"shots {shots}, count {count}")
    have = len(problems) - shots
    if have < (count or 1):
        raise SystemExit(
            f"kakeya: {len(problems)} problems less {shots} worked examples leave {max(have, 0)} "
            f"questions; {count or 1} are needed"
        )
    asked, chat = problems[:have][:count], uses_chat(tokenizer, chat)
    examples = [(e.question, _ANNOTATION.sub("", e.answer)) for e in problems[have:]]
    prompts = [_gsm8k_prompt(tokenizer, p.question, examples, chat) for p in asked]
    expected = [p.expected for p in asked]
    return Task("gsm8k", prompts, expected, GSM8K_MAX_TOKENS, is_number)


def _gsm8k_prompt(
    tokenizer: Any, question: str, examples: list[tuple[str, str]], chat: bool
) -> list[int]:
    if not chat:
        worked = [f"Question: {q}\nAnswer: {solution}\n\n" for q, solution in examples]
        return list(tokenizer("".join(worked) + f"Question: {question}\nAnswer:")["input_ids"])
    messages = []
    for q, solution in [*examples, (question, "")]:
        content = f'{q}\nEnd your answer with "#### " and the number.'
        messages += [{"role": "user", "content": content}]
        messages += [{"role": "assistant", "content": solution}]
    return _encode_chat(tokenizer, messages[:-1])


def has_number(text: str, number: str) -> bool:
    """Whether the first line of ``text`` holds ``number``, not as a part of a longer one."""
    line = re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", text.strip().split("\n")[0])
    return re.search(rf"(?<![0-9]){re.escape(number)}(?![0-9])", line) is not None


def needle_keys(count: int, seed: int) -> list[tuple[str, str, float]]:
    """(city, number of six digits, place in the haystack from 0 to 1) each, no city twice."""
    cities = _CITIES.split()
    if not 1 <= count <= len(cities):
        raise ValueError(f"{count} keys; from 1 to {len(cities)} are possible")
    generator = np.random.default_rng(seed)
    cities = generator.permutation(cities)[:count]
    numbers = generator.choice(900_000, count, replace=False) + 100_000
    places = generator.random(count)
    return [(str(c), str(n), float(p)) for c, n, p in zip(cities, numbers, places, strict=True)]


def needle_prompts(
    tokenizer: Any,
    haystack_text: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    seed: int,
    *,
    keys: int = 4,
    chat: bool | None = None,
    max_model_len: int | None = None,
) -> Task:
    """For every length, depth and key a prompt of exactly ``length`` tokens: a piece of the text
    with the sentence "The secret number of {city} is {number}." in it, and a question for it.

    ``depths``: 0 is the beginning of the piece, 1 its end; the sentence goes where the nearest
    sentence begins. Prompts of a length have, with the same key, the same piece of the text.
    ``max_model_len``: tokens that the model takes, question and answer; the tokenizer's limit holds
    as well. SystemExit for lengths beyond it, too short for the question, or beyond the text;
    ValueError for depths outside 0 to 1 and for numbers of keys that :func:`needle_keys` refuses.
    """
    if not lengths or not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"lengths {lengths}, depths {depths}")
    limit = min(max_model_len or 1 << 60, getattr(tokenizer, "model_max_length", 1 << 60))
    for length in lengths:
        _check_window(length, NEEDLE_MAX_TOKENS, limit)
    haystack = _Haystack(tokenizer, haystack_text, uses_chat(tokenizer, chat))
    chosen = needle_keys(keys, seed)
    cells = [(length, depth, key) for length in lengths for depth in depths for key in chosen]
    prompts = [haystack.prompt(length, depth, *key) for length, depth, key in cells]
    expected = [number for _, _, (_, number, _) in cells]
    groups = {"length": [str(c[0]) for c in cells], "depth": [f"{c[1]:g}" for c in cells]}
    return Task("needle", prompts, expected, NEEDLE_MAX_TOKENS, has_number, groups=groups)


class _Haystack:
    def __init__(self, tokenizer: Any, text: str, chat: bool):
        self.tokenizer, self.text, self.chat = tokenizer, text, chat
        self.tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        self.characters_per_token = len(text) / max(self.tokens, 1)
        self.sentences = np.array([0] + [match.end() for match in _SENTENCE.finditer(text)])

    def encode(self, piece: str, city: str) -> list[int]:
        content = f"{piece.strip()}\n\nQuestion: What is the secret number of {city}?"
        if self.chat:
            content = (
                f"A secret number is hidden in this text.\n\n{content} Answer with the number."
            )
            return _encode_chat(self.tokenizer, [{"role": "user", "content": content}])
        # Small base models know what to do only once the answer has begun.
        content += f"\nAnswer: The secret number of {city} is"
        return list(self.tokenizer(content, verbose=False)["input_ids"])

    def prompt(self, length: int, depth: float, city: str, number: str, place: float) -> list[int]:
        """Token ids [length]."""
        needle = f"The secret number of {city} is {number}. "
        needed = length - len(self.encode(needle, city))
        if needed < 1:
            raise SystemExit(
                f"kakeya: {length} tokens are too few for a needle prompt: {length - needed} are "
                "needed without any haystack"
            )
        # Stretches of the text differ in characters a token; a quarter to spare covers that.
        last = len(self.text) - 1.25 * needed * self.characters_per_token
        first = int(place * (self.sentences <= max(last, 0)).sum())
        # Not every piece can be cut to the length: one more character may be two more tokens.
        near = range(max(first - 8, 0), min(first + 9, len(self.sentences)))
        for i in sorted(near, key=lambda i: abs(i - first)) if needed <= self.tokens else ():
            if ids := self.cut(int(self.sentences[i]), length, depth, needle, city):
                return ids
        raise SystemExit(
            f"kakeya: a needle prompt of {length} tokens takes about {needed} of the haystack, "
            f"which holds {self.tokens} and cannot be cut to fit"
        )

    def cut(self, start: int, length: int, depth: float, needle: str, city: str) -> list[int]:
        """The prompt whose piece begins at character ``start``; empty where no end gives the
        length. Tokens grow with the end, but for a few that cut words and the needle shift."""
        low, high = start, len(self.text) + 1
        end = start + int(length * self.characters_per_token)
        while high - low > 1:
            if not low < end < high:
                end = (low + high) // 2
            places = self.sentences[(self.sentences >= start) & (self.sentences < end)]
            at = int(places[np.abs(places - start - depth * (end - start)).argmin()])
            ids = self.encode(self.text[start:at] + needle + self.text[at:end], city)
            if len(ids) == length:
                return ids
            low, high = (end, high) if len(ids) < length else (low, end)
            end += int((length - len(ids)) * self.characters_per_token)
        return []


def run_task(
    llm: Any, prompts: Sequence[Sequence[int]], max_tokens: int, stop: Sequence[str] = STOP
) -> list[str]:
    """Greedy answers of ``llm`` (``vllm.LLM``) to prompts of token ids, without the stop string;
    as many at a time as the engine's ``max_num_seqs``. SystemExit where an answer would not fit the
    model's window, which vLLM would cut short without a word."""
    from vllm import SamplingParams

    limit = llm.llm_engine.vllm_config.model_config.max_model_len
    _check_window(max(map(len, prompts), default=0), max_tokens, limit)
    parameters = SamplingParams(temperature=0.0, max_tokens=max_tokens, stop=list(stop))
    inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return [output.outputs[0].text for output in llm.generate(inputs, parameters, use_tqdm=True)]


def compare_task(
    reference_texts: Sequence[str],
    texts: Sequence[str],
    expected: Sequence[str],
    right: Callable[[str, str], bool] = is_number,
    groups: dict[str, list[str]] | None = None,
) -> dict[str, Any]:
    """Two caches' answers to the same questions; ``right`` and ``groups`` as in :class:`Task`.

    Accuracies and ``difference`` (this less reference) are shares of problems, ``*_95`` their 95 %
    bootstrap intervals over problems. ``characters_until_difference`` is a mean over the answers
    that differ; None where none does. Ready for JSON. ValueError for lists of unequal length.
    """
    groups = groups or {}
    sizes = [len(x) for x in (reference_texts, texts, expected, *groups.values())]
    if len(set(sizes)) > 1 or not expected:
        raise ValueError(f"answers, expected ones and groups differ in number: {sizes}")
    reference, this = (
        np.array([right(t, e) for t, e in zip(answers, expected, strict=True)], dtype=float)
        for answers in (reference_texts, texts)
    )
    pairs = [(a, b) for a, b in zip(reference_texts, texts, strict=True) if a != b]
    differing = [generation.first_difference(a, b) for a, b in pairs]
    result: dict[str, Any] = {"problems": len(expected)}
    figures = {"accuracy_reference": reference, "accuracy": this, "difference": this - reference}
    for name, values in figures.items():
        result |= {name: float(values.mean()), f"{name}_95": interval(values, np.mean)}
    result["groups"] = {}
    for axis, labels in groups.items():
        rows = result["groups"][axis] = {}
        for label in dict.fromkeys(labels):
            mask = np.array(labels) == label
            before, now = (float(values[mask].mean()) for values in (reference, this))
            found = {"accuracy_reference": before, "accuracy": now}
            rows[label] = {"problems": int(mask.sum()), **found}
    return result | {
        "both_right": int((reference * this).sum()),
        "only_reference": int((reference > this).sum()),
        "only_this": int((this > reference).sum()),
        "neither": int((reference + this == 0).sum()),
        "identical": 1 - len(differing) / len(expected),
        "characters_until_difference": float(np.mean(differing)) if differing else None,
    }


def report_task(result: dict[str, Any]) -> str:
    """A table for people of what compare_task() found; "task" and "label" (of the cache) are shown
    where the caller added them."""

    def row(name: str, key: str, sign: str = "") -> str:
        low, high = result[f"{key}_95"]
        return f"{name:<32}{result[key]:>{sign}8.1%} [{low:{sign}.1%}, {high:{sign}.1%}]"

    until = result["characters_until_difference"]
    lines = [
        f"{result.get('task', 'task')}: {result['problems']} problems, greedy answers\n",
        f"{'cache':<32}{'right':>8} 95 %",
        row("reference", "accuracy_reference"),
        row(result.get("label", "this"), "accuracy"),
        row("difference", "difference", "+"),
        f"\nright: both {result['both_right']}, only the reference {result['only_reference']}, "
        f"only this {result['only_this']}, neither {result['neither']}",
        f"identical answers: {result['identical']:.1%}"
        + ("" if until is None else f"; the others part after {until:.0f} characters"),
    ]
    for axis, rows in result["groups"].items():
        lines.append(f"\n{axis:<16}{'problems':>12}{'reference':>12}{'this':>12}")
        lines += [
            f"{label:<16}{r['problems']:>12}{r['accuracy_reference']:>12.1%}{r['accuracy']:>12.1%}"
            for label, r in rows.items()
        ]
    return "\n".join(lines)
