"""What a training worker holds in memory between steps, before activations."""

FP32 = 4  # bytes


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
