"""What stands in a compiled program."""

import re

WORD = re.compile(r"[\w.\-]+")


def split_branches(program):
    """The text of a compiled program: what always runs, and what branches run."""
    computations = dict(
        re.findall(r"\n(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)\n\}", program, re.DOTALL)
    )

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
