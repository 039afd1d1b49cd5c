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
if about["format_version"] != 2:
    sys.exit(
        f"{export}: an export of format {about['format_version']}, this script reads format 2: export the checkpoint again"
    )
programs = {name: bytearray((root / entry["file"]).read_bytes()) for name, entry in about["programs"].items()}
encode_image, predict = (jax.export.deserialize(programs[name]) for name in ("encode_image", "predict"))
weights, tokenizer = jax.device_put(load_file(root / "weights.safetensors")), Tokenizer.from_file(str(root / "tokenizer.json"))
side, siglip_side, prompt, (b, k, t) = about["sam_size"], about["siglip_size"], about["prompt"], about["shapes"].values()

ids, input_ids = [], np.full((b, t), -1, np.int32)
for phrase in (" ".join(text.lower().split()) for text in texts):
    if not phrase or any(token in phrase for token in about["reserved"]):
        sys.exit(f"cannot ask for {phrase!r}: it is empty or contains a special token")
    ids += prompt["before"] + tokenizer.encode(f"<p>{phrase}</p>", add_special_tokens=False).ids + prompt["after"] + [-1]
if len(texts) > k or len(ids) > t:
    sys.exit(f"{len(texts)} expressions of {len(ids)} token ids: the export has room for {k} of {t}")
input_ids[0, : len(ids)] = ids

image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
h, w = (max(int(n * side / max(image.size) + 0.5), 1) for n in (image.height, image.width))
images, siglip_images = np.zeros((b, side, side, 3), np.uint8), np.zeros((b, siglip_side, siglip_side, 3), np.uint8)
images[0, :h, :w] = image.resize((w, h), Image.Resampling.BILINEAR)
siglip_images[0] = image.resize((siglip_side, siglip_side), Image.Resampling.BILINEAR)
resized_hw = np.full((b, 2), (h, w), np.int32)
encoded = encode_image.call(weights, sam_images=images, resized_hw=resized_hw, siglip_images=siglip_images)
answer = jax.device_get(predict.call(weights, image=encoded, input_ids=input_ids))

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
