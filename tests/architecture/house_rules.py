"""The rules of the house as functions: each takes a checkout's root and lists what breaks it."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from source_reading import dotted, imported_names, imports_of, in_full, module_name

# By room, the rooms it may import. Every room may import itself, `errors`, and `megaplug` for its version.
MAY_KNOW: dict[str, set[str]] = {
    "errors": set(),
    "topology": set(),
    "runs": set(),
    "layers.registry": set(),
    "job": {"topology", "runs", "layers.registry"},
    "plan": {"topology", "runs", "job", "layers.registry"},
    "launchers": {"topology", "runs", "job"},
    "data": {"topology", "runs", "job"},
    "layers": {"layers.registry"},
    "runtime": {"topology", "runs", "job", "data", "layers", "layers.registry"},
    "commands": {"topology", "runs", "job", "plan", "launchers", "data", "layers.registry"},
    "entry": {"commands"},
    "launch": {"entry"},
}
# These may import `runtime`, but only when they are called.
MAY_CALL_RUNTIME = ("megaplug.plan.rehearsal", "megaplug.plan.measure", "megaplug.plan.doctor")
WITHOUT_TORCH = set(MAY_KNOW) - {"layers", "runtime"}
TORCH = {"torch", "megatron", "transformer_engine", "apex"}
# torch brings triton.
THIRD_PARTIES_OF_LAYERS = ("torch", "megatron.core", "triton")
UNSAFE_TO_READ = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
# Its names are looked up one by one.
RESTRICTED = "megaplug/runs/restricted.py"
# Assigning to these is pretending to be CUDA.
STAND_IN_TARGETS = (
    "torch.cuda",
    "torch.accelerator",
    "torch.Tensor",
    "torch.nn.Module",
    "torch.nn.modules.module.Module",
)
HOME_OF_STAND_INS = "megaplug/runtime/cpu.py"
# Written so that this file does not match itself.
MACHINE_TRACES = re.compile(
    r"""["' =:(`]/(?:work|farm|root|home)[/]|--(?:extra-)?index[-]url|https?://[^ ]*/simple\b"""
)


def sources(root: Path, *folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))


def room_of(module: str) -> str | None:
    """The room of a dotted module name, None for what is not ours or is `megaplug` itself."""
    first, _, rest = module.partition(".")
    if first == "launch":
        return "launch"
    if first != "megaplug" or not rest:
        return None
    # Whoever imports the registry runs layers/__init__.py too: it is held to the registry's rules.
    if rest == "layers" or rest.split(".")[:2] == ["layers", "registry"]:
        return "layers.registry"
    return rest.split(".")[0]


def strangers(root: Path) -> list[str]:
    """Imports of a room by one that may not know it."""
    faults = []
    for path in sources(root, "megaplug", "launch"):
        module = module_name(root, path)
        room = room_of(module)
        if room is None:
            allowed: set[str] = set()
        elif room not in MAY_KNOW:
            faults.append(f"{path.relative_to(root)}: the room {room!r} is not in MAY_KNOW")
            continue
        else:
            allowed = MAY_KNOW[room] | {room, "errors"}
        for found in imports_of(root, path):
            target = room_of(found.module)
            if target is None or target in allowed:
                continue
            if (
                target == "runtime"
                and module.startswith(MAY_CALL_RUNTIME)
                and (found.lazy or found.typing_only)
            ):
                continue
            faults.append(f"{path.relative_to(root)}:{found.line}: {room} may not know {found.module}")
    return faults


def guests_of_layers(root: Path) -> list[str]:
    """Imports by a layer of anything but layers, torch, megatron.core and Python's own modules."""
    faults = []
    for path in sources(root, "megaplug/layers"):
        for found in imports_of(root, path):
            first = found.module.split(".")[0]
            if first == "megaplug" or first in sys.stdlib_module_names:
                continue
            if not any(f"{found.module}.".startswith(f"{known}.") for known in THIRD_PARTIES_OF_LAYERS):
                faults.append(f"{path.relative_to(root)}:{found.line}: a layer may not know {found.module}")
    return faults


def torch_at_import(root: Path) -> list[str]:
    """Imports of torch or what brings it at module level, where there must be none."""
    faults = []
    for path in sources(root, "megaplug", "launch"):
        room = room_of(module_name(root, path))
        if room is not None and room not in WITHOUT_TORCH:
            continue
        faults += [
            f"{path.relative_to(root)}:{found.line}: imports {found.module} at module level"
            for found in imports_of(root, path)
            if found.module.split(".")[0] in TORCH and not found.lazy and not found.typing_only
        ]
    return faults


def long_files(root: Path) -> list[str]:
    """None over 500 lines; in what is shipped nine in ten under 350 and the median at most 150."""
    lengths = {
        path: len(path.read_text().splitlines())
        for path in sources(root, "megaplug", "launch", "tests", "benchmarks")
    }
    faults = [
        f"{path.relative_to(root)}: {lines} lines, over 500" for path, lines in lengths.items() if lines > 500
    ]
    shipped = [
        lines for path, lines in lengths.items() if path.relative_to(root).parts[0] in ("megaplug", "launch")
    ]
    # An __init__.py of a line or two would pull the median down for the others.
    shipped = [lines for lines in shipped if lines > 5]
    if shipped and statistics.median(shipped) > 150:
        faults.append(f"the median file has {statistics.median(shipped):g} lines, over 150")
    if sum(lines < 350 for lines in shipped) < 0.9 * len(shipped):
        faults.append(
            f"{sum(lines >= 350 for lines in shipped)} of {len(shipped)} files have 350 lines or more"
        )
    return faults


def stand_ins(root: Path) -> list[str]:
    """Assignments to torch's CUDA surface anywhere but in the one file for it."""
    faults = []
    for path in sources(root, "megaplug", "launch", "benchmarks"):
        if path.relative_to(root).as_posix() == HOME_OF_STAND_INS:
            continue
        tree = ast.parse(path.read_text())
        names = imported_names(tree)
        for node in ast.walk(tree):
            for target in assigned_to(node):
                full = in_full(target, names)
                if full.startswith(tuple(f"{known}." for known in STAND_IN_TARGETS)):
                    faults.append(f"{path.relative_to(root)}:{node.lineno}: assigns to {full}")
    return faults


def assigned_to(node: ast.AST) -> list[str]:
    """The dotted names that a statement assigns to; `setattr(a.b, "c", x)` and `patch("a.b.c")` count."""
    if isinstance(node, ast.Assign):
        targets = [part for target in node.targets for part in getattr(target, "elts", [target])]
        return [dotted(target) for target in targets if isinstance(target, ast.Attribute)]
    if isinstance(node, ast.AugAssign | ast.AnnAssign):
        return [dotted(node.target)] if isinstance(node.target, ast.Attribute) else []
    if isinstance(node, ast.Call):
        called = dotted(node.func).split(".")[-1]
        literal = [
            arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
        ]
        if called == "setattr" and node.args:
            return [f"{dotted(node.args[0])}.{literal[0] if literal else '?'}"]
        if called == "patch" and literal:
            return literal[:1]
    return []


def unsafe_reading(root: Path) -> list[str]:
    """Reading that can run code: pickle and its like, `torch.load` and `numpy.load` with the doors open."""
    faults = []
    for path in sources(root, "megaplug", "launch", "benchmarks", "tests"):
        where = path.relative_to(root)
        tree = ast.parse(path.read_text())
        names = imported_names(tree)
        if where.parts[0] != "tests" and str(where) != RESTRICTED:
            faults += [
                f"{where}:{found.line}: imports {found.module}"
                for found in imports_of(root, path)
                if found.module.split(".")[0] in UNSAFE_TO_READ
            ]
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            keywords = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            if in_full(dotted(node.func), names) == "torch.load" and keywords.get("weights_only") is not True:
                faults.append(f"{where}:{node.lineno}: torch.load without weights_only=True")
            if keywords.get("allow_pickle") is True:
                faults.append(f"{where}:{node.lineno}: allow_pickle=True")
    return faults


def machine_traces(root: Path) -> list[str]:
    """Paths of somebody's machine and addresses of registries, in any text file that git would take."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    # An unpacked sdist is no git repository: every file counts there.
    names = listed.stdout.split("\0") if listed.returncode == 0 else [str(path) for path in root.rglob("*")]
    faults = []
    for path in (root / name for name in names if name):
        if not path.is_file() or path.stat().st_size > 2_000_000:
            continue
        content = path.read_bytes()
        if b"\0" in content[:4096]:
            continue
        for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
            if match := MACHINE_TRACES.search(line):
                faults.append(f"{path.relative_to(root)}:{number}: {match.group().strip()}")
    return faults


def ignored_sources(root: Path) -> list[str]:
    """Source that git does not take: a pattern such as `runs/` in .gitignore hides megaplug/runs/ too."""
    folders = ["megaplug", "launch", "conf", "tests", "benchmarks"]
    listed = subprocess.run(
        ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "-z", "--", *folders],
        cwd=root,
        capture_output=True,
        text=True,
    )
    # Not a git repository: nothing is ignored.
    names = listed.stdout.split("\0") if listed.returncode == 0 else []
    return [f"{name}: ignored by git" for name in names if name.endswith((".py", ".yaml", ".json"))]


RULES = (
    strangers,
    guests_of_layers,
    torch_at_import,
    long_files,
    stand_ins,
    unsafe_reading,
    machine_traces,
    ignored_sources,
)
