"""A recorded fixture on disk: its files, the model that its config.json describes, and its weights.

A fixture is a directory in the format of `tests/golden/xsam` (its README names every array): `config.json` is required, every
other file, and every array in it, may be missing.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flowseg_jax.data.prompts import CHAT_TEMPLATES
from flowseg_jax.data.tokenizer import Tokenizer
from flowseg_jax.errors import UserError
from flowseg_jax.losses import LossConfig
from flowseg_jax.models.boundary import BoundaryConfig
from flowseg_jax.models.config import FlowSegConfig
from flowseg_jax.models.connectors import ConnectorConfig
from flowseg_jax.models.language_config import LanguageConfig
from flowseg_jax.models.mask_decoder import MaskDecoderConfig
from flowseg_jax.models.pixel_decoder import PixelDecoderConfig
from flowseg_jax.models.sam import SamConfig
from flowseg_jax.models.semantic_flow import SemanticFlowConfig
from flowseg_jax.models.siglip import SiglipConfig

WEIGHTS = "weights.safetensors"
Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Run:
    """One recorded run of the whole model.

    Attributes:
        file: its file.
        batch: key of config.json's `batches`: which samples form the batch.
        clamp: limit of the class logits in that branch of X-SAM.
        pass_an_image: that branch decodes once an image, whatever the number of phrases.
    """

    file: str
    batch: str
    clamp: float
    pass_an_image: bool


RUNS = (
    Run("eval_main.npz", "eval", 50.0, True),
    Run("eval_aaai.npz", "aaai_eval", 500.0, False),
    Run("train_main.npz", "train", 50.0, True),
    Run("train_aaai.npz", "aaai_train", 500.0, False),
)
STAGE1 = "train_stage1.npz"


def _is_turn(turn: Any) -> bool:
    return isinstance(turn.get("input"), str) and isinstance(turn.get("output"), str)


def read_npz(path: Path) -> Arrays:
    """All arrays of an npz file.

    Raises:
        UserError: a damaged file, or one with pickled objects.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # zipfile, zlib and NumPy each report damage in types of their own
        reason = (str(error) or "no message").splitlines()[0]
        raise UserError(f"{path}: truncated or damaged npz file ({type(error).__name__}: {reason})") from None


class Fixture:
    """Reads a fixture directory; arrays are loaded when they are first asked for.

    Raises:
        UserError: no such directory, or it holds no readable config.json.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise UserError(f"{self.directory}: no such directory")
        config = self.read_json("config.json")
        if not isinstance(config, dict):
            raise UserError(f"{self.directory}: not a parity fixture (it has no config.json with the sizes of the model)")
        self.config: dict[str, Any] = config
        self._arrays: dict[str, Arrays] = {}
        self._weights: Arrays | None = None

    def has(self, file: str) -> bool:
        return (self.directory / file).is_file()

    def files(self) -> list[str]:
        """Names of the array files, those of this format first and in its order."""
        known = ["inputs.npz", *(run.file for run in RUNS), STAGE1, "units.npz", "text_cross_attn_layer.npz"]
        found = sorted(path.name for path in self.directory.glob("*.npz"))
        return [name for name in known if name in found] + [name for name in found if name not in known]

    def read_json(self, file: str) -> Any:
        """The parsed file, or None if there is none."""
        path = self.directory / file
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as JSON ({error})") from None

    def arrays(self, file: str) -> Arrays:
        """All arrays of an npz file; nothing if it is missing.

        Raises:
            UserError: a damaged file.
        """
        if file not in self._arrays:
            self._arrays[file] = read_npz(self.directory / file) if self.has(file) else {}
        return self._arrays[file]

    def weights(self) -> Arrays:
        """The tensors of weights.safetensors by X-SAM's names, float32.

        Raises:
            UserError: a missing or damaged file.
        """
        import safetensors.numpy

        if self._weights is None:
            path = self.directory / WEIGHTS
            try:
                tensors = safetensors.numpy.load_file(path)
            except Exception as error:  # safetensors' own error type and OSError
                raise UserError(f"{path}: cannot be read ({error})") from None
            self._weights = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
        return self._weights

    def value(self, *keys: str) -> Any:
        """config.json's value under nested keys.

        Raises:
            UserError: there is none.
        """
        node: Any = self.config
        for key in keys:
            if not isinstance(node, Mapping) or key not in node:
                raise UserError(f"{self.directory / 'config.json'}: {'.'.join(keys)} is missing")
            node = node[key]
        return node

    def conversations(self) -> dict[str, list[dict[str, str]]]:
        """The turns of each sample in conversations.json, each with `input`, `output` and (or not) `sep`.

        Raises:
            UserError: the file has another structure.
        """
        try:
            samples = {key: sample["conversations"] for key, sample in (self.read_json("conversations.json") or {}).items()}
            bad = [key for key, turns in samples.items() if not turns or not all(_is_turn(turn) for turn in turns)]
        except (AttributeError, KeyError, TypeError):
            bad = ["a sample"]
        if bad:
            raise UserError(f"{self.directory / 'conversations.json'}: {bad[0]} has no list of turns with input and output")
        return samples

    def prompts(self) -> list[tuple[str, list[dict[str, str]]]]:
        """(template, turns) of each conversation in prompts.json.

        Raises:
            UserError: the file has another structure.
        """
        try:
            prompts = [(prompt["template"], prompt["conversations"]) for prompt in self.read_json("prompts.json") or []]
            bad = not all(_is_turn(turn) for _, turns in prompts for turn in turns)
        except (AttributeError, KeyError, TypeError):
            bad = True
        if bad:
            raise UserError(f"{self.directory / 'prompts.json'}: not a list of conversations with a template and turns")
        return prompts

    def segmentor(self, key: str, default: Any = dataclasses.MISSING) -> Any:
        """A value of the Mask2Former config: the fixture's own choice, else the effective config, else `default`."""
        for group in ("m2f", "m2f_defaults"):
            values = self.config.get(group, {})
            if key in values:
                return values[key]
        return self.value("m2f", key) if default is dataclasses.MISSING else default

    def samples(self, batch: str) -> list[int]:
        """Which samples form a batch."""
        numbers = self.value("batches", batch)
        if not isinstance(numbers, list) or not numbers or not all(isinstance(n, int) for n in numbers):
            raise UserError(f"{self.directory / 'config.json'}: batches.{batch} is {numbers!r}, not a list of samples")
        return numbers

    @property
    def chat(self) -> str:
        """Name of the chat template."""
        name = self.value("template")
        if name not in CHAT_TEMPLATES:
            raise UserError(
                f"{self.directory / 'config.json'}: template {name!r} is unknown (known: {', '.join(CHAT_TEMPLATES)})"
            )
        return name

    def tokenizer(self) -> Tokenizer | None:
        """The fixture's tokenizer, None without tokenizer.json. A bos exists only if `<s>` is among `special_ids`."""
        from transformers import PreTrainedTokenizerFast  # slow to import

        path = self.directory / "tokenizer.json"
        if not path.is_file():
            return None
        special = self.config.get("special_ids", {})
        try:
            hf = PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<s>" if "<s>" in special else None)
        except Exception as error:  # the tokenizers library raises plain Exception
            raise UserError(f"{path}: not a readable tokenizer ({error})") from None
        for token, number in special.items():
            if hf.convert_tokens_to_ids(token) != number:
                raise UserError(f"{path}: {token} has id {hf.convert_tokens_to_ids(token)}, config.json says {number}")
        return Tokenizer(hf, str(path), bos=True)  # X-SAM writes whatever bos there is

    def losses(self) -> LossConfig:
        """Weights and sampling of the recorded training runs."""
        return LossConfig(
            class_weight=self.segmentor("class_weight", 2.0),
            mask_weight=self.segmentor("mask_weight", 5.0),
            dice_weight=self.segmentor("dice_weight", 5.0),
            no_object_weight=self.segmentor("no_object_weight", 0.1),
            num_points=self.segmentor("train_num_points", 12544),
            oversample_ratio=self.segmentor("oversample_ratio", 3.0),
            importance_sample_ratio=self.segmentor("importance_sample_ratio", 0.75),
        )

    def model(self, *, images: int = 1, clamp: float = 50.0, classes: int = 0) -> FlowSegConfig:
        """The plain X-SAM of these sizes: float32, no semantic flow, no boundary refinement.

        Args:
            images: batch size; all its phrases are each other's negatives, as in X-SAM.
            clamp: limit of the class logits.
            classes: categories of the linear class head (stage 1), 0 without.

        Raises:
            UserError: sizes are missing or do not fit each other.
        """
        try:
            return self._model(images, clamp, classes)
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
            raise UserError(f"{self.directory / 'config.json'}: {' '.join(str(error).split())[:300]}") from None

    def _model(self, images: int, clamp: float, classes: int) -> FlowSegConfig:
        levels = self.segmentor("num_feature_levels")
        sam = SamConfig.from_hf(self.value("sam"))
        siglip = SiglipConfig.from_hf(self.value("siglip"))
        llm = LanguageConfig.from_hf(self.value("llm_config"))
        connector = ConnectorConfig(
            channels=(sam.hidden_size,) * levels,
            hidden_channels=self.value("connector_hidden_dim"),
            scales=tuple(self.value("connector_scale_factor")[-levels:]),
        )
        width, heads = self.segmentor("hidden_dim"), self.segmentor("num_attention_heads")
        if self.segmentor("feature_size") != width:
            # X-SAM's projection between the two is no registered module: a checkpoint cannot hold it.
            raise UserError(f"config.json: feature_size {self.segmentor('feature_size')} differs from hidden_dim {width}")
        return FlowSegConfig(
            sam=dataclasses.replace(sam, remat="none"),
            siglip=dataclasses.replace(siglip, remat="none"),
            llm=dataclasses.replace(llm, remat="none"),
            connector=connector,
            pixel_decoder=PixelDecoderConfig(
                channels=tuple(self.segmentor("feature_channels")[::-1]),
                strides=tuple(self.segmentor("feature_strides", [4, 8, 16, 32])[-levels:][::-1]),
                embed_dim=width,
                mask_dim=self.segmentor("mask_feature_size"),
                num_layers=self.segmentor("encoder_layers"),
                num_heads=heads,
                mlp_dim=self.segmentor("encoder_feedforward_dim"),
                common_stride=self.segmentor("common_stride", 4),
                remat="none",
            ),
            mask_decoder=MaskDecoderConfig(
                embed_dim=width,
                num_queries=self.segmentor("num_queries"),
                num_layers=self.segmentor("decoder_layers") - 1,
                num_heads=heads,
                mlp_dim=self.segmentor("dim_feedforward"),
                num_levels=levels,
                mask_dim=self.segmentor("mask_feature_size"),
                logit_clamp=clamp,
                remat="none",
            ),
            connector_hidden_layers=tuple(self.value("extra_select_layers")[-levels:]),
            semantic_flow=SemanticFlowConfig(mode="off"),
            boundary=BoundaryConfig(enabled=False),
            num_classes=classes,
            negatives_group_size=images,
            exclude_same_target=False,
        )
