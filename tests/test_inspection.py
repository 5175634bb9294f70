"""What flax reads from layers, to show them, describe them and carry them over: as from its own."""

import inspect

import flax.linen as nn
import jax
import numpy as np
import pytest
import treescope
from checks import assert_same_bits
from flax import nnx
from samples import well_scaled

import bnjax
import bnjax.linen
import bnjax.nnx

KEY = jax.random.key(0)
KINDS = ["BatchNorm", "BatchRenorm", "DecorrelatedBatchNorm"]
every_kind = pytest.mark.parametrize("kind", KINDS)
X = well_scaled(1, (8, 3))


def of_linen(kind="BatchNorm", module=bnjax.linen, **fields):
    return getattr(module, kind)(use_running_average=False, **fields)


def of_nnx(kind="BatchNorm", module=bnjax.nnx, **fields):
    return getattr(module, kind)(3, rngs=nnx.Rngs(0), **fields)


def lines(text):
    return {line.strip() for line in text.splitlines()}


@pytest.mark.skipif(not hasattr(nnx, "view_info"), reason="this Flax has no nnx.view_info")
@every_kind
def test_view_info_describes_what_a_view_sets(kind):
    model = nnx.Sequential(nnx.Dropout(0.5), of_nnx(kind))
    ours, dropouts = nnx.view_info(model).split("Dropout:")
    name, *described = ours.splitlines()
    assert name == f"{kind}:"
    assert described == [
        "  use_running_average: bool | None = None",
        "    True in evaluation, False in training.",
        "  emit: typing.Union[bool, typing.Literal['only'], NoneType] = None",
        '    True to emit the moments besides remembering them, "only" to emit them instead.',
    ]
    assert "deterministic" in dropouts


@pytest.mark.skipif(not hasattr(nnx, "view"), reason="this Flax has no nnx.view")
@every_kind
def test_attributes_are_set_in_a_model_and_in_a_view(kind):
    model = nnx.Sequential(nnx.Dropout(0.5), of_nnx(kind))
    view = nnx.view(model, use_running_average=True, emit="only", deterministic=True)
    assert (view.layers[1].use_running_average, view.layers[1].emit) == (True, "only")
    model.set_attributes(momentum=0.5, epsilon=0.1, raise_if_not_found=True)
    assert (model.layers[1].momentum, model.layers[1].epsilon) == (0.5, 0.1)
    assert (model.layers[1].use_running_average, model.layers[1].emit) == (False, False)


WIDE = {"console_kwargs": {"width": 300, "force_terminal": False}}
COSTS = {"compute_flops": True, "compute_vjp_flops": True}
NNX_COSTS = COSTS if "compute_flops" in inspect.signature(nnx.tabulate).parameters else {}


def test_summaries_are_those_of_flaxs_layers():
    """The whole tables, as the names are the same."""
    ours, theirs = (nnx.tabulate(of_nnx(module=module), X, **WIDE) for module in (bnjax.nnx, nnx))
    assert ours == theirs
    ours, theirs = (of_linen(module=m).tabulate(KEY, X, **WIDE) for m in (bnjax.linen, nn))
    assert ours == theirs


@every_kind
def test_summaries_list_every_kind_with_its_costs(kind):
    in_nnx = nnx.tabulate(of_nnx(kind), X, **WIDE, **NNX_COSTS)
    in_linen = of_linen(kind).tabulate(KEY, X, **WIDE, **COSTS)
    for table, costs in ((in_nnx, NNX_COSTS), (in_linen, COSTS)):
        assert kind in table
        assert ("vjp_flops" in table) == bool(costs)
        second = "cov: float32[1,3,3]" if kind == "DecorrelatedBatchNorm" else "var: float32[3]"
        assert second in table


@pytest.mark.parametrize("show", [repr, treescope.render_to_text])
@pytest.mark.filterwarnings("ignore:The chararray class:DeprecationWarning")  # treescope looks
def test_layers_show_what_flaxs_show_and_their_own_fields(show):
    for make, module, flaxs in ((of_nnx, bnjax.nnx, nnx), (of_linen, bnjax.linen, nn)):
        ours, theirs = (show(make(module=m)) for m in (module, flaxs))
        ours, theirs = (lines(text.replace(",", "")) for text in (ours, theirs))
        lacking = {line.split("=")[0] for line in theirs - ours}
        assert lacking <= {"bias_init", "scale_init"}  # which the first Flax 0.12 kept in NNX
        assert any(line.startswith("ghost_batch_size") for line in ours)


# Bridges.


@every_kind
def test_a_linen_layer_in_nnx(kind):
    layer = of_linen(kind, momentum=0.5)
    model = nnx.bridge.lazy_init(nnx.bridge.ToNNX(layer, rngs=nnx.Rngs(0)), X)
    y, updates = layer.apply(layer.init(KEY, X), X, mutable=["batch_stats", "moments"])
    assert_same_bits(model(X, mutable=["batch_stats", "moments"]), y)
    emitted = nnx.pop(model, bnjax.nnx.BatchMoments)["moments"]
    m = updates["moments"]["moments"]
    assert_same_bits(jax.tree.leaves(emitted), jax.tree.leaves(m))
    stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    assert_same_bits(stats, dict(updates["batch_stats"]))


@every_kind
def test_an_nnx_layer_in_linen(kind):
    layer = of_nnx(kind, momentum=0.5, emit=True)
    bridged = nnx.bridge.to_linen(getattr(bnjax.nnx, kind), 3, momentum=0.5, emit=True)
    variables = bridged.init(KEY, X)
    y, updates = bridged.apply(variables, X, mutable=["batch_stats", "moments"])
    assert_same_bits(layer(X), y)
    emitted = nnx.pop(layer, bnjax.nnx.BatchMoments)["moments"]
    assert_same_bits(jax.tree.leaves(updates["moments"]), jax.tree.leaves(emitted))
    trained = nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))
    assert_same_bits(dict(updates["batch_stats"]), trained)
    assert set(variables["batch_stats"]) == set(trained)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
