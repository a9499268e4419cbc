"""The original CuMo as plain functions of checkpoint tensors, after cumo_spec.md sections 1, 2 and 5.

`tensors` makes a tiny checkpoint with the names of section 5. `run` computes the outputs of the original
code from it. Operations are in the order of the original code, in the dtype of the tensors.
"""

import json
import math

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

H, I, LAYERS, HEADS, SIZE, PATCH = 32, 48, 3, 2, 12, 4  # tower
C, WIDE, DEPTH, TEXT_HEADS, KV_HEADS, VOCAB = 24, 40, 2, 2, 1, 50  # language model
HEAD = C // TEXT_HEADS
E, K, TEXT_E = 4, 2, 5
GRID = SIZE // PATCH
THETA, EPS = 1e6, 1e-5
SCALES = (1, 3)
IMAGE = -200
V = "model.vision_tower.vision_model."
P = "model.mm_projector."


def shapes(kind="mistral", clip_smoe=True, mlp_smoe=True):
    """Name -> shape of a tiny `llava_mistral` or `llava_mixtral` checkpoint."""
    out = {
        V + "embeddings.class_embedding": (H,),
        V + "embeddings.patch_embedding.weight": (H, 3, PATCH, PATCH),
        V + "embeddings.position_embedding.weight": (GRID**2 + 1, H),
        V + "pre_layrnorm.weight": (H,),
        V + "pre_layrnorm.bias": (H,),
    }
    for layer in range(LAYERS):
        at = f"{V}encoder.layers.{layer}."
        for name in ("q", "k", "v", "out"):
            out |= {f"{at}self_attn.{name}_proj.weight": (H, H), f"{at}self_attn.{name}_proj.bias": (H,)}
        for norm in (1, 2):
            out |= {f"{at}layer_norm{norm}.weight": (H,), f"{at}layer_norm{norm}.bias": (H,)}
        if clip_smoe:
            out[f"{at}gate.weight"] = (E, H)
        for mlp in [f"experts.{e}" for e in range(E)] if clip_smoe else ["mlp"]:
            out |= {f"{at}{mlp}.fc1.weight": (I, H), f"{at}{mlp}.fc1.bias": (I,)}
            out |= {f"{at}{mlp}.fc2.weight": (H, I), f"{at}{mlp}.fc2.bias": (H,)}
    if mlp_smoe:
        out[P + "gate.weight"] = (E, H * len(SCALES))
    for mlp in [f"experts.{e}." for e in range(E)] if mlp_smoe else [""]:
        out |= {f"{P}{mlp}0.weight": (C, H * len(SCALES)), f"{P}{mlp}0.bias": (C,)}
        out |= {f"{P}{mlp}2.weight": (C, C), f"{P}{mlp}2.bias": (C,)}
    out |= {"model.embed_tokens.weight": (VOCAB, C), "lm_head.weight": (VOCAB, C), "model.norm.weight": (C,)}
    for layer in range(DEPTH):
        at = f"model.layers.{layer}."
        out |= {f"{at}self_attn.{p}_proj.weight": (TEXT_HEADS * HEAD, C) for p in "q"}
        out |= {f"{at}self_attn.{p}_proj.weight": (KV_HEADS * HEAD, C) for p in "kv"}
        out |= {f"{at}self_attn.o_proj.weight": (C, TEXT_HEADS * HEAD)}
        out |= {f"{at}input_layernorm.weight": (C,), f"{at}post_attention_layernorm.weight": (C,)}
        if kind == "mistral":
            out |= {f"{at}mlp.{p}_proj.weight": (WIDE, C) for p in ("gate", "up")}
            out[f"{at}mlp.down_proj.weight"] = (C, WIDE)
            continue
        out[f"{at}block_sparse_moe.gate.weight"] = (TEXT_E, C)
        for e in range(TEXT_E):
            expert = f"{at}block_sparse_moe.experts.{e}."
            out |= {f"{expert}w1.weight": (WIDE, C), f"{expert}w3.weight": (WIDE, C)}
            out[f"{expert}w2.weight"] = (C, WIDE)
    return out


def tensors(dtype=torch.float32, std=0.3, **options):
    """Name -> random tensor; the weights of norms are near 1."""
    generator = torch.Generator().manual_seed(5)
    out = {}
    for name, shape in shapes(**options).items():
        value = torch.randn(shape, generator=generator) * std
        out[name] = (value + 1 if "norm" in name and name.endswith("weight") else value).to(dtype)
    return out


def config(kind="mistral", clip_smoe=True, mlp_smoe=True, tower="clip", dtype="float32"):
    """config.json with the keys of section 1.1."""
    return {
        "model_type": f"llava_{kind}",
        "architectures": [f"Llava{kind.title()}ForCausalLM"],
        "hidden_size": C, "intermediate_size": WIDE, "num_hidden_layers": DEPTH, "hidden_act": "silu",
        "num_attention_heads": TEXT_HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB,
        "rms_norm_eps": EPS, "rope_theta": THETA, "sliding_window": None, "max_position_embeddings": 4096,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "use_cache": True,
        **({"num_local_experts": TEXT_E, "num_experts_per_tok": K} if kind == "mixtral" else {}),
        "torch_dtype": dtype,
        "mm_vision_tower": tower, "mm_hidden_size": H, "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "mm_patch_merge_type": "flat", "scales": list(SCALES),
        "mm_projector_type": "smoe_mlp" if mlp_smoe else "mlp2x_gelu", "num_layers": 3, "dropout": False,
        "num_experts": E, "num_selected": K, "clip_smoe": clip_smoe, "mlp_smoe": mlp_smoe,
        "balance_loss_coef": 0.1, "router_z_loss_coef": 0.01, "training": True, "local_rank": 0,
        "image_aspect_ratio": "pad", "tokenizer_padding_side": "right", "tokenizer_model_max_length": 4096,
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False, "mm_projector_lr": None, "use_mm_proj": True,
    }  # fmt: skip


CLIP_CONFIG = {
    "model_type": "clip_vision_model", "hidden_size": H, "intermediate_size": I, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "image_size": SIZE, "patch_size": PATCH, "hidden_act": "quick_gelu",
}  # fmt: skip


def write(folder, values=None, shards=2, pickled=False, **options):
    """Write a checkpoint folder in the released layout and return its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = options.pop("dtype", torch.float32)
    std = options.pop("std", 0.3)
    values = tensors(dtype, std, **options) if values is None else values
    (folder / "config.json").write_text(json.dumps(config(dtype=str(dtype).split(".")[1], **options)))
    (folder / "clip").mkdir(exist_ok=True)
    (folder / "clip/config.json").write_text(json.dumps(CLIP_CONFIG))
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    names, weight_map = list(values), {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}"
        part = {name: values[name] for name in names[i::shards]}
        weight_map |= dict.fromkeys(part, file)
        if pickled:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return values


def moe(x, logits, experts, width, per_crop=True, counted=slice(None), top_k=K):
    """MoE layer of section 2.1 (per_crop: softmax rounded to x's dtype before top-k) or 2.2; x (N, n, .).

    `counted` selects the tokens n of which the losses are means: all, as in the original, or some.
    """
    num = logits.shape[-1]
    z = torch.logsumexp(logits[:, counted], -1).square().mean()
    p = F.softmax(logits, -1, dtype=torch.promote_types(torch.float32, x.dtype))
    p = p.to(x.dtype) if per_crop else p
    weights, chosen = torch.topk(p, top_k)
    first = F.one_hot(chosen[:, counted, 0], num).float().mean(-2)
    balance = (p[:, counted].mean(-2) * first).mean() * num**2
    weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
    rows, chosen, weights = x.flatten(0, 1), chosen.flatten(0, 1), weights.flatten(0, 1)
    out = rows.new_zeros(len(rows), width)  # the original computes crop by crop, with the same result
    for e, expert in enumerate(experts):
        token, nth = torch.where(chosen == e)
        out = out.index_add(0, token, weights[token, nth, None] * expert(rows[token]))
    return out.unflatten(0, x.shape[:2]), balance, z


def tower(w, pixels, smoe):
    """(N, 3, s, s) -> state before the last block (N, 1 + patches, H), balance and z averaged over layers."""
    N = len(pixels)
    x = F.conv2d(pixels, w[V + "embeddings.patch_embedding.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([w[V + "embeddings.class_embedding"].expand(N, 1, -1), x], 1)
    x = x + w[V + "embeddings.position_embedding.weight"]
    x = F.layer_norm(x, (H,), w[V + "pre_layrnorm.weight"], w[V + "pre_layrnorm.bias"])
    balances, zs = [], []
    for layer in range(LAYERS):
        at = f"{V}encoder.layers.{layer}."

        def linear(h, name, at=at):
            return F.linear(h, w[f"{at}{name}.weight"], w[f"{at}{name}.bias"])

        def norm(h, number, at=at):
            return F.layer_norm(
                h, (H,), w[f"{at}layer_norm{number}.weight"], w[f"{at}layer_norm{number}.bias"], 1e-5
            )

        def mlp(h, name, linear=linear):
            h = linear(h, f"{name}.fc1")
            return linear(h * torch.sigmoid(1.702 * h), f"{name}.fc2")

        before, h = x, norm(x, 1)
        q, k, v = (
            linear(h, f"self_attn.{p}_proj").view(N, -1, HEADS, H // HEADS).transpose(1, 2) for p in "qkv"
        )
        scores = torch.softmax(q * (H // HEADS) ** -0.5 @ k.transpose(2, 3), -1)
        x = x + linear((scores @ v).transpose(1, 2).reshape(N, -1, H), "self_attn.out_proj")
        h = norm(x, 2)
        if smoe:
            experts = [lambda rows, e=e, mlp=mlp: mlp(rows, f"experts.{e}") for e in range(E)]
            out, balance, z = moe(h, F.linear(h, w[at + "gate.weight"]), experts, H)
            balances.append(balance)
            zs.append(z)
        else:
            out = mlp(h, "mlp")
        x = x + out
    if not smoe:
        return before, None, None
    return before, torch.stack(balances).mean(), torch.stack(zs).mean()


def features(w, pixels, clip_smoe, mlp_smoe):
    """Images -> (B, patches, C) and the losses of tower and connector."""
    B, scales, balances, zs = len(pixels), [], [], []
    for scale in SCALES:
        crops = pixels
        if scale > 1:
            wide = pixels.to(torch.promote_types(torch.float32, pixels.dtype))
            large = F.interpolate(wide, size=(SIZE * scale, SIZE * scale), mode="bicubic")
            rows = large.to(pixels.dtype).split(SIZE, 2)
            crops = torch.cat([tile for row in rows for tile in row.split(SIZE, 3)])
        states, balance, z = tower(w, crops, clip_smoe)
        grid = states[:, 1:].transpose(1, 2).unflatten(2, (GRID, GRID))
        if scale > 1:
            tiles = grid.split(B)
            board = torch.cat([torch.cat(tiles[i * scale : (i + 1) * scale], 3) for i in range(scale)], 2)
            wide = torch.promote_types(torch.float32, board.dtype)
            grid = F.interpolate(board.to(wide), size=(GRID, GRID), mode="area").to(board.dtype)
        scales.append(grid.flatten(2).transpose(1, 2))
        balances.append(balance)
        zs.append(z)
    x, parts = torch.cat(scales, -1), {}
    if clip_smoe:
        parts |= {"clip_balance": torch.stack(balances).mean(), "clip_z": torch.stack(zs).mean()}

    def mlp(rows, at):
        hidden = F.gelu(F.linear(rows, w[f"{P}{at}0.weight"], w[f"{P}{at}0.bias"]))
        return F.linear(hidden, w[f"{P}{at}2.weight"], w[f"{P}{at}2.bias"])

    if not mlp_smoe:
        return mlp(x, ""), parts
    experts = [lambda rows, e=e: mlp(rows, f"experts.{e}.") for e in range(E)]
    out, balance, z = moe(x, F.linear(x, w[P + "gate.weight"]), experts, C)
    return out, parts | {"mlp_balance": balance, "mlp_z": z}


def rms_norm(x, weight):
    wide = x.to(torch.promote_types(torch.float32, x.dtype))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def rotate(x, positions):
    wide = torch.promote_types(torch.float32, x.dtype)
    angles = positions[..., None].to(wide) * THETA ** (-torch.arange(0, HEAD, 2).to(wide) / HEAD)
    cos, sin = (torch.cat([f(angles), f(angles)], -1)[:, None].to(x.dtype) for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def decoder(w, x, mask, positions, kind, padding_counts=True):
    """(B, S, C) -> logits, and the router losses of the language model, one pair per layer."""
    B, S, losses = *x.shape[:2], []
    allowed = mask[:, None, None].bool() & torch.ones(S, S, dtype=torch.bool).tril()
    for layer in range(DEPTH):
        at = f"model.layers.{layer}."
        h = rms_norm(x, w[at + "input_layernorm.weight"])
        q, k, v = (
            F.linear(h, w[f"{at}self_attn.{p}_proj.weight"]).view(B, S, -1, HEAD).transpose(1, 2)
            for p in "qkv"
        )
        q, k = rotate(q, positions), rotate(k, positions)
        k, v = (t.repeat_interleave(TEXT_HEADS // KV_HEADS, 1) for t in (k, v))
        scores = (q @ k.transpose(2, 3) / math.sqrt(HEAD)).masked_fill(~allowed, torch.finfo(x.dtype).min)
        attended = torch.softmax(scores, -1) @ v
        x = x + F.linear(attended.transpose(1, 2).reshape(B, S, -1), w[at + "self_attn.o_proj.weight"])
        h = rms_norm(x, w[at + "post_attention_layernorm.weight"])

        def mlp(rows, gate, up, down):
            return F.linear(F.silu(F.linear(rows, w[gate])) * F.linear(rows, w[up]), w[down])

        if kind == "mistral":
            x = x + mlp(h, *(f"{at}mlp.{p}_proj.weight" for p in ("gate", "up", "down")))
            continue
        block = at + "block_sparse_moe."
        experts = [
            lambda rows, e=e, block=block, mlp=mlp: mlp(
                rows, *(f"{block}experts.{e}.{p}.weight" for p in ("w1", "w3", "w2"))
            )
            for e in range(TEXT_E)
        ]
        rows = h.reshape(1, B * S, C)
        logits = F.linear(rows, w[block + "gate.weight"])
        counted = slice(None) if padding_counts else mask.flatten().bool()
        out, balance, z = moe(rows, logits, experts, C, per_crop=False, counted=counted)
        x = x + out.view_as(x)
        losses.append((balance, z))
    return F.linear(rms_norm(x, w["model.norm.weight"]), w["lm_head.weight"]), losses


def run(
    w,
    rows,
    labels,
    pixels,
    kind="mistral",
    clip_smoe=True,
    mlp_smoe=True,
    max_length=4096,
    padding_counts=True,
):
    """Training forward of section 1.6 on rows of ids, in which IMAGE marks an image.

    A row without an image has a dummy image (1.8), so `pixels` has at least one image per row. In the
    original, padding counts in the router losses of the language model.

    Returns:
        loss, its parts, logits (B, S, V) of the padded rows, and the mask of real positions.
    """
    found, parts = features(w, pixels, clip_smoe, mlp_smoe)
    embeds, targets, image = [], [], 0
    for ids, wanted in zip(rows, labels, strict=True):
        pieces, marks = [], []
        if IMAGE not in ids.tolist():
            image += 1
        for token, label in zip(ids.tolist(), wanted.tolist(), strict=True):
            if token == IMAGE:
                pieces.append(found[image])
                marks += [-100] * len(found[image])
                image += 1
            else:
                pieces.append(w["model.embed_tokens.weight"][token][None])
                marks.append(label)
        embeds.append(torch.cat(pieces)[:max_length])
        targets.append(torch.tensor(marks[:max_length]))
    S = max(map(len, embeds))
    x = torch.stack([F.pad(e, (0, 0, 0, S - len(e))) for e in embeds])
    y = torch.stack([F.pad(t, (0, S - len(t)), value=-100) for t in targets])
    mask = torch.stack([F.pad(torch.ones(len(e)), (0, S - len(e))) for e in embeds])
    logits, losses = decoder(w, x, mask, torch.arange(S).expand(len(rows), S), kind, padding_counts)
    wide = logits.to(torch.promote_types(torch.float32, logits.dtype))
    parts["language"] = F.cross_entropy(wide[:, :-1].flatten(0, 1), y[:, 1:].flatten())
    loss = parts["language"]
    if losses and (clip_smoe or mlp_smoe):
        parts["llm_balance"], parts["llm_z"] = (sum(terms) / DEPTH for terms in zip(*losses, strict=True))
    for place in ("mlp", "clip", "llm"):
        if f"{place}_balance" in parts:
            loss = loss + 0.1 * parts[f"{place}_balance"] + 0.01 * parts[f"{place}_z"]
    return loss, parts, logits, mask
