"""The typed form of a job: one dataclass a config group, in the order of ``conf/train.yaml``.

Field names are Megatron's wherever the value reaches Megatron as it is; ``job/names.py`` holds
the table of the few that differ. What each key means stands above it in ``conf/``.
"""

# Annotations are types here, not texts: OmegaConf would compile every one of them at each start.
from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    """A decoder-only transformer. Sizes are numbers of elements; ``seq_length`` counts tokens."""

    name: str = "tiny"
    num_layers: int = 4
    hidden_size: int = 128
    ffn_hidden_size: int = 352
    num_attention_heads: int = 4
    num_query_groups: int = 2
    kv_channels: int | None = None
    seq_length: int = 256
    vocab_size: int | None = None
    make_vocab_size_divisible_by: int = 128
    normalization: str = "RMSNorm"
    norm_epsilon: float = 1e-5
    qk_layernorm: bool = False
    swiglu: bool = True
    squared_relu: bool = False
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    position_embedding_type: str = "rope"
    rotary_base: int = 10000
    rotary_percent: float = 1.0
    use_rope_scaling: bool = False
    rope_scaling_factor: float = 8.0
    rotary_seq_len_interpolation_factor: int | None = None
    rotary_scaling_factor: float = 1.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_correction_range_round_to_int: bool = True
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    multi_latent_attention: bool = False
    rope_type: str | None = None
    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_head_dim: int = 128
    qk_pos_emb_head_dim: int = 64
    v_head_dim: int = 128
    untie_embeddings_and_output_weights: bool = True
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    init_method_std: float = 0.02


@dataclass
class TopologyConfig:
    """How many ranks there are and what each dimension of the rank grid is for."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    dp: int | None = None
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    sequence_parallel: bool | None = None
    world_size: int | None = None
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    zero: int = 1
    fsdp: str = "megatron"
    auto: bool = False


@dataclass
class AttentionConfig:
    """Which registered plugin computes the core attention of each layer, and its own parameters."""

    name: str = "flash"
    params: dict[str, Any] = field(default_factory=dict)
    pattern: list[str] | None = None
    pattern_params: dict[str, Any] = field(default_factory=dict)
    sub_layer_norm: bool = False
    gamma_init: float | None = None


@dataclass
class MoeConfig:
    """Mixture of experts; ``num_experts: null`` means a dense model."""

    num_experts: int | None = None
    experts: str = "auto"
    experts_params: dict[str, Any] = field(default_factory=dict)
    moe_ffn_hidden_size: int | None = None
    moe_router_topk: int = 2
    moe_router_load_balancing_type: str = "aux_loss"
    moe_aux_loss_coeff: float = 0.01
    moe_z_loss_coeff: float | None = None
    moe_router_pre_softmax: bool = False
    moe_router_score_function: str = "softmax"
    moe_router_topk_scaling_factor: float | None = None
    moe_router_num_groups: int | None = None
    moe_router_group_topk: int | None = None
    moe_router_enable_expert_bias: bool = False
    moe_router_bias_update_rate: float = 1e-3
    moe_router_dtype: str | None = None
    moe_token_dispatcher_type: str = "alltoall"
    moe_flex_dispatcher_backend: str = "deepep"
    moe_expert_capacity_factor: float | None = None
    moe_token_drop_policy: str = "probs"
    moe_pad_expert_input_to_capacity: bool = False
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False
    moe_shared_expert_overlap: bool = False
    layers: list[int] | None = None
    moe_layer_freq: str | None = None


@dataclass
class DataConfig:
    """The text, how it is split, and where its tokenized form is kept."""

    path: Any = "stdlib"
    valid_path: Any = None
    test_path: Any = None
    text_key: str = "text"
    bad_lines: str = "refuse"
    split: str = "95,5,0"
    cache_dir: str | None = None


@dataclass
class TokenizerConfig:
    """How text becomes token ids."""

    type: str = "byte"
    path: str | None = None
    eod: str | None = None
    tiktoken_pattern: str | None = None
    special_tokens: list[str] | None = None
    tiktoken_num_special_tokens: int = 1000


@dataclass
class TrainConfig:
    """How long, in which batches, and how often it is validated."""

    iters: int | None = None
    tokens: int | None = None
    epochs: float | None = None
    stop_at: int | None = None
    micro_batch_size: int = 4
    global_batch_size: int = 8
    loss_chunk_tokens: int | None = None
    seed: int = 1234
    eval_interval: int = 100
    eval_iters: int = 10
    early_stop_patience: int | None = None
    early_stop_min_delta: float = 0.0
    deterministic_mode: bool = False
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    recompute_modules: list[str] | None = None
    cpu_offloading_num_layers: int = 0
    fine_grained_activation_offloading: bool = False
    offload_modules: list[str] | None = None


@dataclass
class OptimizerConfig:
    """The optimizer, and where its state is kept."""

    optimizer: str = "adam"
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    optimizer_cpu_offload: bool = False
    optimizer_offload_fraction: float = 1.0
    overlap_cpu_optimizer_d2h_h2d: bool = False
    use_precision_aware_optimizer: bool | None = None


@dataclass
class LrConfig:
    """The learning-rate schedule."""

    lr: float = 2e-3
    min_lr: float = 2e-4
    lr_decay_style: str = "cosine"
    lr_decay_iters: int | None = None
    lr_warmup_iters: int = 0
    lr_warmup_fraction: float | None = None
    lr_wsd_decay_style: str = "exponential"
    lr_wsd_decay_iters: int | None = None


@dataclass
class PrecisionConfig:
    """The number format of weights and activations; optimizer state is always fp32."""

    bf16: bool = False
    fp16: bool = False
    grad_reduce_in_bf16: bool = False
    attention_softmax_in_fp32: bool = True
    loss_scale: float | None = None
    initial_loss_scale: float = 65536.0
    min_loss_scale: float = 1.0
    loss_scale_window: float = 1000.0
    hysteresis: int = 2
    fp8_format: str | None = None
    fp8_recipe: str = "delayed"
    fp8_param_gather: bool = False

    @property
    def dtype(self) -> str:
        """The number format of weights and activations: ``fp32``, ``bf16`` or ``fp16``."""
        return "fp16" if self.fp16 else "bf16" if self.bf16 else "fp32"


@dataclass
class KernelsConfig:
    """Whether Megatron may take the kernels of packages that are compiled for a GPU."""

    apex: str = "auto"
    te: str = "auto"


@dataclass
class OverlapConfig:
    """Which communication runs beside computation; ``None`` means wherever Megatron allows it."""

    overlap_grad_reduce: bool | None = None
    overlap_param_gather: bool | None = None
    overlap_p2p_comm: bool | None = None
    tp_comm_overlap: bool | None = None


@dataclass
class CudaGraphConfig:
    """What is captured into CUDA graphs."""

    cuda_graph_impl: str = "none"
    cuda_graph_modules: list[str] = field(default_factory=list)
    cuda_graph_warmup_steps: int = 3


@dataclass
class CheckpointConfig:
    """When a run is saved and which checkpoints are kept."""

    save_interval: int | None = None
    keep: int = 2
    keep_every: int | None = None
    keep_best: int = 0
    async_save: bool | None = None
    async_strategy: str | None = None


@dataclass
class LoggingConfig:
    """How loudly a run speaks; nothing here changes its result."""

    level: str = "info"
    log_interval: int = 1
    progress: str = "auto"
    tensorboard: bool = True
    wandb_project: str | None = None
    mlflow_tracking_uri: str | None = None
    mlflow_experiment: str = "megaplug"
    log_params_norm: bool = False
    communication: bool | None = None
    peak_tflops: float | None = None


@dataclass
class ProfileConfig:
    """What is traced of which steps; names are those of ``torch.profiler``."""

    kind: str = "none"
    ranks: list[int] = field(default_factory=lambda: [0])
    wait: int = 3
    warmup: int = 1
    active: int = 2
    repeat: int = 1
    record_shapes: bool = True
    with_stack: bool = False
    profile_memory: bool = True


@dataclass
class ClusterConfig:
    """The machines that a plan is made for; nothing here changes a run's result. ``None``: as the preset."""

    name: str = "auto"
    device: str | None = None
    num_gpus: int | None = None
    gpus_per_node: int | None = None
    memory_gib: float | None = None
    reserved_gib: float | None = None
    peak_tflops: dict[str, float] | None = None
    memory_bandwidth_tbps: float | None = None
    link_gbps: float | None = None
    link_domain: int | None = None
    network_gbps: float | None = None
    price_per_gpu_hour: float | None = None
    constants: str | None = None


@dataclass
class LaunchConfig:
    """Where the ranks are started."""

    kind: str = "local"
    master_addr: str | None = "127.0.0.1"
    master_port: int | None = None
    nnodes: int | None = None
    node_rank: int | None = None
    join_s: float = 600.0
    at_once: int | None = None
    submit: bool = True
    within_node: list[str] = field(default_factory=lambda: ["tp", "cp"])
    omp_num_threads: int | None = None
    grace_s: float = 120.0
    distributed_timeout_minutes: int = 10
    output: str = "text"
    max_gpu_hours: float | None = 100.0


@dataclass
class SlurmConfig:
    """What a batch script says to SLURM, and what it prepares on the nodes; nothing here changes a result."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    gres: str | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    exclusive: bool = True
    options: dict[str, str] = field(default_factory=dict)
    setup: str | None = None
    modules: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    container: str = "none"
    image: str | None = None
    mounts: list[str] = field(default_factory=list)
    python: str | None = None
    requeue: bool = True
    signal_s: int = 120
    chain: int = 1


@dataclass
class SweepConfig:
    """How ``--multirun`` goes through its points; nothing here changes a run's result."""

    kind: str = "grid"
    trials: int = 20
    metric: str = "valid_loss"
    startup_trials: int = 10
    seed: int = 0


@dataclass
class WatchConfig:
    """When a rank hangs, in seconds without progress, and how often a job that has failed is started again.

    Nothing here changes a run's result.
    """

    max_restarts: int = 0
    hang_s: float | None = None
    start_s: float = 1800.0
    first_step_s: float = 1800.0
    save_s: float = 1800.0


@dataclass
class AlertsConfig:
    """Who is told what has happened to a run."""

    command: str | None = None
    webhook: str | None = None
    events: list[str] = field(default_factory=lambda: ["failure", "stall", "restart", "end"])
    timeout_s: float = 10.0


@dataclass
class ResilienceConfig:
    """How Megatron and NVRx look for what goes wrong in a rank; nothing here changes a run's result."""

    rerun_mode: str = "disabled"
    check_for_nan_in_loss_and_grad: bool = True
    check_for_spiky_loss: bool = False
    check_for_large_grads: bool = False
    result_rejected_tracker_filename: str | None = None
    error_injection_rate: int = 0
    error_injection_type: str = "transient_error"
    log_straggler: bool = False
    straggler_minmax_count: int = 1
    straggler_ctrlr_port: int = 65535
    disable_straggler_on_startup: bool = False
    enable_ft_package: bool = False
    calc_ft_timeouts: bool = False
    ft_num_warmup_iters: int = 5


@dataclass
class Job:
    """One run, as composed from ``conf/`` and the user's overrides."""

    name: str = "${model.name}"
    runs_dir: str = "runs"
    resume: bool = True
    load: str | None = None
    load_state: str = "weights"
    backend: str = "auto"
    device: str = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr: LrConfig = field(default_factory=LrConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    cuda_graph: CudaGraphConfig = field(default_factory=CudaGraphConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    alerts: AlertsConfig = field(default_factory=AlertsConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    megatron: dict[str, Any] = field(default_factory=dict)
