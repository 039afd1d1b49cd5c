"""From a name to a model that answers: `load`."""

from __future__ import annotations

import os

from flowseg_jax.checkpoints import pretrained
from flowseg_jax.checkpoints.find import find_model
from flowseg_jax.checkpoints.model_card import ModelCard
from flowseg_jax.checkpoints.quantized import load_for_inference
from flowseg_jax.data.prompts import PromptTemplates
from flowseg_jax.data.tokenizer import load_tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.inference.segmentor import Segmentor
from flowseg_jax.inference.selection import stored_no_target_threshold
from flowseg_jax.models import flowseg, quantization
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.system import console, host


def load(directory: str | os.PathLike[str] | None = None, *, quantize: str | None = None) -> Segmentor:
    """The segmentor of a model directory; None: of the shipped tiny model; "RUN@STEP" or "RUN@best": of a checkpoint of
    a run; "org/name", where no such directory is here: of the Hugging Face hub. What its card has to say is said once.

    Of its `extra`, "prompts" holds the fields of `PromptTemplates`, and "no_target_threshold" the score below which the answer
    is "nothing" (`SelectionConfig`), if it has one. JAX's compilation cache is turned on (`host.enable_compilation_cache`).

    Args:
        directory: see above.
        quantize: "int8" rounds the matrices of the language model's and of SAM's layers, "bfloat16" all matrices
            (`models.quantization`).

    Raises:
        UserError: not a model directory, a damaged one, or one whose tokenizer does not fit the model.
    """
    host.enable_compilation_cache()
    directory = find_model(None if directory is None else os.fspath(directory), None)
    cfg = FlowSegConfig.from_dict(pretrained.read_model_config(directory)["model"], f"{directory}/config.json: model")
    cfg.require_full_model(str(directory))
    graphdef, abstract = quantization.abstract_model(cfg, quantize)
    with console.heartbeat(f"loading {directory}", say=console.note):
        loaded = load_for_inference(directory, cfg, flowseg.params_dict(abstract), quantize)
    prompts = PromptTemplates.of_model(loaded.extra, directory)
    tokenizer = load_tokenizer(loaded.tokenizer_dir, needed=prompts.special_tokens)
    if tokenizer.vocab > cfg.llm.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab} ids, the model's embedding table {cfg.llm.vocab_size}"
        )
    card = ModelCard.of_model(loaded.extra, directory)
    card.tell(directory)
    return Segmentor(
        graphdef,
        loaded.params,
        tokenizer,
        sam_size=cfg.sam.image_size,
        siglip_size=cfg.siglip.image_size,
        visual_tokens=cfg.num_visual_tokens,
        prompts=prompts,
        no_target_threshold=stored_no_target_threshold(loaded.extra, directory),
        card=card,
        directory=directory,
    )
