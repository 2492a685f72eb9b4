"""Core attentions: what stands between the QKV projection and the output projection."""
