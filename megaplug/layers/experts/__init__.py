"""Experts of a mixture of experts, computed together."""
