"""What a training worker holds in memory and sends to others, before activations."""

FP32 = 4  # bytes
# Elements: 128 MiB in fp32, enough to keep a fast network busy.
LARGEST_BUCKET = 2**25
ALIGNMENT = 2**12  # DeepSpeed wants buffers of a multiple of 2, networks more


def worker_bytes(
    parameters: int, num_workers: int, zero_stage: int, trainable: int | None = None
) -> dict[str, int]:
    """Bytes of each kind on one worker, for fp32 weights trained with AdamW.

    ZeRO (Rajbhandari et al. 2019, arXiv:1910.02054) cuts the optimizer's state from stage 1 on,
    gradients from 2 and weights at 3. From stage 1 on DeepSpeed updates a copy of the worker's part
    of the weights ("master"). Every stage cuts the EMA. With offload, ``master`` and ``moments``
    are in CPU memory.

    Args:
        parameters: of the model. trainable: those not frozen; None means all.
    """
    trained = parameters if trainable is None else trainable
    part = -(-trained // num_workers)
    return {
        "weights": FP32 * (-(-parameters // num_workers) if zero_stage == 3 else parameters),
        "gradients": FP32 * (part if zero_stage >= 2 else trained),
        "master": FP32 * (part if zero_stage >= 1 else 0),
        "moments": 2 * FP32 * (part if zero_stage >= 1 else trained),
        "ema": FP32 * part,
    }


def bucket_elements(largest: int, parameters: int) -> int:
    """Elements of each of DeepSpeed's buffers; the model's largest tensor has ``largest``."""
    bucket = max(largest, min(LARGEST_BUCKET, parameters // 8))
    return -(-bucket // ALIGNMENT) * ALIGNMENT


def buffer_bytes(parameters: int, largest: int, zero_stage: int) -> int:
    """Bytes of DeepSpeed's buffers: two for gradients, at stage 3 two more for weights on call."""
    buffers = (0, 2, 2, 4)[zero_stage]
    return FP32 * buffers * bucket_elements(largest, parameters)


def sent_bytes(
    parameters: int, trainable: int, num_workers: int, zero_stage: int, micro_batches: int
) -> int:
    """Bytes that a worker sends in one optimizer step, by ring collectives on fp32.

    A reduction to everybody sends 2 of the ``num_workers`` parts' shares, one to the part's owner,
    or a gathering, 1. Stages 0 and 1 reduce once a step; 2 and 3 with every micro-batch, and 3
    gathers the weights for its forward and for its backward.
    """
    reductions = 2 if zero_stage == 0 else 1 if zero_stage == 1 else micro_batches
    gradients = reductions * trainable
    weights = (0, trainable, trainable, 2 * micro_batches * parameters)[zero_stage]
    return FP32 * (gradients + weights) * (num_workers - 1) // num_workers
