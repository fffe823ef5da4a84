"""Write profile.json: ONNX Runtime's own profile of the commit stage in three steps of `half` (onnxruntime 1.32).

python tests/data/bench/make.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import onnx
import onnxruntime as ort

from kfac_onnx.bench.arms import ARMS, open_arm
from kfac_onnx.bench.workloads import cases, write_parameters
from kfac_onnx.runtime.step.tensors import session_maker


def main() -> None:
    """Train three steps and keep the events of runs and nodes."""
    commit: list[ort.InferenceSession] = []
    with tempfile.TemporaryDirectory() as folder:

        def profiling(model: bytes, options: ort.SessionOptions, **others: object) -> ort.InferenceSession:
            name = onnx.load_from_string(model).graph.name
            options.enable_profiling = name == "commit"
            options.profile_file_prefix = str(Path(folder) / "commit")
            session = ort.InferenceSession(model, options, **others)
            if name == "commit":
                commit.append(session)
            return session

        session_maker.set(profiling)
        case = cases("mf", vocab_sizes=(1_000,), lookups=(64,))[0]
        parameters = Path(folder) / "start.safetensors"
        write_parameters(case, parameters)
        trainee = open_arm(ARMS["half"], case, parameters, threads=1)
        batches = case.batches(0)
        for _ in range(3):
            trainee.step(next(batches))
        events = json.loads(Path(commit[0].end_profiling()).read_text())
    kept = [
        {key: event[key] for key in ("cat", "name", "ts", "dur")}
        for event in events
        if event["name"] == "model_run" or event["name"].endswith("_kernel_time")
    ]
    lines = ",\n".join(json.dumps(event) for event in kept)
    Path(__file__).with_name("profile.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
