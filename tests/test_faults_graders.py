"""Wrong answers that were paid, right ones that were not, and verifiers that broke: each a sample of its kind."""

import asyncio

import pytest

from trimtab.rewards.answers import choice, equivalent, exact, final_answer, mathematics, numeric, quantity, unreadable
from trimtab.rewards.reading.blocks import code_block, tagged_block
from trimtab.rewards.types import VerifierError

PROGRAM = "def f(n):\n    return n + 1\n"


@pytest.mark.parametrize(
    "text",
    [
        f"```python\n{PROGRAM}```\nIt prints\n```\n8\n```",
        f"~~~python\n{PROGRAM}~~~\n",
        f"```python title='f.py'\n{PROGRAM}```",
        f"```{{.python}}\n{PROGRAM}```",
        f"1. The function\n\n   ```python\n   {PROGRAM.replace(chr(10), chr(10) + '   ').rstrip()}\n   ```\n2. Done.",
        f"> ```py\n> {PROGRAM.replace(chr(10), chr(10) + '> ').rstrip('> ')}> ```",
        f"```\n{PROGRAM}```\nOutput:\n```\n8\n[1, 2]\n```",
        f"```\n{PROGRAM}```\nOutput:\n```text\nprint(8)\n```",
        f"<answer>\n```python\n{PROGRAM}```\n</answer>",
        f"```python\n{PROGRAM}```\r\n",
        f"```python\n{PROGRAM}```\nAnd once more\n```python\ndef g(",
    ],
)
def test_the_program_of_an_answer_is_its_last_whole_block_of_python(text):
    assert code_block(text) == PROGRAM


def test_a_longer_fence_holds_shorter_ones_and_an_indented_one_closes_nothing():
    code = "text = '''\n```\ninside\n```\n'''\n"
    assert code_block(f"````python\n{code}````") == code
    code = "def f():\n    '''\n    ```\n    f()\n    ```\n    '''\n"
    assert code_block(f"```python\n{code}```") == code


def test_what_is_no_program_is_none():
    assert code_block("```\nhello there\n```") is None
    assert code_block("```\n42\n```") is None
    assert code_block("```json\n{}\n```") is None
    assert tagged_block("```sql\nselect 1\n```\n```\nout\n```", ["sql"]) == "select 1\n"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"3\frac{1}{2}", 3.5),
        (r"-2\tfrac34", -2.75),
        ("5 3/8", 5.375),
        ("2¼", 2.25),
        (r"\frac13", 1 / 3),
        (r"\frac{1}3", 1 / 3),
        (r"-\dfrac{5}{8}", -0.625),
        ("1{,}234", 1234),
        (r"45\,600", 45600),
        (r"1,\!234,\!567", 1234567),
        ("10^6", 1e6),
        ("10⁻³", 1e-3),
        ("2^{10}", 1024),
        ("3 \u00d7 10⁴", 30000),
        ("7 * 10**3", 7000),
        ("\u2013 8", -8),
        ("\u22128.5", -8.5),
        (r"0.\overline{6}", 2 / 3),
        ("0.8(3)", 5 / 6),
        ("x = 19", 19),
        ("2.5 million", 2.5e6),
        ("27", 27),
    ],
)
def test_numbers_are_read_as_people_write_them(text, number):
    assert numeric(text, number)


@pytest.mark.parametrize(
    "text", ["3\u20135", "3-5", "3 5/2", "1,23", "2, 100", "5 + 1", "4:30", "1/0", "0x10", "1.2.3", "6!"]
)
def test_what_is_no_single_number_is_not_read_as_one(text):
    found = quantity(text)
    assert found is None or found[1] != ""


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("5 + 37\n#### 42", "42"),
        ("#### $1,250\n", "$1,250"),
        ("#### 2. The sum\nAnswer: 42", "42"),
        (r"so $\boxed 42$.", "42"),
        (r"\boxed\frac12", r"\frac12"),
        (r"\boxed{\sqrt{\frac{1}{2}}}", r"\sqrt{\frac{1}{2}}"),
        ("## Final Answer\n\n42", "42"),
        ("**Final Answer**\n\n\\[\n42\n\\]\n", "42"),
        ("### Final answer:\n42 metres.", "42 metres"),
        ("Final Answer: The final answer is $42$. I hope it is correct.", "42"),
        ("**The answer is: 42**", "42"),
        ("The correct option is (C).", "(C)"),
        ("The answer is option C.", "C"),
        ("Both fail, so (C) is correct.", "C"),
        ("It freezes.\n\n**(C)**", "(C)"),
        ("#### Step 1\nNothing more.", None),
        ("A dog\nran away", None),
    ],
)
def test_final_answers_are_found_in_the_forms_that_data_sets_use(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("(C)", True),
        ("C", True),
        ("c)", True),
        (r"\text{(C)}", True),
        ("C. Vitamin A", True),
        ("option C", True),
        ("B", False),
        ("C or D", False),
        ("(C), (D)", False),
        ("Carbon", False),
        ("A, B, C", False),
        (None, False),
    ],
)
def test_a_choice_is_one_letter(answer, right):
    assert choice(answer, "(C)") is right


def test_the_letter_of_a_choice_is_the_same_with_and_without_brackets():
    assert exact(final_answer("The answer is (C)."), "C") and not exact("(B)", "C")


def same(answer: str, truth: str) -> bool:
    return asyncio.run(equivalent(answer, truth, seconds=30))


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("0.0", r"1.6\times10^{-19}"),
        ("6.0e-34", "6.6e-34"),
        ("1/2006!", "1/2004!"),
        ("0", "e^{-40}"),
        (r"(0, 2)", r"(3\times10^{-9}, 2)"),
        (r"\{0, 1\}", r"\{4\times10^{-8}, 1\}"),
        ("1e-9x", "3e-9x"),
        (r"\begin{pmatrix}0\\1\end{pmatrix}", r"\begin{pmatrix}10^{-12}\\1\end{pmatrix}"),
        ("on", "no"),
        ("left", "felt"),
        ("north", "thorn"),
        ("God", "dog"),
        ("1+3i", r"1+2\mathrm{i}"),
        ("9", "10 000"),
    ],
)
def test_different_values_and_different_words_are_not_equal(answer, truth):
    assert not same(answer, truth)


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("1/3", r"0.\overline{3}"),
        ("7/6", r"1.1\overline{6}"),
        ("1+i", r"1+\mathrm{i}"),
        (r"\pi k", r"x=k\pi"),
        (r"k\pi", r"x = k\pi, k \in \mathbb{Z}"),
        (r"(3, \infty)", r"\{x \mid x>3\}"),
        (r"x \ge 2", r"\{x\in\mathbb{R} : x \ge 2\}"),
        ("(1,2)", "]1,2["),
        ("10000", r"10\,000"),
        ("0.001", "1e-3"),
        (r"\arctan 2", r"\operatorname{arctan} 2"),
        ("60", "60°"),
        ("x=1, y=2", r"\begin{cases}x=1\\y=2\end{cases}"),
        ("No", r"\text{no}"),
        ("yx", "xy"),
        ("(1+i)(1-i)", "2"),
        (r"\sin^2 x + \cos^2 x", "1"),
        ("50%", "0.5"),
    ],
)
def test_truths_in_common_notation_are_read(answer, truth):
    assert same(answer, truth)


def test_truths_that_cannot_be_read_are_listed_with_the_reason():
    found = asyncio.run(unreadable(["3", r"\frac{1}{2}", r"n\equiv 1 \pmod 3", "no", ""], seconds=30))
    assert set(found) == {r"n\equiv 1 \pmod 3", ""}
    assert "use exact()" in found[r"n\equiv 1 \pmod 3"]


def test_a_verifier_that_breaks_at_the_truth_says_nothing_and_at_the_answer_says_no():
    tower = "9^{9^{9^9}}"
    with pytest.raises(VerifierError, match="breaks at the truth"):
        asyncio.run(equivalent("1", tower, seconds=0.3))
    assert asyncio.run(mathematics(rf"\boxed{{{tower}}}", "1", seconds=0.3)) == 0.0
