"""vLLM with treedecode's attention gives the tokens of vLLM without it, in fp32: `make test-vllm`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="make test-vllm installs vLLM in an environment of its own")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024, "initializer_range": 0.15,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "llama": {},
    "mistral": {"sliding_window": 40},
    "gemma2": {
        "tie_word_embeddings": True,
        "sliding_window": 32,
        "query_pre_attn_scalar": 32,
        "final_logit_softcapping": 20.0,
    },
    "gpt_oss": {"sliding_window": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
}
GREEDY = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}


def sampled(n, seed):
    return {"n": n, "temperature": 1.0, "seed": seed, "max_tokens": 24, "ignore_eos": True}


def prompt(seed, length, shared=0):
    """Makes a prompt whose first `shared` tokens are those of all others."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 320, (length,), generator=generator)
    ids[:shared] = torch.randint(3, 320, (shared,), generator=torch.Generator().manual_seed(99))
    return ids.tolist()


FEW = {"max_num_seqs": 32, "max_num_batched_tokens": 1024}
CASES = {  # model, engine, prompts, sampling, rounds
    "16 branches, block 16": ("llama", {**FEW, "block_size": 16}, [prompt(0, 300)], [sampled(16, 7)], 1),
    "16 branches, block 32": ("llama", {**FEW, "block_size": 32}, [prompt(0, 300)], [sampled(16, 7)], 1),
    "16 branches, block 128": ("llama", {**FEW, "block_size": 128}, [prompt(0, 300)], [sampled(16, 7)], 1),
    "greedy beside others": (
        "llama", {**FEW, "block_size": 16}, [prompt(i, 40 + 30 * i) for i in range(5)], [GREEDY] * 5, 1,
    ),
    "prompts in turns": (
        "llama", {**FEW, "block_size": 16}, [prompt(i % 3, 150 + i // 3, 0) for i in range(12)],
        [sampled(2, i) for i in range(12)], 1,
    ),
    "a system prompt, twice": (
        "llama", {**FEW, "block_size": 16}, [prompt(i, 220, shared=200) for i in range(6)],
        [sampled(2, i) for i in range(6)], 2,
    ),
    "chunked prefill": (
        "llama", {"block_size": 16, "max_num_seqs": 8, "max_num_batched_tokens": 64},
        [prompt(i, 90 + 70 * i) for i in range(6)], [GREEDY] * 6, 1,  # vLLM 0.32 cannot seed it on a CPU
    ),
    "preemption": (
        "llama", {**FEW, "block_size": 16, "num_gpu_blocks_override": 40, "max_model_len": 320},
        [prompt(i, 100) for i in range(8)],
        [GREEDY | {"max_tokens": 60}] * 8, 1,
    ),
    "sliding window": ("mistral", {**FEW, "block_size": 16}, [prompt(0, 150), prompt(1, 20)], [sampled(8, 1)] * 2, 1),
    "soft cap": ("gemma2", {**FEW, "block_size": 16}, [prompt(0, 150), prompt(1, 20)], [sampled(8, 1)] * 2, 1),
    "sinks": ("gpt_oss", {**FEW, "block_size": 16}, [prompt(0, 150), prompt(1, 20)], [sampled(8, 1)] * 2, 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Runs all cases with vLLM's attention and with treedecode's."""
    folder = tmp_path_factory.mktemp("vllm")
    for name, extra in MODELS.items():
        torch.manual_seed(1)
        config = AutoConfig.for_model(name, **SIZES | extra)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
    cases = [
        {"model": str(folder / model), "engine": engine, "prompts": prompts, "sampling": sampling, "rounds": rounds}
        for model, engine, prompts, sampling, rounds in CASES.values()
    ]
    outcomes = []
    for plugin in ("0", "1"):
        if plugin == "0":  # vLLM's own attention takes multiples of 32
            stock = [{**case, "engine": {**case["engine"], "block_size": 32}} for case in cases]
        (folder / "cases.json").write_text(json.dumps(stock if plugin == "0" else cases))
        command = [sys.executable, str(Path(__file__).with_name("vllm_generate.py")), str(folder / "cases.json")]
        run = subprocess.run(command, env=os.environ | {"TREEDECODE_VLLM": plugin}, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-4000:]
        outcomes.append(json.loads(run.stdout.splitlines()[-1]))
    return outcomes


def test_the_plugin_is_loaded_by_its_entry_point(results):
    stock, ours = (result["backend"] for result in results)
    assert stock == "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"
    assert ours == "treedecode.integrations.vllm.cpu.TreeAttentionBackend"


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_vllm(results, case):
    number = list(CASES).index(case)
    stock, ours = (result["tokens"][number] for result in results)
    assert ours == stock
    assert len({token for completion in stock[0][0] for token in completion}) > 5, "a text with something in it"
