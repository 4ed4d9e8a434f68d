"""Finding FFNs in tiny models of many families, with and without weights."""

from __future__ import annotations

import json

import pytest
import torch

from ffsplit.errors import ModelError
from ffsplit.families import FFNSite, find_ffns, verify
from tests.tiny import REFUSED, TINY, tiny

# name: (FFNs, gated, kind, fused)
PLAIN = (2, False, "module", None)
GATED = (2, True, "module", None)
FUSED = (2, True, "module", "gate_up")
INLINE = (2, False, "inline", None)
SEQ2SEQ = (4, False, "inline", None)
EXPECTED = {
    **dict.fromkeys(
        (
            "llama",
            "llama-biased",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma2",
            "gemma3",
            "olmo",
            "olmo2",
            "stablelm",
            "cohere",
        ),
        GATED,
    ),
    **dict.fromkeys(("phi3", "glm", "modernbert"), FUSED),
    "cohere": GATED,
    **dict.fromkeys(("starcoder2", "nemotron", "apertus", "phi", "gpt2", "gpt-neox", "gpt-neo", "gptj"), PLAIN),
    **dict.fromkeys(("openai-gpt", "falcon", "distilbert", "xlm", "vit", "vit-classifier"), PLAIN),
    **dict.fromkeys(("clip-text", "clip-vision", "wav2vec2"), PLAIN),
    **dict.fromkeys(("opt", "bloom", "xglm", "bert", "bert-mlm", "bert-classifier", "roberta", "esm"), INLINE),
    **dict.fromkeys(("roberta-classifier", "electra", "mpnet", "mpnet-mlm", "deberta-v2"), INLINE),
    **dict.fromkeys(("whisper", "bart", "bart-classifier", "marian", "m2m100"), SEQ2SEQ),
    "albert": (1, False, "inline", None),
    "clip": (4, False, "module", None),
    "llava": (2, True, "module", None),
    "t5": (4, False, "module", None),
    "t5-v1.1": (4, True, "module", None),
    "t5-encoder": (2, True, "module", None),
}


def test_every_tiny_model_is_expected_or_refused() -> None:
    assert set(EXPECTED) | set(REFUSED) == set(TINY)


@pytest.mark.parametrize("name", EXPECTED)
def test_finds_the_ffns_and_their_weights_are_what_the_model_computes(name: str) -> None:
    count, gated, kind, fused = EXPECTED[name]
    model = tiny(name)
    ffns = find_ffns(model)
    assert len(ffns.sites) == count
    assert {(site.gated, site.kind, site.fused) for site in ffns.sites} == {(gated, kind, fused)}
    assert {site.d_model for site in ffns.sites} == {32}
    assert len({site.name for site in ffns.sites}) == count
    assert set(ffns.calls.values()) == {2 if name == "albert" else 1}
    verify(model, ffns.sites)
    assert tuple(FFNSite.from_dict(json.loads(json.dumps(site.to_dict()))) for site in ffns.sites) == ffns.sites


@pytest.mark.parametrize("name", EXPECTED)
def test_a_skeleton_without_weights_has_the_same_sites(name: str) -> None:
    with torch.device("meta"):
        skeleton = TINY[name]()
    assert sum(parameter.is_meta for parameter in skeleton.parameters()) > 10
    there, here = find_ffns(skeleton), find_ffns(tiny(name))
    assert there.sites == here.sites
    assert there.coverage == here.coverage
    assert there.blocks == here.blocks


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-mlm", "t5"])
def test_coverage_counts_parameters_once(name: str) -> None:
    model = tiny(name)
    ffns = find_ffns(model)
    modules = [model.get_submodule(path) for site in ffns.sites for path in site.projections]
    assert ffns.coverage.ffn_parameters == sum(p.numel() for module in modules for p in module.parameters())
    assert ffns.coverage.model_parameters == model.num_parameters()
    assert 0 < ffns.coverage.ffn_share_of_model < 1
    assert ffns.coverage.covered_share_of_ffn == 1.0
    assert ffns.coverage.notes == ()


def test_tied_embeddings_are_counted_once() -> None:
    tied, untied = tiny("gpt2"), tiny("llama")
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    for model in (tied, untied):
        assert find_ffns(model).coverage.model_parameters == sum(p.numel() for p in model.parameters())


def test_an_image_tower_that_the_forward_does_not_run_is_reported_as_uncovered() -> None:
    model = tiny("llava")
    ffns = find_ffns(model)
    assert find_ffns(model, {"input_ids": torch.arange(3, 9).unsqueeze(0)}).coverage == ffns.coverage
    assert all("language_model" in site.name for site in ffns.sites)
    assert ffns.coverage.uncovered_ffn_parameters == 2 * (2 * 32 * 80 + 80 + 32)
    assert len(ffns.coverage.notes) == 2
    assert "vision_tower.encoder.layers.0.mlp.fc2" in ffns.coverage.notes[0]


def test_gate_and_up_are_not_confused() -> None:
    assert find_ffns(tiny("llama")).sites[0].gate == "model.layers.0.mlp.gate_proj"
    assert find_ffns(tiny("t5-v1.1")).sites[0].gate == "encoder.block.0.layer.1.DenseReluDense.wi_0"
    assert find_ffns(tiny("phi3")).sites[0].gate == find_ffns(tiny("phi3")).sites[0].up


def test_an_activation_that_is_a_function_is_named() -> None:
    site = find_ffns(tiny("esm")).sites[0]
    assert (site.act, site.act_name) == (None, "gelu")
    assert site.name == "esm.encoder.layer.0.intermediate"


def test_a_model_without_ffn_is_refused_with_its_module_tree() -> None:
    with pytest.raises(ModelError, match="no FFN found in SqueezeBertModel") as caught:
        find_ffns(tiny("squeezebert"))
    message = str(caught.value)
    assert "0..1: 2 x SqueezeBertModule" in message
    assert "Embedding(weight [128, 32])" in message
    assert len(message.splitlines()) <= 62


@pytest.mark.parametrize(
    ("name", "share"), [("mixtral", 0.0), ("qwen2-moe", 2 * 3 * 32 * 48 / (2 * 3 * 32 * (48 + 4 * 16)))]
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_experts_are_counted_and_refused(name: str, share: float, device: str) -> None:
    with torch.device(device):
        model = TINY[name]()
    with pytest.raises(ModelError, match="mixture-of-experts is not supported yet") as caught:
        find_ffns(model)
    message = str(caught.value)
    assert f"Only {share:.1%} of its FFN parameters" in message
    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert f"{sum(p.numel() for p in experts.parameters()):,}" in message
    assert "model.layers.1.mlp.experts" in message
    assert "forward" not in experts.__dict__


def test_blocks_are_the_layers() -> None:
    blocks = find_ffns(tiny("t5")).blocks
    assert [block.path for block in blocks] == [
        "encoder.block.0",
        "encoder.block.1",
        "decoder.block.0",
        "decoder.block.1",
    ]
    assert [(block.list_path, block.index) for block in blocks[2:]] == [("decoder.block", 0), ("decoder.block", 1)]
    assert [site.name for site in blocks[3].sites] == ["decoder.block.1.layer.2.DenseReluDense"]


@pytest.mark.parametrize("name", ["albert", "xlm"])
def test_layers_that_are_no_chain_are_one_block(name: str) -> None:
    ffns = find_ffns(tiny(name))
    (block,) = ffns.blocks
    assert block.whole_model
    assert block.sites == ffns.sites


@pytest.mark.parametrize("name", ["gemma2", "deberta-v2", "whisper", "modernbert", "bloom"])
def test_layers_that_are_a_chain_are_blocks(name: str) -> None:
    ffns = find_ffns(tiny(name))
    assert len(ffns.blocks) == len(ffns.sites)
    assert not any(block.whole_model for block in ffns.blocks)


@pytest.mark.parametrize(
    "change",
    [{"kind": "elsewhere"}, {"fused": "both"}, {"d_ff": 0}, {"d_model": "32"}, {"up": None}, {"colour": "red"}],
)
def test_a_damaged_site_is_refused(change: dict[str, object]) -> None:
    data = find_ffns(tiny("llama")).sites[0].to_dict() | change
    with pytest.raises(ModelError, match=next(iter(change))):
        FFNSite.from_dict(data)
