"""What is measured: the cases, and the libraries that take part in each."""

import itertools
from typing import Any

Case = dict[str, Any]

LIBRARIES = (
    "bnjax",
    "bnjax-running",
    "bnjax-policy",
    "bnjax-nnx",
    "flax",
    "flax-nnx",
    "haiku",
    "equinox",
    "keras",
    "torch",
    "limit",
)
SHAPES = (
    (32, 112, 112, 64),
    (32, 56, 56, 64),
    (32, 56, 56, 256),
    (32, 28, 28, 128),
    (32, 28, 28, 512),
    (32, 14, 14, 256),
    (32, 14, 14, 1024),
    (32, 7, 7, 512),
    (32, 7, 7, 2048),
    (4096, 1024),
    (256, 4096),
)
MODES = ("forward_backward", "forward", "inference")
DTYPES = ("float32", "bfloat16")
# Examples in a batch, on a CPU and on an accelerator.
BATCHES = {"resnet50": (8, 64), "small_resnet": (64, 512), "mlp": (512, 4096)}

# What is compiled for accelerators that are not there: inputs as large as one of them takes, and
# networks with the size from which on their arrays are feature maps.
COMPILED_SHAPES = (
    (256, 56, 56, 256),
    (256, 14, 14, 1024),
    (32, 7, 7, 2048),
    (4096, 1024),
    (256, 4096),
)
COMPILED_STEPS = {
    "small_resnet": (128, 2**18),
    "scanned": (64, 2**18),
    "resnet50": (128, 2**20),
}


def all_cases(on_cpu: bool) -> list[Case]:
    layers = [
        {"kind": "layer", "mode": mode, "dtype": dtype, "relu": relu, "shape": shape}
        for mode, dtype, relu, shape in itertools.product(MODES, DTYPES, (False, True), SHAPES)
    ]
    eager = [{"kind": "eager", "dtype": dtype, "shape": (128, 64)} for dtype in DTYPES]
    steps = [
        {"kind": "step", "model": model, "dtype": dtype, "batch": batch[not on_cpu]}
        for (model, batch), dtype in itertools.product(BATCHES.items(), DTYPES)
    ]
    return layers + eager + steps


def quick_cases(on_cpu: bool) -> list[Case]:
    """Enough to see whether something is badly off."""

    def is_quick(case: Case) -> bool:
        if case["kind"] != "layer":
            return case["dtype"] == "float32" and case.get("model") != "resnet50"
        if case["mode"] != "forward_backward":
            return case["dtype"] == "float32" and not case["relu"] and case["shape"] == SHAPES[3]
        return case["shape"] in (SHAPES[3], SHAPES[-1]) and not case["relu"]

    return [case for case in all_cases(on_cpu) if is_quick(case)]


def compiled_cases() -> list[Case]:
    layers = [
        {"kind": "layer", "mode": "forward_backward", "dtype": dtype, "relu": False, "shape": shape}
        for dtype, shape in itertools.product(DTYPES, COMPILED_SHAPES)
    ]
    steps = [
        {"kind": "step", "model": model, "dtype": dtype, "batch": batch, "elements": elements}
        for (model, (batch, elements)), dtype in itertools.product(COMPILED_STEPS.items(), DTYPES)
    ]
    return layers + steps


def card_cases(quick: bool, on_cpu: bool) -> list[Case]:
    """What a card is timed with; a CPU gets less of it, to try whether all works."""
    layers = [case for case in compiled_cases() if case["kind"] == "layer"]
    if on_cpu:
        layers = [case | {"shape": (8, *case["shape"][1:])} for case in layers]
    if quick:
        layers = [case for case in layers if case["dtype"] == "bfloat16"][::2]
    step = {"kind": "step", "model": "resnet50", "dtype": "bfloat16", "batch": 2 if on_cpu else 128}
    return [*layers, step]


def name(case: Case) -> str:
    """For people, and for `--cases`."""
    if case["kind"] == "step":
        return f"step {case['model']} {case['dtype']} batch {case['batch']}"
    size = "x".join(map(str, case["shape"]))
    if case["kind"] == "eager":
        return f"eager {case['dtype']} {size}"
    return f"layer {case['mode']} {case['dtype']} {'relu' if case['relu'] else 'alone'} {size}"


def takes_part(library: str, case: Case) -> bool:
    """Whether the library has something of its own to show in the case."""
    if case["kind"] == "step":
        return library in ("bnjax", "bnjax-running", "bnjax-policy", "flax")
    if case["kind"] == "eager":
        return library in ("bnjax", "bnjax-nnx", "flax", "flax-nnx")
    if library == "bnjax-policy":  # saves something only where something follows the layer
        return case["relu"] and case["mode"] == "forward_backward"
    return library != "bnjax-running" or case["mode"] != "inference"
