"""Loads what `dinoxide export` writes with transformers, torch and timm, and compares features.

usage: python check_exports.py DINOXIDE ../../../crates/exchange/tests/fixtures

Each fixture is exported by the program DINOXIDE; the features must be those that the library that wrote the fixture computed
(`<name>.expected.safetensors`), within 1e-4. No key may be missing or unexpected.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

program, fixtures = sys.argv[1], Path(sys.argv[2])
small = dict(pretrained=False, num_classes=0, depth=1, num_heads=1, embed_dim=64, mlp_ratio=0.5, patch_size=4)


def images(height, width):
    index = torch.arange(2 * 3 * height * width, dtype=torch.int64)
    return ((7919 * index % 2003).double() / 1001.5 - 1).float().reshape(2, 3, height, width)


def hf(path, x):
    model, info = AutoModel.from_pretrained(path, output_loading_info=True)
    wrong = {key: value for key, value in info.items() if value}
    assert not wrong, wrong
    AutoImageProcessor.from_pretrained(path)
    return model.eval()(x).last_hidden_state


def with_timm(name, **more):
    def features(path, x):
        model = timm.create_model(name, **more).eval()
        model.load_state_dict(load_file(path), strict=True)
        found = model.forward_features(x)
        if found.dim() == 4:
            norm = model.head.norm
            tokens = torch.cat([found.mean([2, 3])[:, None], found.flatten(2).transpose(1, 2)], 1)
            found = torch.nn.functional.layer_norm(tokens, norm.weight.shape, norm.weight, norm.bias, 1e-6)
        return found

    return features


def meta_dino(path, x):
    """A flat dictionary under DINO's names, which timm's model of DINO shares."""
    state = torch.load(path, weights_only=True)
    model = timm.create_model("vit_small_patch16_224.dino", img_size=12, **small).eval()
    model.load_state_dict(state, strict=True)
    return model.forward_features(x)


dino = with_timm("vit_small_patch16_224.dino", img_size=12, **small)
reg4 = with_timm("vit_small_patch14_reg4_dinov2", img_size=20, dynamic_img_size=True, **small)
dinov3 = with_timm("vit_small_plus_patch16_dinov3_qkvb", img_size=16, **small)
convnext = with_timm("convnext_tiny", pretrained=False, num_classes=0, depths=(1, 2, 1, 1), dims=(4, 6, 8, 10))
cases = [
    ("dino_full_checkpoint", "timm", dino),
    ("dino_full_checkpoint", "meta", meta_dino),
    ("dinov3_teacher_checkpoint", "hf", hf),
    ("hf_dinov2_swiglu", "hf", hf),
    ("hf_dinov2_with_registers", "hf", hf),
    ("hf_dinov3_convnext", "hf", hf),
    ("hf_dinov3_convnext", "timm", convnext),
    ("hf_dinov3_vit", "hf", hf),
    ("hf_dinov3_vit_gated_sharded", "hf", hf),
    ("timm_convnext", "hf", hf),
    ("timm_convnext", "timm", convnext),
    ("timm_dinov3", "hf", hf),
    ("timm_dinov3", "timm", dinov3),
    ("timm_reg4_dinov2", "timm", reg4),
]
worst = 0.0
for name, format, features in cases:
    with tempfile.TemporaryDirectory() as place, safe_open(fixtures / f"{name}.expected.safetensors", "pt") as expected:
        about = expected.metadata()
        path = Path(place) / "out"
        weights = str(fixtures / about["path"])
        subprocess.run([program, "export", "--weights", weights, "--format", format, "--output", path], check=True,
                       capture_output=True)
        with torch.no_grad():
            tokens = features(path, images(int(about["height"]), int(about["width"])))
        patches = expected.get_tensor("patches")
        off = max(
            (tokens[:, 0] - expected.get_tensor("cls")).abs().max().item(),
            (tokens[:, -patches.shape[1] :] - patches).abs().max().item(),
        )
        print(f"{name} as {format}: off by {off:.1e}")
        assert off <= 1e-4
        worst = max(worst, off)

# The DINOv3 repository's names, against the checkpoint that was written under them.
with tempfile.TemporaryDirectory() as place:
    path, weights = Path(place) / "out.pth", fixtures / "dinov3_teacher_checkpoint.pth"
    subprocess.run([program, "export", "--weights", weights, "--format", "meta", "--output", path], check=True,
                   capture_output=True)
    found = torch.load(path, weights_only=True)
    teacher = torch.load(weights, weights_only=True)["teacher"]
    backbone = {k.removeprefix("backbone."): v for k, v in teacher.items() if k.startswith("backbone.")}
    assert found.keys() == backbone.keys(), found.keys() ^ backbone.keys()
    for key, value in backbone.items():
        if key.endswith("qkv.bias"):
            value = torch.where(backbone[f"{key}_mask"] == 0, 0, value)
        assert torch.allclose(found[key], value.float(), rtol=1e-6), key
print(f"{len(cases)} exports and one flat dictionary, off by {worst:.1e} at most")
