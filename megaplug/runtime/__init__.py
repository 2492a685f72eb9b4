"""Inside a rank: the device, Megatron's arguments, the repairs, and ``pretrain()``."""
