import pytest
import torch

from treedecode import ops


def update_in_torch(scores, hit, pool_scores, pool_finished, texts, candidate_texts, num_beams, length):
    """Does the same step with torch ops on padded token rows, as a beam search in Python does."""
    running_scores, running = (scores + hit * -1e9).topk(num_beams, dim=1)
    running_texts = candidate_texts.gather(1, running[:, :, None].expand(-1, -1, texts.shape[2]))
    finished = hit.clone()
    finished[:, num_beams:] = False
    merged = torch.cat([pool_scores, scores / length + ~finished * -1e9], dim=1)
    best, index = merged.topk(num_beams, dim=1)
    best_texts = torch.cat([texts, candidate_texts], dim=1).gather(1, index[:, :, None].expand(-1, -1, texts.shape[2]))
    best_finished = torch.cat([pool_finished, finished], dim=1).gather(1, index)
    done = (running_scores[:, :1] / length <= best.amin(1, keepdim=True)) & best_finished.all(1, keepdim=True)
    return running_scores, running_texts, best_texts, done


@pytest.mark.parametrize(("num_groups", "num_beams"), [(1, 8), (16, 8), (256, 16)])
def bench_beam_update(compare, num_groups, num_beams):
    torch.manual_seed(0)
    num_candidates, length, max_len = 2 * num_beams, 100, 256
    total = num_groups * num_beams
    scores = -torch.rand(num_groups, num_candidates).cumsum(1)
    indptr = torch.arange(0, total + 1, num_beams, dtype=torch.int32)
    parent = (torch.randint(0, num_beams, scores.shape) + indptr[:-1, None]).int()
    token = torch.randint(0, 20, scores.shape, dtype=torch.int32)
    pool = [torch.full((total,), -1e9), *torch.zeros(3, total, dtype=torch.int32).unbind()]
    done = torch.zeros(num_groups, dtype=torch.bool)
    settings = {
        "gen_lens": torch.full((num_groups,), length, dtype=torch.int32),
        "max_new_tokens": torch.full((num_groups,), max_len, dtype=torch.int32),
        "eos_ids": torch.tensor([3], dtype=torch.int32),
    }
    texts = torch.zeros(num_groups, num_beams, max_len, dtype=torch.int64)
    candidate_texts = torch.zeros(num_groups, num_candidates, max_len, dtype=torch.int64)
    pool_scores = torch.full((num_groups, num_beams), -1e9)
    pool_finished = torch.zeros(num_groups, num_beams, dtype=torch.bool)

    def prepare():
        pool[0].fill_(-1e9)
        pool[1].zero_()
        done.zero_()

    compare(
        lambda: ops.beam_update(scores, parent, token, indptr, indptr, *pool, done, **settings),
        {
            "torch, token rows": lambda: update_in_torch(
                scores, token == 3, pool_scores, pool_finished, texts, candidate_texts, num_beams, float(length)
            )
        },
        num_bytes=3 * scores.nbytes + 4 * total * (3 + 2 * 4),  # candidates in, running out, pool in and out
        prepare=prepare,
    )
