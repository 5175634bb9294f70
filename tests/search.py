"""Searches programs for results that rounding spoils: `python tests/search.py --help`.

Each program is a form, a layout and a choice of what is returned, at random sizes (mostly no powers
of two) and mean/std from 1e2 to 1e6, compared with longdouble on several batches.
"""

import argparse
import contextlib
import itertools
import re
import zlib
from collections import defaultdict
from typing import NamedTuple

import jax
import numpy as np
import programs
import reference
from programs import FORMS, LAYOUTS, MAPPED, MAPPED_FORMS, MESHES, PARTS, WHOLE_FORMS, Given
from tqdm import tqdm

from bnjax import _xla

BOUNDS = {"y": 2e-6, "whitened y": 1e-5, "dx": 5e-6, "mean": 2e-6, "var": 2e-6}
ALONE = [("y",), ("dx",)]
RETURNED = [*ALONE, *ALONE, ("y", "dx"), ("y", "m"), ("dx", "m"), ("y", "dx", "m")]
LARGEST = 400  # rows


class Case(NamedTuple):
    """One program, and where its batches come from."""

    form: str
    layout: str
    returned: tuple[str, ...]
    rows: int
    features: int
    replicas: int
    seed: int

    def __str__(self) -> str:
        on = f"{self.replicas} x " if self.replicas > 1 else ""
        size = f"{self.rows} x {self.features}"
        returned = " ".join(self.returned)
        return f"{self.form} | {on}{self.layout} | {returned} | {size} | seed {self.seed}"


def form_of(case):
    return (FORMS | MAPPED_FORMS | WHOLE_FORMS)[case.form]


def draw(form, layout, seed):
    """A case of this form and layout: a mean is at a rounding tie only where a count is even."""
    rng = np.random.default_rng([zlib.crc32(f"{form} {layout}".encode()), seed])
    case = Case(form, layout, RETURNED[rng.integers(len(RETURNED))], 0, 0, 1, seed)
    of = form_of(case)
    if layout in MAPPED or layout in MESHES:
        case = case._replace(replicas=int(rng.integers(2, 9)))
    unit = case.replicas * of.rows * (PARTS if form in WHOLE_FORMS else of.parts)
    least = 32 if of.divisor > 1 else 8 if of.where else 2 * unit if of.parts > 1 else 2
    few, many = -(-least // unit), max(LARGEST // unit, -(-least // unit) + 1)
    size = int(np.exp(rng.uniform(np.log(few), np.log(many))))
    size += size % 2 * (rng.random() < 0.8)
    features = of.divisor * int(rng.integers(1, 50 // of.divisor + 1))
    return case._replace(rows=unit * size, features=features)


def groups_of(case):
    """How many parts of the batch are normalized each by itself."""
    of = form_of(case)
    alone = case.replicas if of.parts > 1 and case.layout in MAPPED else 1
    return of.parts * alone


def batches(case, number):
    """x, dy, where and what else is given: columns of one std, with means of their own."""
    rng = np.random.default_rng([case.seed, 1])
    of, shape = form_of(case), (case.rows, case.features)
    std = float(np.exp(rng.uniform(-3, 3)))
    mean = std * 10 ** rng.uniform(2, 6, case.features) * rng.choice([-1, 1], case.features)
    estimate = (mean + 0.3 * std * rng.standard_normal(case.features)).astype(np.float32)
    var = (std**2 * rng.uniform(0.8, 2, case.features)).astype(np.float32)
    means = (mean + 0.1 * std * rng.standard_normal((2, case.features))).astype(np.float32)
    far = rng.choice(np.float32([0, np.nan, np.inf, -1e30, 1e20, 1]), case.features)
    far = np.where(rng.random(case.features) < 0.5, far, estimate)
    given = Given(estimate, var, far, means, np.stack([var, var[::-1]]))
    for _ in range(number):
        where = mask(of.where, shape, rng)
        noise, dy = rng.standard_normal((2, *shape))
        x = (mean + std * noise / spread(noise, where, groups_of(case))).astype(np.float32)
        yield x, dy.astype(np.float32), where, given


def spread(noise, where, groups):
    """The standard deviations, of each part of the batch, as long as the batch."""
    parts = groups, -1, noise.shape[1]
    w = None if where is None else np.broadcast_to(where, noise.shape).reshape(parts)
    m = reference.moments(noise.reshape(parts), feature_axis=(0, 2), where=w)
    return np.repeat(np.sqrt(m.var), len(noise) // groups, 0)


def mask(kind, shape, rng):
    """At least half of the values of each feature."""
    if kind is None:
        return None
    rows, features = shape
    keep = rng.random((rows, features if kind == "mask per feature" else 1)) < 0.7
    keep[rng.permutation(rows)[: rows // 2]] = True
    if kind != "weights":
        return keep
    return (keep * rng.uniform(0.5, 2, keep.shape)).astype(np.float32)


def compiled(case, given):
    """The program, from whole arrays to a dictionary of what it returns."""
    of = form_of(case)

    def f(x, dy, where, traced, axis_name):
        def output(x):
            return of.step(x, where, given if of.constant else traced, axis_name)

        if "dx" not in case.returned:
            y, m = output(x)
            out = {"y": y, "m": m}
        else:
            y, pull, m = jax.vjp(output, x, has_aux=True)
            out = {"y": y, "m": m, "dx": pull(dy)[0]}
        return {name: out[name] for name in case.returned}

    return LAYOUTS[case.layout](f, case.replicas)


def errors(case, number=8):
    """The largest error of each result, in units of its bound."""
    largest: dict[str, float] = defaultdict(float)
    f = None
    for x, dy, where, given in batches(case, number):
        f = f or compiled(case, given)
        out = f(x, dy, where, given)
        for name, error in compare(case, out, x, dy, where, given).items():
            largest[name] = max(largest[name], np.nan_to_num(error, nan=np.inf))
    return dict(largest)


def compare(case, out, x, dy, where, given):
    of, groups = form_of(case), groups_of(case)
    parts = [
        of.expected(*(None if a is None else np.split(a, groups)[i] for a in (x, dy, where)), given)
        for i in range(groups)
    ]
    y, dx = (np.concatenate(p) for p in zip(*parts, strict=True))
    found = {}
    if "y" in out:
        bound = BOUNDS["whitened y" if of.expected is programs.whitened else "y"]
        found["y"] = np.max(np.abs(reference.wide(out["y"]) - y)) / bound
    if "dx" in out and case.rows > 2 * groups:
        found["dx"] = (
            np.max(np.abs(reference.wide(out["dx"]) - dx)) / np.max(np.abs(dx)) / BOUNDS["dx"]
        )
    m = out.get("m")
    if hasattr(m, "remainder") and groups == 1 and of.expected is not programs.merged:
        whole = reference.moments(x, where=where)
        off = (reference.wide(m.mean) - whole.mean) + reference.wide(m.remainder)
        found["mean"] = np.max(np.abs(off) / np.sqrt(whole.var)) / BOUNDS["mean"]
        found["var"] = np.max(np.abs(reference.wide(m.var) / whole.var - 1)) / BOUNDS["var"]
    return {name: float(error) for name, error in found.items()}


def search(cases, number=8, backend=None, show=False):
    """`{case: errors}` of all cases that are beyond a bound, and the worst of each form."""
    _xla.forced = backend
    jax.clear_caches()
    faults: dict[Case, dict[str, float]] = {}
    worst = defaultdict(lambda: defaultdict(float))
    bar = tqdm(cases, disable=not show, unit="program")
    with contextlib.suppress(KeyboardInterrupt):  # ends with what was found so far
        for i, case in enumerate(bar):
            found = errors(case, number)
            for name, error in found.items():
                worst[case.form][name] = max(worst[case.form][name], error)
            if max(found.values(), default=0.0) > 1:
                faults[case] = found
                bar.set_postfix(faults=len(faults))
            if i % 50 == 49:
                jax.clear_caches()
    return faults, worst


def cases(number, seed, matching=""):
    """So many programs whose names match: half of them in plain jit, where XLA fuses most."""
    pairs = [pair for pair in programs.all_programs() if re.search(matching, " | ".join(pair))]
    jitted, others = ([p for p in pairs if (p[1] == "jit") == is_jit] for is_jit in (True, False))
    rng = np.random.default_rng(seed)
    turns = [itertools.cycle(rng.permutation(part).tolist()) for part in (jitted, others) if part]
    return [draw(*next(turns[i % len(turns)]), seed + i) for i in range(number)]


def report(faults, worst):
    """What was found, form by form, and the smallest program of each that fails."""
    for name in sorted(worst):
        here = {case: found for case, found in faults.items() if case.form == name}
        print(f"{name:28}", f"{len(here):4} faults; worst, in bounds:", figures(worst[name]))
        if here:
            case = min(here, key=lambda case: case.rows * case.features * case.replicas)
            print(f"    smallest: {case}:", figures(here[case]))


def figures(errors):
    return "  ".join(f"{name} {error:.2g}" for name, error in sorted(errors.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=300, help="how many")
    parser.add_argument("--matching", default="", metavar="REGEX", help='of "form | layout"')
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--backend", choices=["cpu", "gpu", "tpu"], help="whose programs run")
    parser.add_argument("--batches", type=int, default=8, help="for each program")
    parser.add_argument("--list", action="store_true", help="the names of all, and end")
    given = parser.parse_args()
    if given.list:
        return print(*map(" | ".join, programs.all_programs()), sep="\n")
    jax.config.update("jax_num_cpu_devices", 8)
    chosen = cases(given.programs, given.seed, given.matching)
    print(f"JAX {jax.__version__}, {jax.default_backend()}: {len(chosen)} programs", flush=True)
    faults, worst = search(chosen, given.batches, given.backend, show=True)
    report(faults, worst)
    print(f"{len(faults)} of {len(chosen)} programs are beyond a bound")


if __name__ == "__main__":
    main()
