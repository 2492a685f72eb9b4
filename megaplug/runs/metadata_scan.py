"""Look into a checkpoint's ``.metadata`` before Megatron unpickles it: a crafted one could run any program.

The pickle is never executed here. Its opcodes are read one by one, and the names that it would import are
compared with the few that torch's distributed checkpoints need. What cannot be followed is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megaplug.runs.atomic import disk_errors

_METADATA = "torch.distributed.checkpoint.metadata"
_DTYPES = (
    "bfloat16 float16 float32 float64 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz "
    "float8_e8m0fnu float4_e2m1fn_x2 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool "
    "complex64 complex128"
)
ALLOWED_GLOBALS = frozenset(
    {("torch", name) for name in ("Size", *_DTYPES.split())}
    | {
        (_METADATA, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    }
    | {
        ("torch.distributed.checkpoint.planner", name)
        for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    }
    | {
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
        ("pathlib._local", "PosixPath"),
        ("pathlib._local", "PurePosixPath"),
    }
)

# Objects by registry number, by persistent id, or by a class called at once: DCP writes none of them.
REFUSED = frozenset({"EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "INST", "OBJ"})
_TEXTS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}


def scan_metadata(path: Path) -> list[str]:
    """What a ``.metadata`` file would import beyond what a checkpoint needs; empty when it is harmless.

    Args:
        path: The file.

    Returns:
        One line a fault, the refused name in it.

    Raises:
        UserError: If the file cannot be read.
    """
    with disk_errors(path, "read"):
        content = path.read_bytes()
    faults = scan_pickle(content, lambda module, name: (module, name) in ALLOWED_GLOBALS)
    return [f"{path.name} {fault}" for fault in faults]


def scan_pickle(
    content: bytes, allowed: Callable[[str, str], bool], refused: frozenset[str] = REFUSED
) -> list[str]:
    """What a pickle would import or do beyond what is allowed, without executing it; each fault once.

    Args:
        content: The pickle.
        allowed: Whether a name, given with its module, may be imported.
        refused: Instructions that it must not have.
    """
    faults: list[str] = []
    memo: dict[int, str | None] = {}
    # The last two things pushed, where they are texts: exactly what STACK_GLOBAL would import.
    before, last = None, None
    pair: tuple[str, str] | None
    try:
        argument: Any
        for opcode, argument, _ in pickletools.genops(content):
            kind = opcode.name
            if kind == "MEMOIZE":
                memo[len(memo)] = last
            elif kind in _PUTS:
                if int(argument) > len(memo):
                    # A pickle counts; whoever skips makes an unpickler reserve memory for what is in between.
                    faults.append("leaves out numbers of its memo")
                memo[int(argument)] = last
            elif kind in _TEXTS:
                before, last = last, argument
            elif kind in _GETS:
                before, last = last, memo.get(int(argument))
            elif kind in {"GLOBAL", "STACK_GLOBAL"}:
                if kind == "GLOBAL":
                    module, _, attribute = argument.partition(" ")
                    pair = (module, attribute)
                else:
                    pair = (before, last) if before is not None and last is not None else None
                if pair is None:
                    faults.append("imports a name that cannot be read beforehand")
                elif not allowed(*pair):
                    faults.append(f"would import {pair[0]}.{pair[1]}")
                before, last = None, None
            elif kind in refused:
                faults.append(f"uses the pickle instruction {kind}")
                before, last = None, None
            elif kind not in {"PROTO", "FRAME"}:
                before, last = None, None
    except Exception as error:  # noqa: BLE001  whatever a broken pickle makes pickletools raise, it is a fault
        faults.append(f"is not a readable pickle: {error}")
    return list(dict.fromkeys(faults))
