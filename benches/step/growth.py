"""How a training step grows: seconds and peak memory over tokens and over prototypes, beside the counted work.

    cargo build --release
    python benches/step/growth.py --json growth.json

Over tokens: ViT-S/16 of few blocks, two global crops and no local ones, small heads; the side of the crops grows. Over
prototypes: a small backbone and two heads whose K grows. Each size is measured by `dinoxide bench step`, a process of its
own; `--rounds` repeats all of them in turn, so that other work on the machine falls on all. A step's seconds are those of
the fastest step of all rounds. Memory is shown as it is, and above that of the smallest size, which is what grows.

The exponent is the slope of a line through the logarithms, over all sizes and over the two largest: 1 is linear. Work is
counted as multiply-adds in matrix products, twice; the student's backward takes two forwards, and the teacher's forward one.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent

# Sides of the crops; 5, 50, 101, 197, 401, 785 and 1,370 tokens. The first is the ground that memory is shown above.
SIDES = [32, 112, 160, 224, 320, 448, 592]
# The first, again, is the ground.
PROTOTYPES = [64, 1024, 4096, 16384, 65536, 131072]

WIDTH, BLOCKS, BATCH = 384, 2, 2
TOKENS = f"""
train.batch_size={BATCH}
model.arch=vit_small
model.depth={BLOCKS}
model.patch_size=16
augmentation.local_crops=0
dino_head={{ prototypes = 256, hidden_dim = 64, bottleneck_dim = 32 }}
loss.ibot_weight=0.0
efficiency.micro_batches=1
""".strip().splitlines()

SMALL_WIDTH, BOTTLENECK, HEAD_BATCH, LOCALS, CROP_PATCHES = 192, 128, 32, 4, 16
HEADS = f"""
train.batch_size={HEAD_BATCH}
model.arch=vit_tiny
model.depth=1
model.patch_size=16
augmentation.global_crop_size=64
augmentation.local_crop_size=32
augmentation.local_crops={LOCALS}
dino_head.hidden_dim=256
ibot_head.hidden_dim=256
dino_head.bottleneck_dim={BOTTLENECK}
ibot_head.bottleneck_dim={BOTTLENECK}
efficiency.micro_batches=1
""".strip().splitlines()


def tokens(side):
    return 1 + (side // 16) ** 2


def token_settings(side):
    return TOKENS + [f"augmentation.global_crop_size={side}"]


def token_work(side):
    """Attention and feed-forward of a block are 24·N·D² + 4·N²·D; a student's step is three forwards, a teacher's one."""
    n = tokens(side)
    return 4 * 2 * BATCH * BLOCKS * (24 * n * WIDTH**2 + 4 * n * n * WIDTH)


def head_settings(k):
    return HEADS + [f"dino_head.prototypes={k}", f"ibot_head.prototypes={k}"]


def head_work(k):
    """Rows times K·b, twice; the teacher's rows once, the student's three times. Half of the crops are masked, by 30 %."""
    masked = 0.5 * 2 * HEAD_BATCH * 0.3 * CROP_PATCHES
    teacher = 2 * HEAD_BATCH + masked
    student = (2 + LOCALS) * HEAD_BATCH + masked
    return (teacher + 3 * student) * 2 * k * BOTTLENECK


SERIES = {
    "tokens": (SIDES, tokens, token_settings, token_work),
    "prototypes": (PROTOTYPES, int, head_settings, head_work),
}


def measure(binary, steps, settings):
    command = [str(binary), "bench", "step", "--config", str(HERE / "vits16_224px.toml"), "--steps", str(steps), "--json"]
    for setting in settings:
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with code {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def slope(points):
    """Of the line through the logarithms, by least squares."""
    points = [(math.log(x), math.log(y)) for x, y in points if y > 0]
    if len(points) < 2:
        return float("nan")
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def show(name, rows):
    print(f"\n{name:>10}  {'GFLOP':>9}  {'seconds':>8}  {'GFLOP/s':>8}  {'peak MB':>8}  {'above MB':>8}")
    for row in rows:
        rate = row["gflop"] / row["seconds"]
        print(
            f"{row['x']:>10,}  {row['gflop']:>9.2f}  {row['seconds']:>8.4f}  {rate:>8.1f}  "
            f"{row['peak_bytes'] / 1e6:>8.0f}  {row['above_bytes'] / 1e6:>8.0f}"
        )
    for label, chosen in (("all", rows[1:]), ("last two", rows[-2:])):
        exponents = {key: slope([(row["x"], row[key]) for row in chosen]) for key in ("gflop", "seconds", "peak_bytes", "above_bytes")}
        print(
            f"{'exponent':>10}  {exponents['gflop']:>9.2f}  {exponents['seconds']:>8.2f}  {'':>8}  "
            f"{exponents['peak_bytes']:>8.2f}  {exponents['above_bytes']:>8.2f}  ({label})"
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--series", choices=SERIES, action="append")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dinoxide", default=HERE.parents[1] / "target/release/dinoxide")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    found = {name: {} for name in args.series or SERIES}
    for i in range(args.rounds):
        for name in found:
            sizes, _, settings, _ = SERIES[name]
            for size in sizes:
                measured = measure(args.dinoxide, args.steps, settings(size))
                found[name].setdefault(size, []).append(measured)
                print(f"round {i + 1}/{args.rounds}  {name} {size}  {measured['images_per_second']:.2f} images/s", file=sys.stderr)
    result = {}
    for name, measured in found.items():
        sizes, x, _, work = SERIES[name]
        batch = {"tokens": BATCH, "prototypes": HEAD_BATCH}[name]
        rows = []
        for size in sizes:
            peak = min(one["peak_bytes"] for one in measured[size])
            seconds = batch / max(one["highest"] for one in measured[size])
            rows.append({"x": x(size), "gflop": work(size) / 1e9, "seconds": seconds, "peak_bytes": peak})
        for row in rows:
            row["above_bytes"] = row["peak_bytes"] - rows[0]["peak_bytes"]
        result[name] = rows
        show(name, rows)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
