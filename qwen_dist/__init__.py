"""Run and fine-tune Qwen text models in JAX on any mesh of devices.

Importing this package touches no environment variable, no jax setting, no logger and no device.
"""

__version__ = "0.1.0"
