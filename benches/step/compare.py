"""The training step beside PyTorch: `dinoxide bench step` and benches/peer/step/step.py take turns on the same sizes.

    cargo build --release
    pip install torch numpy
    python benches/step/compare.py --size vits16_224px --rounds 7

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
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    ours = [args.dinoxide, "bench", "step", "--json", "--config", HERE / f"{args.size}.toml", "--steps", str(args.steps)]
    theirs = [sys.executable, HERE.parent / "peer/step/step.py", "--size", args.size, "--steps", str(args.steps)]
    rounds = []
    for i in range(args.rounds):
        rounds.append({"dinoxide": last_json(ours), "pytorch": last_json(theirs)})
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
