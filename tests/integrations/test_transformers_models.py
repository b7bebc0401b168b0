"""`treedecode.generate` on compiled models, under other default devices, and on text prompts of multimodal classes."""

import pytest
import torch
from support.generate_cases import VOCAB, make_inputs, make_model
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import treedecode
import treedecode as td

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = {"max_new_tokens": 10, "do_sample": False}
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}


def compile_forward(model):
    model.forward = torch.compile(model.forward)


def compile_a_layer(model):
    model.model.layers[1].forward = torch.compile(model.model.layers[1].forward)


def compile_in_place(model):
    model.compile()


@pytest.mark.parametrize("compile_model", [compile_forward, compile_a_layer, compile_in_place])
def test_compiled_models_run_as_they_were_written(compile_model, monkeypatch):
    model = make_model()
    want = model.generate(**make_inputs(2), **GREEDY).tolist()
    compile_model(model)
    monkeypatch.setattr(torch._dynamo.convert_frame, "compile_frame", lambda *args, **kwargs: pytest.fail("compiled"))
    assert model.generate(**make_inputs(2), **GREEDY, custom_generate=treedecode.generate).tolist() == want


@pytest.fixture
def meta_by_default():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"output_scores": True, "return_dict_in_generate": True}], ids=str
)
def test_another_default_device(request, options):
    model, inputs = make_model(), make_inputs(2)
    want = model.generate(**inputs, **GREEDY, **options)
    [prompt] = make_inputs(1)["input_ids"].tolist()
    request.getfixturevalue("meta_by_default")
    got = model.generate(**inputs, **GREEDY, **options, custom_generate=treedecode.generate)
    if "output_scores" in options:
        want, got = want.sequences, got.sequences
    assert got.tolist() == want.tolist()
    with td.Decoder(make_model_on_cpu()) as dec:

        async def search():
            with await dec.roots([prompt]) as root, root.fork(2) as frontier:
                await frontier.extend(max_new_tokens=3)
                await frontier.hidden()
                return frontier.num_tokens.tolist()

        assert dec.run(search()) == [len(prompt) + 3] * 2
        assert len(dec.generate([prompt], num_branches=2, max_new_tokens=4)[0]) == 2


def make_model_on_cpu():
    with torch.device("cpu"):
        return make_model()


def gemma3():
    text = {**TEXT, "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    tokens = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92, "mm_tokens_per_image": 4}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **tokens))


def qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14}
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    text = {**TEXT, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **tokens))


def llava():
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=vision, image_token_index=90)
    return LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("make", [gemma3, qwen2_vl, llava])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_text_prompts_of_multimodal_classes(make, options):
    torch.manual_seed(0)
    model = make().eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.25)
    for batch in (1, 3):
        inputs = make_inputs(batch)
        inputs["input_ids"] %= 89  # no token of an image
        want = model.generate(**inputs, **GREEDY, **options)
        got = model.generate(**inputs, **GREEDY, **options, custom_generate=treedecode.generate)
        assert got.tolist() == want.tolist()
        assert len(set(want[0].tolist())) > 3, "another text than one token over and over"
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    assert len({id(config) for config in configs}) >= 2
    assert {config._attn_implementation for config in configs} == {"sdpa"}, "nested ones are restored too"
    positions = torch.arange(7).expand(3, 1, 7) + torch.tensor([0, 0, 1])[:, None, None]
    with pytest.raises(ValueError, match="position_ids: expected those of the attention mask"):
        model.generate(**make_inputs(1), **GREEDY, position_ids=positions, custom_generate=treedecode.generate)
