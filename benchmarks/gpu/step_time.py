"""Step time and model FLOP utilisation (MFU) of layers shaped as those of llama3_8b, in bf16, one GPU.

Contenders, one after the other, each alone on the GPU: megaplug's native layers, Hugging Face's
LlamaForCausalLM, Megatron's local spec, and Transformer Engine's layers where installed. All train on the
same sizes with the same global batch; a step is forward and backward of all micro-batches, clipping and
AdamW. The local spec keeps every score, 15 GB a layer here: it is compared with the native layers at half
the layers.

FLOPs of a token: ``6 N + 6 L s d``, N being the weights that are multiplied (all but the input embedding), L
the layers, s the sequence, d the width of all query heads: attention's two products over the lower triangle
only (causal: half of ``12 L s d``), backward twice the forward, recomputation not counted. MFU is over the
dense bf16 peak of the GPU as published.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jobs import kernels, steps, write_corpus
from setting import ROOT, Setting, ended, read_setting, skipped

from megaplug.errors import UserError

HERE = Path(__file__).resolve().parent
# Dense bf16, published, FLOP/s; by what stands in the GPU's name.
PEAKS = {"h200": 989e12, "h100": 989e12, "b200": 2250e12, "a100": 312e12}
WARM_UP = 3
LIMIT_S = 60.0
# A rehearsal shares two cores with whatever else they do.
REHEARSAL_LIMIT_S = 4 * LIMIT_S


@dataclass(frozen=True)
class Sizes:
    """The model and its batch."""

    num_layers: int = 4
    hidden_size: int = 4096
    ffn_hidden_size: int = 14336
    num_attention_heads: int = 32
    num_query_groups: int = 8
    vocab_size: int = 128256
    seq_length: int = 8192
    micro_batch_size: int = 1
    global_batch_size: int = 4
    steps: int = 9

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.global_batch_size * self.seq_length

    @property
    def multiplied_weights(self) -> int:
        """Weights of matrix products: of the layers and the output layer."""
        head = self.hidden_size // self.num_attention_heads
        attention = self.hidden_size * head * 2 * (self.num_attention_heads + self.num_query_groups)
        layer = attention + 3 * self.hidden_size * self.ffn_hidden_size
        return self.num_layers * layer + self.hidden_size * self.vocab_size

    @property
    def flops_of_a_token(self) -> int:
        """Forward and backward, see above."""
        return 6 * self.multiplied_weights + 6 * self.num_layers * self.seq_length * self.hidden_size


TINY = Sizes(
    num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2,
    vocab_size=512, seq_length=64, global_batch_size=2, steps=5,
)  # fmt: skip


def train_with_megatron(kind: str, sizes: Sizes, setting: Setting) -> dict[str, Any]:
    """Megatron's ``pretrain()`` on a frozen job whose ranks do not save.

    Args:
        kind: ``native``, ``local`` or ``te``.
        sizes: The model and its batch.
        setting: Where.

    Raises:
        RuntimeError: It failed.
    """
    folder = freeze(kind, sizes, setting)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    output = said([str(HERE / "step_rank.py"), str(folder / "job.yaml"), kind], {**rank, **place}, setting)
    peak = int(next(line for line in output.splitlines() if line.startswith("peak bytes")).split()[-1])
    seconds = [line["seconds"] for line in steps(folder)]
    return {"seconds": seconds, "peak_bytes": peak, "kernels": kernels(folder)}


def freeze(kind: str, sizes: Sizes, setting: Setting) -> Path:
    """The folder of a run that is ready to start, and that does not save 16 bytes a weight."""
    import dataclasses

    from megaplug.commands.readiness import make_ready, open_folder
    from megaplug.commands.resolved import resolve
    from megaplug.job.compose import compose_job
    from megaplug.job.freeze import read_frozen, write_frozen

    model = {
        key: value
        for key, value in asdict(sizes).items()
        if key not in ("steps", "micro_batch_size", "global_batch_size")
    }
    words = [
        *(f"model.{key}={value}" for key, value in model.items()),
        f"train.micro_batch_size={sizes.micro_batch_size}",
        f"train.global_batch_size={sizes.global_batch_size}",
        f"train.iters={sizes.steps}", "train.eval_iters=0", "precision=bf16", "lr=constant", "lr.lr=1e-5",
        "model.rotary_base=500000", f"name={kind}", f"device={setting.device}",
        f"runs_dir={setting.work / 'steps'}",
        f"data.path={write_corpus(setting.work / 'corpus')}", f"data.cache_dir={setting.work / 'cache'}",
        "logging.progress=none", "logging.tensorboard=false", *_BACKENDS[kind],
    ]  # fmt: skip
    resolved = resolve(compose_job(words), on_this_machine=False)
    folder = open_folder(resolved)
    make_ready(resolved, folder)
    frozen = read_frozen(folder.job_file)
    left = list(frozen.megatron_args)
    for flag in ("--save", "--save-interval"):
        place = left.index(flag)
        del left[place : place + 2]
    write_frozen(dataclasses.replace(frozen, megatron_args=left))
    return folder.path


_BACKENDS = {
    "native": ["backend=native", "attention=flash"],
    # Its layers are replaced in the rank.
    "local": ["backend=native", "attention=local"],
    "te": ["backend=te", "attention=te"],
}


def train_with_hugging_face(weights: str, sizes: Sizes, setting: Setting) -> dict[str, Any]:
    """``hugging_face.py`` on the same sizes.

    Raises:
        RuntimeError: It failed.
    """
    config = {
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.ffn_hidden_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_attention_heads,
        "num_key_value_heads": sizes.num_query_groups,
        "vocab_size": sizes.vocab_size,
        "max_position_embeddings": sizes.seq_length,
        "tie_word_embeddings": False,
    }
    wanted = {
        "config": config,
        "device": setting.device,
        "weights": weights,
        "micro_batch_size": sizes.micro_batch_size,
        "micro_batches": sizes.global_batch_size // sizes.micro_batch_size,
        "steps": sizes.steps,
    }
    return json.loads(said([str(HERE / "hugging_face.py"), json.dumps(wanted)], {}, setting).splitlines()[-1])


def said(command: Sequence[str], more: dict[str, str], setting: Setting) -> str:
    """The standard output of a script.

    Raises:
        RuntimeError: It failed or took too long.
    """
    env = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **more}
    limit = REHEARSAL_LIMIT_S if setting.rehearse else LIMIT_S
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"not ended after {limit:.0f} s") from error
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise RuntimeError(f"ended with {done.returncode}\n{tail}")
    return done.stdout


def figures(run: dict[str, Any], sizes: Sizes, peak: float | None) -> dict[str, Any]:
    """Medians over the steps after the warm-up."""
    steady = run["seconds"][WARM_UP:]
    seconds = statistics.median(steady)
    flops = sizes.flops_of_a_token * sizes.tokens / seconds
    return {
        "median_step_s": seconds,
        "fastest_step_s": min(steady),
        "tokens_per_second": sizes.tokens / seconds,
        "tflops": flops / 1e12,
        "mfu": None if peak is None else flops / peak,
        "num_layers": sizes.num_layers,
        **run,
    }


def main() -> int:
    """Train with each contender, print and store."""
    setting = read_setting(__doc__)
    sizes = TINY if setting.rehearse else Sizes()
    peak = next((value for name, value in PEAKS.items() if name in setting.gpu), None)
    half = replace(sizes, num_layers=sizes.num_layers // 2)
    contenders: dict[str, tuple[Sizes, Callable[[Sizes], dict[str, Any]]]] = {
        "megaplug native": (sizes, lambda sizes: train_with_megatron("native", sizes, setting)),
        "Hugging Face, bf16 weights": (sizes, lambda sizes: train_with_hugging_face("bf16", sizes, setting)),
        "Hugging Face, fp32 weights": (sizes, lambda sizes: train_with_hugging_face("fp32", sizes, setting)),
        "Transformer Engine": (sizes, lambda sizes: train_with_megatron("te", sizes, setting)),
        "Megatron local, half": (half, lambda sizes: train_with_megatron("local", sizes, setting)),
        "megaplug native, half": (half, lambda sizes: train_with_megatron("native", sizes, setting)),
    }
    rows: dict[str, Any] = {}
    failures = []
    for name, (own, train) in contenders.items():
        if name == "Transformer Engine" and (setting.rehearse or find_spec("transformer_engine") is None):
            skipped(name, "it is not installed" if not setting.rehearse else "it needs a GPU")
            continue
        try:
            rows[name] = figures(train(own), own, peak)
        except (RuntimeError, UserError) as error:
            failures.append(f"{name}: {error}")
            print(f"{name}: {error}", flush=True)
            continue
        row = rows[name]
        utilisation = "" if row["mfu"] is None else f", MFU {row['mfu']:.1%}"
        print(
            f"{name:28} {row['median_step_s'] * 1e3:9.1f} ms a step, "
            f"{row['tokens_per_second']:9.0f} tokens/s, {row['tflops']:6.1f} TFLOP/s{utilisation}",
            flush=True,
        )
        # Kept after each, for the case that the time is up before the last.
        setting.write(
            "step_time", {"what": __doc__, "sizes": asdict(sizes), "peak_flops": peak, "results": rows}
        )
    return ended(failures)


if __name__ == "__main__":
    sys.exit(main())
