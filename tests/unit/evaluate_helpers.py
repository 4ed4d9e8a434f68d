"""Tiny tokenizers and models for the tests of text, tokens and evaluation."""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<cls>", "<sep>", "<mask>", "<unk>"]
VOCABULARY = 256 + len(SPECIAL)
TINY = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "max_position_embeddings": 64}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, with the special tokens of an encoder around a sequence."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>", special_tokens=[("<cls>", vocabulary["<cls>"]), ("<sep>", vocabulary["<sep>"])]
    )
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "cls", "sep", "mask", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=32, **names)


def build(auto: str, config: str, seed: int = 0, scale: float = 1.0, **options: object) -> PreTrainedModel:
    """A tiny model with random weights; ``scale`` makes its logits less flat."""
    torch.manual_seed(seed)
    sizes = getattr(transformers, config)(**(TINY | HEADS | options))
    automatic = getattr(transformers, auto)
    model = automatic.from_config(sizes, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return model


def tiny_llama(seed: int = 0, **options: object) -> PreTrainedModel:
    return build("AutoModelForCausalLM", "LlamaConfig", seed, scale=8.0, **options)


def tiny_bert(auto: str = "AutoModelForMaskedLM", seed: int = 0, **options: object) -> PreTrainedModel:
    return build(auto, "BertConfig", seed, scale=4.0, **options)


def disturbed(model: PreTrainedModel, amount: float = 0.3) -> PreTrainedModel:
    """A copy with noise in its FFNs, standing for a compressed model."""
    import copy

    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if any(part in name for part in ("mlp", "intermediate", "output.dense", ".wi", ".wo", "fc1", "fc2")):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(amount * parameter.std() * noise)
    return other
