"""Look into the pickled objects of a checkpoint's shards before a rank unpickles them.

Random states, Megatron's arguments and the state of its rerun machinery lie in the ``.distcp`` files, each as
``torch.save`` packs it. What torch would not load with ``weights_only=True`` is refused beforehand, so that
the checkpoint before is used; a rank unpickles them so in any case (`megaplug.runtime.unpickling`).
"""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import BinaryIO

from megaplug.errors import UserError
from megaplug.runs.atomic import disk_errors
from megaplug.runs.metadata_scan import REFUSED, scan_pickle
from megaplug.runs.stored import METADATA, read_stored

# What torch loads with weights_only=True, and what Megatron-core adds (its safe_globals); a test compares.
_EXACT = frozenset(
    {
        ("collections", "OrderedDict"),
        ("collections", "Counter"),
        ("torch.nn.parameter", "Parameter"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("torch", "device"),
        ("torch", "memory_format"),
        ("torch._C", "Generator"),
        ("torch._tensor", "_rebuild_from_type_v2"),
        ("_codecs", "encode"),
        ("builtins", "bytearray"),
        ("builtins", "set"),
        ("builtins", "complex"),
        ("__builtin__", "bytearray"),
        ("__builtin__", "set"),
        ("__builtin__", "complex"),
        ("torch._dynamo.decorators", "_DimRange"),
        ("torch.distributed._mesh_layout", "_FlatLayout"),
        ("torch.distributed._mesh_layout", "_MeshLayout"),
        ("torch.distributed.device_mesh", "DeviceMesh"),
        ("torch.distributed.tensor", "DTensor"),
        ("torch.distributed.tensor._dtensor_spec", "DTensorSpec"),
        ("torch.distributed.tensor._dtensor_spec", "ShardOrderEntry"),
        ("torch.distributed.tensor._dtensor_spec", "TensorMeta"),
        ("torch.distributed.tensor.placement_types", "Partial"),
        ("torch.distributed.tensor.placement_types", "Replicate"),
        ("torch.distributed.tensor.placement_types", "Shard"),
        ("torch.distributed.tensor.placement_types", "_StridedShard"),
        ("types", "SimpleNamespace"),
        ("argparse", "Namespace"),
        ("_io", "BytesIO"),
        ("io", "BytesIO"),
        ("signal", "Signals"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.dtypes", "UInt32DType"),
        ("megatron.core.enums", "ModelType"),
        ("megatron.core.optimizer.optimizer_config", "OptimizerConfig"),
        ("megatron.core.rerun_state_machine", "Call"),
        ("megatron.core.rerun_state_machine", "Caller"),
        ("megatron.core.rerun_state_machine", "RerunDiagnostic"),
        ("megatron.core.rerun_state_machine", "RerunMode"),
        ("megatron.core.rerun_state_machine", "RerunState"),
        ("megatron.core.transformer.enums", "AttnBackend"),
        ("megatron.core.transformer.enums", "CudaGraphModule"),
        ("megatron.core.transformer.enums", "CudaGraphScope"),
        ("megatron.core.transformer.enums", "InferenceCudaGraphScope"),
    }
)
_NUMBERS = re.compile(r"b?float\d\w*|u?int\d+|b?complex\d+|bits\w+|qu?int\w+|bool|per_(tensor|channel)_\w+")
_TENSORS = re.compile(r"[A-Z]\w*(Tensor|Storage)|Tensor")
_PLACES = {"torch", "torch.cuda", "torch.cuda.sparse", "torch.sparse", "torch.storage"}
# torch.save names each storage by a persistent id.
_REFUSED = REFUSED - {"PERSID", "BINPERSID"}


def allowed(module: str, name: str) -> bool:
    """Whether a pickled object of a checkpoint may import this name."""
    if (module, name) in _EXACT:
        return True
    if module == "torch._utils":
        return name.startswith("_rebuild_") and name.isidentifier()
    if module == "torch" and _NUMBERS.fullmatch(name):
        return True
    places = (
        "torch",
        "torch.cuda",
        "torch.storage",
        "torch.sparse",
        "torch.cuda.sparse",
        "torch.sparse.cuda",
    )
    return module in places and _TENSORS.fullmatch(name) is not None


def scan_objects(checkpoint: Path) -> list[str]:
    """What the objects of a checkpoint would import beyond what it needs; empty when they are harmless.

    Args:
        checkpoint: A folder whose files are whole, and whose ``.metadata``, if it has one, is harmless.

    Raises:
        UserError: A file cannot be read.
    """
    faults = []
    # Megatron before 0.19 kept a ``common.pt``, and still loads it where there is one.
    for path in sorted(checkpoint.rglob("*.pt")):
        with disk_errors(path, "read"), path.open("rb") as file:
            faults += [f"{path.relative_to(checkpoint)} {fault}" for fault in _faults(file)]
    if (checkpoint / METADATA).exists():
        faults += _faults_of_shards(checkpoint)
    return list(dict.fromkeys(faults))


def _faults_of_shards(checkpoint: Path) -> list[str]:
    try:
        stored = read_stored(checkpoint)
    except UserError as error:
        return [error.message.removeprefix(f"{checkpoint}/")]
    strange = sorted(file for file in stored.files if not _is_ours(checkpoint, file))
    if strange:
        return [f".metadata names {file!r}, which is no file of the checkpoint" for file in strange]
    faults = []
    for one in stored.objects:
        if one.transformed:
            continue  # compressed, say: only who loads it knows how
        path = checkpoint / one.file
        with disk_errors(path, "read"), path.open("rb") as file:
            file.seek(one.offset)
            content = io.BytesIO(file.read(one.length))
        faults += [f"{one.file}: {one.name} {fault}" for fault in _faults(content)]
    return faults


def _is_ours(checkpoint: Path, name: str) -> bool:
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts and (checkpoint / path).is_file()


def _faults(file: BinaryIO) -> list[str]:
    """What is wrong with something that ``torch.save`` should have written."""
    try:
        with zipfile.ZipFile(file) as archive:
            pickles = [info for info in archive.infolist() if info.filename.endswith("data.pkl")]
            texts = [archive.read(info) for info in pickles]
    except Exception as error:  # noqa: BLE001  whatever a broken or crafted archive raises
        return [f"is not what torch saves: {error}"]
    if not texts:
        return ["is not what torch saves: it has no pickle"]
    return [fault for text in texts for fault in scan_pickle(text, allowed, _REFUSED)]
