"""Runs exported backbones in onnxruntime and compares their outputs with ours.

    cargo run --release -p dinoxide-onnx --example peer -- FOLDER
    pip install onnx onnxruntime
    python benches/peer/onnx/check.py FOLDER

Every FOLDER/*.onnx has a FOLDER/*.safetensors beside it with inputs and the features that they must give, both by the
number of the batch and the name of the value: `0.images`, `0.cls`, `0.patches`. Exits with 1 if a value is off by more
than the tolerance that an export keeps to.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

# Of the largest difference over the output's root mean square, where that is above 1.
TOLERANCE = 1e-4


def read_safetensors(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        tensors[name] = np.frombuffer(body[start:end], np.float32).reshape(entry["shape"])
    return tensors


def check(path):
    """The worst deviation of a file's outputs, after printing one line for each of its batches."""
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    domains = {node.domain for node in model.graph.node}
    assert domains == {""}, f"{path.name}: operators of other domains: {domains}"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = (value.name for value in session.get_inputs())
    outputs = [value.name for value in session.get_outputs()]
    tensors = read_safetensors(path.with_suffix(".safetensors"))
    batches = sorted({int(name.split(".")[0]) for name in tensors})
    worst = 0.0
    for batch in batches:
        images = tensors[f"{batch}.{given}"]
        expected = {name.split(".")[1] for name in tensors if name.startswith(f"{batch}.")} - {given}
        assert expected == set(outputs), f"{path.name}: outputs {outputs}, expected {sorted(expected)}"
        deviations = {}
        for name, found in zip(outputs, session.run(outputs, {given: images})):
            ours = tensors[f"{batch}.{name}"]
            assert found.shape == ours.shape, f"{path.name}: {name} is {found.shape}, expected {ours.shape}"
            scale = max(1.0, float(np.sqrt(np.mean(ours.astype(np.float64) ** 2))))
            deviations[name] = float(np.abs(found - ours).max()) / scale
        shape = "×".join(str(size) for size in images.shape)
        print(f"{path.stem:20} {given:17} {shape:15} " + "  ".join(f"{k} {v:.1e}" for k, v in deviations.items()))
        # `max` would pass over a deviation that is no number.
        worst = max([worst, *(v if np.isfinite(v) else float("inf") for v in deviations.values())])
    return worst


def main():
    paths = sorted(Path(sys.argv[1]).glob("*.onnx"))
    if not paths:
        sys.exit(f"{sys.argv[1]}: no ONNX files")
    print(f"onnxruntime {onnxruntime.__version__}, {len(paths)} files")
    worst = max(check(path) for path in paths)
    print(f"largest deviation {worst:.1e}, at most {TOLERANCE:.0e} is allowed")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
