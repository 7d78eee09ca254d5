"""Times parts of the evaluation beside PyTorch, in turn within one run; medians of several rounds.

    pip install torch timm safetensors numpy
    cargo build --release --workspace --lib --bin dinoxide --example evaluation_peer
    python benches/peer/evaluation/speed.py knn
    python benches/peer/evaluation/speed.py probe
    python benches/peer/evaluation/speed.py forward
    python benches/peer/evaluation/speed.py runs --weights W --train DIR --val DIR
    python benches/peer/evaluation/speed.py features --images DIR

knn       50,000 train and 10,000 val features of width 384, 200 neighbours: ours against matmul and topk in blocks of 256
          queries. Also the peak memory of our process, and how many neighbours agree.
probe     13 linear classifiers trained at once against 13 trained one after another, both ours.
forward   Features of images that are already decoded, of a ViT-S/16 at 224 px (CLS and mean patch; crop and normalisation
          included on our side only), against PyTorch's forward of a ViT of the same shape on a tensor; two threads each.
runs      `dinoxide eval linear --grid dinov3` with its 13 learning rates, as one process, against 13 processes with one
          learning rate each, all of which compute the features they need.
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


def run(command, **environment):
    """Runs a command: its standard output, seconds, and peak memory in bytes."""
    start = time.perf_counter()
    environment = {**os.environ, **environment}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
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


class Block(torch.nn.Module):
    """A block of a vision transformer, normalised before each branch."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = torch.nn.LayerNorm(dim, eps=1e-6), torch.nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = torch.nn.Linear(dim, 3 * dim), torch.nn.Linear(dim, dim)
        self.fc1, self.fc2 = torch.nn.Linear(dim, 4 * dim), torch.nn.Linear(4 * dim, dim)

    def forward(self, x):
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim)
        x = x + self.proj(attended)
        return x + self.fc2(torch.nn.functional.gelu(self.fc1(self.norm2(x))))


class Vit(torch.nn.Module):
    """ViT-S/16 with learned positions, 224 px; CLS and mean patch after the last norm."""

    def __init__(self, dim=384, depth=12, heads=6):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, dim, 16, 16)
        self.cls = torch.nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.positions = torch.nn.Parameter(0.02 * torch.randn(1, 197, dim))
        self.blocks = torch.nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm = torch.nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images):
        patches = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(images), -1, -1), patches], 1) + self.positions
        x = self.norm(self.blocks(x))
        return x[:, 0], x[:, 1:].mean(1)


def forward(args):
    count, batch = 16, 16
    torch.set_num_threads(2)
    model = Vit().eval()
    images = torch.randn(count, 3, 224, 224)
    command = [os.path.join(args.target, "examples/evaluation_peer"), "forward", str(count), str(batch)]
    ours, theirs = [], []
    with torch.inference_mode():
        for _ in range(args.rounds + 1):
            ours.append(json.loads(run(command, RAYON_NUM_THREADS="2")[0])["seconds"])
            start = time.perf_counter()
            for block in images.split(batch):
                model(block)
            theirs.append(time.perf_counter() - start)
    # PyTorch's first round sets memory aside; ours does so outside of what it times.
    summary(ours[1:], theirs[1:], images=count)


def runs(args):
    common = [
        os.path.join(args.target, "dinoxide"), "eval", "linear", "--weights", args.weights, "--train", args.train,
        "--val", args.val, "--grid", "dinov3", "--batch-size", "16", "--iterations", str(args.iterations),
    ]
    rates = [m * 10.0**e for e in range(-5, -1) for m in (1, 2, 5)] + [0.1]
    together, separate = [], []
    for _ in range(args.rounds):
        each = [run([*common, "--lr", f"{rate:g}"])[1] for rate in rates[:6]]
        together.append(run(common)[1])
        each += [run([*common, "--lr", f"{rate:g}"])[1] for rate in rates[6:]]
        separate.append(sum(each))
    a, b = statistics.median(together), statistics.median(separate)
    print(json.dumps({
        "together_s": [round(t, 1) for t in together], "separate_s": [round(t, 1) for t in separate],
        "ratio": round(b / a, 2), "classifiers": len(rates),
    }, indent=1))


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
parser.add_argument("what", choices=["knn", "probe", "forward", "runs", "features"])
parser.add_argument("--target", default="target/release", help="folder with the built programs")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--images", help="folder of photographs, for `features`")
parser.add_argument("--weights", help="backbone, for `runs`")
parser.add_argument("--iterations", type=int, default=500, help="of SGD, for `runs`")
parser.add_argument("--train", help="folder of classes, for `runs`")
parser.add_argument("--val", help="folder of the same classes, for `runs`")
arguments = parser.parse_args()
{"knn": knn, "probe": probe, "forward": forward, "runs": runs, "features": features}[arguments.what](arguments)
