"""One DINOv3 pretraining step in PyTorch, for timing beside `dinoxide train`. Random crops, no loader: a head start.

    pip install torch numpy
    python benches/peer/step/step.py --size vitt8_64px --steps 12
    python benches/peer/step/step.py --size vits16_224px --steps 6 --compile
    python benches/peer/step/step.py --size vitb16_224px --device cuda --precision bf16 --batch 64 --compile

Written from the papers (arXiv:2304.07193, arXiv:2508.10104): teacher on global crops, Sinkhorn-Knopp targets, DINO on CLS,
iBOT on masked patches, KoLeo, clipping per submodule, AdamW, EMA. Tuned as one would: scaled_dot_product_attention, heads
applied to masked patches only, one head call for all CLS tokens, fused AdamW, foreach clipping and EMA. On a GPU: crops from
pinned bytes, autocast to bfloat16, compiled backbones and heads, one read of the loss per step.
Prints one JSON object: median images per second, and peak memory in bytes (on a GPU, of its allocator).
"""

import argparse
import copy
import json
import math
import resource
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

SIZES = {
    # dim, depth, heads, patch, batch, global, local, locals, hidden, bottleneck, prototypes
    "vitt8_64px": (192, 12, 3, 8, 64, 64, 32, 4, 1024, 128, 2048),
    "vits16_224px": (384, 12, 6, 16, 4, 224, 96, 8, 2048, 256, 16384),
    "vitb16_224px": (768, 12, 12, 16, 2, 224, 96, 8, 2048, 256, 16384),
    "vitl16_224px": (1024, 24, 16, 16, 2, 224, 96, 8, 2048, 256, 65536),
}


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.ls1, self.ls2 = nn.Parameter(torch.full((dim,), 0.1)), nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x, cos, sin):
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        x = x + self.ls1 * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        return x + self.ls2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Vit(nn.Module):
    def __init__(self, dim, depth, heads, patch):
        super().__init__()
        self.patch, self.head_dim = patch, dim // heads
        self.embed = nn.Conv2d(3, dim, patch, patch)
        self.cls, self.mask = nn.Parameter(torch.randn(1, 1, dim) * 0.02), nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.tables = {}

    def rope(self, side, device):
        if side not in self.tables:
            quarter = self.head_dim // 4
            periods = 100 ** (torch.arange(quarter) * 2 / (self.head_dim // 2))
            at = (torch.arange(side) + 0.5) / side * 2 - 1
            grid = torch.stack(torch.meshgrid(at, at, indexing="ij"), -1).flatten(0, 1)
            angles = (2 * math.pi * grid[:, :, None] / periods).flatten(1).tile(2)
            # CLS has no place: cosine 1, sine 0.
            pad = torch.zeros(1, self.head_dim)
            tables = torch.cat((pad + 1, angles.cos())), torch.cat((pad, angles.sin()))
            self.tables[side] = tuple(table.to(device) for table in tables)
        return self.tables[side]

    def forward(self, images, masks=None):
        x = self.embed(images)
        side = x.shape[-1]
        x = x.flatten(2).transpose(1, 2)
        if masks is not None:
            x = torch.where(masks[..., None], self.mask, x)
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), 1)
        cos, sin = self.rope(side, x.device)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x)


class Head(nn.Module):
    def __init__(self, dim, hidden, bottleneck, prototypes):
        super().__init__()
        layers = [nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)]
        self.mlp, self.last = nn.Sequential(*layers), nn.Linear(bottleneck, prototypes, bias=False)

    def forward(self, x):
        return self.last(F.normalize(self.mlp(x), dim=-1))


class Network(nn.Module):
    def __init__(self, dim, depth, heads, patch, hidden, bottleneck, prototypes):
        super().__init__()
        self.backbone = Vit(dim, depth, heads, patch)
        self.dino, self.ibot = (Head(dim, hidden, bottleneck, prototypes) for _ in range(2))


@torch.no_grad()
def sinkhorn(logits, temperature):
    q = (logits.float() / temperature).exp_().t()
    q /= q.sum()
    k, b = q.shape
    for _ in range(3):
        q /= q.sum(1, keepdim=True) * k
        q /= q.sum(0, keepdim=True) * b
    return (q * b).t()


def cross_entropy(logits, targets):
    return -(targets * F.log_softmax(logits.float() / 0.1, dim=-1)).sum(-1)


def koleo(x):
    x = F.normalize(x.float(), dim=-1)
    with torch.no_grad():
        dots = x @ x.t()
        dots.fill_diagonal_(-1)
        nearest = dots.argmax(1)
    return -(F.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).log().mean()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="vitt8_64px")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, help="images of a step; default: the size's own")
    parser.add_argument("--prototypes", type=int, help="of each head; default: the size's own")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dim, depth, heads, patch, batch, large, small, locals_, hidden, bottleneck, prototypes = SIZES[args.size]
    batch, prototypes = args.batch or batch, args.prototypes or prototypes
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    student = Network(dim, depth, heads, patch, hidden, bottleneck, prototypes).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.04, fused=True)
    submodules = [student.backbone, student.dino, student.ibot]
    pairs = list(student.parameters()), list(teacher.parameters())
    student_backbone, teacher_backbone = student.backbone, teacher.backbone
    if args.compile:
        student_backbone, teacher_backbone = torch.compile(student_backbone), torch.compile(teacher_backbone)
        for network in (student, teacher):
            network.dino.mlp, network.ibot.mlp = torch.compile(network.dino.mlp), torch.compile(network.ibot.mlp)
    patches = (large // patch) ** 2
    if on_gpu:
        noise = lambda count, side: torch.randint(256, (count, 3, side, side), dtype=torch.uint8).pin_memory()
    else:
        noise = lambda count, side: torch.randn(count, 3, side, side)
    crops_on_host, small_crops_on_host = noise(2 * batch, large), noise(locals_ * batch, small)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16")

    def on_device(crops):
        return crops.to(device, non_blocking=True).float().sub_(116).div_(58) if on_gpu else crops

    def step():
        # Half of the global crops are masked, by 10 to 50 % of their patches.
        masks = torch.zeros(2 * batch, patches, dtype=torch.bool)
        for i in range(batch):
            masks[2 * i, torch.randperm(patches)[: int(patches * (0.1 + 0.4 * i / batch))]] = True
        indices = masks.flatten().nonzero()[:, 0].to(device, non_blocking=True)
        masks = masks.to(device, non_blocking=True)
        crops, small_crops = on_device(crops_on_host), on_device(small_crops_on_host)
        with autocast:
            loss = losses(crops, small_crops, masks, indices)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for module in submodules:
            nn.utils.clip_grad_norm_(module.parameters(), 3.0, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(pairs[1], pairs[0], 0.008)
        assert math.isfinite(loss.item())

    def losses(crops, small_crops, masks, indices):
        with torch.no_grad():
            features = teacher_backbone(crops)
            targets = sinkhorn(teacher.dino(features[:, 0]), 0.05).view(2, batch, -1)
            patch_targets = sinkhorn(teacher.ibot(features[:, 1:].flatten(0, 1)[indices]), 0.05)
        features = student_backbone(crops, masks)
        local_features = student_backbone(small_crops)
        logits = student.dino(torch.cat((features[:, 0], local_features[:, 0])))
        global_logits, local_logits = logits[: 2 * batch].view(2, batch, -1), logits[2 * batch :].view(locals_, batch, -1)
        dino_global = cross_entropy(global_logits, targets.flip(0)).mean()
        # Every local crop against both targets: linear in them, so against their sum.
        dino_local = -(targets.sum(0) * F.log_softmax(local_logits.float() / 0.1, -1)).sum(-1).mean() / 2
        patch_logits = student.ibot(features[:, 1:].flatten(0, 1)[indices])
        ibot = cross_entropy(patch_logits, patch_targets).sum() / (2 * batch)
        spread = sum(koleo(part) for part in features[:, 0].chunk(2))
        return dino_global + dino_local + ibot + 0.1 * spread

    times = []
    for i in range(args.warmup + args.steps):
        start = time.perf_counter()
        step()
        if i >= args.warmup:
            times.append(time.perf_counter() - start)
    median = statistics.median(times)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if on_gpu:
        peak = torch.cuda.max_memory_reserved()
    print(json.dumps({"images_per_second": round(batch / median, 3), "peak_bytes": peak, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
