#!/usr/bin/env python3
"""docs/support.md: what runs with KAKEYA, what is refused, and which test says so.

    scripts/support.py measure    # docs/support.json by tests/vllm/test_families.py, then the page;
                                  # docs/support_gpu.json where vLLM runs on a GPU
    scripts/support.py write      # the page alone: after a change to the plugin, a test or a figure
    scripts/support.py check      # 1 if the page is stale; the tests ask too

Nothing on the page is written by hand that could be read: families come from docs/support.json,
which the tests hold against what they measure, and docs/support_gpu.json; quality and speed from
the tables of docs/quality.md and docs/benchmarks.md; refusals from the plugin's sources, every one
of which needs a line here; a test that is named must exist and run where the page says it does.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "vllm_plugin" / "kakeya_vllm"
TESTS = ROOT / "tests" / "vllm"
DOCS = ROOT / "docs"
DATA = DOCS / "support.json"
GPU_DATA = DOCS / "support_gpu.json"
PAGE = DOCS / "support.md"
COMMAND = "scripts/support.py measure"


class NotUnderstood(Exception):
    """The page would say something that sources, figures or tests do not."""


# --- what the page says of its own ----------------------------------------------------------


@dataclass(frozen=True)
class Feature:
    """A feature of vLLM or KAKEYA. Tests are FILE::FUNCTION without "test_" and ".py"; words come
    after them, or stand alone where no test shows it."""

    name: str
    cpu: tuple[str, ...] = ()
    gpu: tuple[str, ...] = ()
    cpu_words: str = ""
    gpu_words: str = ""


NOT_RUN = "not run"
FEATURES = (
    Feature(
        "requests together equal each alone (continuous batching)",
        ("engine::eight_interleaved_requests_equal_each_alone",),
        ("engine::eight_interleaved_requests_equal_each_alone",),
        gpu_words="bit for bit with `VLLM_BATCH_INVARIANT=1`",
    ),
    Feature(
        "prefix caching",
        (
            "engine::prefix_hits_across_steps_change_nothing",
            "engine::raw_prefix_hits_within_one_step_equal_chunks",
        ),
        ("engine::raw_prefix_hits_within_one_step_equal_chunks",),
    ),
    Feature(
        "cache salts, tenants",
        ("isolation::a_tenants_blocks_are_hit_by_that_tenant_only",),
        ("isolation::a_tenants_blocks_are_hit_by_that_tenant_only",),
    ),
    Feature(
        "chunked prefill",
        (
            "engine::sealed_chunks_equal_one_piece",
            "processes::chunked_prefill_is_within_the_recipes_tolerance",
        ),
        ("processes::chunked_prefill_is_within_the_recipes_tolerance",),
    ),
    Feature(
        "preemption",
        ("engine::forced_preemption_loses_nothing",),
        ("gpu_engine::forced_preemption_finishes_every_request",),
    ),
    Feature(
        "aborted requests",
        ("engine::an_aborted_request_frees_its_open_block",),
        ("engine::an_aborted_request_frees_its_open_block",),
    ),
    Feature(
        "random load with all of these",
        ("soak::every_answer_equals_its_answer_alone",),
        ("soak::every_answer_equals_its_answer_alone",),
    ),
    Feature(
        "n-gram drafts",
        ("processes::speculative_decoding_changes_nothing",),
        (
            "processes::speculative_decoding_changes_nothing",
            "gpu_engine::drafts_change_nothing",
        ),
    ),
    Feature(
        "draft model, EAGLE",
        ("doors::drafts_of_a_model_change_nothing",),
        ("doors::drafts_of_a_model_change_nothing",),
        cpu_words="the EAGLE head was a random one",
    ),
    Feature("EAGLE-3, MTP, Medusa, ...", cpu_words="refused", gpu_words="refused"),
    Feature(
        "LoRA",
        ("lora::adapters_and_base_share_an_engine_and_no_pages",),
        ("lora::adapters_and_base_share_an_engine_and_no_pages",),
    ),
    Feature("structured output", ("doors::structured_output",), ("doors::structured_output",)),
    Feature(
        "tensor parallelism",
        ("processes::tensor_parallel_2_gives_the_same_codes_as_1",),
        ("gpu_engine::tensor_parallel_2_is_within_the_recipe",),
    ),
    Feature(
        "pipeline parallelism",
        ("pipeline::two_stages_give_the_pages_of_one",),
        ("pipeline::two_stages_give_the_pages_of_one",),
    ),
    Feature(
        "data parallelism",
        ("processes::two_data_parallel_engines_give_the_same_text",),
        ("processes::two_data_parallel_engines_give_the_same_text",),
    ),
    Feature(
        "KakeyaConnector (pages in a folder)",
        (
            "connectors::a_decode_engine_goes_on_from_a_prefill_engines_pages",
            "connectors::blocks_come_back_after_they_were_evicted",
        ),
        (
            "connectors::a_decode_engine_goes_on_from_a_prefill_engines_pages",
            "connectors::blocks_come_back_after_they_were_evicted",
        ),
    ),
    Feature(
        "OffloadingConnector (CPU memory)",
        gpu=("connectors::pages_are_offloaded_to_cpu_memory",),
        cpu_words="refused",
    ),
    Feature(
        "CUDA graphs",
        (),
        (
            "gpu_engine::graphs_give_the_eager_tokens",
            "gpu_engine::compiled_with_piecewise_graphs",
        ),
        cpu_words="none there",
    ),
    Feature(
        "both of vLLM's model runners",
        (),
        ("gpu_engine::both_model_runners_give_the_same_tokens",),
        cpu_words="one there",
    ),
    Feature(
        "batch invariance",
        (),
        ("cuda_device::batch_invariance", "gpu_engine::drafts_give_exactly_the_plain_tokens"),
        cpu_words="in float32, without a setting",
    ),
    Feature(
        "spawned engine, OpenAI server",
        (
            "processes::spawned_engine_gives_the_same_text",
            "processes::served_over_http_gives_the_same_text",
        ),
        (
            "processes::spawned_engine_gives_the_same_text",
            "processes::served_over_http_gives_the_same_text",
        ),
    ),
    Feature(
        "metrics, `vllm bench serve`",
        ("metrics::what_was_configured_is_shown", "metrics::vllm_bench_serve_measures_it"),
        ("metrics::what_was_configured_is_shown", "metrics::vllm_bench_serve_measures_it"),
    ),
    Feature(
        "the calls of lm_eval; `vllm bench latency`, `throughput`",
        ("doors::what_lm_eval_calls", "doors::vllm_bench_latency_and_throughput"),
        ("doors::what_lm_eval_calls", "doors::vllm_bench_latency_and_throughput"),
    ),
    Feature(
        "images in a prompt of a text model",
        ("doors::a_multimodal_prompt_of_a_text_model_is_refused_and_the_engine_goes_on",),
        ("doors::a_multimodal_prompt_of_a_text_model_is_refused_and_the_engine_goes_on",),
        cpu_words="refused by vLLM; the engine goes on",
    ),
    Feature(
        "multimodal models without M-RoPE, quantised weights",
        cpu_words=NOT_RUN,
        gpu_words=NOT_RUN,
    ),
    Feature(
        "boundary layers (`KAKEYA_BOUNDARY_SKIP_LAYERS`)",
        ("processes::all_boundary_layers_give_the_stock_tokens",),
        ("gpu_engine::all_boundary_layers_give_the_stock_tokens",),
    ),
    Feature(
        "`KAKEYA_PREFILL=sealed`",
        ("engine::sealed_chunks_equal_one_piece",),
        gpu_words="refused",
    ),
    Feature(
        "`KAKEYA_VERIFY=1`",
        ("verify::a_sound_engine_passes", "verify::a_flipped_bit_is_found_before_it_is_read"),
        ("verify::a_sound_engine_passes", "verify::a_flipped_bit_is_found_before_it_is_read"),
    ),
    Feature(
        "`KAKEYA_CALIBRATION=auto`",
        ("auto::engines_calibrate_once",),
        ("auto::engines_calibrate_once",),
    ),
    Feature(
        "attention sinks",
        ("mixed::full_layers_are_compressed_and_the_rest_is_stock",),
        (
            "cuda_device::soft_caps_and_sinks",
            "mixed::full_layers_are_compressed_and_the_rest_is_stock",
        ),
    ),
    Feature(
        "a soft cap of scores",
        ("mixed::full_layers_are_compressed_and_the_rest_is_stock",),
        (
            "cuda_device::soft_caps_and_sinks",
            "mixed::full_layers_are_compressed_and_the_rest_is_stock",
        ),
    ),
    Feature(
        "full and sliding-window layers in one model",
        ("mixed::requests_together_equal_each_alone",),
        ("mixed::requests_together_equal_each_alone",),
    ),
    Feature(
        "hybrid models: attention beside states",
        (
            "hybrid::requests_together_equal_each_alone",
            "hybrid::prefix_hits_give_the_same",
            "hybrid::two_ranks_in_processes_of_their_own",
        ),
        (
            "hybrid::attention_is_compressed_and_states_stay",
            "hybrid::requests_together_equal_each_alone",
        ),
        gpu_words="over two ranks it ran, not compared",
    ),
    Feature(
        "recipes of the seed", ("seed_backend::prefix_hits_change_nothing",), gpu_words="refused"
    ),
)

# Words of a refusal as the sources have them ("…": what is filled in), why, and the tests that
# show it. A refusal without a line here, a line without a refusal or without a test are errors.
REFUSALS: dict[str, tuple[tuple[str, str, tuple[str, ...]], ...]] = {
    "Models": (
        ("MLA (multi-head", "not implemented: latents, not keys and values",
         ("support::models_refused_by_name", "families::refused_by_name")),
        ("ALiBi", "not implemented",
         ("support::layers_refused_by_name", "families::refused_by_name")),
        ("M-RoPE", "several positions a token", ("families::refused_by_name",)),
        ("without attention layers", "there is nothing to compress",
         ("support::kinds_of_models_refused_by_name",)),
        ("a hybrid model with sliding", "pages of a third size",
         ("support::a_hybrid_model_with_windows_is_refused",)),
        ("sliding-window attention in all", "nothing grows with the context",
         ("support::models_refused_by_name", "families::refused_by_name")),
        ("sliding-window attention (window", "the same, where only a layer shows it",
         ("support::layers_refused_by_name",)),
        ("chunked local attention", "nothing grows with the context",
         ("support::models_refused_by_name", "families::refused_by_name")),
        ("head_dim … (valid: …)", "there are no pages for them",
         ("support::models_refused_by_name", "families::refused_by_name")),
        ("layers that differ in their heads", "a codec is made for one shape",
         ("families::refused_by_name",)),
        ("compressed layers in … KV cache groups", "vLLM cuts them so; pages would have several "
         "block tables", ("mixed::refused_by_name",)),
        ("cross attention (an encoder", "another kind of cache",
         ("support::kinds_of_models_refused_by_name",)),
        ("attention (encoder and cross", "another kind of cache",
         ("support::layers_refused_by_name",)),
        ("share another layer's KV cache", "another kind of cache",
         ("support::layers_refused_by_name", "families::refused_by_name")),
        ("bidirectional attention over image", "not implemented",
         ("support::kinds_of_models_refused_by_name",)),
        ("reference sliding-window", "not implemented",
         ("support::kinds_of_models_refused_by_name",)),
        ("diffusion language models", "not implemented",
         ("support::kinds_of_models_refused_by_name",)),
        ("the attention option", "what it does to attention is not known",
         ("support::layers_refused_by_name",)),
        ("value heads of another size", "a page holds K and V of one size",
         ("support::layers_that_show_themselves_refused_by_name",)),
        ("layers with differing heads", "a codec is made for one shape",
         ("support::layers_that_no_codec_describes",)),
        ("several attention modules in layer", "an artefact has one entry a layer",
         ("support::layers_that_no_codec_describes",)),
        ("does not hold exactly one layer number", "it could not be told apart",
         ("support::layers_that_show_themselves_refused_by_name",)),
        ("attention layers outside the model", "an artefact has no entry for them",
         ("support::layers_that_no_codec_describes",)),
    ),
    "Rotary embeddings": (
        ("keys cannot be looked at", "how it turns them would be a guess",
         ("rope::keys_that_show_nothing_are_refused",)),
        ("keys are not turned by its angles", "they would be turned back by others",
         ("rope::keys_that_are_turned_otherwise_are_refused",)),
        ("which has no angles for", "the same",
         ("rope::a_module_of_transformers_without_angles_for_a_layer_is_refused",)),
        ("which answers no cosines and sines", "its angles cannot be checked",
         ("rope::a_module_of_transformers_that_answers_one_tensor_is_refused",)),
        ("rotary embedding … of type …", "as for others of the kinds below",
         ("rope::other_kinds_of_transformers_are_refused",)),
        ("another scale in short contexts", "an artefact's means would be of the other scale",
         ("rope::longrope_with_two_scales_of_keys_is_refused",)),
        ("rotary embedding … (…)", "keys are turned back by one fixed angle a position: not so "
         "for dynamic NTK, M-RoPE and kinds that are not known",
         ("rope::other_kinds_are_refused",
          "families::refused_by_name")),
        ("rotary embedding is not beside", "the angles that the model uses are not found",
         ("rope::no_rotary_at_all",)),
        ("rotate only some layers", "a codec has the angles of all layers",
         ("rope::layers_without_rotation_are_refused", "families::refused_by_name")),
        ("several different rotary", "the same", ("rope::layers_that_differ_are_refused",)),
        ("several rotary embeddings in", "which one a layer uses is not known",
         ("rope::two_rotary_embeddings_beside_one_layer_are_refused",)),
        ("with several scaling factors", "which one a request uses is not known",
         ("rope::several_scaling_factors_are_refused",)),
        ("does not follow its own frequencies", "keys would be turned by other angles",
         ("rope::a_table_that_disagrees_is_refused",)),
        ("rotary embedding … of … channels", "the same",
         ("rope::a_table_of_other_channels_is_refused",)),
    ),
    "Settings of vLLM": (
        ("block size …", "a page is one block",
         ("support::options_refused_by_name", "seed_backend::options_refused_by_name")),
        ("kv_cache_dtype …", "the recipe is the cache type",
         ("support::options_refused_by_name", "doors::kv_cache_dtypes_that_are_refused")),
        ("prefix_match_unit …", "a page cannot be copied in part",
         ("support::options_refused_by_name",)),
        ("kv_sharing_fast_prefill", "not tried",
         ("support::settings_of_the_cache_refused_by_name",)),
        ("backend_per_kind for", "other kinds of layers have no pages",
         ("support::settings_of_the_cache_refused_by_name",)),
        ("tensor-parallel ranks for", "attention takes all query heads of a KV head in one call",
         ("support::options_refused_by_name",)),
        ("(DCP)", "a step of a sequence must be in one place",
         ("support::parallelism_refused_by_name",)),
        ("(PCP)", "the same", ("support::parallelism_refused_by_name",)),
        ("micro-batching", "the same", ("support::parallelism_refused_by_name",)),
        ("a hybrid model with pipeline", "a stage sees its own states only, and all have to agree "
         "on a block", ("hybrid::refused_by_name",)),
        ("platform (valid: CPU, CUDA)", "nothing to run",
         ("support::another_platform_is_refused",)),
    ),
    "Speculation": (
        ("speculative tokens (at most two", "the pool of open blocks is made for two a sequence",
         ("support::speculation",)),
        ("speculative decoding with … (valid", "not tried",
         ("support::drafters_that_are_refused",)),
        ("a draft model where either", "not tried",
         ("support::a_drafter_beside_windows_is_refused",)),
        ("a hybrid model with speculative", "not tried", ("hybrid::refused_by_name",)),
        ("KAKEYA for the layers of a draft", "they have no recipe",
         ("support::drafters_that_are_refused",)),
    ),
    "KV connectors": (
        ("the KV connector …", "what it takes a block to be was not tried",
         ("support::options_refused_by_name", "connectors::connectors_refused_by_name")),
        ("KV connectors with a recipe of the seed", "not tried",
         ("connectors::connectors_refused_by_name",)),
        ("KV connectors with …", "where layers do not all keep every token: a load would have to "
         "bring blocks of all groups",
         ("connectors::connectors_refused_by_name", "hybrid::refused_by_name")),
        ("KV connectors with pipeline", "not tried", ("connectors::connectors_refused_by_name",)),
        ("KV connectors with drafts by", "not tried",
         ("connectors::connectors_refused_by_name",)),
        ("with folder … in", "files need a place that all processes see",
         ("connectors::connectors_refused_by_name",)),
        ("with model …", "files are kept under a name",
         ("connectors::connectors_refused_by_name",)),
        ("with … in kv_connector_extra_config", "a misspelt setting would be ignored",
         ("connectors::connectors_refused_by_name",)),
        ("prefix_caching_hash_algo", "others are seeded by process, and collide",
         ("connectors::connectors_refused_by_name",)),
        ("layers whose blocks or heads differ", "a file has one head's pages of all layers",
         ("connectors::layers_that_differ_are_refused",)),
        ("KV offloading without a GPU", "vLLM's connector needs one",
         ("support::options_refused_by_name", "connectors::connectors_refused_by_name")),
        ("KV offloading with … (valid", "names of its files hold no recipe",
         ("connectors::connectors_refused_by_name",)),
        ("KV offloading with canonical", "not tried", ("connectors::connectors_refused_by_name",)),
    ),
    "Settings of KAKEYA": (
        ("boundary layers in …", "where layers do not all keep every token: pages of yet another "
         "size", ("mixed::refused_by_name", "hybrid::refused_by_name")),
        ("recipe … with …", "a recipe of the seed there: the same",
         ("support::settings_refused_by_name",)),
        ("KAKEYA_VERIFY=1 with a KV", "loaded pages have no checksum here",
         ("support::checks_of_pages_and_pages_of_others",)),
        ("KAKEYA_VERIFY=1 with CUDA graphs", "the checks wait for the device",
         ("verify::recipes_of_the_seed_and_graphs_are_refused",)),
        ("KAKEYA_VERIFY=1 with recipe", "not implemented for recipes of the seed",
         ("verify::recipes_of_the_seed_and_graphs_are_refused",)),
        ("speculative decoding with recipe", "a block would be sealed twice, at 20 ms a head",
         ("seed_backend::options_refused_by_name",)),
        ("… with a recipe of the seed", "soft caps and sinks: not implemented",
         ("support::a_recipe_of_the_seed_beside_them_is_refused",)),
        ("recipe … on a GPU (it is served", "no kernels: `kakeya eval` simulates it",
         ("seed_backend::a_gpu_is_refused",)),
        ("KAKEYA_PREFILL=sealed on a GPU", "prompts go through FlashAttention on raw K and V",
         ("support::settings_refused_by_name",)),
    ),
    "On a GPU": (
        ("built without kernels", "nothing to run", ("cuda::what_is_refused_on_a_gpu",)),
        ("vLLM … on a GPU", "not run with it", ("cuda::what_is_refused_on_a_gpu",)),
        ("before compute capability", "nothing to run", ("cuda::what_is_refused_on_a_gpu",)),
        ("on a GPU (valid: bfloat16", "no kernels", ("cuda::what_is_refused_on_a_gpu",)),
        ("speculative tokens on a GPU", "attention takes 8 query tokens a sequence",
         ("cuda::what_is_refused_on_a_gpu",)),
    ),
}  # fmt: skip

# Families whose weights were at hand: model, page, heading and row of its quality.
RECIPE = "kakeya-4.6x"
QUALITY = {"llama2": "SmolLM2-135M", "qwen2": "Qwen2.5-Coder-1.5B"}
# The family that engines were timed with: shapes, cell of docs/benchmarks.md.
SPEED = {"qwen3": ("Qwen3-4B's shapes with dummy weights", "64 x 8,192, ms")}
# What else of a family ran on a GPU.
ON_A_GPU = {
    "llama2": ("SmolLM2-135M", ("gpu_engine::graphs_give_the_eager_tokens",)),
    "qwen2": (
        "tiny random, Qwen2.5-Coder-1.5B",
        ("engine::eight_interleaved_requests_equal_each_alone",),
    ),
    "qwen3": ("Qwen3-4B's shapes ([benchmarks.md](benchmarks.md))", ()),
}

PREAMBLE = """\
# What runs, and what is refused

Written by `scripts/support.py`; the tests refuse a stale page. [KAKEYA in vLLM](vllm.md) has how
each feature works and what was seen of it. "Ran" is what a test showed, never what should work.

| word | means |
|---|---|
| refused | an error that names the feature, before a token is computed |
| not run | nothing refuses it, and no test has run it there |
| file names | the tests of `tests/vllm` that show it |

On the CPU these run in every `make test`. On a GPU they are part of `make test-gpu`, with vLLM
0.33.0: what of it ran, and on which cards, is in [Testing](testing.md#on-a-gpu) and
[KAKEYA in vLLM](vllm.md#on-a-gpu).
"""
FAMILIES = """\
## Families of models

`tests/vllm/test_families.py`: a tiny random instance of each on the CPU, with vLLM {vllm},
transformers {transformers} and torch {torch}. Of each that runs: log-probabilities of prompts
against the stock cache at two ratios, with every page and a sample of seals and outputs against
references (`KAKEYA_VERIFY`); greedy tokens over the end of a block against the same tokens as a
prompt; prefix-cache hits against the first answers. All that in float32 with `prefill: sealed`, and
once in bfloat16 with the default recipe, from whose KV-cache specs the ratio is. Of each that does
not: the error, and that no engine was made.

On a GPU the same in bfloat16 and with raw prompts, so without the comparison of decoded tokens with
prompts: {gpu_families} families with vLLM {gpu_vllm}, transformers {gpu_transformers} and torch
{gpu_torch}, on one {gpu}. There "ran" is followed by what moved: less than on the CPU, as
raw prompts read pages only for what is behind their first 256 tokens.

- **Ratio**: bf16's bytes to those that vLLM allocates for a block of the compressed layers, with
  `{recipe}`. Windows beside them keep the stock cache; on the CPU pages are then padded to 4.0x
  ([why](vllm.md#full-and-sliding-window-layers-in-one-model)).
- **Moved**: root mean square change of the log-probabilities of a prompt, with random weights, at
  6.4x and 2.7x. It shows that a family loses by the recipe and not by an error. It is **no
  quality**: small where norms flatten attention or few layers are compressed.
- **Quality, speed**: of `{calibrated}`, where weights were at hand; "-": not measured. Intervals,
  commands and other recipes: [Quality](quality.md), [Benchmarks](benchmarks.md).
"""


# --- tests -----------------------------------------------------------------------------------


@functools.cache
def _marks(path: Path) -> dict[str, set[str]]:
    """Of a file of tests: where each function runs only ("gpu", "cpu_only"), by its name."""
    tree = ast.parse(path.read_text("utf-8"))

    def named(node: ast.expr) -> str:
        return ast.unparse(node).removeprefix("pytest.mark.").split("(")[0]

    assigned = {
        target.id: named(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    everywhere = {assigned["pytestmark"]} if "pytestmark" in assigned else set()
    return {
        node.name: everywhere
        | {assigned.get(name, name) for name in map(named, node.decorator_list)}
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }


def shown_by(tests: tuple[str, ...], where: str | None = None) -> str:
    """The files of tests, which must exist, and run on ``where`` ("cpu" or "gpu") if given."""
    files = []
    for test in tests:
        name, function = test.split("::")
        path = TESTS / f"test_{name}.py"
        marks = _marks(path).get(f"test_{function}") if path.is_file() else None
        if marks is None:
            raise NotUnderstood(f"there is no test {path.name}::test_{function}")
        other = {"cpu": "gpu", "gpu": "cpu_only"}.get(where or "")
        if other in marks:
            raise NotUnderstood(f"{path.name}::test_{function} does not run on the {where}")
        files.append(f"`{path.name}`")
    return ", ".join(dict.fromkeys(files))


# --- refusals --------------------------------------------------------------------------------


def _text(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
    return None


def _texts(node: ast.expr | None) -> Iterator[str]:
    """Texts of a list, of what a comprehension makes, or of one text."""
    if isinstance(node, ast.List):
        for element in node.elts:
            yield from _texts(element)
    elif isinstance(node, ast.ListComp | ast.GeneratorExp):
        yield from _texts(node.elt)
    elif node is not None and (text := _text(node)) is not None:
        yield text


def refusals(source: str, *, lists: bool) -> list[str]:
    """What a module refuses: texts given to UnsupportedFeature and, with ``lists``, those in lists
    that its functions make, and what they add to ``found``. "…" stands for what is filled in."""
    texts: list[str] = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                collects = lists and called in ("found.append", "found.extend")
                if collects or called.split(".")[-1] == "UnsupportedFeature":
                    texts += _texts(node.args[0])
            elif lists and isinstance(node, ast.Return | ast.Assign | ast.AugAssign):
                texts += _texts(node.value) if isinstance(node.value, ast.List) else ()
    return list(dict.fromkeys(texts))


def all_refusals() -> list[str]:
    """Every refusal of the plugin."""
    texts: list[str] = []
    for path in sorted(PLUGIN.rglob("*.py")):
        lists = path.name in ("support.py", "transfer.py")
        texts += refusals(path.read_text("utf-8"), lists=lists)
    return list(dict.fromkeys(texts))


def refusal_tables(texts: list[str]) -> Iterator[str]:
    """A table for each part of REFUSALS. Every text has one line, every line a text."""
    left = set(texts)
    for title, lines in REFUSALS.items():
        yield f"### {title}\n\n| message | why | test |\n|---|---|---|"
        for words, why, tests in lines:
            matching = [text for text in texts if text in left and words in text]
            if words in left:
                matching = [words]
            if not matching:
                raise NotUnderstood(
                    f"nothing in the plugin says {words!r} any more, or a line before it takes it: "
                    "REFUSALS in scripts/support.py"
                )
            left.difference_update(matching)
            if not tests:
                raise NotUnderstood(f"no test shows the refusal {words!r}")
            for text in matching:
                yield f"| {_cell(text)} | {why} | {shown_by(tests)} |"
        yield ""
    if left:
        raise NotUnderstood(
            "the plugin refuses what has no line in REFUSALS of scripts/support.py: "
            + "; ".join(sorted(left))
        )


# --- figures of other pages ------------------------------------------------------------------


def figures(page: Path, heading: str, row: str) -> dict[str, str]:
    """One row of the table under a heading: cells by column. Bold is dropped."""
    text = page.read_text("utf-8")
    parts = re.split(rf"^#+ {re.escape(heading)}$", text, maxsplit=1, flags=re.M)
    columns: list[str] = []
    for line in parts[-1].splitlines() if len(parts) == 2 else []:
        if line.startswith("#"):
            break
        if not line.startswith("|"):
            columns = []
            continue
        cells = [cell.strip().replace("**", "") for cell in line.strip("|").split("|")]
        columns = columns or cells
        if cells[0] == row:
            return dict(zip(columns, cells, strict=True))
    raise NotUnderstood(f"{page.name} has no row {row} under {heading}")


def _quality(name: str) -> str:
    if name not in QUALITY:
        return "-"
    row = figures(DOCS / "quality.md", QUALITY[name], RECIPE)
    shift, top = (row[column].split(" [")[0] for column in ("delta ppl", "top-1"))
    return f"{QUALITY[name]}: delta ppl {shift}, top-1 {top}, {row['verdict']}"


def _speed(name: str) -> str:
    if name not in SPEED:
        return "-"
    what, column = SPEED[name]
    cell = figures(DOCS / "benchmarks.md", "Engine", RECIPE)[column]
    took, ratio = cell.removesuffix(")").split(" (")
    return f"{what}, {column.removesuffix(', ms')}: {took} ms a token, {ratio} bf16's speed"


# --- the page --------------------------------------------------------------------------------


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _moved(entry: dict[str, Any]) -> str:
    return f"{entry['moved']['6.4x']:g}, {entry['moved']['2.7x']:g}"


def _on_a_gpu(name: str, refused: list[str], there: dict[str, Any]) -> str:
    """``refused``: why a GPU would refuse it; ``there``: what was measured on one."""
    ran = "moved" in there.get(name, {})
    if refused:
        if ran or name in ON_A_GPU:
            raise NotUnderstood(f"{name} ran on a GPU and is refused there: {refused}")
        return "refused: " + "; ".join(refused)
    what, tests = ON_A_GPU.get(name, ("", ()))
    parts = [_moved(there[name]) if ran else "", what, shown_by(tests, "gpu") if tests else ""]
    parts = list(filter(None, parts))
    return "ran: " + "; ".join(parts) if parts else NOT_RUN


def family_tables(families: dict[str, Any], there: dict[str, Any]) -> Iterator[str]:
    """A table for each section of the families. ``there``: what was measured on a GPU."""
    for section in dict.fromkeys(entry["section"] for entry in families.values()):
        entries = {n: e for n, e in families.items() if e["section"] == section}
        yield f"### {section}\n"
        running = {n: e for n, e in entries.items() if "refused" not in e}
        if running:
            yield "| family | of its own | CPU | GPU | ratio | moved | quality | speed |"
            yield "|---|---|---|---|---|---|---|---|"
        for name, e in running.items():
            count = len(e["compressed"])
            layers = "" if count == e["layers"] else f", {count} of {e['layers']} layers"
            yield (
                "| "
                + " | ".join(
                    [
                        f"{e['title']} (`{e['architecture']}`)",
                        e["shows"],
                        f"ran{layers}",
                        _cell(_on_a_gpu(name, e["gpu"], there)),
                        f"{e['ratio']:.2f}x",
                        _moved(e),
                        _quality(name),
                        _speed(name),
                    ]
                )
                + " |"
            )
        if running:
            yield ""
        refused = {n: e for n, e in entries.items() if "refused" in e}
        if refused:
            yield "| family | of its own | refused, with | when |\n|---|---|---|---|"
        for name, e in refused.items():
            when = "when the model is loaded" if e["loads"] else "before it is loaded"
            if "moved" in there.get(name, {}):
                when += f"; on a GPU it ran: {_moved(there[name])}"
            title = f"{e['title']} (`{e['architecture']}`)"
            yield f"| {title} | {e['shows']} | {_cell(e['refused'])} | {when} |"
        if refused:
            yield ""


def feature_table() -> Iterator[str]:
    yield "| feature | CPU | GPU |\n|---|---|---|"
    for feature in FEATURES:
        cpu = ", ".join(filter(None, [shown_by(feature.cpu, "cpu"), feature.cpu_words]))
        gpu = ", ".join(filter(None, [shown_by(feature.gpu, "gpu"), feature.gpu_words]))
        if not cpu or not gpu:
            raise NotUnderstood(f"{feature.name}: neither a test nor words")
        yield f"| {feature.name} | {cpu} | {gpu} |"


def render() -> str:
    """The page. Raises NotUnderstood."""
    kept = json.loads(DATA.read_text("utf-8"))
    families = kept["families"]
    there = json.loads(GPU_DATA.read_text("utf-8"))
    gpu = {f"gpu_{name}": value for name, value in there["versions"].items()}
    gpu["gpu_families"] = sum("moved" in entry for entry in there["families"].values())
    gpu["gpu"] = there["gpu"]
    if unknown := set(there["families"]) - set(families):
        raise NotUnderstood(f"{GPU_DATA.name} has {sorted(unknown)}, {DATA.name} has not")
    for name in (*QUALITY, *SPEED, *ON_A_GPU):
        if name not in families:
            raise NotUnderstood(f"there is no family {name} in {DATA.name}")
    (recipe,) = {e["recipe"] for e in families.values() if "recipe" in e}
    return (
        "\n".join(
            [
                PREAMBLE,
                FAMILIES.format(**kept["versions"], **gpu, recipe=recipe, calibrated=RECIPE).rstrip(
                    "\n"
                ),
                "",
                *family_tables(families, there["families"]),
                f"Measured by `{COMMAND}`, kept in `docs/support.json` and (on a GPU) "
                "`docs/support_gpu.json`.\n",
                "## Features\n",
                *feature_table(),
                "",
                "## Refusals",
                "",
                "Every refusal in the plugin's sources, with dots for what is filled in: "
                '`UnsupportedFeature` names them after "KAKEYA does not support:".',
                "[Troubleshooting](troubleshooting.md) has ways round.",
                "",
                *refusal_tables(all_refusals()),
            ]
        ).rstrip("\n")
        + "\n"
    )


def measure() -> None:
    """Run the tests of the families and keep what they measured."""
    from vllm.platforms import current_platform

    data = GPU_DATA if current_platform.is_cuda() else DATA
    fresh = data.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "tests/vllm/test_families.py"]
    try:
        subprocess.run(
            command, cwd=ROOT, env=os.environ | {"KAKEYA_TEST_FAMILIES": str(fresh)}, check=True
        )
        fresh.replace(data)
    finally:
        fresh.unlink(missing_ok=True)


def main() -> int:
    command = sys.argv[1:]
    if command not in (["measure"], ["write"], ["check"]):
        print("usage: scripts/support.py measure | write | check", file=sys.stderr)
        return 2
    try:
        if command == ["measure"]:
            measure()
        page = render()
    except (NotUnderstood, subprocess.CalledProcessError) as error:
        print(f"docs/support.md: {error}", file=sys.stderr)
        return 1
    if command == ["check"]:
        if PAGE.is_file() and PAGE.read_text("utf-8") == page:
            return 0
        print("docs/support.md is stale: scripts/support.py write", file=sys.stderr)
        return 1
    PAGE.write_text(page, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
