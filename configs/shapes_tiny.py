"""The default: a tiny FlowSeg trained from scratch on the embedded `shapes` benchmark, on two CPU cores."""

from ml_collections import ConfigDict

from flowseg_jax.models.config import FlowSegConfig


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 2000
    config.batch_size = 8  # images; each brings data.max_phrases referring passes and the passes over all its objects
    config.log_every = 20
    config.checkpoint_every = 200
    config.checkpoint = ConfigDict({"keep": 2, "keep_every": 0, "best": ()})  # the last, every n-th, (metric, "min" or "max")
    config.init_from = ()  # ([component=]DIR, ...), models and components to start from; empty: random initialisation

    config.model = ConfigDict(FlowSegConfig.tiny(vocab_size=512, num_classes=384).to_dict())

    config.data = ConfigDict()
    config.data.dir = "data/shapes"  # generated and prepared once if it is missing
    config.data.shapes_images = 6000
    config.data.seed = 0
    config.data.shapes_mix = ()  # ((family, share), ...) of the generated expressions; empty: the benchmark's own
    config.data.mixture = ()  # ((directory of a prepared data set, weight), ...) instead of `dir`; weights all 0: by size
    config.data.held_out = ()  # prepared data sets, or lists of images, whose evaluation images nothing is trained on
    config.data.objects = "all"  # targets of images with expressions: all objects, or "referred" where not all are annotated
    config.data.max_phrases = 8
    config.data.max_masks = 12
    config.data.max_names = 0  # names that a generic question may ask for, absent ones included; 0: the kinds in the image
    config.data.explanation_prob = 0.5  # share of the reasoning questions with an explanation that ask for it
    config.data.lsj_scale_range = ()  # (smallest, largest) scale of large-scale jitter of images with categories only
    config.data.pad_to_square = False  # pad the vision encoder's image to a square instead of stretching it
    config.data.text_length = 368  # tokens an image, the 72 visual ones included
    config.data.tokenizer = ""  # its directory; empty: a small one is trained on the data set and comes with it
    config.data.chat_template = "qwen3_instruct"
    config.data.random_prompts = False
    config.data.curriculum = ()  # ((until_step, {family: weight}), ...)
    config.data.num_threads = 1  # that build batches
    config.data.num_workers = 0  # processes that do, on hosts with many cores

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_fraction = 0.03
    config.optimizer.weight_decay = 0.05
    config.optimizer.max_grad_norm = 1.0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.98
    config.optimizer.eps = 1e-8
    config.optimizer.param_groups = ((".*", 1.0),)
    config.optimizer.grad_accum_steps = 1  # parts of a batch that are differentiated one after the other
    config.optimizer.max_skipped_updates = 10  # updates in a row that may fail to be finite
    config.optimizer.frozen_dtype = "float32"  # what the matrices of frozen components rest in
    config.optimizer.losses = ConfigDict(
        {
            "language_weight": 0.1,
            "class_weight": 2.0,
            "class_loss_scale": 4.0,
            "mask_weight": 5.0,
            "dice_weight": 5.0,
            "no_object_weight": 0.1,
            "num_points": 0,
            "oversample_ratio": 3.0,
            "importance_sample_ratio": 0.75,
            "generic_weight": 1.0,
            "closed_vocab_weight": 1.0,
            "logits_chunk_size": 4096,
        }
    )

    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    return config
