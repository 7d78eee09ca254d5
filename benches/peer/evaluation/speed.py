"""Times parts of the evaluation beside PyTorch, in turn within one run; medians of several rounds.

    pip install torch timm safetensors numpy
    cargo build --release --workspace --lib --bin dinoxide --example evaluation_peer
    python benches/peer/evaluation/speed.py knn
    python benches/peer/evaluation/speed.py probe
    python benches/peer/evaluation/speed.py features --images DIR

knn       50,000 train and 10,000 val features of width 384, 200 neighbours: ours against matmul and topk in blocks of 256
          queries. Also the peak memory of our process, and how many neighbours agree.
probe     13 linear classifiers trained at once against 13 trained one after another, both ours.
features  `dinoxide embed` on a folder of photographs, from the start of the process to its end, decoding included, against
          PyTorch's forward alone of the same ViT-S/16 on crops that are already there.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time

import numpy as np
import torch


def run(command):
    """Runs a command: its standard output, seconds, and peak memory in bytes."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = status
    assert status == 0, (command, status)
    return output, time.perf_counter() - start, usage.ru_maxrss * 1024


def summary(ours, torch_times, **more):
    a, b = statistics.median(ours), statistics.median(torch_times)
    rounded = lambda times: [round(t, 3) for t in times]
    print(json.dumps({
        "ours_s": rounded(ours), "pytorch_s": rounded(torch_times),
        "ours_median_s": round(a, 3), "pytorch_median_s": round(b, 3), "ratio": round(b / a, 2), **more,
    }, indent=1))


def knn(args):
    rows, queries, dim, k = 50_000, 10_000, 384, 200
    generator = torch.Generator().manual_seed(0)
    make = lambda n: torch.nn.functional.normalize(torch.randn(n, dim, generator=generator), dim=1)
    train, query = make(rows), make(queries)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("train", "query", "found")]
        train.numpy().tofile(files[0])
        query.numpy().tofile(files[1])
        command = [os.path.join(args.target, "examples/evaluation_peer"), "knn", *map(str, (rows, queries, dim, k)), *files]
        peak = 0
        for _ in range(args.rounds):
            output, _, memory = run(command)
            ours.append(json.loads(output)["seconds"])
            peak = max(peak, memory)
            start = time.perf_counter()
            found = [torch.topk(block @ train.T, k, dim=1).indices for block in query.split(256)]
            theirs.append(time.perf_counter() - start)
        mine = np.fromfile(files[2], dtype=np.uint32).reshape(queries, k)
    both = torch.cat(found).numpy()
    agree = np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(mine, both)])
    summary(ours, theirs, our_peak_bytes=peak, share_of_equal_neighbours=round(float(agree), 6))


def probe(args):
    command = [os.path.join(args.target, "examples/evaluation_peer"), "probe", "5000", "384", "100", "60", str(args.rounds)]
    found = json.loads(run(command)[0])
    a, b = (statistics.median(found[key]) for key in ("together", "separate"))
    print(json.dumps({**found, "ratio": round(b / a, 2)}, indent=1))


def features(args):
    import timm
    from safetensors.torch import save_file

    model = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    names = [name for name in os.listdir(args.images) if name.lower().endswith((".jpg", ".jpeg", ".png"))]
    images = torch.randn(len(names), 3, 224, 224)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        weights = os.path.join(folder, "model.safetensors")
        save_file(model.state_dict(), weights)
        for number in range(args.rounds):
            output = os.path.join(folder, f"{number}.safetensors")
            ours.append(run([
                os.path.join(args.target, "dinoxide"), "embed", "--weights", weights, "--data", args.images,
                "--crop", "224", "--resize", "256", "--batch-size", "16", "--output", output,
            ])[1])
            start = time.perf_counter()
            for block in images.split(16):
                model(block)
            theirs.append(time.perf_counter() - start)
    summary(ours, theirs, images=len(names))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("what", choices=["knn", "probe", "features"])
parser.add_argument("--target", default="target/release", help="folder with the built programs")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--images", help="folder of photographs, for `features`")
arguments = parser.parse_args()
{"knn": knn, "probe": probe, "features": features}[arguments.what](arguments)
