"""The native norms against Megatron's WrappedTorchNorm (torch's modules), forward and backward, in one run.

python benchmarks/norm.py [--tokens 2048] [--hidden-size 256] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from measure import alternate, environment, median

warnings.filterwarnings("ignore")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of each norm in fp32 and bf16."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megaplug.layers.norm import LayerNorm, RMSNorm

    size, results = options.hidden_size, {}
    for name, native in (("RMSNorm", RMSNorm), ("LayerNorm", LayerNorm)):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=size,
            num_attention_heads=1,
            normalization=name,
            use_cpu_initialization=True,
        )
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(options.tokens, 1, size, device=options.device, dtype=dtype, requires_grad=True)
            grad = torch.randn_like(x)
            norms = {
                who: kind(config, size).to(device=options.device, dtype=dtype)
                for who, kind in (("native", native), ("megatron", WrappedTorchNorm))
            }
            runs = {
                who: lambda norm=norm, x=x, grad=grad: norm(x).backward(grad) for who, norm in norms.items()
            }
            seconds = alternate(runs, options.repeats, options.device)
            results[f"{name} {str(dtype).removeprefix('torch.')}"] = {
                who: median(t) for who, t in seconds.items()
            }
    return results


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    results, machine = measure(options), environment(options.device)
    print(f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}")
    for name, row in results.items():
        times = ", ".join(f"{who} {seconds * 1e3:.2f} ms" for who, seconds in row.items())
        print(f"{name:20} {times}, megatron/native {row['megatron'] / row['native']:.2f}")
    if options.json:
        report = {"what": "norm, forward and backward; median seconds, measured", "machine": machine}
        sizes = {"tokens": options.tokens, "hidden_size": options.hidden_size}
        options.json.write_text(json.dumps(report | {"sizes": sizes, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
