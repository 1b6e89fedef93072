"""Data sheets of the devices that a plan can use."""

from __future__ import annotations

import dataclasses
import math
import os
import re

from qwen_dist.errors import UsageError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as jax counts devices. Rates are None without a data sheet; then times are not estimated.

    Attributes:
      memory_bytes: what the compiler lets a program use, slightly less than the data sheet says.
      dims: dimensions of the torus.
      bytes_per_second: memory bandwidth.
      flops_per_second: peak rate, dense bfloat16.
      ici_bytes_per_second: what a device receives from both neighbours along one axis of the torus. It can send as much at
        the same time.
      devices_per_chip: jax devices on one chip.
    """

    memory_bytes: int
    dims: int
    bytes_per_second: float | None = None
    flops_per_second: float | None = None
    ici_bytes_per_second: float | None = None
    devices_per_chip: int = 1


# Bandwidths and rates: https://cloud.google.com/tpu/docs, one page per chip ("key specifications"). The pages give ICI for
# all ports of a chip (v4 to v6e: 2,400, 1,600, 4,800 and 3,584 Gb/s one way; tpu7x: 1,200 GB/s both ways); here it is for
# the two ports of one axis. Memory: the limit that libtpu 0.0.42 reports when a program is too large.
CHIPS = {
    "v4": Chip(int(30.75 * GIB), 3, 1228e9, 275e12, 100e9),
    "v5e": Chip(int(15.75 * GIB), 2, 819e9, 197e12, 100e9),
    "v5p": Chip(int(95.74 * GIB), 3, 2765e9, 459e12, 200e9),
    "v6e": Chip(int(31.25 * GIB), 2, 1640e9, 918e12, 224e9),
    "tpu7x": Chip(int(94.75 * GIB), 3, 3690e9, 1153.5e12, 100e9, devices_per_chip=2),
}

# `jax.Device.device_kind` -> name in CHIPS.
_CHIP_OF_DEVICE_KIND = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def chip_of_device(device_kind: str) -> Chip | None:
    """Return the data sheet for a `jax.Device.device_kind`, or None if there is none."""
    return CHIPS[_CHIP_OF_DEVICE_KIND[device_kind]] if device_kind in _CHIP_OF_DEVICE_KIND else None


@dataclasses.dataclass(frozen=True)
class CompilerProfile:
    """What the compiler of a platform does with memory, as its reports of this project's programs show.

    Attributes:
      platform: as jax names it.
      presence_copies: copies of the token-presence table while a step updates it.
      saved_input_copies: copies of the input of each block that the backward pass recomputes.
    """

    platform: str
    presence_copies: int
    saved_input_copies: int


CPU_COMPILER = CompilerProfile("cpu", presence_copies=1, saved_input_copies=2)
TPU_COMPILER = CompilerProfile("tpu", presence_copies=2, saved_input_copies=1)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of devices of one kind. `name` is libtpu's name, such as v5e:16x16, or cpu:8."""

    name: str
    chip: Chip
    num_devices: int

    @property
    def is_cpu(self) -> bool:
        return self.name.startswith("cpu:")

    @property
    def compiler(self) -> CompilerProfile:
        return CPU_COMPILER if self.is_cpu else TPU_COMPILER

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Parse `v5e:16x16`, `v5p:16x16x16` (chips along each axis of the torus) or `cpu:8`. Raises UsageError."""
        match = re.fullmatch(r"(\w+):([1-9]\d{0,3}(?:x[1-9]\d{0,3}){0,2})", text)
        kind, dims = match.groups() if match else ("", "")
        sizes = [int(size) for size in dims.split("x") if size]
        if kind == "cpu" and len(sizes) == 1:
            return cls(text, _host_cpu(sizes[0]), sizes[0])
        if kind not in CHIPS or len(sizes) != CHIPS[kind].dims:
            kinds = ", ".join(f"{name}:{'x'.join('AB' if chip.dims == 2 else 'ABC')}" for name, chip in CHIPS.items())
            raise UsageError(
                f"topology {text!r} is not known. Use {kinds} or cpu:N, where A, B and C are the chips along each axis."
            )
        return cls(text, CHIPS[kind], math.prod(sizes) * CHIPS[kind].devices_per_chip)


def _host_cpu(num_devices: int) -> Chip:
    """Return one of `num_devices` CPU devices, which share the memory of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Chip(memory // num_devices, 1)
