"""Segments by an export, without flowseg_jax: python run_export.py EXPORT IMAGE OUT "the red circle" "the star" ..."""

import json
import pathlib
import sys

import jax.export
import numpy as np
from PIL import Image, ImageOps
from safetensors.numpy import load_file
from tokenizers import Tokenizer


def bilinear(n, m):  # float32 [m, n]: the matrix that resizes n samples to m
    at = np.maximum(np.float32(n) / np.float32(m) * (np.arange(m, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), 0)
    low, one = np.minimum(at.astype(int), n - 1), np.eye(n, dtype=np.float32)
    part = (at - low.astype(np.float32))[:, None]
    return (1 - part) * one[low] + part * one[np.minimum(low + 1, n - 1)]


export, file, out, *texts = sys.argv[1:]
root = pathlib.Path(export)
about = json.loads((root / "export.json").read_text())
see, ask = (jax.export.deserialize(bytearray((root / about["programs"][n]["file"]).read_bytes())) for n in ("see", "ask"))
weights, tokenizer = jax.device_put(load_file(root / "weights.safetensors")), Tokenizer.from_file(str(root / "tokenizer.json"))
side, vision, wording, (b, k, t) = about["image"], about["vision"], about["wording"], about["room"].values()

ids, tokens = [], np.full((b, t), -1, np.int32)
for phrase in (" ".join(text.lower().split()) for text in texts):
    if not phrase or any(mark in phrase for mark in about["reserved"]):
        sys.exit(f"cannot ask for {phrase!r}: it is empty or contains a mark of the tokenizer")
    ids += wording["before"] + tokenizer.encode(f"<p>{phrase}</p>", add_special_tokens=False).ids + wording["after"] + [-1]
if len(texts) > k or len(ids) > t:
    sys.exit(f"{len(texts)} expressions of {len(ids)} token ids: the export has room for {k} of {t}")
tokens[0, : len(ids)] = ids

image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
h, w = (max(int(n * side / max(image.size) + 0.5), 1) for n in (image.height, image.width))
images, small = np.zeros((b, side, side, 3), np.uint8), np.zeros((b, vision, vision, 3), np.uint8)
images[0, :h, :w] = image.resize((w, h), Image.Resampling.BILINEAR)
small[0] = image.resize((vision, vision), Image.Resampling.BILINEAR)
seen = see.call(weights, images=images, scaled_size=np.full((b, 2), (h, w), np.int32), vision_images=small)
answer = jax.device_get(ask.call(weights, seen=seen, tokens=tokens))

rows = bilinear(h, image.height) @ bilinear(answer["logits"].shape[2], side)[:h]
cols = bilinear(w, image.width) @ bilinear(answer["logits"].shape[3], side)[:w]
for i, text in enumerate(texts):
    query = int(answer["query"][0, i])
    score = float(answer["scores"][0, i, query])
    if not np.isfinite(score):
        sys.exit(f"{text!r}: the score of the selected candidate is no number")
    mask = (rows @ answer["logits"][0, i] @ cols.T > 0) & (score >= about["no_target_threshold"])
    Image.fromarray(mask).save(f"{out}_{i}.png")
    print(json.dumps({"text": text, "query": query, "score": score, "area": int(mask.sum())}))
