"""Tasks are deterministic and exact, and their programs print what they claim."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thor_fast.errors import ConfigError
from thor_fast.synthetic import (
    HELD_OUT_FAMILIES,
    TEST_SEED,
    TRAIN_SEED,
    TRAINED_FAMILIES,
    generate,
    task_set,
)
from thor_fast.synthetic.execution import run_trusted
from thor_fast.types import Status

ALL = TRAINED_FAMILIES + HELD_OUT_FAMILIES
ANY_TASK = st.builds(generate, st.sampled_from(ALL), st.integers(0, 2**32), st.integers(0, 2**32))


def _numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def _digit_sum(n):
    return sum(int(c) for c in str(n))


def _expression(text):
    """The value of a written formula of digits, ``+-*`` and ``^``."""
    assert re.fullmatch(r"[\d+*^-]+", text), text
    return eval(text.replace("^", "**"))


def _modular(text):
    base, exponent, modulus = _numbers(text)
    value = 1
    for _ in range(exponent):
        value = value * base % modulus
    return value


def _euclid(a, b):
    return a if b == 0 else _euclid(b, a % b)


def _divisors(text):
    a, b = _numbers(text)
    g = _euclid(a, b)
    return a * b // g if "lcm" in text else g


def _linear(question):
    equations = re.findall(r"(-?\d+)x([+-]\d+)y=(-?\d+)", question)
    (a, b, p), (c, d, q) = (map(int, e) for e in equations)
    solutions = [
        (x, y)
        for x in range(-99, 100)
        for y in range(-99, 100)
        if a * x + b * y == p and c * x + d * y == q
    ]
    (solution,) = solutions
    return solution[0 if re.search(r"(Find|is) x", question) else 1]


def _counting(question):
    low, high, *rest = _numbers(question)
    if "digit sum" in question:
        return len([n for n in range(low, high + 1) if _digit_sum(n) == rest[0]])
    if "remainder" in question:
        return len([n for n in range(low, high + 1) if n % rest[1] == rest[0]])
    return len([n for n in range(low, high + 1) if n % rest[0] == 0 and n % rest[1] != 0])


def _chain(question):
    first = re.search(r"k=(.*?)[.,] ", question)[1]
    then = re.search(r"(?:Find|what is) (.*)[.?]", question)[1]
    k = _modular(first) if "mod" in first else _divisors(first)
    then = re.sub(r"\bk\b", str(k), then)
    if "digit sum" in then:
        return _digit_sum(math.prod(_numbers(then)))
    return _modular(then) if "mod" in then else _expression(then)


def _residues(question):
    low, p, r, q, s = _numbers(question)
    return next(n for n in range(low + 1, low + 1 + p * q) if n % p == r and n % q == s)


# Answers by another way than the families use: from the text of the question alone.
SOLVERS = {
    "arithmetic": lambda q: _expression(re.search(r"[\d+*-]{3,}", q)[0]),
    "powers": _modular,
    "divisors": _divisors,
    "digits": lambda q: _digit_sum(_expression(re.search(r"\d[\d*^]+", q)[0])),
    "linear": _linear,
    "counting": _counting,
    "chain": _chain,
    "composed": _chain,
    "residues": _residues,
}


@pytest.mark.parametrize("family", ALL)
def test_answer_follows_from_the_question(family):
    for index in range(30):
        task = generate(family, TEST_SEED, index)
        assert str(SOLVERS[family](task.question)) == task.answer, task


@given(ANY_TASK)
@settings(max_examples=200, deadline=None)
def test_programs_print_what_they_claim_and_the_last_one_the_answer(task):
    for step in task.steps:
        result = run_trusted(step.code)
        assert (result.status, result.stdout) == (Status.OK, step.output + "\n")
    assert task.steps[-1].output == task.answer


@given(ANY_TASK)
@settings(max_examples=50, deadline=None)
def test_a_task_is_a_function_of_its_name(task):
    assert generate(task.family, task.seed, task.index) == task
    assert task.task_id == f"{task.family}/{task.seed}/{task.index}"


def test_tasks_are_the_same_in_another_process():
    code = "from thor_fast.synthetic import *; print([t.question for t in task_set(9, seed=5)])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == f"{[t.question for t in task_set(9, seed=5)]}\n"


def test_task_set_is_balanced_and_grows_at_its_end():
    tasks = task_set(10, TEST_SEED)
    assert tasks == task_set(12, TEST_SEED)[:10]
    counts = [sum(t.family == f for t in tasks) for f in TRAINED_FAMILIES]
    assert max(counts) - min(counts) <= 1
    assert task_set(0, TEST_SEED) == []


def test_test_questions_are_all_but_never_seen_in_training():
    train = {t.question for t in task_set(14_000, TRAIN_SEED)}
    test = [t.question for t in task_set(700, TEST_SEED)]
    # Measured: 2 of 7 000 against all of training. Chance repetitions of small gcds are no leak.
    assert sum(q in train for q in test) <= 1


def test_held_out_families_share_no_question_form_with_training():
    from thor_fast.synthetic.families.chain import HELD_OUT_PAIRS, TRAINED_PAIRS

    assert not set(HELD_OUT_PAIRS) & set(TRAINED_PAIRS)
    assert {p[0] for p in HELD_OUT_PAIRS} == {p[0] for p in TRAINED_PAIRS}
    assert {p[1] for p in HELD_OUT_PAIRS} == {p[1] for p in TRAINED_PAIRS}
    assert not set(HELD_OUT_FAMILIES) & set(TRAINED_FAMILIES)


def test_prompt_forms_differ():
    task = generate("powers", TEST_SEED, 0)
    assert task.prompt == f"{task.question} Use Python.\n"
    assert task.direct_prompt == f"{task.question} No code.\n"


def test_wrong_names_and_counts_are_told():
    with pytest.raises(ConfigError, match="family is 'poems', expected one of arithmetic"):
        generate("poems", 1, 0)
    with pytest.raises(ConfigError, match="index is -1, expected >= 0"):
        generate("powers", 1, -1)
    with pytest.raises(ConfigError, match="n is -1, expected >= 0"):
        task_set(-1, 1)
    with pytest.raises(ConfigError, match="families is empty"):
        task_set(1, 1, ())


def test_tasks_need_no_torch():
    code = "import sys, thor_fast.synthetic; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "False\n"
