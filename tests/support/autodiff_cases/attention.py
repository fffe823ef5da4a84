"""Cases of attention: batch 2, 3 queries, 4 keys, heads of 5, values of 6."""

from __future__ import annotations

import numpy as np

from autodiff_cases import Case, Draw, floats

ALLOWED = np.array([[1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 0, 1]], bool)
DEAD = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]], bool)


def attend(
    name: str,
    attributes: str = "",
    torch: str = "",
    *,
    heads: tuple[int, int] = (2, 2),
    flat: bool = False,
    mask: Draw | np.ndarray | None = None,
    queries: int = 3,
    opset: int = 23,
) -> Case:
    """Return one attention; `flat` inputs have rank 3."""
    many, few = heads
    shapes = {"q": (2, many, queries, 5), "k": (2, few, 4, 5), "v": (2, few, 4, 6)}
    if flat:
        shapes = {key: (b, t, h * d) for key, (b, h, t, d) in shapes.items()}
        attributes = ", ".join(
            item for item in (attributes, f"q_num_heads = {many}, kv_num_heads = {few}") if item
        )
        torch = ", ".join(item for item in (torch, f"heads=({many}, {few})") if item)
    inputs: dict[str, Draw | np.ndarray] = {key: floats(*shape) for key, shape in shapes.items()}
    if mask is not None:
        inputs["m"] = mask
    given = f"<{attributes}>" if attributes else ""
    call = ", ".join(item for item in ("q, k, v", "mask=m" if mask is not None else "", torch) if item)
    return Case(
        f"attention_{name}",
        f"z = Attention{given}({', '.join(inputs)})",
        f"R.attention({call})",
        inputs,
        opset=opset,
        symbolic=not flat,  # ONNX infers a hidden size of 0 for symbolic ones
    )


CASES = [
    attend("plain"),
    attend("flat", flat=True),
    attend("one_query", queries=1),
    attend("scale", "scale = 0.7", "scale=0.7"),
    attend("causal", "is_causal = 1", "causal=True"),
    attend("causal_flat", "is_causal = 1", "causal=True", flat=True, queries=4),
    attend("bool_mask", mask=ALLOWED),
    attend("float_mask", mask=floats(2, 1, 3, 4)),
    attend("bias_of_heads", mask=floats(2, 3, 4)),
    attend("mask_and_causal", "is_causal = 1", "causal=True", mask=floats(3, 4)),
    attend("row_that_attends_to_nothing", mask=DEAD),
    attend("softcap", "softcap = 0.8", "cap=0.8"),
    attend("softcap_causal", "softcap = 0.8, is_causal = 1", "cap=0.8, causal=True"),
    attend("softcap_mask", "softcap = 0.8", "cap=0.8", mask=floats(3, 4)),
    attend("shared_keys", heads=(4, 2)),
    attend("one_key_head", "is_causal = 1", "causal=True", heads=(3, 1)),
    attend("shared_keys_flat", "is_causal = 1", "causal=True", heads=(4, 2), flat=True),
    attend("shared_keys_mask", heads=(4, 2), mask=floats(4, 3, 4)),
    attend("opset_24", "is_causal = 1", "causal=True", opset=24),
    attend("opset_24_mask", mask=ALLOWED, opset=24),
    attend("opset_24_trained_mask", mask=floats(3, 4), opset=24),
    Case(
        "attention_of_itself",
        "z = Attention(x, x, x)",
        "R.attention(x, x, x)",
        {"x": floats(2, 2, 3, 4)},
        opset=23,
    ),
    Case(
        "attention_with_past",
        "z, pk, pv = Attention(q, k, v, , a, b)",
        "(R.attention(q, torch.cat([a, k], 2), torch.cat([b, v], 2)), torch.cat([a, k], 2), torch.cat([b, v], 2))",
        {
            "q": floats(2, 2, 3, 5),
            "k": floats(2, 2, 3, 5),
            "v": floats(2, 2, 3, 6),
            "a": floats(2, 2, 2, 5),
            "b": floats(2, 2, 2, 6),
        },
        outputs=("z", "pk", "pv"),
        opset=23,
    ),
]
