"""Decodes with the ops and no Decoder: a prompt forks into a tree of branches that share its KV pages."""

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from treedecode import ops
from treedecode.cache.page_pool import PagePool
from treedecode.tasks.countdown import model_path


def paged_attention(module, q, k, v, mask, *, scaling, step, **_):
    """Computes one layer's attention; q, k, v: [1, heads, num_tokens, head_dim], the new tokens of all branches."""
    pool, page_table, seq_lens, plan, slots = step
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    k_pages, v_pages = pool.layer(module.layer_idx)
    ops.append_kv(k, v, k_pages, v_pages, slots)
    out, _ = ops.tree_attention(q, k_pages, v_pages, page_table, seq_lens, plan, sm_scale=scaling)
    return out[None], None


def forward(model, pool, rows, tokens):
    """Appends the ids tokens[i] to branch rows[i]; returns the logits after each branch, [len(rows), vocab]."""
    q_lens, config = torch.tensor([len(new) for new in tokens], dtype=torch.int32), model.config
    slots = pool.append(rows, q_lens)  # takes free pages; copies a partial last page that other branches hold too
    page_table, seq_lens = pool.page_table[rows], pool.seq_lens[rows]
    heads = {"num_qo_heads": config.num_attention_heads, "num_kv_heads": config.num_key_value_heads}
    plan = ops.plan_tree(page_table, seq_lens, q_lens, page_size=pool.page_size, head_dim=config.head_dim, **heads)
    step = pool, page_table, seq_lens, plan, slots  # reaches every layer's attention as a keyword argument
    positions = torch.cat([torch.arange(end - new, end) for end, new in zip(seq_lens, q_lens, strict=True)])
    ids, last = torch.cat(tuple(tokens)), q_lens.cumsum(0) - 1
    return model(ids[None], position_ids=positions[None], logits_to_keep=last, use_cache=False, step=step).logits[0]


@torch.inference_mode()
def decode_tree(model, pool, prompt, levels):
    """For each (width, num_tokens) of levels, forks every branch width times and samples num_tokens on each."""
    rows, branches = pool.allocate_rows(1), [prompt]
    logits = forward(model, pool, rows, branches)
    for width, num_tokens in levels:
        parents = torch.arange(len(rows)).repeat_interleave(width)  # siblings are neighbours, where sharing is found
        children = pool.allocate_rows(len(parents))
        pool.fork(rows[parents], children)  # copies page ids, neither keys nor values
        pool.release(rows)
        rows, branches, logits = children, [branches[i] for i in parents], logits[parents]
        for position in range(len(branches[0]), len(branches[0]) + num_tokens):
            tokens, _, _ = ops.sample(logits, temperature=1.0, seed=torch.arange(len(rows)), position=position)
            branches = [torch.cat(pair) for pair in zip(branches, tokens[:, None], strict=True)]
            logits = forward(model, pool, rows, tokens[:, None])
    return branches


AttentionInterface.register("paged", paged_attention)
if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(model_path(), attn_implementation="paged")
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(model_path())
    sizes = {"num_kv_heads": config.num_key_value_heads, "head_dim": config.head_dim, "dtype": model.dtype}
    pool = PagePool(num_layers=config.num_hidden_layers, num_pages=64, max_branches=24, max_pages_per_branch=4, **sizes)
    prompt = tokenizer.encode("Use 4 4 12 23 to make 19\n", return_tensors="pt")[0]
    for branch in decode_tree(model, pool, prompt, levels=((4, 11), (2, 10), (2, 9))):
        print(tokenizer.decode(branch[len(prompt) :]).strip().replace("\n", "; "))
