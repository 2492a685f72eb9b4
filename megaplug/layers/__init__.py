"""Layers that are registered as Megatron-core modules: declarations without torch, modules, specs."""
