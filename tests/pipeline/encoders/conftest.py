"""Toy encoders, frames and published-looking checkpoints that the tests of this folder share."""

import json

import numpy as np
import pytest
import torch

from pipeline.encoders import ENCODERS, load_encoder

BUILT_IN = ("languagebind", "dinov2", "vivit", "siglip", "clip", "videomae", "siglip2", "dinov3", "vjepa2")
BUILT_IN += ("pe", "videomae2", "depthanything")
TOY = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_layers": 3, "num_heads": 4}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Toy matrices are far too small to share; idle threads would spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def toy_spec(name):
    return ENCODERS[name].with_architecture(TOY)


@pytest.fixture(scope="session")
def toy():
    """toy(name, weights, compute_dtype) -> a toy Encoder, loaded once a session."""
    loaded = {}

    def load(name, weights="random:0", compute_dtype="float32"):
        key = (name, weights, compute_dtype)
        if key not in loaded:
            loaded[key] = load_encoder(toy_spec(name), weights, compute_dtype=compute_dtype)
        return loaded[key]

    return load


@pytest.fixture(scope="session")
def spec_of():
    """spec_of(name) -> the toy spec."""
    return toy_spec


@pytest.fixture(scope="session")
def noise():
    """noise(spec, batch, seed) -> uint8 frames of videos."""

    def make(spec, batch=2, seed=0, num_frames=None):
        size, num_frames = spec.resize.size, num_frames or spec.num_frames
        return np.random.default_rng(seed).integers(0, 256, (batch, num_frames, size, size, 3), dtype=np.uint8)

    return make


@pytest.fixture(scope="session")
def published_model():
    """published_model(spec) -> the plain transformers model of the class that the Hub publishes, busy weights."""
    models = {}

    def make(spec):
        key = json.dumps([spec.name, dict(spec.architecture)])
        if key not in models:
            models[key] = _plain_model(spec)
        return models[key]

    return make


def _plain_model(spec):
    import transformers as hf

    sizes = spec.architecture
    common = {
        "hidden_size": sizes["hidden_size"],
        "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": sizes["num_heads"],
        "image_size": sizes["image_size"],
    }
    image = common | {"patch_size": sizes["patch_size"], "intermediate_size": sizes["mlp_size"]}
    with torch.random.fork_rng():
        if spec.name == "dinov2":
            published_image = sizes["position_grid"] * sizes["patch_size"]
            values = common | {"image_size": published_image, "patch_size": sizes["patch_size"], "mlp_ratio": 4}
            model = hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**values))
        elif spec.name == "dinov3":
            model = hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**image, num_register_tokens=4))
        elif spec.name == "vjepa2":
            values = {name: value for name, value in common.items() if name != "image_size"}
            values |= {"crop_size": sizes["image_size"], "patch_size": sizes["patch_size"]}
            model = hf.VJEPA2Model(hf.VJEPA2Config(**values, pred_num_hidden_layers=2))
        elif spec.name in ("siglip", "siglip2"):
            model = hf.SiglipModel(hf.SiglipConfig(vision_config=image, text_config=TEXT))
        elif spec.name == "clip":
            model = hf.CLIPModel(hf.CLIPConfig(vision_config=image, text_config=TEXT))
        elif spec.name == "depthanything":
            backbone = common | {"image_size": sizes["position_grid"] * sizes["patch_size"], "mlp_ratio": 4}
            backbone |= {"model_type": "dinov2", "patch_size": sizes["patch_size"], "reshape_hidden_states": False}
            backbone |= {"out_indices": [0, 1, 2, 3], "apply_layernorm": True}
            model = hf.DepthAnythingForDepthEstimation(
                hf.DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=sizes["hidden_size"])
            )
        elif spec.name == "pe":
            model = _plain_pe(sizes)
        elif spec.name == "vivit":
            tubelet = [2, sizes["patch_size"], sizes["patch_size"]]
            values = common | {"tubelet_size": tubelet, "intermediate_size": sizes["mlp_size"]}
            model = hf.VivitForVideoClassification(hf.VivitConfig(**values))
        else:
            model = hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**image))
        # fresh models have zero class tokens, unit norms and zero biases: a mistake there would not show
        torch.manual_seed(7)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def _plain_pe(sizes):
    from pipeline.encoders.timm_models import import_timm

    options = {"embed_dim": sizes["hidden_size"], "depth": sizes["num_layers"], "num_heads": sizes["num_heads"]}
    options |= {"patch_size": sizes["patch_size"], "img_size": sizes["position_grid"] * sizes["patch_size"]}
    return import_timm().create_model("vit_pe_lang_large_patch14_448", **options)


@pytest.fixture(scope="session")
def checkpoint(published_model, tmp_path_factory):
    """checkpoint(spec, "safetensors" | "bin") -> a folder laid out like the published one, at the spec's size."""
    folders = {}

    def make(spec, layout="safetensors"):
        key = (spec.name, spec.width, layout)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(f"{spec.name}-{layout}")
            _write_checkpoint(spec, layout, folders[key], published_model)
        return folders[key]

    return make


def _write_checkpoint(spec, layout, folder, published_model):
    from safetensors.torch import load_file, save_file

    if spec.name == "pe":
        from pipeline.encoders.timm_models import import_timm

        import_timm().models.save_for_hf(published_model(spec), folder, safe_serialization=True)
    elif spec.name == "videomae2":
        config, weights = videomae2_checkpoint(spec)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(weights, folder / "model.safetensors")
    elif spec.name == "languagebind":
        weights = languagebind_weights(spec)
        (folder / "config.json").write_text(json.dumps({"vision_config": languagebind_config(spec)}))
        save_file(weights, folder / "model.safetensors")
    else:
        published_model(spec).save_pretrained(folder)
    if layout == "bin":
        weights = load_file(folder / "model.safetensors")
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()


def languagebind_config(spec):
    sizes = spec.architecture
    return {
        "add_time_attn": True,
        "hidden_act": "gelu",
        "hidden_size": sizes["hidden_size"],
        "image_size": sizes["image_size"],
        "intermediate_size": sizes["mlp_size"],
        "num_attention_heads": sizes["num_heads"],
        "num_frames": 8,
        "num_hidden_layers": sizes["num_layers"],
        "patch_size": sizes["patch_size"],
    }


def languagebind_shapes(sizes):
    """Every name of the published checkpoint's vision tower with its shape, written out."""
    width, mlp = sizes["hidden_size"], sizes["mlp_size"]
    positions = 1 + (sizes["image_size"] // sizes["patch_size"]) ** 2
    norm = {"weight": (width,), "bias": (width,)}
    dense = {"weight": (width, width), "bias": (width,)}
    block = {"temporal_embedding": (1, 8, width)}
    for attention in ("temporal_attn", "self_attn"):
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            block |= {f"{attention}.{projection}.{part}": shape for part, shape in dense.items()}
    for name in ("temporal_layer_norm1", "layer_norm1", "layer_norm2"):
        block |= {f"{name}.{part}": shape for part, shape in norm.items()}
    block |= {"mlp.fc1.weight": (mlp, width), "mlp.fc1.bias": (mlp,)}
    block |= {"mlp.fc2.weight": (width, mlp), "mlp.fc2.bias": (width,)}
    shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, sizes["patch_size"], sizes["patch_size"]),
        "embeddings.position_embedding.weight": (positions, width),
    }
    for name in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{name}.{part}": shape for part, shape in norm.items()}
    for layer in range(sizes["num_layers"]):
        shapes |= {f"encoder.layers.{layer}.{name}": shape for name, shape in block.items()}
    return {f"vision_model.{name}": shape for name, shape in shapes.items()}


def languagebind_weights(spec):
    """A whole dual-tower checkpoint: the vision tower, and the other weights of the published file."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, shape in languagebind_shapes(spec.architecture).items():
        values = torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.2)
        weights[name] = values + 1 if "norm" in name and name.endswith("weight") else values
    weights["text_model.embeddings.token_embedding.weight"] = torch.zeros(9, 4)
    weights["visual_projection.weight"] = torch.zeros(4, spec.width)
    weights["logit_scale"] = torch.tensor(2.6)
    return weights


@pytest.fixture(scope="session")
def languagebind_names():
    """languagebind_names(sizes) -> name -> shape of the published vision tower."""
    return languagebind_shapes


def videomae2_checkpoint(spec):
    """config.json and weights as in OpenGVLab/VideoMAEv2-Base: the authors' names, query, key and value fused."""
    sizes, generator = spec.architecture, torch.Generator().manual_seed(5)
    width, mlp, patch = sizes["hidden_size"], sizes["mlp_size"], sizes["patch_size"]
    shapes = {"patch_embed.proj.weight": (width, 3, 2, patch, patch), "patch_embed.proj.bias": (width,)}
    block = {"attn.qkv.weight": (3 * width, width), "attn.q_bias": (width,), "attn.v_bias": (width,)}
    block |= {"attn.proj.weight": (width, width), "attn.proj.bias": (width,)}
    block |= {f"norm{n}.{part}": (width,) for n in (1, 2) for part in ("weight", "bias")}
    block |= {"mlp.fc1.weight": (mlp, width), "mlp.fc1.bias": (mlp,)}
    block |= {"mlp.fc2.weight": (width, mlp), "mlp.fc2.bias": (width,)}
    for layer in range(sizes["num_layers"]):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= {"fc_norm.weight": (width,), "fc_norm.bias": (width,)}
    weights = {}
    for name, shape in shapes.items():
        scale = torch.Size(shape[1:]).numel() ** -0.5 if len(shape) > 1 else 0.2
        values = torch.randn(shape, generator=generator) * scale
        weights[f"model.{name}"] = values + 1 if "norm" in name and name.endswith("weight") else values
    config = {"img_size": sizes["image_size"], "patch_size": patch, "embed_dim": width, "mlp_ratio": 4}
    config |= {"depth": sizes["num_layers"], "num_heads": sizes["num_heads"], "layer_norm_eps": 1e-6}
    config |= {"init_values": 0.0, "use_learnable_pos_emb": False, "tubelet_size": 2, "cos_attn": False}
    return {"model_type": "VideoMAEv2_Base", "model_config": config}, weights
