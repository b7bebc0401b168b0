"""Loading: GGUF files are converted once per content and dtype, and missing files are named."""

import gguf
import numpy as np
import pytest
import torch

from treedecode.common import env
from treedecode.models import loading

HIDDEN, INTERMEDIATE, VOCAB = 32, 64, 40


@pytest.fixture
def gguf_path(tmp_path, monkeypatch):
    monkeypatch.setenv("TREEDECODE_CACHE", str(tmp_path / "cache"))
    return write_gguf(tmp_path / "tiny.gguf")


def write_gguf(path, lacking=()):
    """Writes a Llama of one layer as GGUF, with fp16 weights and a byte-level BPE tokenizer."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<s>", "</s>", "ab", "abc", *map(chr, range(97, 97 + VOCAB - 4))])
    writer.add_token_types([3, 3] + [1] * (VOCAB - 2))
    writer.add_token_merges(["a b", "ab c"])  # Transformers 5.17 takes a list of one for a string
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd": (VOCAB, HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_v": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_up": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INTERMEDIATE),
    }
    for name, shape in shapes.items():
        if name in lacking:
            continue
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float16 if len(shape) > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_is_converted_once(gguf_path, monkeypatch):
    model, tokenizer = loading.load_pretrained(gguf_path, dtype=torch.float32)
    down = model.model.layers[0].mlp.down_proj.weight
    assert down.shape == (HIDDEN, INTERMEDIATE)
    assert down.dtype == torch.float32
    assert not model.training
    stored = next(t for t in gguf.GGUFReader(gguf_path).tensors if t.name == "blk.0.ffn_down.weight")
    assert np.array_equal(down.detach().numpy(), stored.data.astype(np.float32).reshape(down.shape))

    monkeypatch.setattr(loading, "_load_gguf", lambda *args: pytest.fail("converted a second time"))
    again, same_tokenizer = loading.load_pretrained(gguf_path.parent, dtype=torch.float32, gguf_file=gguf_path.name)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert same_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert len(list((env.cache_dir() / "gguf").iterdir())) == 1  # and no scratch folder stays


def test_gguf_conversion_that_fails_leaves_nothing(gguf_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(loading, "_load_gguf", fail)
    with pytest.raises(OSError, match="disk full"):
        loading.load_pretrained(gguf_path)
    assert list((env.cache_dir() / "gguf").iterdir()) == []


def test_other_content_is_another_conversion(gguf_path):
    first = loading.convert_gguf(gguf_path, torch.float32)
    assert loading.convert_gguf(gguf_path, torch.bfloat16) != first
    content = bytearray(gguf_path.read_bytes())
    content[-40] ^= 1
    gguf_path.write_bytes(content)
    assert loading.convert_gguf(gguf_path, torch.float32) != first


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gguf_file: no file .*absent.gguf"):
        loading.load_pretrained(tmp_path / "absent.gguf")
    with pytest.raises(FileNotFoundError, match=r"path_or_id: no model folder at .*nowhere"):
        loading.load_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("lacking", [["blk.0.ffn_down"], ["token_embd"], ["blk.0.attn_q", "output_norm"]])
def test_a_gguf_file_that_lacks_weights(tmp_path, monkeypatch, lacking):
    monkeypatch.setenv("TREEDECODE_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "part.gguf", lacking)
    names = {"blk.0.ffn_down": "mlp.down_proj", "token_embd": "embed_tokens", "blk.0.attn_q": "self_attn.q_proj"}
    for _ in range(2):  # nothing of it is kept
        with pytest.raises(ValueError, match=rf"^gguf_file: part.gguf lacks weights of .*{names[lacking[0]]}"):
            loading.load_pretrained(path)
    assert list((env.cache_dir() / "gguf").iterdir()) == []


@pytest.mark.parametrize("number", [1, 2])
def test_one_part_of_a_gguf_file(tmp_path, monkeypatch, number):
    monkeypatch.setenv("TREEDECODE_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / f"tiny-0000{number}-of-00002.gguf")
    with pytest.raises(ValueError, match=r"^gguf_file: tiny-.* is one of 2 parts"):
        loading.load_pretrained(path)
    assert not (env.cache_dir() / "gguf").exists()


def test_the_only_part_of_a_gguf_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TREEDECODE_CACHE", str(tmp_path / "cache"))
    model, _ = loading.load_pretrained(write_gguf(tmp_path / "tiny-00001-of-00001.gguf"))
    assert model.config.num_hidden_layers == 1


def test_other_versions_convert_anew(gguf_path, monkeypatch):
    first = loading.convert_gguf(gguf_path, torch.float32)
    monkeypatch.setattr(loading, "version", lambda package: "another")
    assert loading.convert_gguf(gguf_path, torch.float32) != first


@pytest.mark.parametrize("size", [3, 200, -40])
def test_a_gguf_file_that_ends_early(gguf_path, size):
    gguf_path.write_bytes(gguf_path.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"^gguf_file: {gguf_path.name} is damaged, or no GGUF file: "):
        loading.load_pretrained(gguf_path)
    assert not list((env.cache_dir() / "gguf").iterdir())
