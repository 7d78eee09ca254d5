"""Tiny weights written by torch, transformers and timm, with the features that they compute.

usage: python make_fixtures.py ../../../crates/exchange/tests/fixtures

For each fixture `<name>` there is a file or folder of weights and `<name>.expected.safetensors` with `cls [2, D]` and
`patches [2, P, D]` after the final norm; its metadata has the path of the weights and the size of the images. The images
are no file: pixel i of the batch, row-major [2, 3, H, W], is (7919·i mod 2003)/1001.5 − 1.
"""

import argparse
import shutil
import sys
from collections import OrderedDict
from pathlib import Path

import timm
import torch
import transformers
from safetensors.torch import save_file

to = Path(sys.argv[1])


def images(height, width):
    index = torch.arange(2 * 3 * height * width, dtype=torch.int64)
    return ((7919 * index % 2003).double() / 1001.5 - 1).float().reshape(2, 3, height, width)


def fill(model, seed, dtype=torch.float32):
    """Values of a size that lets every tensor matter, rounded to what `dtype` can hold."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            last = name.split(".")[-1]
            if "norm" in name and last == "weight":
                value = 1 + 0.1 * noise
            elif last in ("lambda1", "gamma", "gamma_1", "gamma_2"):
                value = 0.5 + 0.1 * noise
            elif last == "bias":
                value = 0.1 * noise
            else:
                value = 0.2 * noise
            parameter.copy_(value.to(dtype).float())
    return model.eval()


def expect(name, path, height, width, tokens, prefix):
    """`tokens [2, N, D]` after the final norm: CLS, other tokens up to `prefix`, patches."""
    tokens = tokens.detach()
    save_file(
        {"cls": tokens[:, 0].contiguous(), "patches": tokens[:, prefix:].contiguous()},
        to / f"{name}.expected.safetensors",
        metadata={"path": path, "height": str(height), "width": str(width)},
    )


def hugging_face(name, model, height, width, prefix, **save):
    model.save_pretrained(to / name, **save)
    expect(name, name, height, width, model(images(height, width)).last_hidden_state, prefix)
    return model


def reference_names(state):
    """A DINOv3 ViT's tensors under the names of the DINOv3 repository."""
    blocks = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("model.layer."))
    found = OrderedDict(
        cls_token=state["embeddings.cls_token"],
        storage_tokens=state["embeddings.register_tokens"],
        mask_token=state["embeddings.mask_token"].reshape(1, -1),
    )
    for kind in ("weight", "bias"):
        found[f"patch_embed.proj.{kind}"] = state[f"embeddings.patch_embeddings.{kind}"]
        found[f"norm.{kind}"] = state[f"norm.{kind}"]
    dim = state["norm.weight"].numel()
    for i in range(blocks):
        theirs, ours = f"model.layer.{i}.", f"blocks.{i}."
        q, k, v = (state[f"{theirs}attention.{x}_proj.weight"] for x in "qkv")
        found[ours + "attn.qkv.weight"] = torch.cat([q, k, v])
        # The keys' third is held at zero by the mask: what is stored there must not matter.
        stale = torch.full([dim], float("nan") if i == 0 else 3.0)
        biases = [state[f"{theirs}attention.q_proj.bias"], stale, state[f"{theirs}attention.v_proj.bias"]]
        found[ours + "attn.qkv.bias"] = torch.cat(biases)
        mask = torch.ones(3 * dim)
        mask[dim : 2 * dim] = 0
        found[ours + "attn.qkv.bias_mask"] = mask
        found[ours + "ls1.gamma"] = state[theirs + "layer_scale1.lambda1"]
        found[ours + "ls2.gamma"] = state[theirs + "layer_scale2.lambda1"]
        for kind in ("weight", "bias"):
            found[f"{ours}norm1.{kind}"] = state[f"{theirs}norm1.{kind}"]
            found[f"{ours}norm2.{kind}"] = state[f"{theirs}norm2.{kind}"]
            found[f"{ours}attn.proj.{kind}"] = state[f"{theirs}attention.o_proj.{kind}"]
            found[f"{ours}mlp.fc1.{kind}"] = state[f"{theirs}mlp.up_proj.{kind}"]
            found[f"{ours}mlp.fc2.{kind}"] = state[f"{theirs}mlp.down_proj.{kind}"]
    return found


def views(state):
    """The same tensors as views of one storage, matrices transposed in memory."""
    flat = torch.cat([(v.t() if v.dim() == 2 else v).reshape(-1) for v in state.values()])
    out, start = OrderedDict(), 0
    for name, value in state.items():
        part = flat[start : start + value.numel()]
        start += value.numel()
        out[name] = part.view(value.shape[::-1]).t() if value.dim() == 2 else part.view(value.shape)
    return out


def main():
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, timm {timm.__version__}")
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    vit = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=4)

    config = transformers.Dinov2Config(**vit, image_size=20, mlp_ratio=3, use_swiglu_ffn=True)
    hugging_face("hf_dinov2_swiglu", fill(transformers.Dinov2Model(config), 1), 12, 28, 1)

    config = transformers.Dinov2WithRegistersConfig(**vit, image_size=20, mlp_ratio=2, num_register_tokens=3)
    hugging_face("hf_dinov2_with_registers", fill(transformers.Dinov2WithRegistersModel(config), 2), 12, 28, 4)

    config = transformers.DINOv3ViTConfig(**vit, intermediate_size=24, num_register_tokens=5)
    dinov3 = fill(transformers.DINOv3ViTModel(config), 3)
    hugging_face("hf_dinov3_vit", dinov3, 12, 28, 6)

    config = transformers.DINOv3ViTConfig(
        **vit, intermediate_size=24, use_gated_mlp=True, hidden_act="silu", num_register_tokens=0, rope_theta=50.0
    )
    model = fill(transformers.DINOv3ViTModel(config), 4)
    hugging_face("hf_dinov3_vit_gated_sharded", model, 12, 28, 1, max_shard_size="12KB")

    config = transformers.DINOv3ConvNextConfig(hidden_sizes=[4, 6, 8, 10], depths=[1, 2, 1, 1])
    hugging_face("hf_dinov3_convnext", fill(transformers.DINOv3ConvNextModel(config), 5), 64, 96, 1)

    # A teacher checkpoint of DINOv3, its tensors strided views of one storage.
    state = views(reference_names(dinov3.state_dict()))
    teacher = {f"backbone.{name}": value for name, value in state.items()}
    teacher["backbone.rope_embed.periods"] = torch.tensor([1.0, 10.0]).to(torch.bfloat16)
    teacher |= {"dino_head.mlp.0.weight": torch.zeros(2, 16), "ibot_head.last_layer.weight": torch.zeros(3, 2)}
    torch.save({"teacher": teacher}, to / "dinov3_teacher_checkpoint.pth")
    tokens = dinov3(images(12, 28)).last_hidden_state
    expect("dinov3_teacher_checkpoint", "dinov3_teacher_checkpoint.pth", 12, 28, tokens, 6)

    # A full checkpoint of DINO: student, optimizer, arguments.
    small = dict(pretrained=False, num_classes=0, depth=1, num_heads=1, embed_dim=64, mlp_ratio=0.5, patch_size=4)
    model = fill(timm.create_model("vit_small_patch16_224.dino", img_size=12, **small), 6, torch.float16)
    backbone = {name: value.half() for name, value in model.state_dict().items()}
    student = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(student.parameters())
    student(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    checkpoint = {
        "student": OrderedDict({f"module.backbone.{n}": v for n, v in student.state_dict().items()}),
        "teacher": OrderedDict({f"backbone.{n}": v for n, v in backbone.items()})
        | OrderedDict({"head.mlp.0.weight": torch.zeros(3, 64), "head.last_layer.weight_g": torch.ones(3, 1)}),
        "optimizer": optimizer.state_dict(),
        "epoch": 800,
        "args": argparse.Namespace(arch="vit_small", lr=5e-4, crops=(0.4, 1.0), out=Path("x")),
        "dino_loss": OrderedDict(center=torch.zeros(1, 3)),
        "fp16_scaler": None,
    }
    torch.save(checkpoint, to / "dino_full_checkpoint.pth")
    # At the size of the position table: elsewhere, timm and DINO interpolate by other rules.
    expect("dino_full_checkpoint", "dino_full_checkpoint.pth", 12, 12, model.forward_features(images(12, 12)), 1)

    model = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=20, dynamic_img_size=True, **small)
    fill(model, 7, torch.float16)
    save_file({n: v.half() for n, v in model.state_dict().items()}, to / "timm_reg4_dinov2.safetensors")
    expect("timm_reg4_dinov2", "timm_reg4_dinov2.safetensors", 8, 12, model.forward_features(images(8, 12)), 5)

    model = timm.create_model("vit_small_plus_patch16_dinov3_qkvb", img_size=16, **small)
    fill(model, 8, torch.bfloat16)
    save_file({n: v.bfloat16() for n, v in model.state_dict().items()}, to / "timm_dinov3.safetensors")
    expect("timm_dinov3", "timm_dinov3.safetensors", 8, 12, model.forward_features(images(8, 12)), 5)

    model = timm.create_model("convnext_tiny", pretrained=False, num_classes=0, depths=(1, 2, 1, 1), dims=(4, 6, 8, 10))
    fill(model, 9)
    save_file(model.state_dict(), to / "timm_convnext.safetensors")
    map = model.forward_features(images(64, 96))
    tokens = torch.cat([map.mean([2, 3])[:, None], map.flatten(2).transpose(1, 2)], 1)
    norm = model.head.norm
    tokens = torch.nn.functional.layer_norm(tokens, [10], norm.weight, norm.bias, 1e-6)
    expect("timm_convnext", "timm_convnext.safetensors", 64, 96, tokens, 1)

    print(sum(f.stat().st_size for f in to.rglob("*") if f.is_file()) // 1024, "KiB")


main()
