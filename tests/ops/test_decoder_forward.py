import threading
import time

import pytest
import torch
from support.decoder_cases import assert_same, bits, branch_alone, in_torch, make_case, one_after_another, truth

from treedecode import ops, reference
from treedecode.ops.decoder_forward import LAYER_TENSORS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "plain": {},
    "head norms": {"head_norms": True},
    "biases": {"biases": True, "gate": "gelu_tanh"},
    "windows and sinks": {"windows": 3, "sinks": True},
    "window of one": {"windows": 0, "page_size": 16},
    "soft caps": {"soft_caps": 1.5, "unit_offset": True},
    "all": {"head_norms": True, "biases": True, "sinks": True, "soft_caps": 2.0, "windows": 5, "gate": "gelu_tanh",
            "unit_offset": True, "idle": 2},
    "pages of one token": {"page_size": 1, "windows": 4},
    "pages of 16 tokens": {"page_size": 16, "head_norms": True},
    "many tokens": {"page_size": 16, "q_lens": (1, 16, 9, 17, 32, 0)},  # whole blocks of tile registers
    "no tokens at last": {"q_lens": (0, 3, 0, 0, 1, 1), "idle": 1},
    "hidden_size widest": {"sizes": (64, 2, 1, 16, 20, 5)},
    "heads widest": {"sizes": (10, 6, 3, 24, 14, 50)},
    "intermediate_size widest": {"sizes": (48, 3, 1, 72, 250, 97)},
    "head_dim 256": {"sizes": (32, 1, 1, 256, 32, 16)},
    "all sizes least": {"sizes": (2, 1, 1, 8, 2, 1)},
    "no layers": {"num_layers": 0},
    "some logits": {"logit_rows": (2, 4, 0)},
    "repeated logits": {"logit_rows": (6, 6, 1, 6)},
    "more logits than tokens": {"logit_rows": (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6) * 2},
    "no logits": {"logit_rows": ()},
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def rms(x):
    return x.double().pow(2).mean().sqrt() if x.numel() else torch.zeros(())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(isa, dtype, options):
    """Errors against float64 are at most twice those of torch operators in the dtype, plus one ulp."""
    case = make_case(dtype=dtype, **options)
    exact, peer = truth(case)
    got = case.run()
    for name, a, b, c in zip(("logits", "hidden", "kv"), got, exact, peer, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a.isnan(), b.isnan()), name  # only the tokens' slots of kv are written
        budget = 2 * rms((c - b).nan_to_num()) + torch.finfo(dtype).eps * rms(b.nan_to_num())
        assert rms((a - b).nan_to_num()) <= budget, f"{name}: {rms((a - b).nan_to_num()) / budget:.2f} of the budget"
    written = case.options["num_layers"] * 2 * int((case.args[4] >= 0).sum())
    changed = (bits(got[2]) != bits(case.kv)).any(-1).any(3)
    assert int(changed.sum()) == written


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_reference_is_the_computation_in_torch(options):
    """The reference agrees with torch operators with dense masks, in float64."""
    case = make_case(**options)
    for a, b in zip(truth(case)[0], in_torch(case, torch.float64), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_as_the_single_ops(isa, dtype, options):
    case = make_case(dtype=dtype, **options)
    before = [t.clone() for t in [*case.args[:3], *case.args[4:7], *case.weights.tensors]]
    assert_same(case.run(), one_after_another(case))
    for a, b in zip([*case.args[:3], *case.args[4:7], *case.weights.tensors], before, strict=True):
        assert torch.equal(a, b)


LARGE = {"sizes": (96, 6, 2, 32, 208, 500), "page_size": 16, "q_lens": (3, 16, 9, 1, 32, 1), "head_norms": True}


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeatable_with_any_number_of_threads(isa, dtype):
    case = make_case(dtype=dtype, **LARGE)
    want = case.run()
    for num_threads in (2, 3, 1):
        torch.set_num_threads(num_threads)
        assert_same(case.run(), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_branch_does_not_depend_on_the_others(isa, dtype):
    case = make_case(dtype=dtype, **LARGE)
    logits, hidden, kv = case.run()
    for row in range(len(case.args[6])):
        single, tokens = branch_alone(case, row)
        own_logits, own_hidden, own_kv = single.run()
        assert torch.equal(own_logits, logits[tokens])
        assert torch.equal(own_hidden, hidden[tokens])
        page, offset = single.args[4] // 16, single.args[4] % 16
        assert torch.equal(own_kv[:, :, page, :, offset], kv[:, :, page, :, offset])


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_do_not_depend_on_which_others_are_asked_for(isa, dtype):
    case = make_case(dtype=dtype, **LARGE)
    logits, hidden, _ = case.run()
    for rows in ([5], [40, 2], [61, 7, 7, 0] * 30):
        some_logits, some_hidden, _ = case.replace(logit_rows=torch.tensor(rows)).run()
        assert torch.equal(some_logits, logits[rows])
        assert torch.equal(some_hidden, hidden[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_of_no_branch_change_nothing(isa, dtype):
    with_idle, without = (make_case(dtype=dtype, windows=3, idle=idle) for idle in (3, 0))
    count = len(without.args[0])
    x, cos, sin = (torch.cat([a, b[count:]]) for a, b in zip(without.args[:3], with_idle.args[:3], strict=True))
    slots = torch.cat([without.args[4], torch.full((3,), -1)])
    more = without.replace(x=x, cos=cos, sin=sin, slots=slots, logit_rows=torch.arange(count + 3))
    logits, hidden, kv = more.run()
    assert_same((logits[:count], hidden[:count], kv), without.run())
    assert not logits.isnan().any()


def without_tokens(case, num_branches):
    """Returns a case without query tokens, in a batch of so many branches."""
    x, cos, sin, _, slots, table, lens, _, logit_rows = case.args
    table, lens = table[:num_branches], lens[:num_branches]
    heads = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    plan = ops.plan_tree(table, lens, torch.zeros_like(lens), page_size=4, **heads)
    return case.replace(
        x=x[:0], cos=cos[:0], sin=sin[:0], slots=slots[:0], page_table=table, seq_lens=lens, plan=plan,
        logit_rows=logit_rows[:0],
    )  # fmt: skip


@pytest.mark.parametrize("num_branches", [0, 3])
@pytest.mark.parametrize("module", [ops, reference])
def test_no_tokens(module, num_branches):
    case = without_tokens(make_case(), num_branches)
    logits, hidden, kv = case.run(module)
    assert logits.shape == (0, 37)
    assert hidden.shape == (0, 24)
    assert torch.equal(bits(kv), bits(case.kv))


def test_layout_of_kv_does_not_matter(isa):
    for dtype in DTYPES:
        hnd, nhd = (make_case(dtype=dtype, layout=layout) for layout in ("HND", "NHD"))
        assert not nhd.kv.is_contiguous()
        assert torch.equal(bits(nhd.kv), bits(hnd.kv))
        assert nhd.run()[2].stride() == nhd.kv.stride()
        want = hnd.run()
        assert_same(nhd.run(), want)
        wide = torch.full((4, 3, *hnd.kv.shape[2:-1], 2 * hnd.kv.shape[-1]), 7.0, dtype=dtype)
        part = wide[1:3, 1:, ..., : hnd.kv.shape[-1]]
        part.copy_(hnd.kv)
        logits, hidden = ops.decoder_forward(*hnd.replace(kv=part).args, hnd.weights)
        assert_same((logits, hidden, part), want)
        part.fill_(7.0)
        assert (wide == 7.0).all()


def test_angles_and_tables_may_be_strided():
    case = make_case()
    x, cos, sin, _, _, table, *_ = case.args
    same = cos[:1].expand(len(x), -1)
    wide = torch.cat([same, sin], dim=1)
    got = case.replace(cos=same, sin=wide[:, 8:], page_table=torch.cat([table, table], dim=1)[:, : table.shape[1]])
    assert_same(got.run(), case.replace(cos=same.clone()).run())


def slow_case():
    """Returns a case of hundreds of layers of the same weights, which takes some tenths of a second."""
    case = make_case(**(LARGE | {"dtype": torch.float32, "num_layers": 1}))
    count, w = 400, case.weights
    return case.replace(
        kv=case.kv.expand(count, *case.kv.shape[1:]).clone(),
        tensors=[*w.tensors[: len(LAYER_TENSORS)] * count, *w.tensors[len(LAYER_TENSORS) :]],
        sm_scales=w.sm_scales * count, soft_caps=w.soft_caps * count, windows=w.windows * count,
    )  # fmt: skip


def test_another_thread_runs_python_meanwhile():
    case, times = slow_case(), []

    def forward():
        times.append(time.perf_counter())
        ops.decoder_forward(*case.args, case.weights)
        times.append(time.perf_counter())

    thread = threading.Thread(target=forward)
    seen = []
    thread.start()
    while thread.is_alive():
        seen.append(time.perf_counter())
    begin, end = times
    quarter = (end - begin) / 4
    assert any(begin + quarter < moment < end - quarter for moment in seen)


def test_same_bits_on_other_threads():
    case = make_case(**LARGE)
    want, results = case.run(), [None] * 3

    def forward(i):
        results[i] = [case.run() for _ in range(5)]

    threads = [threading.Thread(target=forward, args=(i,)) for i in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got in (got for runs in results for got in runs):
        assert_same(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    case = make_case(dtype=dtype, head_norms=True, biases=True, sinks=True)
    x, cos, sin, kv, slots, table, lens, plan, logit_rows = case.args
    w = case.weights
    args = (
        x, cos, sin, kv.nan_to_num(), slots, table, lens, *plan.tensors,
        logit_rows, w.tensors, w.sm_scales, w.soft_caps, w.windows, w.eps, w.unit_offset, w.gate, w.num_qo_heads,
        w.intermediate_size, w.vocab_size,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.treedecode.decoder_forward, args)
