"""One rank of a frozen job: from ``job.yaml`` to Megatron's ``pretrain()`` and back."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megaplug.errors import UserError
from megaplug.job.attention import attention_layers
from megaplug.job.experts import experts_choice
from megaplug.job.freeze import FrozenJob, read_frozen
from megaplug.job.retention import retention
from megaplug.runs.atomic import write_json_atomic
from megaplug.runs.events import STORE_FD, EventWriter
from megaplug.runs.state import RunState, read_state, write_state
from megaplug.runtime import (
    cpu,
    fused_adam,
    heartbeat,
    loudness,
    optimizer_state,
    packages,
    profiling,
    repairs,
    spared,
)
from megaplug.runtime.early_stopping import EarlyStopping
from megaplug.runtime.failures import LastWords
from megaplug.runtime.metrics import MetricsRecorder
from megaplug.runtime.rerun import Findings
from megaplug.runtime.saving import Saver
from megaplug.runtime.stopping import Stopping
from megaplug.runtime.verifying import verify_what_is_loaded


def run(
    job_file: Path, *, skip_repairs: frozenset[str] = frozenset(), plant: Callable[[], None] | None = None
) -> RunState:
    """Train the frozen job as the rank that the environment names (``RANK``, ``WORLD_SIZE``, ...).

    Args:
        job_file: The ``job.yaml`` of a run's folder.
        skip_repairs: Repairs of Megatron to leave out; for the tests that show its faults.
        plant: Called when device and repairs are in place; for the tests that put a fault there.

    Returns:
        How the run stands now; without a supervisor rank 0 has also written it to ``state.json``.
    """
    frozen = read_frozen(job_file)
    loudness.set_level(frozen.job.logging.level)
    rank = int(os.environ["RANK"])
    events = EventWriter.from_environment()
    events.write("phase", name="starting Megatron")
    # Before anything imports Megatron, which looks for them once.
    choices = packages.choose(frozen.job.kernels, frozen.derived.device)
    spared.compile_nothing()
    with spared.kept_out(spared.unused_packages(frozen.megatron_args)):
        on_cpu = cpu.install()
        _same_device(frozen.derived.device, on_cpu)
        from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue
        from megatron.core.tokenizers.text import libraries  # noqa: F401

        # A forked queue for Megatron's writers, before this process touches a GPU: a spawned one imports
        # torch again at the first save.
        get_write_results_queue("fork")
        applied = repairs.apply(skip_repairs)
        fused_adam.install()
    if on_cpu:
        optimizer_state.install()
    if rank == 0:
        print(f"megaplug: device {'cpu, standing in for CUDA' if on_cpu else torch.cuda.get_device_name()}")
        for choice in choices:
            said = choice.reason or "found; Megatron takes its kernels"
            print(f"megaplug: {packages.NAMES[choice.key]}: {said}")
            if choice.is_news:
                events.write("note", text=f"no {packages.NAMES[choice.key]}: {choice.reason}")
        for repair in applied:
            print(f"megaplug: repair {repair.name}: {repair.fault}", flush=True)
    if plant is not None:
        plant()
    return _Run(frozen, events, rank).pretrain(packages.arguments(choices))


def _same_device(frozen: str, on_cpu: bool) -> None:
    if frozen == "cuda" and on_cpu:
        raise UserError(
            "the job is for CUDA, and torch finds no usable GPU in this rank",
            hint="python launch/plan.py action=doctor says why; device=cpu trains without one",
            exit_code=1,
        )
    if frozen == "cpu" and not on_cpu:
        raise UserError(
            "the job is for the CPU, and this rank sees a GPU",
            hint="set CUDA_VISIBLE_DEVICES to nothing, as the launcher does",
            exit_code=1,
        )


def _about(frozen: FrozenJob) -> dict[str, Any]:
    """What every manifest says of who wrote the checkpoint."""
    grid = frozen.topology
    sizes = {name: getattr(grid, name) for name in ("world_size", "tp", "pp", "cp", "dp", "ep")}
    versions = {"megaplug": frozen.megaplug_version}
    versions |= {name.replace("-", "_"): version(name) for name in ("megatron-core", "torch")}
    return {
        "model": frozen.model_fingerprint,
        "job": frozen.digest,
        "topology": sizes,
        "dtype": frozen.job.precision.dtype,
        "versions": versions,
    }


class _Run:
    """The pieces of one rank's run that belong together."""

    def __init__(self, frozen: FrozenJob, events: EventWriter, rank: int) -> None:
        self.frozen = frozen
        self.folder = frozen.folder
        self.events = events
        self.rank = rank
        self.recorder = MetricsRecorder(frozen, events)
        self.stopping = Stopping(events, self.recorder.is_validated)
        kept, strategy = retention(frozen.job), frozen.derived.async_strategy
        self.saver = Saver(self.folder, _about(frozen), kept, events, self._on_saved, strategy)
        self.early = EarlyStopping(frozen)
        self.findings = Findings(events, self.recorder)
        self.saved_iteration: int | None = None

    def pretrain(self, more_words: list[str]) -> RunState:
        """Train to the end.

        Args:
            more_words: For Megatron's parser, beside those of the job.
        """
        from megatron.training import argument_utils, training
        from megatron.training.arguments import parse_and_validate_args

        from megaplug.layers.attention.megatron_tokens import spread_as
        from megaplug.layers.spec import transformer_layer_spec
        from megaplug.runtime import upcycling, what_runs
        from megaplug.runtime.batch import forward_step
        from megaplug.runtime.source_losses import SourceLosses

        sys.argv = ["megaplug", *self.frozen.megatron_args, *more_words]
        args = parse_and_validate_args()
        if self.frozen.derived.async_strategy == "mcore":
            # Megatron's own check turns it off, which is about a process that outlives a save.
            args.async_save, args.async_strategy, args.use_persistent_ckpt_worker = True, "mcore", False

        model_config = argument_utils.gpt_config_from_args(args)
        job = self.frozen.job
        attention = attention_layers(job.attention)
        spread_as(attention.token_layout())
        backend = self.frozen.derived.backend
        experts = experts_choice(job, backend)
        model_config.transformer_layer_spec = transformer_layer_spec(attention, backend, experts)
        if args.moe_use_upcycling:
            upcycling.watch(training, args, model_config.transformer_layer_spec)
        sources = SourceLosses(self.frozen.facts)
        chunk = job.train.loss_chunk_tokens
        step = heartbeat.counting(partial(forward_step, sources=sources, loss_chunk_tokens=chunk))
        profiled_step = profiling.watch(training, step, self.frozen, self.rank)
        self.stopping.watch(training)
        self.recorder.watch(training)
        self.saver.watch(training)
        what_runs.watch(training, self._on_built, chunk)
        sources.watch(training)
        graphs = job.cuda_graph
        # The step after the last of warming up is the one that is captured.
        made_once = 1 if graphs.cuda_graph_impl == "none" else graphs.cuda_graph_warmup_steps + 2
        heartbeat.watch(training, made_once)
        if self.rank == 0 and self.events.fd is None:
            verify_what_is_loaded(args.load)  # a supervisor has done so
        self.early.watch(training, self.recorder)
        self.findings.watch(training)
        self._report("running")
        state = None
        try:
            with LastWords(self.events, self.recorder, self.findings):
                left = self._train(training, args, model_config, profiled_step)
                self.saver.close()
            state = self._ended(left)
        finally:
            self.recorder.close(good=state is not None)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        return state

    def _train(self, training: Any, args: Any, model_config: Any, step: Any) -> bool:
        """Megatron's training; whether it raised SystemExit, so that nothing after its loop was done."""
        from megatron.core.enums import ModelType
        from megatron.training import argument_utils

        from megaplug.runtime.batch import build_datasets

        try:
            training.pretrain(
                argument_utils.pretrain_cfg_container_from_args(args, model_config),
                build_datasets,
                ModelType.encoder_or_decoder,
                step,
                store=_store(args),
            )
        except SystemExit as leaving:
            # Megatron leaves so after a signal and at --exit-interval, and where it gives up: see _ended.
            if leaving.code not in (0, None):
                raise
            return True
        return False

    def _on_built(self, kernels: dict[str, str]) -> None:
        """Write down what runs; stages that hold other layers say nothing, their kernels are the same."""
        if self.rank != 0:
            return
        write_json_atomic(self.folder.kernels_file, {**kernels, "overlap": self.frozen.derived.overlap})
        self.events.write("kernels", kernels=kernels)
        print(
            "\n".join(f"megaplug: {part.replace('_', ' ')}: {name}" for part, name in kernels.items()),
            flush=True,
        )

    def _on_saved(self, iteration: int) -> None:
        self.saved_iteration = iteration
        reached = max(iteration, self.recorder.iteration)
        self._report("running", iteration=reached, saved_iteration=iteration)

    def _ended(self, left: bool) -> RunState:
        """How it ended, from what was done: Megatron exits with 0 for half a dozen reasons.

        Args:
            left: Megatron raised SystemExit, so that nothing after the training loop was done.

        Raises:
            UserError: Megatron gave up.
        """
        iteration = self.recorder.iteration
        if not left and iteration >= self.frozen.derived.iters:
            if self.stopping.was_cut:
                return self._end("stopped", iteration, "signal")
            return self._end("finished", iteration)
        if left and self.saved_iteration == iteration:
            from megatron.training.global_vars import get_signal_handler

            if any(get_signal_handler().signals_received()):
                return self._end("stopped", iteration, "signal")
            if self.early.reason:
                return self._end("finished", iteration, self.early.reason)
            if iteration == self.frozen.job.train.stop_at:
                return self._end("stopped", iteration, "train.stop_at")
        reason = "Megatron ended by itself; the last lines of this log say why"
        self._end("failed", iteration, reason)
        raise UserError(f"{reason}, at step {iteration}", exit_code=1)

    def _end(self, status: str, iteration: int, reason: str = "") -> RunState:
        self.events.write("end", status=status, iteration=iteration, reason=reason)
        return self._report(status, iteration=iteration, reason=reason)

    def _report(self, status: str, **changes: Any) -> RunState:
        before = read_state(self.folder.state_file) or RunState("created")
        changes = {"iters": self.frozen.derived.iters, "reason": "", "rank": None, **changes}
        state = replace(before, status=status, **changes)
        # Where a supervisor listens it keeps the state, from what it is told.
        if self.rank != 0 or self.events.fd is not None:
            return state
        return write_state(self.folder.state_file, state)


def _store(args: Any) -> torch.distributed.Store:
    """The rendezvous store of all ranks; rank 0 serves it on the socket that the supervisor bound."""
    listening = os.environ.get(STORE_FD)
    options: dict[str, Any] = {}
    if args.rank == 0 and listening is not None:
        options["master_listen_fd"] = int(listening)
    return torch.distributed.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        args.world_size,
        is_master=args.rank == 0,
        timeout=timedelta(minutes=args.distributed_timeout_minutes),
        **options,
    )
