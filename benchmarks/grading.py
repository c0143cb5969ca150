"""The share of a hundred answers that is graded right, by kind. What raises is wrong.

python benchmarks/grading.py
python benchmarks/grading.py --cases FOLDER/tests     from an older checkout, with the cases of a newer one
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

KINDS = {"maths": "mathematics", "number": "numbers", "exact": "choices and words", "code": "programs in answers"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, default=Path(__file__).parent.parent / "tests")
    sys.path.insert(0, str(parser.parse_args().cases))
    from grading_cases import CASES
    from test_grading_cases import verdict

    right, all_cases = Counter[str](), Counter[str]()
    for case in CASES:
        kind = KINDS.get(case.kind, "instructions")
        all_cases[kind] += 1
        try:
            right[kind] += verdict(case) is case.right
        except Exception:  # a verdict that never comes is no right one
            continue
    print("| cases | right |\n| --- | --- |")
    for kind, count in all_cases.items():
        print(f"| {kind} | {right[kind]} of {count} |")
    print(f"| all | {right.total()} of {all_cases.total()} |")


if __name__ == "__main__":
    main()
