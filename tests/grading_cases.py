# ruff: noqa: RUF001 - letters of other scripts are meant
"""A hundred answers as models write them, with truths as data sets have them, and whether they are right."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Case:
    """kind: maths (mathematics), number (numeric), exact (exact of the final answer), code (code_block), or the kind of
    a constraint. truth: what it is compared with; of a constraint its options."""

    kind: str
    text: str
    truth: Any
    right: bool = True


CASES = (
    # the final answer, in the forms in which it comes
    Case("maths", "Adding both gives 57.\n#### 57", "57"),
    Case("maths", r"So the area is $\boxed 12$.", "12"),
    Case("maths", r"Hence \boxed{\dfrac{3}{8}}.", r"\frac38"),
    Case("maths", "Some steps.\n\n## Final Answer\n\n41", "41"),
    Case("maths", "**Final Answer:** 9/4", "2.25"),
    Case("maths", "The answer is: $-\\sqrt{7}$.", r"-\sqrt{7}"),
    Case("maths", "First I get \\boxed{3}, then correct it: \\boxed{5}.", "5"),
    Case("maths", "First I get \\boxed{3}, then correct it: \\boxed{5}.", "3", False),
    Case("maths", "<answer>18</answer>", "18"),
    Case("maths", "It is 18, I believe.", "18", False),
    Case("maths", "The answer is 6 or 8.", "6", False),
    Case("maths", r"\boxed{x = 14}", "14"),
    Case("maths", "所以答案是 32。", "32"),
    Case("maths", "Answer: $$\\frac{2}{9}$$", r"\frac{2}{9}"),
    Case("exact", "I compare the options.\n(B)", "B"),
    Case("exact", "The correct choice is (D).", "D"),
    Case("exact", "Answer: C", "(C)"),
    Case("exact", "Answer: C", "B", False),
    Case("exact", "The answer is **Lima**.", "Lima"),
    Case("exact", "The answer is Lima or Quito.", "Lima", False),
    # numbers
    Case("number", r"2\frac{3}{4}", 2.75),
    Case("number", r"\frac35", 0.6),
    Case("number", "12{,}480", 12480.0),
    Case("number", "10^4", 10000.0),
    Case("number", "\u201317", -17.0),
    Case("number", "5 1/2", 5.5),
    Case("number", "4.2 x 10^3", 4200.0),
    Case("number", r"6.5 \times 10^{-2}", 0.065),
    Case("number", "3.1 million", 3.1e6),
    Case("number", "1 250", 1250.0),
    Case("number", "½", 0.5),
    Case("number", r"0.\overline{6}", 2 / 3),
    Case("number", "n = 84", 84.0),
    Case("number", "7-9", 7.0, False),
    Case("number", "8, 9", 8.0, False),
    Case("number", "2^5", 32.0),
    Case("number", "about a dozen", 12.0, False),
    Case("number", "-0.04", 0.04, False),
    # truths that are hard to read
    Case("maths", r"\boxed{\frac{1}{6}}", r"0.1\overline{6}"),
    Case("maths", r"\boxed{2-3i}", r"2-3\mathrm{i}"),
    Case("maths", r"\boxed{2+3i}", r"2-3\mathrm{i}", False),
    Case("maths", r"\boxed{x > -2}", r"\{x \mid x > -2\}"),
    Case("maths", r"\boxed{(-2, \infty)}", r"\{x \mid x > -2\}"),
    Case("maths", r"\boxed{\frac{k\pi}{2}}", r"x = \frac{k\pi}{2}, k \in \mathbb{Z}"),
    Case("maths", r"\boxed{]0, 4[}", "(0, 4)"),
    Case("maths", r"\boxed{2.5\times10^{-4}}", "2.5e-4"),
    Case("maths", r"\boxed{24000}", r"24\,000"),
    Case("maths", r"\boxed{3\sqrt{5}}", "3√5"),
    Case("maths", r"\boxed{\ln 2}", r"\mathrm{ln}(2)"),
    # equal and not equal
    Case("maths", r"\boxed{0.0}", r"3.2\times10^{-21}", False),
    Case("maths", r"\boxed{\frac{1}{30!}}", r"\frac{1}{28!}", False),
    Case("maths", r"\boxed{1.0000001}", "1", False),
    Case("maths", r"\boxed{0.33}", r"\frac{1}{3}", False),
    Case("maths", r"\boxed{0.5}", r"\frac{1}{2}"),
    Case("maths", r"\boxed{50\%}", "0.5"),
    Case("maths", r"\boxed{(x-1)(x+1)}", "x^2-1"),
    Case("maths", r"\boxed{x^2+1}", "x^2-1", False),
    Case("maths", r"\boxed{\{2, 1\}}", r"\{1, 2\}"),
    Case("maths", r"\boxed{(2, 1)}", "(1, 2)", False),
    Case("maths", r"\boxed{\text{on}}", r"\text{no}", False),
    Case("maths", r"\boxed{\text{even}}", r"\text{even}"),
    Case("maths", r"\boxed{\text{left}}", r"\text{felt}", False),
    Case("maths", r"\boxed{2\sin x\cos x}", r"\sin(2x)"),
    Case("maths", r"\boxed{\frac{\sqrt{2}}{2}}", r"\frac{1}{\sqrt{2}}"),
    Case("maths", r"\boxed{x\le 3}", r"(-\infty, 3]"),
    Case("maths", r"\boxed{x<3}", r"(-\infty, 3]", False),
    Case("maths", r"\boxed{1, 2, 4}", "1, 2, 4"),
    Case("maths", r"\boxed{10\text{ cm}}", "10"),
    # programs in answers
    Case("code", "```python\nprint(6 * 7)\n```\nIt prints\n```\n42\n```\n", "print(6 * 7)\n"),
    Case("code", "```\nfor i in range(3):\n    print(i)\n```", "for i in range(3):\n    print(i)\n"),
    Case("code", "~~~python\nx = 1\n~~~", "x = 1\n"),
    Case("code", "````python\ns = '```'\n````", "s = '```'\n"),
    Case("code", "  ```py\n  y = 2\n  ```", "y = 2\n"),
    Case("code", "```bash\nls\n```\n```python\nz = 3\n```\n```text\n3\n```", "z = 3\n"),
    Case("code", "```python\nfirst = 1\n```\nBetter:\n```python\nsecond = 2\n```", "second = 2\n"),
    Case("code", "```Python3\nw = 4\n```", "w = 4\n"),
    # instructions
    Case("bullets", "- milk\n- eggs\n\n* * *\n\nThat is all.", {"at_most": 2}),
    Case("bullets", "* one\n* two\n* three", {"at_least": 3}),
    Case("sentences", "1. Buy milk.\n2. Feed the cat.", {"at_least": 2, "at_most": 2}),
    Case("sentences", "Dr. Mora came at 3.30 p.m. She stayed.", {"at_most": 2}),
    Case("sentences", "It rains. It pours. It ends.", {"at_most": 2}, False),
    Case("words", "मैं आज घर जा रहा हूँ", {"at_least": 6, "at_most": 6}),
    Case("words", "don't stop the well-known machine", {"at_least": 5, "at_most": 5}),
    Case("includes", "Мы видели кота у дома.", {"phrases": ["кот"]}, False),
    Case("includes", "Кот спит у дома.", {"phrases": ["кот"]}),
    Case("excludes", "The catalogue is new.", {"phrases": ["cat"]}),
    Case("excludes", "Der Ärger ist groß.", {"phrases": ["rger"]}),
    Case("paragraphs", "One.\n\nTwo.\n\n***\n\nThree.", {"at_least": 3, "at_most": 3}),
    Case("numbered", "1) first\n2) second", {"at_least": 2}),
    Case("upper_case", "ALL OF IT, 7 TIMES", {}),
    Case("upper_case", "ALL of it", {}, False),
    Case("ends_with", "I am done. Over and out", {"text": "Over and out"}),
    Case("json", '{"a": [1, 2]}', {}),
    Case("json", 'Here it is: {"a": 1}', {}, False),
    Case("no_commas", "One two three", {}),
    Case("title", "<<The boat>>\nIt sails.", {}),
    Case("placeholders", "Dear [name], see [place].", {"at_least": 2}),
    Case("lower_case", "all small, 3 times", {}),
    Case("starts_with", "Dear reader, hello.", {"text": "Dear reader"}),
    Case("sentences", "你好。今天下雨。", {"at_least": 2, "at_most": 2}),
)
