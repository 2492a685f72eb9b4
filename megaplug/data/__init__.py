"""Text in, Megatron's ``.bin``/``.idx`` out: ``prepare(job)`` gives the facts of the tokenized corpus."""
