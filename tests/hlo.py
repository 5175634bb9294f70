"""What stands in a compiled program."""

import re

WORD = re.compile(r"[\w.\-]+")


ARITHMETIC = re.compile(r" (?:add|subtract|multiply|divide|rsqrt|negate|select|compare)\(")


def computations_of(program):
    """The text of each computation of a compiled program, by its name."""
    return dict(re.findall(r"\n(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)\n\}", program, re.DOTALL))


def loops_over(shape, program):
    """`(arrays, operations)` of each loop that writes such an array, the smallest first."""
    result = re.compile(rf"ROOT [^=]*= \w+\[{','.join(map(str, shape))}\]")
    texts = [text for text in computations_of(program).values() if result.search(text)]
    return sorted((text.count(" parameter("), len(ARITHMETIC.findall(text))) for text in texts)


def split_branches(program):
    """The text of a compiled program: what always runs, and what branches run."""
    computations = computations_of(program)

    def reached(names):
        for name in names:
            yield name
            yield from reached(n for n in set(WORD.findall(computations[name])) & set(computations))

    branches = {
        name
        for names in re.findall(
            r"(?:branch_computations=\{|(?:true|false)_computation=)([^}\n]*)", program
        )
        for name in WORD.findall(names)
        if name in computations
    }
    inside = set(reached(branches))
    texts = {True: [], False: []}
    for name, text in computations.items():
        texts[name in inside].append(text)
    return "\n".join(texts[False]), "\n".join(texts[True])
