"""One of the two processes of test_processes.py. Each has two devices; a batch lies on all four.

    python two_processes.py table ADDRESS PROCESS FOLDER
    python two_processes.py train ADDRESS PROCESS FOLDER [KILLED STEP]
    python two_processes.py both ADDRESS PROCESS FOLDER

`table` takes one step of batch normalization with each of the inputs in FOLDER. `train` trains a
network from the last checkpoint in FOLDER; after STEP steps the process KILLED kills itself.
"""

import functools
import os
import pickle
import signal
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax

AXIS = "replicas"
STEPS = 20
STEPS_BETWEEN_CHECKPOINTS = 3
# When process 0 is gone, JAX ends the other at once. When another one is gone, the rest hang in a
# collective until its heartbeats have been missing for this many seconds (by default 100).
HEARTBEAT_TIMEOUT = 10


def start(address, process):
    """Joins the other process, and returns the mesh of all devices."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.distributed.initialize(
        address,
        num_processes=2,
        process_id=process,
        initialization_timeout=60,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        coordinator_bind_address=address,
    )
    return Mesh(np.array(jax.devices()), (AXIS,))


def place(array, mesh, spec):
    """The global array, of which this process holds the shards of its own devices."""
    return jax.make_array_from_callback(
        array.shape, NamedSharding(mesh, spec), lambda index: array[index]
    )


def step(x, dy, where, scale, bias, axis_name=None):
    """(y, dx, dscale, dbias, moments); the gradients are those of sum(dy * y)."""

    def apply(x, scale, bias):
        return bnjax.batch_norm(x, scale, bias, where=where, axis_name=axis_name)

    y, pull_back, m = jax.vjp(apply, x, scale, bias, has_aux=True)
    return y, *pull_back(dy), m


def table(mesh, folder):
    """Each input's result by plain jit and by shard_map, whole, as this process sees it."""
    inputs = pickle.loads((folder / "inputs.pickle").read_bytes())
    by_example, whole = P(AXIS), P()
    specs = by_example, by_example, by_example, whole, whole
    gather = jax.jit(lambda result: result, out_shardings=NamedSharding(mesh, whole))
    by_shard_map = jax.shard_map(
        functools.partial(step, axis_name=AXIS),
        mesh=mesh,
        in_specs=specs,
        out_specs=(by_example, by_example, whole, whole, whole),
    )
    layouts = {"jit": jax.jit(step), "shard_map": jax.jit(by_shard_map)}
    results = {}
    for case, arrays in inputs.items():
        arrays = [
            None if array is None else place(array, mesh, spec)
            for array, spec in zip(arrays, specs, strict=True)
        ]
        for layout, take_step in layouts.items():
            results[case, layout] = jax.device_get(gather(take_step(*arrays)))
    shards = [shard.data.shape for shard in arrays[0].addressable_shards]
    output = pickle.dumps((jax.process_count(), shards, results))
    (folder / f"results{jax.process_index()}.pickle").write_bytes(output)


class Network(nn.Module):
    """Two dense layers, batch normalization between them."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32, use_bias=False)(x)
        x = bnjax.linen.BatchNorm(use_running_average=False, momentum=0.9)(x)
        return nn.Dense(10)(nn.relu(x))


def train(mesh, folder, killed=None, last_step=None):
    """Goes on from the last checkpoint; after STEPS steps writes the state to a file."""
    images, labels = pickle.loads((folder / "digits.pickle").read_bytes())
    network, optimizer = Network(), optax.sgd(0.05, momentum=0.9)

    @jax.jit
    def train_step(state, images, labels):
        def loss_fn(params):
            variables = {"params": params, "batch_stats": state["batch_stats"]}
            logits, updates = network.apply(variables, images, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates["batch_stats"]

        grads, batch_stats = jax.grad(loss_fn, has_aux=True)(state["params"])
        updates, momenta = optimizer.update(grads, state["optimizer"])
        return {
            "params": optax.apply_updates(state["params"], updates),
            "batch_stats": batch_stats,
            "optimizer": momenta,
            "step": state["step"] + 1,
        }

    def init():
        variables = network.init(jax.random.key(0), jnp.zeros((2, 64)))
        return {**variables, "optimizer": optimizer.init(variables["params"]), "step": 0}

    state = jax.jit(init, out_shardings=NamedSharding(mesh, P()))()
    options = ocp.CheckpointManagerOptions(save_interval_steps=STEPS_BETWEEN_CHECKPOINTS)
    with ocp.CheckpointManager(folder / "checkpoints", options=options) as checkpoints:
        if checkpoints.latest_step() is not None:
            args = ocp.args.StandardRestore(state)
            state = checkpoints.restore(checkpoints.latest_step(), args=args)
        print(f"starts after {state['step']} steps", flush=True)
        for i in range(int(state["step"]), STEPS):
            batch = np.random.default_rng(i).permutation(len(images))[:64]
            arrays = (place(array[batch], mesh, P(AXIS)) for array in (images, labels))
            state = train_step(state, *arrays)
            if (jax.process_index(), i + 1) == (killed, last_step):
                os.kill(os.getpid(), signal.SIGKILL)
            checkpoints.save(i + 1, args=ocp.args.StandardSave(state))
    output = pickle.dumps(jax.device_get(state))
    (folder / f"state{jax.process_index()}.pickle").write_bytes(output)


if __name__ == "__main__":
    task, address, process, folder, *killed = sys.argv[1:]
    mesh = start(address, int(process))
    for name, do in (("table", table), ("train", train)):
        if task in (name, "both"):
            do(mesh, Path(folder).resolve(), *map(int, killed))
    jax.distributed.shutdown()
