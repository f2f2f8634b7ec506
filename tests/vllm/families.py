"""Tiny random instances of the decoder families that vLLM serves, and what is measured of them.

Each is chosen for what it does with keys and values that another does not. Built from a config with
transformers, without a network and without a tokenizer: prompts are token ids. Random weights show
that a family runs and loses what its recipe loses; they say nothing about quality.

As a script it measures the families that it is given, all in one process, and prints a line of JSON
for each: those with experts first, which need process groups that an engine before them would not
have made.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import engines
import hybrid
import mixed
from kakeya_vllm import lib, support, version

LAYERS = 2
COMMON: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": mixed.VOCABULARY,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
GQA = {"num_key_value_heads": 2}
MHA = {"num_key_value_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
SLIDING, FULL = mixed.SLIDING, mixed.FULL
THREE_TO_ONE = {
    "num_hidden_layers": 4,
    "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
    "sliding_window": mixed.WINDOW,
}


@dataclass(frozen=True)
class Family:
    """One architecture. ``config`` is the model's config.json, over :data:`COMMON`.

    ``refused``: the feature that KAKEYA names, empty for a family that runs. ``loads``: whether
    the refusal needs a loaded model; otherwise it comes while the engine is configured. ``error``:
    the class of the refusal; libkakeya has its own. ``options``: of its engines, over
    :data:`OPTIONS`. ``exact``: by how much log-probabilities may differ that should agree except
    for the order of sums.
    """

    title: str
    shows: str
    config: dict[str, Any] = field(repr=False)
    refused: str = ""
    loads: bool = False
    error: str = "UnsupportedFeature"
    experts: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    exact: float = 1e-3

    @property
    def architecture(self) -> str:
        return self.about["architectures"][0]

    @property
    def about(self) -> dict[str, Any]:
        return COMMON | self.config


def _of(architecture: str, model_type: str, *parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A config of these parts."""
    about = {"architectures": [architecture], "model_type": model_type}
    for part in parts:
        about |= part
    return about | more


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0} | more}


def _llama(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return _of("LlamaForCausalLM", "llama", GQA, *parts, **more)


LLAMA3 = _rope(
    "llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=1024,
)
YARN = _rope("yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=1024)
LONGROPE = {
    "original_max_position_embeddings": 1024,
} | _rope(
    "longrope",
    short_factor=[1.0 + i / 100 for i in range(48)],
    long_factor=[1.0 + i / 10 for i in range(48)],
    original_max_position_embeddings=1024,
)
PHI3 = _of("Phi3ForCausalLM", "phi3", MHA, hidden_size=384)

# One kind of attention in all layers.
DENSE: dict[str, Family] = {
    "llama2": Family("Llama 1, 2, SmolLM2", "as many KV heads as query heads", _llama(MHA)),
    "llama3": Family("Llama 3", "Llama 3's scaling of frequencies", _llama(LLAMA3)),
    "llama_linear": Family(
        "Llama, linear RoPE scaling", "scaled positions", _llama(_rope("linear", factor=2.0))
    ),
    "qwen2": Family(
        "Qwen 2, 2.5", "biases of q, k, v", _of("Qwen2ForCausalLM", "qwen2", GQA, hidden_size=512)
    ),
    "qwen2_yarn": Family(
        "Qwen 2.5, YaRN", "a constant scale of K", _of("Qwen2ForCausalLM", "qwen2", GQA, YARN)
    ),
    "qwen3": Family(
        "Qwen 3", "norms of q and k", _of("Qwen3ForCausalLM", "qwen3", GQA, head_dim=128)
    ),
    "mistral": Family(
        "Mistral from 0.2 on",
        "no window; q wider than the hidden state",
        _of("MistralForCausalLM", "mistral", GQA, head_dim=128, sliding_window=None),
    ),
    "phi3": Family("Phi-3, 4k", "head_dim 96, fused q, k, v", PHI3),
    "phi3_longrope": Family("Phi-3, 128k", "LongRoPE", PHI3 | LONGROPE),
    "phi4": Family("Phi-4", "head_dim 128, fused q, k, v", PHI3 | GQA | {"hidden_size": 512}),
    "gemma": Family(
        "Gemma 1",
        "head_dim 256, one KV head",
        _of(
            "GemmaForCausalLM",
            "gemma",
            num_key_value_heads=1,
            head_dim=256,
            hidden_activation="gelu_pytorch_tanh",
            tie_word_embeddings=True,
        ),
    ),
    "stablelm": Family(
        "StableLM",
        "a rotary embedding of a quarter of the channels",
        _of("StableLmForCausalLM", "stablelm", MHA, partial_rotary_factor=0.25),
    ),
    "glm4": Family(
        "GLM-4",
        "a rotary embedding of half the channels, of neighbours",
        _of(
            "Glm4ForCausalLM",
            "glm4",
            GQA,
            head_dim=128,
            partial_rotary_factor=0.5,
            attention_bias=True,
        ),
    ),
    "ernie45": Family(
        "ERNIE 4.5", "a rotary embedding of neighbours", _of("Ernie4_5ForCausalLM", "ernie4_5", GQA)
    ),
    "cohere": Family(
        "Command R+",
        "norms of q and k, a rotary embedding of neighbours",
        _of(
            "CohereForCausalLM",
            "cohere",
            MHA,
            use_qk_norm=True,
            logit_scale=1.0,
            tie_word_embeddings=True,
        ),
    ),
    "granite": Family(
        "Granite 3",
        "another scale of scores",
        _of(
            "GraniteForCausalLM",
            "granite",
            GQA,
            attention_multiplier=0.0625,
            embedding_multiplier=2.0,
            residual_multiplier=0.5,
            logits_scaling=0.5,
        ),
    ),
    "nemotron": Family(
        "Nemotron 4, Minitron",
        "layer norms, half the channels rotated",
        _of("NemotronForCausalLM", "nemotron", GQA, partial_rotary_factor=0.5),
    ),
    "apertus": Family(
        "Apertus", "norms of q and k, xIELU", _of("ApertusForCausalLM", "apertus", GQA, LLAMA3)
    ),
    "gptj": Family(
        "GPT-J",
        "half the channels rotated, of neighbours",
        _of(
            "GPTJForCausalLM",
            "gptj",
            n_embd=256,
            n_layer=LAYERS,
            n_head=4,
            n_inner=512,
            n_positions=4096,
            rotary_dim=32,
        ),
    ),
    "falcon": Family(
        "Falcon 7B",
        "one KV head",
        _of(
            "FalconForCausalLM",
            "falcon",
            alibi=False,
            multi_query=True,
            new_decoder_architecture=False,
            tie_word_embeddings=True,
        ),
    ),
    "gpt2": Family(
        "GPT-2",
        "learned positions, no rotary embedding",
        _of(
            "GPT2LMHeadModel",
            "gpt2",
            n_embd=256,
            n_layer=LAYERS,
            n_head=4,
            n_inner=512,
            n_positions=4096,
            tie_word_embeddings=True,
        ),
    ),
    "opt": Family(
        "OPT",
        "learned positions, no rotary embedding",
        _of(
            "OPTForCausalLM",
            "opt",
            ffn_dim=512,
            word_embed_proj_dim=256,
            tie_word_embeddings=True,
        ),
    ),
    "gpt_neox": Family(
        "GPT-NeoX, Pythia",
        "vLLM's Transformers backend, a quarter of the channels rotated",
        _of("GPTNeoXForCausalLM", "gpt_neox", rotary_pct=0.25),
    ),
    "olmo2": Family(
        "OLMo 2",
        "vLLM's Transformers backend, norms over all heads of q and k",
        _of("Olmo2ForCausalLM", "olmo2", GQA),
    ),
    "seed_oss": Family(
        "Seed-OSS",
        "vLLM's Transformers backend, biases of q, k, v",
        _of("SeedOssForCausalLM", "seed_oss", GQA, head_dim=64),
    ),
    "hunyuan": Family(
        "Hunyuan dense",
        "vLLM's Transformers backend, norms of q and k after the rotation",
        _of("HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense", GQA, head_dim=64),
    ),
    "starcoder2": Family(
        "StarCoder 2",
        "vLLM's Transformers backend, biases",
        _of("Starcoder2ForCausalLM", "starcoder2", GQA, use_bias=True, sliding_window=None),
    ),
    "phi2": Family(
        "Phi-1.5, Phi-2",
        "vLLM's Transformers backend, half the channels rotated",
        _of("PhiForCausalLM", "phi", GQA, partial_rotary_factor=0.5),
    ),
}

MIXTURES: dict[str, Family] = {
    "mixtral": Family(
        "Mixtral",
        "experts",
        _of(
            "MixtralForCausalLM",
            "mixtral",
            GQA,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=None,
        ),
        experts=True,
    ),
    "qwen2_moe": Family(
        "Qwen 1.5, 2 MoE",
        "experts, one of them shared, biases of q, k, v",
        _of(
            "Qwen2MoeForCausalLM",
            "qwen2_moe",
            GQA,
            EXPERTS,
            moe_intermediate_size=256,
            shared_expert_intermediate_size=256,
        ),
        experts=True,
    ),
    "qwen3_moe": Family(
        "Qwen 3 MoE",
        "experts, norms of q and k",
        _of(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            GQA,
            EXPERTS,
            head_dim=128,
            moe_intermediate_size=256,
            norm_topk_prob=True,
        ),
        experts=True,
    ),
    "olmoe": Family(
        "OLMoE",
        "experts, norms over all heads of q and k",
        _of("OlmoeForCausalLM", "olmoe", GQA, EXPERTS),
        experts=True,
    ),
    "granite_moe": Family(
        "Granite 3 MoE",
        "experts, another scale of scores",
        _of(
            "GraniteMoeForCausalLM",
            "granitemoe",
            GQA,
            num_local_experts=4,
            num_experts_per_tok=2,
            attention_multiplier=0.0625,
        ),
        experts=True,
    ),
    "glm4_moe": Family(
        "GLM-4.5",
        "experts, half the channels rotated",
        _of(
            "Glm4MoeForCausalLM",
            "glm4_moe",
            GQA,
            head_dim=128,
            partial_rotary_factor=0.5,
            use_qk_norm=True,
            attention_bias=True,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=256,
            first_k_dense_replace=1,
        ),
        experts=True,
    ),
    "ernie45_moe": Family(
        "ERNIE 4.5 MoE",
        "experts, a rotary embedding of neighbours",
        _of(
            "Ernie4_5_MoeForCausalLM",
            "ernie4_5_moe",
            GQA,
            moe_num_experts=4,
            moe_k=2,
            moe_intermediate_size=256,
            moe_num_shared_experts=1,
            moe_layer_start_index=0,
        ),
        experts=True,
    ),
    "gpt_oss": Family(
        "gpt-oss",
        "experts, sinks, YaRN, windows in every other layer",
        mixed.COMMON | mixed.MODELS["gpt_oss"],
        experts=True,
    ),
}

# Full attention in some layers and windows in the others: tests/vllm/mixed.py has more of these.
WINDOWED: dict[str, Family] = {
    "gemma2": Family(
        "Gemma 2",
        "a soft cap of scores, windows in every other layer",
        mixed.COMMON | mixed.MODELS["gemma2"] | {"tie_word_embeddings": True},
    ),
    "gemma3": Family(
        "Gemma 3",
        "head_dim 256, norms of q and k, windows with a rotary embedding of their own",
        mixed.COMMON | mixed.MODELS["gemma3"] | {"tie_word_embeddings": True},
    ),
    "cohere2": Family(
        "Command R7B, Command A",
        "windows with a rotary embedding, full layers without one",
        _of(
            "Cohere2ForCausalLM",
            "cohere2",
            GQA,
            THREE_TO_ONE,
            logit_scale=1.0,
            tie_word_embeddings=True,
        ),
    ),
    "exaone4": Family(
        "EXAONE 4",
        "windows with a rotary embedding, full layers without one",
        _of("Exaone4ForCausalLM", "exaone4", GQA, THREE_TO_ONE),
    ),
    "olmo3": Family(
        "OLMo 3",
        "vLLM's Transformers backend, windows in most layers",
        _of("Olmo3ForCausalLM", "olmo3", GQA, THREE_TO_ONE),
    ),
}

# Attention in some layers and states in the others, or both in each.
NO_CACHING = {"enable_prefix_caching": False}  # vLLM's Mamba 2 fails with it on the CPU
HYBRID: dict[str, Family] = {
    "qwen3_next": Family(
        "Qwen 3 Next",
        "gated delta net beside gated attention, partial rotary embedding",
        hybrid.COMMON | hybrid.MODELS["qwen3_next"],
        options=hybrid.OPTIONS,
        experts=True,
        exact=0.25,  # in bfloat16: vLLM's kernel for the CPU takes nothing else
    ),
    "granite_hybrid": Family(
        "Granite 4",
        "Mamba 2 beside attention",
        hybrid.COMMON | hybrid.MODELS["granite"],
        options=NO_CACHING,
    ),
    "falcon_h1": Family(
        "Falcon H1",
        "Mamba 2 and attention in every layer",
        hybrid.COMMON | hybrid.MODELS["falcon_h1"],
        options=NO_CACHING,
    ),
    "lfm2": Family(
        "LFM 2",
        "short convolutions beside attention; vLLM 0.32 turns its keys wrongly on the CPU",
        hybrid.COMMON | hybrid.MODELS["lfm2"],
        refused="" if engines.on_gpu() else "keys are not turned by its angles alone",
        loads=True,
    ),
}

REFUSED: dict[str, Family] = {
    "deepseek": Family(
        "DeepSeek V2",
        "latent attention (MLA)",
        _of(
            "DeepseekV2ForCausalLM",
            "deepseek_v2",
            MHA,
            kv_lora_rank=64,
            q_lora_rank=None,
            qk_nope_head_dim=64,
            qk_rope_head_dim=64,
            v_head_dim=64,
            n_routed_experts=4,
            first_k_dense_replace=2,
        ),
        refused="MLA (multi-head latent attention)",
    ),
    "falcon_alibi": Family(
        "Falcon RW",
        "ALiBi",
        _of(
            "FalconForCausalLM",
            "falcon",
            alibi=True,
            multi_query=False,
            parallel_attn=False,
            bias=True,
        ),
        refused="ALiBi",
    ),
    "bloom": Family(
        "BLOOM",
        "ALiBi",
        _of("BloomForCausalLM", "bloom", n_layer=LAYERS, n_head=4),
        refused="ALiBi",
    ),
    "qwen2_vl": Family(
        "Qwen 2 with the positions of Qwen 2-VL",
        "M-RoPE",
        _of(
            "Qwen2ForCausalLM",
            "qwen2",
            GQA,
            _rope("default", mrope_section=[16, 8, 8]),
        ),
        refused="M-RoPE",
    ),
    "mistral_window": Family(
        "Mistral 0.1",
        "a window in all layers",
        _of("MistralForCausalLM", "mistral", GQA, head_dim=128, sliding_window=mixed.WINDOW),
        refused="sliding-window attention in all layers",
    ),
    "llama4": Family(
        "Llama 4",
        "chunked attention",
        _of(
            "Llama4ForCausalLM",
            "llama4_text",
            GQA,
            num_hidden_layers=4,
            num_local_experts=2,
            num_experts_per_tok=1,
            intermediate_size_mlp=512,
            head_dim=64,
            attention_chunk_size=256,
        ),
        refused="chunked local attention",
    ),
    "gemma3n": Family(
        "Gemma 3n",
        "layers that read the cache of others",
        _of(
            "Gemma3nForCausalLM",
            "gemma3n_text",
            num_key_value_heads=1,
            head_dim=256,
            num_hidden_layers=4,
            layer_types=[SLIDING, FULL, SLIDING, FULL],
            sliding_window=mixed.WINDOW,
            num_kv_shared_layers=2,
            vocab_size_per_layer_input=mixed.VOCABULARY,
            hidden_size_per_layer_input=64,
            laurel_rank=16,
            activation_sparsity_pattern=[0.0] * 4,
            intermediate_size=[512] * 4,
            tie_word_embeddings=True,
        ),
        refused="layers that share another layer's KV cache",
        loads=True,
    ),
    "gemma4": Family(
        "Gemma 4",
        "heads of another size in full layers than beside windows",
        _of(
            "Gemma4ForCausalLM",
            "gemma4_text",
            GQA,
            THREE_TO_ONE,
            head_dim=128,
            global_head_dim=256,
            num_kv_shared_layers=0,
            vocab_size_per_layer_input=mixed.VOCABULARY,
            hidden_size_per_layer_input=64,
            tie_word_embeddings=True,
        ),
        refused="layers that differ in their heads",
    ),
    "llama_dynamic": Family(
        "Llama, dynamic NTK",
        "angles that depend on the sequence length",
        _llama(_rope("dynamic", factor=2.0)),
        refused="its angles depend on the sequence length",
        loads=True,
    ),
    "stablelm_80": Family(
        "StableLM 3B",
        "head_dim 80",
        _of("StableLmForCausalLM", "stablelm", MHA, hidden_size=320, partial_rotary_factor=0.25),
        refused="head_dim 80",
    ),
    "smollm3": Family(
        "SmolLM3",
        "vLLM's Transformers backend, layers without a rotary embedding",
        _of("SmolLM3ForCausalLM", "smollm3", GQA, no_rope_layers=[1, 0]),
        refused="models that rotate only some layers",
        loads=True,
    ),
}

FAMILIES: dict[str, Family] = DENSE | MIXTURES | WINDOWED | HYBRID | REFUSED
SECTIONS: dict[str, dict[str, Family]] = {
    "Full attention in all layers": DENSE,
    "Experts": MIXTURES,
    "Full and sliding-window layers": WINDOWED,
    "Attention beside states (hybrid models)": HYBRID,
    "Others that are refused": REFUSED,
}

# Rows that decide where attention looks, by the names that the architectures have for them.
_SHARPENED = (
    "q_proj",
    "k_proj",
    "o_proj",
    "qkv",
    "query_key_value",
    "c_attn",
    "attn.c_proj",
    "attn.out_proj",
    "attention.dense",
    "self_attn.dense",
)


def make(directory: Path, about: dict[str, Any], *, weights: bool = True) -> Path:
    """A random instance of a config, with biases. Without ``weights`` only its config."""
    if weights:
        return mixed.instance(directory, about, sharpened=_SHARPENED, bias=0.2)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(about, indent=1))
    return directory


# Not a block, a block and one token, and with 16 more tokens over the end of a block.
LENGTHS = [45, 129, 300, 120]
NEW_TOKENS = 16
RATIOS = ("2.7x", "6.4x")
# On the CPU prompts are the same in pieces and whole, decoded and read. Prompts are raw on a GPU.
ENVIRONMENT = {"KAKEYA_VERIFY": "1"} | ({} if engines.on_gpu() else {"KAKEYA_PREFILL": "sealed"})
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_num_batched_tokens": 256,
    "enable_prefix_caching": True,
}
SERVED = {"dtype": "bfloat16"}  # as people run it: what a page's size is held against


def prompts() -> list[list[int]]:
    return [engines.tokens(70 + i, n, mixed.VOCABULARY) for i, n in enumerate(LENGTHS)]


def measure(model: Path, family: Family) -> dict[str, Any]:
    """What a model says of the prompts with the stock cache and at two ratios, checked by
    KAKEYA_VERIFY; what it decodes; and what vLLM allocates for it with the default recipe."""
    dtype = SERVED["dtype"] if engines.on_gpu() else family.about["torch_dtype"]
    options = OPTIONS | {"dtype": dtype} | family.options
    stock = {"attention_backend": None, "block_size": lib.BLOCK_TOKENS}
    with engines.engine(model, **options | stock) as engine:
        found: dict[str, Any] = {"stock": [engine.prompt_logprobs(p) for p in prompts()]}
    for ratio in RATIOS:
        env = ENVIRONMENT | {"KAKEYA_RECIPE": f"kakeya-free-{ratio}"}
        with engines.engine(model, env, **options) as engine:
            found[ratio] = [engine.prompt_logprobs(p) for p in prompts()]
            if ratio != RATIOS[0]:
                continue
            first, again = (engine.run(prompts(), NEW_TOKENS) for _ in range(2))
            # Read as prompts: what was decoded must have seen the same.
            read = [
                engine.prompt_logprobs(p + run.tokens)[-NEW_TOKENS:]
                for p, run in zip(prompts(), first, strict=True)
            ]
            found |= {
                "decoded": [run.logprobs for run in first],
                "read": read,
                "tokens": [[run.tokens for run in runs] for runs in (first, again)],
                "hits": [run.cached for run in again],
                "block": engine.runtime.pages_per_block * lib.BLOCK_TOKENS,
                "checked": dict(engine.runtime.verifier.counts),
            }
    with engines.engine(model, **OPTIONS | SERVED | family.options) as engine:
        assert [len(run.tokens) for run in engine.run(prompts(), 2)] == [2] * len(LENGTHS)
        found |= _allocated(engine)
    return found


def _allocated(engine: engines.Engine) -> dict[str, Any]:
    """Of an engine: compressed layers, all layers, what they are, bytes of their cache, and what a
    GPU would refuse."""
    runtime = engine.runtime
    config = engine.llm.llm_engine.vllm_config
    layers = list(runtime.layers.values())
    group = engine.worker(_groups)[runtime.group]
    spec = group.kv_cache_spec
    heads, head_dim = layers[0].num_kv_heads, layers[0].head_size
    return {
        "recipe": runtime.settings.recipe,
        "compressed": sorted(support.layer_index(name) for name in runtime.layers),
        "layers": config.model_config.get_total_num_hidden_layers(),
        "heads": [config.model_config.get_num_attention_heads(config.parallel_config), heads],
        "head_dim": head_dim,
        "ratio": 2 * 2 * heads * head_dim * spec.block_size / spec.page_size_bytes,
        "gpu": support._cuda_features(config, _Gpu, "90"),
    }


class _Gpu:
    """A GPU that has what the kernels need."""

    @staticmethod
    def has_device_capability(_: Any) -> bool:
        return True


def _groups(worker: Any) -> Any:
    return worker.model_runner.kv_cache_config.kv_cache_groups


def refusal(model: Path) -> dict[str, Any]:
    """The error that a model is refused with, and what was made of an engine by then."""
    before = len(engines._closed)
    try:
        with engines.engine(model, **OPTIONS | SERVED):
            return {}
    except Exception as error:
        return {
            "kind": type(error).__name__,
            "refused": str(error),
            "engines": len(engines._closed) - before,
        }


def _run(name: str) -> dict[str, Any]:
    family = FAMILIES[name]
    with tempfile.TemporaryDirectory() as directory:
        if family.refused:
            return refusal(make(Path(directory), family.about, weights=family.loads))
        return measure(make(Path(directory), family.about), family)


def _inspect_here() -> None:
    """vLLM inspects each architecture in a process of its own before it uses it, which takes longer
    than to run it. Those that are registered as classes it inspects in this one."""
    from vllm import ModelRegistry

    for name in {family.architecture for family in FAMILIES.values()}:
        known = ModelRegistry.models.get(name)
        if known is not None:
            ModelRegistry.register_model(name, known.load_model_cls())


def measured(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What :func:`measure` or :func:`refusal` finds of each family, in one process of its own. A
    family that fails otherwise has an "error" only, as have those that a crash left out."""
    # Threads that wait by spinning would take the cores from other thread pools.
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    order = sorted(names, key=lambda name: not FAMILIES[name].experts)
    with engines.variables(quiet), tempfile.TemporaryFile("w+") as log:
        done = subprocess.run(
            [sys.executable, __file__, *order],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            timeout=840,
            check=False,
        )
        log.seek(0)
        tail = log.read()[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = {entry.pop("name"): entry for entry in map(json.loads, lines)}
    for name in order:
        found.setdefault(name, {"error": f"the process ended with {done.returncode}:\n{tail}"})
    return found


def main() -> None:
    _inspect_here()
    for name in sys.argv[1:]:
        try:
            entry = _run(name)
        except Exception as error:
            entry = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"name": name} | entry), flush=True)
    # Python would take down every engine first, which takes longer than they ran.
    os._exit(0)


def summary(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """What docs/support.json keeps of a family, from what was measured of it."""
    family = FAMILIES[name]
    kept = {
        "section": next(title for title, part in SECTIONS.items() if name in part),
        "title": family.title,
        "shows": family.shows,
        "architecture": family.architecture,
    }
    if family.refused:
        reason = found["refused"]
        for prefix in ("KAKEYA does not support: ", "KAKEYA_ERR_UNSUPPORTED: not supported: "):
            reason = reason.removeprefix(prefix)
        return kept | {"refused": reason, "loads": family.loads}
    moved = {ratio: float(f"{mixed.apart(found[ratio], found['stock']):.2g}") for ratio in RATIOS}
    names = ("recipe", "compressed", "layers", "heads", "head_dim", "gpu")
    return kept | {"ratio": round(found["ratio"], 2), "moved": moved} | {n: found[n] for n in names}


def versions() -> dict[str, str]:
    """Of what the measurement depends on."""
    libraries = {name: metadata.version(name) for name in ("transformers", "torch")}
    return {"vllm": version.installed()} | libraries


if __name__ == "__main__":
    for _name, _value in engines.ENVIRONMENT.items():
        os.environ.setdefault(_name, _value)
    main()
