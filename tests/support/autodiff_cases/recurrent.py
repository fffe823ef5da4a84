"""Cases of LSTM, GRU and RNN: time 4, batch 3, inputs 5, hidden 2."""

from __future__ import annotations

import numpy as np

from autodiff_cases import Case, floats

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
ENDS = np.array([4, 1, 3], np.int32)


def layer(
    kind: str,
    name: str,
    attributes: str = "",
    *,
    direction: str = "forward",
    torch: str = "",
    given: str = "xwrbhc",
    read: str = "yhc",
    batch: int = 3,
    steps: int = 4,
) -> Case:
    """Return a layer; `given` are its inputs (`l`: lengths), `read` its outputs that the loss depends on."""
    count = 2 if direction == "bidirectional" else 1
    shapes = {
        "x": (steps, batch, 5),
        "w": (count, GATES[kind] * 2, 5),
        "r": (count, GATES[kind] * 2, 2),
        "b": (count, GATES[kind] * 4),
        "h": (count, batch, 2),
        "c": (count, batch, 2),
    }
    places = "xwrblhc" if kind == "LSTM" else "xwrblh"
    inputs = {key: floats(*shapes[key], scale=0.7) for key in places if key in given and key != "l"}
    if "l" in given:
        inputs["l"] = ENDS
    names = ", ".join(key if key in given else "" for key in places).rstrip(", ")
    outputs = tuple(f"{kind.lower()}_{key}" for key in ("yhc" if kind == "LSTM" else "yh"))
    kept = tuple(name for name in outputs if name[-1] in read)
    last = outputs.index(kept[-1]) + 1
    written = ", ".join(name if name in kept else "" for name in outputs[:last])
    call = ", ".join(
        f"{full}={key}"
        for full, key in (("b", "b"), ("lengths", "l"), ("h0", "h"), ("c0", "c"))
        if key in inputs
    )
    call = ", ".join(item for item in (call, f'direction="{direction}"', torch) if item)
    chosen = tuple(index for index, name in enumerate(outputs) if name in kept)
    attributes = ", ".join(
        item for item in (f'hidden_size = 2, direction = "{direction}"', attributes) if item
    )
    return Case(
        f"{kind.lower()}_{name}",
        f"{written} = {kind}<{attributes}>({names})",
        f"tuple(R.{kind.lower()}(x, w, r, {call})[i] for i in {chosen})",
        inputs,
        outputs=kept,
        static=("w", "r"),
    )


def every(kind: str, tag: str = "", attributes: str = "", torch: str = "") -> list[Case]:
    """Return the cases that each kind of layer has."""
    return [
        layer(kind, f"{tag}{name}", attributes, torch=torch, **more)
        for name, more in (
            ("forward", {}),
            ("reverse", {"direction": "reverse"}),
            ("both", {"direction": "bidirectional"}),
            ("bare", {"given": "xwr"}),
            ("bare_both", {"given": "xwr", "direction": "bidirectional", "read": "y"}),
            ("last_state", {"read": "h"}),
            ("every_state", {"read": "y", "given": "xwrb"}),
            ("start_only", {"given": "xwrh"}),
            ("one_step_one_row", {"steps": 1, "batch": 1}),
            ("lengths", {"given": "xwrblhc"}),
            ("lengths_reverse", {"given": "xwrblh", "direction": "reverse"}),
            ("lengths_both", {"given": "xwrbl", "direction": "bidirectional"}),
        )
    ]


CASES = [
    *every("LSTM"),
    layer("LSTM", "last_cell", read="c"),
    layer(
        "LSTM",
        "named_activations",
        'activations = ["Sigmoid", "Tanh", "Tanh", "Sigmoid", "Tanh", "Tanh"]',
        direction="bidirectional",
    ),
    *every("GRU", attributes="linear_before_reset = 0"),
    *every("GRU", "reset_last_", "linear_before_reset = 1", "reset_last=True"),
    *every("RNN"),
    layer("RNN", "relu", 'activations = ["Relu"]', torch='functions=("relu",)'),
    layer(
        "RNN",
        "relu_both",
        'activations = ["Relu", "Relu"]',
        torch='functions=("relu",)',
        direction="bidirectional",
    ),
]
