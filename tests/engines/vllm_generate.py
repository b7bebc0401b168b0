"""Generates with vLLM in a process of its own, because a process has one attention backend: `vllm_generate.py FILE`.

The file has a list of cases as JSON (`test_vllm_tokens.py` says what is in one); the last line of standard output has
their tokens.
"""

import json
import os
import sys

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def tokens_of(case):
    """Returns the new tokens of every completion, prompt by prompt, after each of the rounds."""
    from vllm import LLM, SamplingParams

    options = {"dtype": "float32", "enforce_eager": True, "disable_log_stats": True, "max_model_len": 1024}
    llm = LLM(case["model"], skip_tokenizer_init=True, **options | case["engine"])
    sampling = [SamplingParams(**one, detokenize=False) for one in case["sampling"]]
    prompts = [{"prompt_token_ids": ids} for ids in case["prompts"]]
    result = []
    for _ in range(case.get("rounds", 1)):
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        result.append([[list(one.token_ids) for one in output.outputs] for output in outputs])
    return result


def main():
    with open(sys.argv[1]) as file:
        cases = json.load(file)
    results = [tokens_of(case) for case in cases]
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    print(json.dumps({"backend": AttentionBackendEnum.CPU_ATTN.get_path(), "tokens": results}))


if __name__ == "__main__":
    main()
