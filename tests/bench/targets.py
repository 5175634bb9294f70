"""The devices that a program can be compiled for where they are not."""

from pathlib import Path
from typing import Any

NAMES = {"cpu": "CPU", "tpu": "TPU v5e", "h100": "H100"}
# Pinned: figures change with every version of a compiler.
COMMON = ("jax==0.10.2", "jaxlib==0.10.2", "flax==0.12.8", "optax==0.2.8", "numpy", "pytest")
PACKAGES = {
    "cpu": COMMON,
    "tpu": (*COMMON, "libtpu==0.0.52"),
    "h100": (*COMMON, "jax-cuda12-plugin==0.10.2", "jax-cuda12-pjrt==0.10.2"),
}
# What a process must start with. JAX itself runs on the CPU; and libtpu asks a machine's server
# for what is not said here, and lets one process at a time load it.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
# Kernels are not tried out where there is no card: they are real ones, but tiles may differ.
OPTIONS = {"h100": {"xla_gpu_autotune_level": 0}}


def devices(target: str, tpu: str = "v5e:2x2") -> list[Any]:
    """Devices to place arguments on: of a TPU all that the topology has."""
    import jax
    from jax.experimental import topologies

    if target == "cpu":
        return jax.devices("cpu")[:1]
    if target == "tpu":
        return topologies.get_topology_desc(tpu, platform="tpu").devices
    return topologies.get_topology_desc(
        "h100",
        platform="cuda",
        topology="1x1x1",
        target_config=Path(__file__).with_name("h100.txtpb").read_text(),
    ).devices
