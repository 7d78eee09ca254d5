"""The share of the machine's matrix products that a training step reaches, at the step's own sizes.

    cargo build --release
    python benches/step/gemm_share.py --size vits16_224px --rounds 7

`benches/benches/products.rs` multiplies matrices of the sizes of a block's linear layers, `dinoxide bench step` takes steps;
they take turns. The rate of a step is the work of all its products over its time: blocks with attention, heads and
prototypes, patch embedding; of the last block what is computed. Norms, activations and the optimizer are time without work.
"""

import argparse
import ast
import json
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent

# Half of the global crops have masks, over 10 to 50 % of their patches.
MASKED = 0.5 * 0.3


def sizes():
    """Those of the peer, without importing PyTorch."""
    text = (HERE.parent / "peer/step/step.py").read_text()
    return ast.literal_eval(text[text.index("SIZES = {") + len("SIZES = ") : text.index("}\n", text.index("SIZES = {")) + 1])


def work(size):
    """FLOP of a step: two for each multiplication."""
    dim, depth, _, patch, batch, large, small, locals_, hidden, bottleneck, prototypes = size
    total = 0
    groups = []
    for side, crops, forwards in ((large, 2 * batch, 4), (small, locals_ * batch, 3)):
        patches = (side // patch) ** 2
        tokens = patches + 1
        seen = crops * (1 + (MASKED * patches if side == large else 0))
        block = 12 * dim**2 * crops * tokens + 2 * crops * tokens**2 * dim
        # Keys and values of all tokens, everything else of those that a loss looks at.
        last = 2 * dim**2 * crops * tokens + 10 * dim**2 * seen + 2 * seen * tokens * dim
        embedding = 3 * patch**2 * dim * crops * patches
        # A gradient of the weights, and none of the pixels.
        total += forwards * ((depth - 1) * block + last) + (forwards - 1) * embedding
        mlp = dim * hidden + hidden**2 + hidden * bottleneck
        total += forwards * seen * (mlp + bottleneck * prototypes)
        groups.append(f"{crops * tokens}:{forwards - 2}")
    return 2 * total, batch, [str(dim), *groups]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=sizes(), required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--dinoxide", default=HERE.parents[1] / "target/release/dinoxide")
    args = parser.parse_args()
    flop, batch, shapes = work(sizes()[args.size])
    products = ["cargo", "bench", "-q", "-p", "dinoxide-benches", "--bench", "products", "--", *shapes]
    step = [args.dinoxide, "bench", "step", "--json", "--config", HERE / f"{args.size}.toml", "--steps", str(args.steps)]
    shares, rates = [], []
    for i in range(args.rounds):
        rate = float(subprocess.run(products, capture_output=True, text=True, check=True).stdout.split()[-1])
        measured = json.loads(subprocess.run(step, capture_output=True, text=True, check=True).stdout)
        ours = measured["images_per_second"] / batch * flop / 1e9
        rates.append((rate, ours))
        shares.append(ours / rate)
        print(f"round {i + 1}/{args.rounds}  products {rate:.1f}, step {ours:.1f} GFLOP/s", file=sys.stderr)
    middle = [statistics.median(column) for column in zip(*rates)]
    print(
        f"{args.size}, {flop / 1e9:.0f} GFLOP a step: products {middle[0]:.1f}, step {middle[1]:.1f} GFLOP/s, share "
        f"{statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f}), medians of {args.rounds} rounds"
    )


if __name__ == "__main__":
    main()
