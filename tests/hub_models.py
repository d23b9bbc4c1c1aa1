"""Tiny networks of the kinds that timm and transformers have, as their own code builds them."""

from typing import Any

import torch
from torch import Tensor, nn

WORDS, LENGTH = 13, 6

# timm's own small networks are wide enough for minutes: transformers are made narrower.
NARROW = {"embed_dim": 8, "num_heads": 2, "depth": 2, "img_size": 32, "patch_size": 8}
TIMM: dict[str, dict[str, Any]] = {
    "test_byobnet": {}, "test_convnext": {}, "test_convnext2": {}, "test_convnext3": {},
    "test_efficientnet": {}, "test_efficientnet_ln": {}, "test_mambaout": {}, "test_nfnet": {},
    "test_resnet": {}, "test_coatnet": {},
    "test_vit": NARROW, "test_vit2": NARROW, "test_vit3": NARROW, "test_vit4": NARROW,
    "test_vit_relpos": NARROW, "eva02_tiny_patch14_224": NARROW, "beit_base_patch16_224": NARROW,
    "cait_xxs24_224": NARROW, "deit_tiny_distilled_patch16_224": NARROW,
    "xcit_nano_12_p16_224": {"embed_dim": 8, "num_heads": 2, "depth": 2, "img_size": 32},
    "convnextv2_atto": {"depths": (1, 1, 1, 1), "dims": (4, 6, 8, 10)},
    "pvt_v2_b0": {
        "depths": (1, 1, 1, 1), "embed_dims": (8, 8, 8, 8), "num_heads": (1, 2, 2, 2),
    },
    "fastvit_t8": {"layers": (1, 1, 1, 1), "embed_dims": (8, 8, 8, 8)},
    "densenet121": {"growth_rate": 4, "block_config": (1, 1, 1, 1)},
    "starnet_s1": {"base_dim": 4, "depths": (1, 1, 1, 1)},
}  # fmt: skip
# What a network of timm may leave out of the graph, by a part of the parameter's name.
TIMM_LOOSE = {
    "test_vit3": ("attn_pool.latent", "attn_pool.q"),
    "eva02_tiny_patch14_224": ("q_bias", "v_bias"),
    "beit_base_patch16_224": ("q_bias", "v_bias"),
}

SMALL = {
    "vocab_size": WORDS, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 12,
}  # fmt: skip
PLACED = {**SMALL, "max_position_embeddings": 32}
GROUPED = {**PLACED, "num_key_value_heads": 1, "pad_token_id": 0}
PICTURE = {
    **{k: v for k, v in SMALL.items() if k != "vocab_size"},
    "image_size": 16,
    "patch_size": 4,
}
GPT = {"vocab_size": WORDS, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 32}
BART = {
    "vocab_size": WORDS, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12, "max_position_embeddings": 32,
}  # fmt: skip
SOUND = {
    **SMALL, "conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
# By name: (class of the network, its options, what it is fed).
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "Bert": ("BertForMaskedLM", PLACED, "text"),
    "Roberta": ("RobertaForMaskedLM", PLACED, "text"),
    "Electra": ("ElectraForMaskedLM", {**PLACED, "embedding_size": 6}, "text"),
    "Albert": ("AlbertForMaskedLM", {**PLACED, "embedding_size": 6}, "text"),
    "DistilBert": (
        "DistilBertForMaskedLM",
        {
            "vocab_size": WORDS, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12,
            "max_position_embeddings": 32,
        },
        "text",
    ),
    "ModernBert": ("ModernBertForMaskedLM", {**PLACED, "pad_token_id": 0}, "text"),
    "GPT2": ("GPT2LMHeadModel", GPT, "decoder"),
    "GPTJ": ("GPTJForCausalLM", {**GPT, "rotary_dim": 2}, "decoder"),
    "GPTNeoX": ("GPTNeoXForCausalLM", {**PLACED, "rotary_pct": 0.5}, "decoder"),
    "Bloom": (
        "BloomForCausalLM", {"vocab_size": WORDS, "hidden_size": 8, "n_layer": 2, "n_head": 2},
        "decoder",
    ),
    "OPT": (
        "OPTForCausalLM", {**PLACED, "ffn_dim": 12, "word_embed_proj_dim": 6}, "decoder",
    ),
    "Llama": ("LlamaForCausalLM", GROUPED, "decoder"),
    "Mistral": ("MistralForCausalLM", GROUPED, "decoder"),
    "Mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 3}, "decoder"),
    "Gemma": ("GemmaForCausalLM", {**GROUPED, "head_dim": 4}, "decoder"),
    "Qwen2": ("Qwen2ForCausalLM", GROUPED, "decoder"),
    "Qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 4}, "decoder"),
    "Phi3": ("Phi3ForCausalLM", GROUPED, "decoder"),
    "Rwkv": (
        "RwkvForCausalLM",
        {
            "vocab_size": WORDS, "hidden_size": 8, "num_hidden_layers": 2,
            "attention_hidden_size": 8, "intermediate_size": 12,
        },
        "decoder",
    ),
    "T5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": WORDS, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1,
            "num_heads": 2, "relative_attention_num_buckets": 8,
        },
        "both",
    ),
    "Bart": ("BartForConditionalGeneration", BART, "both"),
    "ViT": ("ViTForImageClassification", PICTURE, "picture"),
    "DeiT": ("DeiTForImageClassificationWithTeacher", PICTURE, "picture"),
    "Swin": (
        "SwinForImageClassification",
        {
            "image_size": 16, "patch_size": 2, "embed_dim": 4, "depths": [2, 2],
            "num_heads": [2, 2], "window_size": 4,
        },
        "picture",
    ),
    "CLIPText": ("CLIPTextModel", {**PLACED, "eos_token_id": 12}, "text"),
    "Wav2Vec2": ("Wav2Vec2ForCTC", SOUND, "sound"),
}  # fmt: skip
TRANSFORMERS_LOOSE = {"Wav2Vec2": ("pos_conv_embed", "masked_spec_embed")}


def timm_network(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A network of timm in float64, and the named arguments of a call."""
    import timm

    net = timm.create_model(name, num_classes=5, **TIMM[name])
    size = net.default_cfg["input_size"][-1] if "coatnet" in name else 32
    return net.double().eval(), {"x": torch.randn(2, 3, size, size, dtype=torch.float64)}


def transformers_network(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A network of transformers in float64, and the named arguments of a call."""
    import transformers

    kind, options, fed = TRANSFORMERS[name]
    config = getattr(transformers, f"{name}Config")(**options)
    config._attn_implementation = config._experts_implementation = "eager"
    net = getattr(transformers, kind)(config).double().eval()
    words = torch.randint(3, WORDS, (2, LENGTH))
    batch: dict[str, Any] = {"input_ids": words}
    if fed == "picture":
        batch = {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64)}
    elif fed == "sound":
        batch = {"input_values": torch.randn(2, 2000, dtype=torch.float64)}
    if fed == "both":
        batch["decoder_input_ids"] = words.flip(1)
    if fed in ("decoder", "both"):
        batch["use_cache"] = False
    return net, batch
