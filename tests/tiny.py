"""Tiny random models of many families, built from their configs. ``tiny("llama")`` is seeded and in eval mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from transformers import PreTrainedModel

VOCABULARY = 128
_DECODER = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0}  # fmt: skip
_GROUPED = {**_DECODER, "num_key_value_heads": 2, "head_dim": 8}
_ENCODER = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
_VISION = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
           "image_size": 16, "patch_size": 8}  # fmt: skip
_SEQ2SEQ = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_ffn_dim": 80, "decoder_ffn_dim": 72,
            "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
            "decoder_start_token_id": 2, "forced_eos_token_id": None}  # fmt: skip
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 80, "num_layers": 2, "num_heads": 4,
       "decoder_start_token_id": 0}  # fmt: skip
_CLIP_TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2,
              "num_attention_heads": 4, "max_position_embeddings": 64, "projection_dim": 16, "bos_token_id": 1,
              "eos_token_id": 2}  # fmt: skip
_CLIP_VISION = {**_VISION, "projection_dim": 16}
_WINDOWED = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}


def _of(model: str, config: str, **fields: Any) -> Callable[[], PreTrainedModel]:
    """A factory of a model class with a config class, both by name."""

    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        made: PreTrainedModel = getattr(tf, model)(getattr(tf, config)(**fields))
        # Initialised biases are zero and hide a bias that is read from the wrong place.
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        return made.eval()

    return build


TINY: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _of("LlamaForCausalLM", "LlamaConfig", **_GROUPED),
    "llama-biased": _of("LlamaForCausalLM", "LlamaConfig", **_GROUPED, mlp_bias=True),
    "mistral": _of("MistralForCausalLM", "MistralConfig", **_GROUPED, sliding_window=None),
    "qwen2": _of("Qwen2ForCausalLM", "Qwen2Config", **_DECODER, num_key_value_heads=2),
    "qwen3": _of("Qwen3ForCausalLM", "Qwen3Config", **_GROUPED),
    "gemma2": _of("Gemma2ForCausalLM", "Gemma2Config", **_GROUPED, **_WINDOWED, query_pre_attn_scalar=8),
    "gemma3": _of("Gemma3ForCausalLM", "Gemma3TextConfig", **_GROUPED, **_WINDOWED, query_pre_attn_scalar=8),
    "phi3": _of("Phi3ForCausalLM", "Phi3Config", **_DECODER, num_key_value_heads=2),
    "olmo": _of("OlmoForCausalLM", "OlmoConfig", **_DECODER),
    "olmo2": _of("Olmo2ForCausalLM", "Olmo2Config", **_DECODER),
    "stablelm": _of("StableLmForCausalLM", "StableLmConfig", **_DECODER, num_key_value_heads=2),
    "cohere": _of("CohereForCausalLM", "CohereConfig", **_DECODER),
    "starcoder2": _of("Starcoder2ForCausalLM", "Starcoder2Config", **_DECODER, num_key_value_heads=2),
    "nemotron": _of("NemotronForCausalLM", "NemotronConfig", **_GROUPED),
    "apertus": _of("ApertusForCausalLM", "ApertusConfig", **_GROUPED, dtype=torch.float32),
    "glm": _of("GlmForCausalLM", "GlmConfig", **_GROUPED),
    "phi": _of("PhiForCausalLM", "PhiConfig", **_DECODER),
    "gpt2": _of("GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_inner=80,
                n_positions=64, bos_token_id=1, eos_token_id=2),
    "gpt-neox": _of("GPTNeoXForCausalLM", "GPTNeoXConfig", **_DECODER),
    "gpt-neo": _of("GPTNeoForCausalLM", "GPTNeoConfig", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=80,
                   num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], max_position_embeddings=64,
                   bos_token_id=1, eos_token_id=2),
    "gptj": _of("GPTJForCausalLM", "GPTJConfig", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_inner=80,
                rotary_dim=4, n_positions=64, bos_token_id=1, eos_token_id=2),
    "openai-gpt": _of("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4,
                      n_positions=64),
    "opt": _of("OPTForCausalLM", "OPTConfig", vocab_size=VOCABULARY, hidden_size=32, ffn_dim=80, num_hidden_layers=2,
               num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32, bos_token_id=1,
               eos_token_id=2, pad_token_id=0),
    "bloom": _of("BloomForCausalLM", "BloomConfig", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4,
                 bos_token_id=1, eos_token_id=2, pad_token_id=0),
    "falcon": _of("FalconForCausalLM", "FalconConfig", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2,
                  num_attention_heads=4, ffn_hidden_size=80, bias=True, bos_token_id=1, eos_token_id=2),
    "xglm": _of("XGLMForCausalLM", "XGLMConfig", vocab_size=VOCABULARY, d_model=32, ffn_dim=80, num_layers=2,
                attention_heads=4, max_position_embeddings=64),
    "bert": _of("BertModel", "BertConfig", **_ENCODER),
    "bert-mlm": _of("BertForMaskedLM", "BertConfig", **_ENCODER),
    "bert-classifier": _of("BertForSequenceClassification", "BertConfig", **_ENCODER, num_labels=3),
    "roberta": _of("RobertaForMaskedLM", "RobertaConfig", **_ENCODER),
    "roberta-classifier": _of("RobertaForSequenceClassification", "RobertaConfig", **_ENCODER, num_labels=3),
    "electra": _of("ElectraForPreTraining", "ElectraConfig", **_ENCODER, embedding_size=16),
    "mpnet": _of("MPNetModel", "MPNetConfig", **_ENCODER),
    "mpnet-mlm": _of("MPNetForMaskedLM", "MPNetConfig", **_ENCODER),
    "distilbert": _of("DistilBertForMaskedLM", "DistilBertConfig", vocab_size=VOCABULARY, dim=32, hidden_dim=80,
                      n_layers=2, n_heads=4, max_position_embeddings=64),
    "modernbert": _of("ModernBertForMaskedLM", "ModernBertConfig", **_ENCODER, cls_token_id=1, sep_token_id=2,
                      bos_token_id=1, eos_token_id=2, global_attn_every_n_layers=2, local_attention=16),
    "deberta-v2": _of("DebertaV2Model", "DebertaV2Config", **_ENCODER, relative_attention=True,
                      pos_att_type=["p2c", "c2p"]),
    "esm": _of("EsmForMaskedLM", "EsmConfig", **_ENCODER, mask_token_id=4, position_embedding_type="rotary"),
    "xlm": _of("XLMModel", "XLMConfig", vocab_size=VOCABULARY, emb_dim=32, n_layers=2, n_heads=4,
               max_position_embeddings=64),
    "albert": _of("AlbertModel", "AlbertConfig", **_ENCODER, embedding_size=16),
    "squeezebert": _of("SqueezeBertModel", "SqueezeBertConfig", **_ENCODER, embedding_size=32),
    "vit": _of("ViTModel", "ViTConfig", **_VISION),
    "vit-classifier": _of("ViTForImageClassification", "ViTConfig", **_VISION, num_labels=3),
    "clip": _of("CLIPModel", "CLIPConfig", text_config=_CLIP_TEXT, vision_config=_CLIP_VISION, projection_dim=16),
    "clip-text": _of("CLIPTextModel", "CLIPTextConfig", **_CLIP_TEXT),
    "clip-vision": _of("CLIPVisionModel", "CLIPVisionConfig", **_CLIP_VISION),
    "llava": _of("LlavaForConditionalGeneration", "LlavaConfig", text_config={**_GROUPED, "model_type": "llama"},
                 vision_config={**_CLIP_VISION, "model_type": "clip_vision_model"}, image_token_index=127),
    "whisper": _of("WhisperForConditionalGeneration", "WhisperConfig", **{
        **_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16,
        "suppress_tokens": None, "begin_suppress_tokens": None}),
    "wav2vec2": _of("Wav2Vec2Model", "Wav2Vec2Config", hidden_size=32, intermediate_size=80, num_hidden_layers=2,
                    num_attention_heads=4, conv_dim=[16, 16], conv_stride=[5, 4], conv_kernel=[10, 8],
                    num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=32),
    "bart": _of("BartForConditionalGeneration", "BartConfig", **_SEQ2SEQ),
    "bart-classifier": _of("BartForSequenceClassification", "BartConfig", **_SEQ2SEQ, num_labels=3),
    "marian": _of("MarianMTModel", "MarianConfig", **_SEQ2SEQ),
    "m2m100": _of("M2M100ForConditionalGeneration", "M2M100Config", **_SEQ2SEQ),
    "t5": _of("T5ForConditionalGeneration", "T5Config", **_T5, feed_forward_proj="relu"),
    "t5-v1.1": _of("T5ForConditionalGeneration", "T5Config", **_T5, feed_forward_proj="gated-gelu",
                   tie_word_embeddings=False),
    "t5-encoder": _of("T5EncoderModel", "T5Config", **_T5, feed_forward_proj="gated-gelu"),
    "mixtral": _of("MixtralForCausalLM", "MixtralConfig", **_GROUPED, num_local_experts=4),
    "qwen2-moe": _of("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **_DECODER, num_key_value_heads=2, num_experts=4,
                     num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=48),
}  # fmt: skip

# Models that `ffsplit` refuses: convolutions instead of projections, mixtures of experts.
REFUSED = ("squeezebert", "mixtral", "qwen2-moe")


def tiny(name: str) -> PreTrainedModel:
    """A fresh tiny model: the same weights every time."""
    return TINY[name]()


def strong(name: str) -> PreTrainedModel:
    """A tiny model whose FFNs matter: random weights of the usual size hardly change the logits."""
    model = tiny(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model
