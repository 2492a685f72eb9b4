"""Training steps of Hugging Face's LlamaForCausalLM with a flash attention and torch's fused AdamW.

    python benchmarks/gpu/hugging_face.py '{"hidden_size": 4096, ...}'

Prints one line of JSON: the seconds of every step and the peak of allocated bytes. ``weights`` is ``bf16``
(no fp32 master weights: less work and memory than Megatron's) or ``fp32`` (autocast to bf16: fp32 weights as
in Megatron).
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def main() -> None:
    """Build, train, print."""
    from transformers import LlamaConfig, LlamaForCausalLM

    wanted: dict[str, Any] = json.loads(sys.argv[1])
    device, on_gpu = wanted["device"], wanted["device"] == "cuda"
    attention = "flash_attention_2" if on_gpu and find_spec("flash_attn") is not None else "sdpa"
    config = LlamaConfig(**wanted["config"], attn_implementation=attention)
    weights = torch.bfloat16 if wanted["weights"] == "bf16" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(weights)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    shape = (wanted["micro_batch_size"], config.max_position_embeddings)
    batches = [torch.randint(config.vocab_size, shape, device=device) for _ in range(wanted["micro_batches"])]
    seconds = []
    for _ in range(wanted["steps"]):
        synchronize(on_gpu)
        started = time.perf_counter()
        for tokens in batches:
            with contexts(on_gpu, wanted["weights"]):
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss / len(batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(on_gpu)
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    print(
        json.dumps(
            {
                "seconds": seconds,
                "peak_bytes": peak,
                "attention": attention,
                "last_loss": loss.item() * len(batches),
            }
        )
    )


def contexts(on_gpu: bool, weights: str) -> AbstractContextManager[Any]:
    """Torch's flash kernel for SDPA, and bf16 arithmetic over fp32 weights."""
    stack = ExitStack()
    if on_gpu:
        stack.enter_context(sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]))
    stack.enter_context(
        torch.autocast("cuda" if on_gpu else "cpu", torch.bfloat16) if weights == "fp32" else nullcontext()
    )
    return stack


def synchronize(on_gpu: bool) -> None:
    """Wait for the GPU."""
    if on_gpu:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
