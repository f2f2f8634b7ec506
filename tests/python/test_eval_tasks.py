"""Tasks of the evaluation: questions, the extraction of answers, and two caches' answers compared.
No engine runs here."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from kakeya_vllm.evaluation import generation, tasks
from kakeya_vllm.evaluation.tasks import Problem


@pytest.fixture(scope="module")
def tokenizer():
    import engines
    from transformers import AutoTokenizer

    path = engines.ROOT / ".cache" / "models" / "smollm2"
    if not (path / "tokenizer.json").exists():
        pytest.fail(f"no tokenizer at {path}: run `make setup`")
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def haystack():
    """Prose of some 11,000 tokens whose sentences are all different and hold no large numbers."""
    generator = np.random.default_rng(0)
    words = ["river", "amber", "quietly", "falling", "under", "seven", "lanterns", "beside"]
    sentences = [" ".join(generator.choice(words, 9)).capitalize() + "." for _ in range(1000)]
    return "\n\n".join(" ".join(sentences[i : i + 10]) for i in range(0, 1000, 10))


def problem(i):
    return Problem(f"What is {i} and {i}?", f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}", "")


# --- GSM8K


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She makes 9 * 2 = $18.\n#### 18", "18"),
        ("#### $1,450,000", "1450000"),
        ("#### 18.0", "18"),
        ("#### 18.50 dollars", "18.5"),
        ("#### -10", "-10"),
        ("#### $-10", "-10"),
        ("#### −3", "-3"),
        ("#### 007", "7"),
        ("#### -0.0", "0"),
        ("#### 18\n#### 19", "18"),
        ("in all 12.\n#### eighteen", "12"),
        ("It is 5 and then 1,234.", "1234"),
        ("so 20-15", "15"),
        ("(20)-15", "15"),
        ("so $20-$15", "15"),
        ("it is 5% of 3,45", "45"),
        ("about .50", "0.5"),
        ("The answer is...18", "18"),
        ("no idea", None),
        ("", None),
        ("9" * 300, "9" * 300),
    ],
)
def test_the_answer_of_a_text(text, answer):
    assert tasks.extract_answer(text) == answer


def test_numbers_are_compared_by_value():
    assert tasks.is_number("#### 2,125.00", "2,125")
    assert not tasks.is_number("#### 2,126", "2,125")
    assert not tasks.is_number("nothing", "0")


def write(path, *lines):
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


GOOD = json.dumps({"question": "How many?", "answer": "Two.\u2028\n#### 2,000"}, ensure_ascii=False)


def test_problems_are_read(tmp_path):
    found = tasks.load_gsm8k(write(tmp_path / "p.jsonl", GOOD, "", GOOD, ""))
    assert found == [Problem("How many?", "Two.\u2028\n#### 2,000", "2000")] * 2


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ('{"answer": "#### 1"}', '"question" is missing'),
        ('{"question": "a", "answer": 1}', '"answer" is missing or not a text'),
        ('{"question": " ", "answer": "#### 1"}', '"question" is missing'),
        ('{"question": "a", "answer": "1"}', "does not end in"),
        ('{"question": "a", "answer": "1 #### one"}', "does not end in"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, why):
    path = write(tmp_path / "p.jsonl", GOOD, "", line)
    with pytest.raises(SystemExit, match=rf"^kakeya: .*p\.jsonl, line 3: .*{why}"):
        tasks.load_gsm8k(path)


def test_files_without_problems_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no problems"):
        tasks.load_gsm8k(write(tmp_path / "p.jsonl", "", ""))
    with pytest.raises(SystemExit, match="does not exist"):
        tasks.load_gsm8k(tmp_path / "none.jsonl")


def test_plain_prompts_begin_with_the_last_problems(tokenizer):
    task = tasks.gsm8k_prompts(tokenizer, [problem(i) for i in range(10)], shots=2, chat=False)
    assert len(task.prompts) == len(task.expected) == 8
    assert tokenizer.decode(task.prompts[3]) == (
        "Question: What is 8 and 8?\nAnswer: 8+8=16\n#### 16\n\n"
        "Question: What is 9 and 9?\nAnswer: 9+9=18\n#### 18\n\n"
        "Question: What is 3 and 3?\nAnswer:"
    )
    assert task.stop == ("\nQuestion:",)
    assert task.max_tokens == 256


def test_chat_prompts_hold_the_examples_as_turns(tokenizer):
    problems = [problem(i) for i in range(10)]
    task = tasks.gsm8k_prompts(tokenizer, problems, shots=1, count=2)
    assert task.prompts == tasks.gsm8k_prompts(tokenizer, problems, 1, chat=True, count=2).prompts
    text = tokenizer.decode(task.prompts[1])
    assert len(task.prompts) == 2
    roles = re.findall(r"<\|im_start\|>(\w+)", text)
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert "assistant\n9+9=18\n#### 18<|im_end|>" in text
    assert "user\nWhat is 1 and 1?\n" in text
    assert text.endswith("<|im_start|>assistant\n")


def test_expected_numbers_follow_their_questions(tokenizer, tmp_path):
    lines = [json.dumps({"question": f"q{i}", "answer": f"#### {i}"}) for i in range(6)]
    problems = tasks.load_gsm8k(write(tmp_path / "p.jsonl", *lines))
    assert tasks.gsm8k_prompts(tokenizer, problems).expected == ["0", "1"]
    assert len(tasks.gsm8k_prompts(tokenizer, problems, shots=0).expected) == 6


def test_problems_must_suffice(tokenizer):
    with pytest.raises(SystemExit, match="4 problems less 4 worked examples leave 0"):
        tasks.gsm8k_prompts(tokenizer, [problem(i) for i in range(4)])
    with pytest.raises(SystemExit, match="leave 6 questions; 7 are needed"):
        tasks.gsm8k_prompts(tokenizer, [problem(i) for i in range(10)], count=7)


def test_a_chat_template_must_exist_where_one_is_asked_for():
    plain = SimpleNamespace(chat_template=None)
    assert not tasks.uses_chat(plain, None)
    assert not tasks.uses_chat(SimpleNamespace(chat_template="x"), False)
    assert tasks.uses_chat(SimpleNamespace(chat_template="x"), None)
    with pytest.raises(SystemExit, match="no chat template"):
        tasks.uses_chat(plain, True)


# --- Needle in a haystack


@pytest.mark.parametrize("chat", [False, True])
def test_needle_prompts_have_exactly_the_length(tokenizer, haystack, chat):
    lengths, depths = [128, 513, 2048], [0, 0.3, 1]
    task = tasks.needle_prompts(tokenizer, haystack, lengths, depths, 1, keys=3, chat=chat)
    assert [len(p) for p in task.prompts] == [n for n in lengths for _ in range(9)]
    assert task.groups["length"] == [str(n) for n in lengths for _ in range(9)]
    assert task.groups["depth"] == ["0"] * 3 + ["0.3"] * 3 + ["1"] * 3 + task.groups["depth"][9:]
    for prompt, number, depth in zip(
        task.prompts, task.expected, task.groups["depth"], strict=True
    ):
        text = tokenizer.decode(prompt)
        # What is decoded is what was tokenised.
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == prompt
        (needle,) = re.finditer(rf"The secret number of (\w+) is {number}\. ", text)
        city = needle.group(1)
        question = text.index(f"\n\nQuestion: What is the secret number of {city}?")
        if not chat:
            assert text.endswith(f"\nAnswer: The secret number of {city} is")
            before = text[: needle.start()].rstrip()
            assert not before or before[-1] == "."
            at = needle.start() / (question - len(needle.group()))
            # A sentence has some 60 characters: half a one before or after, or one at the end.
            assert abs(at - float(depth)) * question <= 90


def test_a_seed_gives_the_same_prompts(tokenizer, haystack):
    first, second, other = (
        tasks.needle_prompts(tokenizer, haystack, [256], [0.5], seed, keys=2) for seed in (3, 3, 4)
    )
    assert first == second
    assert first.expected != other.expected
    assert len({city for city, _, _ in tasks.needle_keys(23, 0)}) == 23


def test_the_whole_haystack_can_be_used(tokenizer, haystack):
    needed = len(tokenizer(haystack)["input_ids"]) + 30
    room = Recorder(tokenizer)
    task = tasks.needle_prompts(room, haystack, [needed], [0.5], 0, keys=1)
    assert len(task.prompts[0]) == needed
    assert room.calls < 60
    with pytest.raises(SystemExit, match=f"a needle prompt of {needed + 500} tokens .* cannot be"):
        tasks.needle_prompts(room, haystack, [needed + 500], [0.5], 0, keys=1)


class Recorder:
    """A tokenizer without a limit and without a chat template, that counts its calls."""

    model_max_length, chat_template = 1 << 40, None

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.tokenizer(*args, **kwargs)


def test_long_prompts_take_few_attempts(tokenizer, haystack):
    room = Recorder(tokenizer)
    text = "\n\n".join(f"Chapter {i}.\n\n{haystack}" for i in range(4))
    task = tasks.needle_prompts(room, text, [32_768], [0.1, 0.9], 0, keys=2)
    assert [len(p) for p in task.prompts] == [32_768] * 4
    assert room.calls < 4 * 30


def test_lengths_that_cannot_be_are_refused(tokenizer, haystack):
    with pytest.raises(
        SystemExit, match=r"8192 tokens and 32 of the answer exceed the window of 8192"
    ):
        tasks.needle_prompts(tokenizer, haystack, [8192], [0.5], 0)
    with pytest.raises(SystemExit, match="window of 1000"):
        tasks.needle_prompts(tokenizer, haystack, [1000], [0.5], 0, max_model_len=1000)
    with pytest.raises(SystemExit, match="20 tokens are too few"):
        tasks.needle_prompts(tokenizer, haystack, [20], [0.5], 0)
    with pytest.raises(ValueError, match="depths"):
        tasks.needle_prompts(tokenizer, haystack, [128], [1.5], 0)
    with pytest.raises(ValueError, match="99 keys"):
        tasks.needle_prompts(tokenizer, haystack, [128], [0.5], 0, keys=99)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (" 482173.", True),
        ("\n\nIt is 482,173.\nReally", True),
        ("The number is **482173**", True),
        (" 1482173", False),
        (" 4821730", False),
        (" 482174\n482173", False),
        ("", False),
    ],
)
def test_the_first_line_must_hold_the_number(text, found):
    assert tasks.has_number(text, "482173") is found


# --- Running and comparing


class FakeEngine:
    def __init__(self, window):
        config = SimpleNamespace(max_model_len=window)
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(model_config=config))

    def generate(self, prompts, parameters, use_tqdm):
        self.parameters = parameters
        assert use_tqdm
        answers = [str(sum(p["prompt_token_ids"])) for p in prompts]
        return [SimpleNamespace(outputs=[SimpleNamespace(text=a)]) for a in answers]


def test_a_task_is_answered_greedily(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    llm = FakeEngine(20)
    assert tasks.run_task(llm, [[1, 2], [3]], 18) == ["3", "3"]
    assert llm.parameters == SimpleNamespace(temperature=0, max_tokens=18, stop=["\nQuestion:"])
    with pytest.raises(SystemExit, match=r"^kakeya: 2 tokens and 19 of the answer exceed"):
        tasks.run_task(llm, [[1, 2], [3]], 19)


REFERENCE = ["#### 1", "#### 2", "#### 3", "#### 0", "#### 0"]
TEXTS = ["#### 1", "so 2", "#### 4", "#### 4", "#### 9"]
EXPECTED = ["1", "2", "3", "4", "5"]


def test_two_caches_are_compared():
    groups = {"length": ["a", "a", "b", "b", "b"]}
    found = tasks.compare_task(REFERENCE, TEXTS, EXPECTED, groups=groups)
    assert found["problems"] == 5
    assert found["accuracy_reference"] == found["accuracy"] == pytest.approx(0.6)
    assert found["difference"] == 0
    low, high = found["difference_95"]
    assert -0.8 <= low < 0 < high <= 0.8
    assert found["accuracy_95"][0] < 0.6 < found["accuracy_95"][1]
    counts = [found[k] for k in ("both_right", "only_reference", "only_this", "neither")]
    assert counts == [2, 1, 1, 1]
    assert found["identical"] == pytest.approx(0.2)
    assert found["characters_until_difference"] == pytest.approx((0 + 5 + 5 + 5) / 4)
    rows = found["groups"]["length"]
    assert rows["a"] == {"problems": 2, "accuracy_reference": 1.0, "accuracy": 1.0}
    assert rows["b"]["problems"] == 3
    assert json.loads(json.dumps(found)) == found


def test_equal_answers_differ_by_nothing():
    found = tasks.compare_task(TEXTS, TEXTS, EXPECTED)
    assert found["difference_95"] == [0, 0]
    assert found["identical"] == 1
    assert found["characters_until_difference"] is None


def test_the_task_says_what_is_right():
    found = tasks.compare_task([" 12\n34"], [" 34\n12"], ["12"], tasks.has_number)
    assert (found["accuracy_reference"], found["accuracy"]) == (1, 0)
    assert found["difference"] == -1


@pytest.mark.parametrize("arguments", [([], [], []), (["1"], ["1", "2"], ["1", "2"])])
def test_lists_of_answers_must_match(arguments):
    with pytest.raises(ValueError, match="differ in number"):
        tasks.compare_task(*arguments)
    with pytest.raises(ValueError, match="differ in number"):
        tasks.compare_task(["1"], ["1"], ["1"], groups={"depth": []})


def test_the_report_shows_the_figures():
    found = tasks.compare_task(REFERENCE, TEXTS, EXPECTED, groups={"depth": list("00111")})
    text = tasks.report_task({"task": "gsm8k", "label": "fp8", **found})
    assert text.startswith("gsm8k: 5 problems")
    assert re.search(r"^fp8 +60\.0% \[\d+\.\d%, \d+\.\d%\]$", text, re.M)
    assert re.search(r"^difference +\+0\.0% \[-\d+\.\d%, \+\d+\.\d%\]$", text, re.M)
    assert "both 2, only the reference 1, only this 1, neither 1" in text
    assert "identical answers: 20.0%; the others part after 4 characters" in text
    assert re.search(r"^0 +2 +100\.0% +100\.0%$", text, re.M)
    assert "part after" not in tasks.report_task(tasks.compare_task(TEXTS, TEXTS, EXPECTED))


def test_generations_are_compared_by_place():
    reference = [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2]]
    found = generation.compare(reference, [[1, 2, 3, 4], [1, 9, 3, 9], [1, 2, 3]])
    assert found["first_difference"] == [4, 1, 2]
    assert found["first_difference_median"] == 2
    assert found["never_different"] == pytest.approx(1 / 3)
    assert found["agreement_by_position"] == pytest.approx([1, 2 / 3, 2 / 3, 1 / 2])
    assert found["agreement_after"] == pytest.approx(1 / 2)
    assert json.loads(json.dumps(found)) == found
    same = generation.compare(reference, reference)
    assert same["agreement_after"] is None
    assert same["agreement_by_position"] == [1, 1, 1, 1]
