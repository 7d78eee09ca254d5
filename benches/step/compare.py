"""The training step beside PyTorch: `dinoxide bench step` and benches/peer/step/step.py take turns on the same sizes.

    cargo build --release
    pip install torch numpy
    python benches/step/compare.py --size vits16_224px --rounds 7

    python benches/step/compare.py --size vitb16_224px --device cuda:0 --precision bf16 --batch 64 --compile

Taking turns, other work on the machine falls on both. Each round starts both programs anew and takes the median of a few
steps; the table shows the median of the rounds, their range, and the ratio of each round. `--json FILE` keeps all rounds.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
SIZES = sorted(path.stem for path in HERE.glob("*.toml"))


def last_json(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} ended with code {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def spread(values, unit, digits):
    median = statistics.median(values)
    return f"{median:.{digits}f} {unit} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dinoxide", default=HERE.parents[1] / "target/release/dinoxide")
    parser.add_argument("--device", default="cpu", help="as in `run.device`; on a GPU, memory is that of its allocator")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, help="images of a step; default: the size's own")
    parser.add_argument("--prototypes", type=int, help="of each head; default: the size's own")
    parser.add_argument("--compile", action="store_true", help="let PyTorch compile")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    if args.steps < 1 or args.rounds < 1:
        parser.error("at least one round of one step has to be measured")
    memory = "peak_bytes" if args.device == "cpu" else "device_bytes"
    ours = [args.dinoxide, "bench", "step", "--json", "--config", HERE / f"{args.size}.toml", "--steps", str(args.steps)]
    ours += ["--set", f"run.device={args.device}", "--set", f"train.precision={args.precision}"]
    theirs = [sys.executable, HERE.parent / "peer/step/step.py", "--size", args.size, "--steps", str(args.steps)]
    theirs += ["--device", args.device, "--precision", args.precision]
    if args.batch:
        ours += ["--set", f"train.batch_size={args.batch}"]
        theirs += ["--batch", str(args.batch)]
    if args.prototypes:
        ours += ["--set", f"dino_head.prototypes={args.prototypes}", "--set", f"ibot_head.prototypes={args.prototypes}"]
        theirs += ["--prototypes", str(args.prototypes)]
    if args.compile:
        theirs.append("--compile")
    rounds = []
    for i in range(args.rounds):
        rounds.append({"dinoxide": last_json(ours), "pytorch": last_json(theirs)})
        rounds[-1]["dinoxide"]["peak_bytes"] = rounds[-1]["dinoxide"][memory]
        rates = [rounds[-1][name]["images_per_second"] for name in ("dinoxide", "pytorch")]
        print(f"round {i + 1}/{args.rounds}  {rates[0]:.2f} and {rates[1]:.2f} images/s", file=sys.stderr)
        if args.json:
            args.json.write_text(json.dumps(rounds, indent=1))
    print(f"{args.size}, {args.rounds} rounds of {args.steps} steps: median (range)")
    for name in ("dinoxide", "pytorch"):
        speed = spread([r[name]["images_per_second"] for r in rounds], "images/s", 2)
        memory = spread([r[name]["peak_bytes"] / 1e9 for r in rounds], "GB", 2)
        print(f"{name:10} {speed:34} {memory}")
    faster = spread([r["dinoxide"]["images_per_second"] / r["pytorch"]["images_per_second"] for r in rounds], "x", 2)
    smaller = spread([r["dinoxide"]["peak_bytes"] / r["pytorch"]["peak_bytes"] for r in rounds], "x", 2)
    print(f"{'ratio':10} {faster:34} {smaller}")


if __name__ == "__main__":
    main()
