"""megaplug: a plugin layer over Megatron-core, configured with Hydra."""

__version__ = "0.1.0"
