"""Patch-similarity structure of backbones beside that of a reference backbone: the mean cosine between the matrices of cosine
similarities of all patches of an image (what Gram anchoring holds), over fixed images.

    pip install numpy safetensors matplotlib
    dinoxide embed --weights W --data IMAGES --tokens patches --normalize --output W.safetensors      # for each backbone
    python similarity.py REFERENCE.safetensors "with:a.safetensors,b.safetensors" "without:c.safetensors,…" --plot out.png
"""

import argparse

import numpy as np
from safetensors.numpy import load_file


def matrices(path):
    patches = load_file(path)["patches"]
    grams = np.einsum("ipd,iqd->ipq", patches, patches).reshape(len(patches), -1)
    return grams / np.linalg.norm(grams, axis=1, keepdims=True)


def centered(path):
    """The same without each image's mean similarity, which is close to one in every backbone."""
    patches = load_file(path)["patches"]
    grams = np.einsum("ipd,iqd->ipq", patches, patches).reshape(len(patches), -1)
    grams -= grams.mean(1, keepdims=True)
    return grams / np.linalg.norm(grams, axis=1, keepdims=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("reference")
    parser.add_argument("series", nargs="+", help="NAME:FILE[@IMAGES],FILE[@IMAGES],…")
    parser.add_argument("--plot")
    args = parser.parse_args()
    curves = {}
    for series in args.series:
        name, files = series.split(":", 1)
        for item in files.split(","):
            path, _, images = item.partition("@")
            pair = [(of(args.reference) * of(path)).sum(1).mean() for of in (matrices, centered)]
            curves.setdefault(name, []).append((int(images or 0), *map(float, pair)))
            print(f"{name:10} {images or '':>6} images: cosine {pair[0]:.4f}, without the mean similarity {pair[1]:.4f}")
    if args.plot:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, 2, figsize=(8, 3), constrained_layout=True)
        for axis, column, title in zip(axes, (1, 2), ("as they are", "each image's mean similarity removed")):
            for name, points in curves.items():
                axis.plot([p[0] for p in points], [p[column] for p in points], marker="o", label=name)
            axis.set(xlabel="images since the copy", title=title)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("mean cosine of Gram matrices")
        axes[0].legend()
        figure.savefig(args.plot, dpi=150)


if __name__ == "__main__":
    main()
