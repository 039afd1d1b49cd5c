"""One line about every key of an experiment config: `flowseg train --list-keys`."""

from __future__ import annotations

import typing
from typing import Any

from ml_collections import ConfigDict

_REMAT = 'again in the backward pass: "none", "full", "attention" (all but its results), "dots" (all but products)'
_HEADS = "attention heads; divides hidden_size"
_MLP = "hidden width of the feed-forward part"

HELP = {
    "seed": "determines, with the step, every random number of a run",
    "num_steps": "updates of the parameters; the schedule of the learning rate ends there",
    "batch_size": "images of an update, over all devices",
    "log_every": "steps between two lines of metrics",
    "trackers": 'where metrics go as well: "wandb", "mlflow"; (): nowhere else',
    "eval_every": "steps between two validations; the best checkpoint by them is kept; 0: none",
    "eval_split": "split that is validated on",
    "eval_images": "images of a validation, the first ones of the split; 0: all",
    "eval_data": 'prepared data set to validate on; "": the first of the training data that has the split',
    "checkpoint_every": "steps between two checkpoints",
    "checkpoint.keep": "checkpoints that are kept, the latest ones",
    "checkpoint.keep_every": "keeps every checkpoint whose step is a multiple of this as well; 0: none",
    "checkpoint.best": '(metric, "min" or "max"): keeps the best by it as well; (): by eval/ciou where there is one',
    "checkpoint.local_dir": 'disk or memory of each host for more frequent checkpoints, as "/dev/shm/flowseg"; "": none',
    "checkpoint.local_every": "steps between two checkpoints there; 0: none",
    "init_from": "([component=]DIR, ...): models and components to start from; (): random initialization",
    # data
    "data.dir": "prepared data set to train on",
    "data.shapes_images": "images of the shapes benchmark, generated in data.dir where it is missing; 0: no such benchmark",
    "data.seed": "of the generated images",
    "data.shapes_mix": "((family, share), ...) of the generated expressions; (): the benchmark's own",
    "data.mixture": "((directory of a prepared data set, weight), ...) instead of data.dir; weights all 0: by size",
    "data.held_out": "prepared data sets, or lists of images, whose evaluation images nothing is trained on",
    "data.objects": 'targets in images with expressions: "all" objects, or "referred" where not all are annotated',
    "data.text_length": "tokens of an image's text, the visual ones included",
    "data.max_phrases": "expressions of an image",
    "data.max_masks": "masks of an image that are targets",
    "data.max_names": "categories that a generic question names, absent ones included; 0: those in the image",
    "data.explanation_prob": "share of the reasoning questions with an explanation that ask for it",
    "data.lsj_scale_range": "(smallest, largest) scale of large-scale jitter, of images with categories only; (): none",
    "data.pad_to_square": "pads the vision encoder's image to a square instead of stretching it",
    "data.tokenizer": 'its directory; "": the one of the data set',
    "data.chat_template": "of the language model: qwen3_instruct, qwen3_wothinking, phi3_chat or llama3_chat",
    "data.random_prompts": "draws the prompt template of every question; otherwise always the first",
    "data.curriculum": "((until_step, {family: weight}), ...): which families of expressions are used when",
    "data.num_threads": "threads that build batches, in each process",
    "data.num_workers": "processes that build batches; 0: the training process itself",
    # optimizer
    "optimizer.learning_rate": "peak of the learning rate",
    "optimizer.warmup_fraction": "share of the steps in which the learning rate rises to its peak",
    "optimizer.weight_decay": "decoupled, of every parameter that learns",
    "optimizer.max_grad_norm": "larger gradients are scaled down to this global norm",
    "optimizer.b1": "Adam's decay of the first moment",
    "optimizer.b2": "Adam's decay of the second moment",
    "optimizer.eps": "Adam's epsilon",
    "optimizer.param_groups": "((pattern of paths, factor on the learning rate or None: frozen), ...); the first match counts",
    "optimizer.grad_accum_steps": "micro-batches that an update adds up one after the other, to save memory",
    "optimizer.max_skipped_updates": "updates in a row that may be skipped because they are not finite; more stop the run",
    "optimizer.frozen_dtype": 'of the matrices of frozen encoders and language models: "float32", "bfloat16" or "int8"',
    "optimizer.name": '"adamw", "lion", "adafactor" or "muon"',
    "optimizer.schedule": 'of the learning rate: "cosine", "linear", "wsd" (constant, then down) or "constant"',
    "optimizer.decay_fraction": "of wsd: share of the steps in which the learning rate falls to zero",
    "optimizer.layer_decay": "factor on the learning rate from a layer of an encoder or language model to the one before it",
    "optimizer.losses.language_weight": "weight of the next-token loss; 0 leaves it out",
    "optimizer.losses.class_weight": "weight of the class loss, also in the matching",
    "optimizer.losses.class_loss_scale": "a further factor on the class loss, which the matching does not see",
    "optimizer.losses.mask_weight": "weight of the binary cross entropy of masks",
    "optimizer.losses.dice_weight": "weight of the dice loss of masks",
    "optimizer.losses.no_object_weight": "weight of the background class in the class loss",
    "optimizer.losses.num_points": "points at which a mask is compared; 0: every pixel of the mask grid",
    "optimizer.losses.oversample_ratio": "candidates per point, of which the uncertain ones are taken",
    "optimizer.losses.importance_sample_ratio": "share of the points that are taken where the prediction is most uncertain",
    "optimizer.losses.generic_weight": "weight of the generic (open-vocabulary) pass",
    "optimizer.losses.closed_vocab_weight": "weight of the closed-vocabulary pass",
    "optimizer.losses.logits_chunk_size": "tokens whose logits exist at the same time",
    # lora
    "lora.targets": "(pattern of linear layers' paths, ...) that get adapters; (): none",
    "lora.rank": "rank of an adapter's product",
    "lora.alpha": "an adapter's product is scaled by alpha / rank",
    "lora.dropout": "share of an adapter's input that is dropped in training",
    "lora.rslora": "scales by alpha / sqrt(rank) instead",
    "lora.dora": "also learns the length of each column of an adapted weight",
    # ema
    "ema.decay": "share of the moving average that stays in a step; 0: no average",
    "ema.warmup": "less of the average stays in the first steps",
    "ema.export": "the average is what is evaluated and written as the model",
    # mesh
    "mesh.data": "ways in which the batch is split; -1: the devices that the other axes leave",
    "mesh.fsdp": "ways in which batch, parameters and moments are split",
    "mesh.tensor": "ways in which one image's computation is split",
    "mesh.slices": "slices (TPU) or nodes (GPU) that data is laid out across; 0: as many as the devices say",
    # model
    "model.components": '"full"; "segmentor": no language (stage 1); "vlm": no mask decoder (stage 2)',
    "model.connector_hidden_layers": "SAM hidden states that feed the connector, shallow to deep",
    "model.num_classes": "categories of the linear class head, which the closed-vocabulary pass trains; 0: no head",
    "model.generic_pass": 'the pass over the names of all objects: "off", "with_flow" or "without_flow" (of SR and CR)',
    "model.negatives_group_size": "images whose expressions are each other's negatives; divides the batch",
    "model.exclude_same_target": "expressions of the same object are not each other's negatives",
    "model.dtype": 'that the network computes in: "float32" or "bfloat16"; parameters are float32',
    "model.sam.image_size": "side of the mask encoder's input, pixels",
    "model.sam.patch_size": "side of a patch, pixels",
    "model.sam.hidden_size": "width of the layers",
    "model.sam.num_hidden_layers": "layers",
    "model.sam.num_attention_heads": _HEADS,
    "model.sam.mlp_dim": _MLP,
    "model.sam.window_size": "side of an attention window, patches",
    "model.sam.global_attn_indexes": "layers, from 0, that attend over the whole image",
    "model.sam.layer_norm_eps": "LayerNorm's epsilon",
    "model.sam.pos_embed_init": 'what the position embedding starts from: "normal" or "sine"',
    "model.sam.remat": _REMAT,
    "model.siglip.image_size": "side of the vision encoder's input, pixels",
    "model.siglip.patch_size": "side of a patch, pixels",
    "model.siglip.hidden_size": "width of the layers",
    "model.siglip.num_hidden_layers": "layers",
    "model.siglip.num_attention_heads": _HEADS,
    "model.siglip.intermediate_size": _MLP,
    "model.siglip.layer_norm_eps": "LayerNorm's epsilon",
    "model.siglip.remat": _REMAT,
    "model.llm.model_type": 'architecture: "qwen3", "phi3" or "llama"',
    "model.llm.vocab_size": "rows of the embedding table; at least the tokenizer's ids",
    "model.llm.hidden_size": "width of the layers",
    "model.llm.num_hidden_layers": "layers",
    "model.llm.num_attention_heads": "query heads",
    "model.llm.num_key_value_heads": "key and value heads; divides num_attention_heads",
    "model.llm.head_dim": "width of a head, even",
    "model.llm.intermediate_size": _MLP,
    "model.llm.rope_theta": "base of the rotary frequencies",
    "model.llm.rms_norm_eps": "RMSNorm's epsilon",
    "model.llm.qk_norm": "normalizes queries and keys per head",
    "model.llm.tie_word_embeddings": "the language head is the embedding table",
    "model.llm.sliding_window": "a token attends to keys less than this many positions back; None: to all",
    "model.llm.rope_scaling": "Llama 3's scaling of the rotary frequencies, four numbers; None: they are not scaled",
    "model.llm.remat": _REMAT,
    "model.llm.initializer_range": "standard deviation of the layers' initial matrices",
    "model.llm.embedding_initializer_range": "standard deviation of the embedding table's initial values",
    "model.connector.channels": "width of each map that comes in, shallow to deep",
    "model.connector.hidden_channels": "width between the convolutions",
    "model.connector.scales": "factor on the sides of each map: a whole number or one over a whole number",
    "model.pixel_decoder.channels": "width of each map that comes in, low to high resolution",
    "model.pixel_decoder.strides": "nominal stride of each map that comes in, low to high resolution",
    "model.pixel_decoder.embed_dim": "width of the encoder layers, a multiple of 4",
    "model.pixel_decoder.mask_dim": "width of the mask features",
    "model.pixel_decoder.num_layers": "encoder layers",
    "model.pixel_decoder.num_heads": "attention heads; divides embed_dim",
    "model.pixel_decoder.num_points": "sampled points per head and level of deformable attention",
    "model.pixel_decoder.mlp_dim": _MLP,
    "model.pixel_decoder.num_levels": "maps, from the lowest resolution, that enter the encoder; None: all",
    "model.pixel_decoder.common_stride": "nominal stride of the mask features",
    "model.pixel_decoder.norm_groups": "groups of the GroupNorms",
    "model.pixel_decoder.deformable_attention_impl": '"auto", "gather", "packed_gather", "dense" or "pallas"',
    "model.pixel_decoder.remat": _REMAT,
    "model.mask_decoder.embed_dim": "width of queries, conditions and memory",
    "model.mask_decoder.num_queries": "queries, and so the most masks of an image",
    "model.mask_decoder.num_layers": "decoder layers",
    "model.mask_decoder.num_heads": "attention heads; divides embed_dim",
    "model.mask_decoder.mlp_dim": _MLP,
    "model.mask_decoder.num_levels": "levels of the memory, which the layers read in turn",
    "model.mask_decoder.mask_dim": "width of the mask features; None: embed_dim",
    "model.mask_decoder.query_init_std": "standard deviation of the queries' initial values",
    "model.mask_decoder.mask_init_std": "standard deviation of the mask embedding's initial matrices",
    "model.mask_decoder.logit_scale": "initial log scale of the cosine class head",
    "model.mask_decoder.logit_clamp": "class logits are clipped to plus or minus this",
    "model.mask_decoder.remat": _REMAT,
    "model.semantic_flow.mode": '"off" (as X-SAM), "sr" (semantic refinement), "cr" (condition refinement), "sr_cr" (FlowSeg)',
    "model.semantic_flow.norm": '"post" (LayerNorm after the sum, as in X-SAM\'s layers) or "residual" (starts as X-SAM)',
    "model.semantic_flow.gate_bias": "initial bias of the gate; positive values start near vision",
    "model.semantic_flow.zero_init_condition_refinement": "condition refinement starts as the identity",
    "model.boundary.enabled": "refines masks at their boundaries (BAR)",
    "model.boundary.kernel_size": "side of the morphological window, pixels of the mask grid",
    "model.boundary.threshold": "gradient of the probabilities from which a pixel belongs to the boundary",
    "model.boundary.hidden_channels": "width of the projected pixel features",
    "model.boundary.identity_init": 'what makes BAR start as the identity: "alpha" or "conv"',
}


def list_keys(config: ConfigDict) -> str:
    """A line about every key of a config: its name, its type, its value in this config and what it is."""
    rows = []
    for key, text in HELP.items():
        node, last = config, key.rpartition(".")[2]
        for section in key.split(".")[:-1]:
            node = node[section]
        kind = _model_type(key) if key.startswith("model.") else node.get_type(last).__name__
        rows.append((key, kind, repr(node[last]), text))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{key:{widths[0]}}  {kind:{widths[1]}}  {value}  # {text}" for key, kind, value, text in rows)


def _model_type(key: str) -> str:
    from flowseg_jax.models.config import FlowSegConfig

    hint: Any = FlowSegConfig
    for part in key.split(".")[1:]:
        hint = typing.get_type_hints(hint)[part]
    return hint.__name__ if isinstance(hint, type) else str(hint)
