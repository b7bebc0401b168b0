"""Reward models: tiny random classification heads, against one plain forward per text."""

import asyncio

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
)

from treedecode.tasks import Problem
from treedecode.verify import RewardModel

pytestmark = pytest.mark.usefixtures("one_thread")

CHARACTERS = ["<pad>", "<s>", "<step>", *"abcdefghijklmnopqrstuvwxyz .,\n0123456789#"]
PROMPT = "what is 1.\n"
TEXTS = ["one", "two\nthree\n", "", "four\n\nfive and six\nseven", "two\nthree\n", "\n"]
STEPS = [["one"], ["two", "three"], [""], ["four", "five and six", "seven"], ["two", "three"], [""]]


def make_tokenizer(**special):
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="."))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", **special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<step>"]})
    return tokenizer


def make_model(kind, head, num_labels, **config):
    torch.manual_seed(3)
    config = {
        "vocab_size": len(CHARACTERS),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.5,
        "pad_token_id": 0,
        "num_labels": num_labels,
    } | config
    # float64: a padded and a plain forward may then be compared up to its own rounding
    return head.from_config(AutoConfig.for_model(kind, **config)).double().eval()


SEQUENCE, TOKEN = AutoModelForSequenceClassification, AutoModelForTokenClassification


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].numpy()


def softmax(x):
    return np.exp(x - x.max(-1, keepdims=True)) / np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)


def close(found, expected):
    return np.allclose(found, expected, rtol=0, atol=1e3 * np.finfo(np.float64).eps)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(("num_labels", "label"), [(1, None), (2, None), (2, 0), (3, 2), (3, "LABEL_1")])
def test_a_sequence_head_gives_one_grade(kind, num_labels, label):
    model, tokenizer = make_model(kind, SEQUENCE, num_labels), make_tokenizer()
    rewards = RewardModel(model, tokenizer, positive_label=label, batch_size=2)
    found = rewards.grade(PROMPT, TEXTS)
    outs = [logits(model, tokenizer(PROMPT + text)["input_ids"]) for text in TEXTS]
    chosen = {"LABEL_1": 1, None: 1}.get(label, label)
    assert close(found, [out[0] if num_labels == 1 else softmax(out)[chosen] for out in outs])
    assert rewards.probability == (num_labels > 1)
    assert len(np.unique(np.round(found, 6))) > 3, "the grades depend on the text"


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("aggregate", ["last", "min", "prod"])
@pytest.mark.parametrize(("num_labels", "step_token"), [(2, None), (1, "<step>"), (2, " ok\n")])
def test_a_token_head_grades_each_step(kind, aggregate, num_labels, step_token):
    model, tokenizer = make_model(kind, TOKEN, num_labels), make_tokenizer(bos_token="<s>")
    rewards = RewardModel(model, tokenizer, aggregate=aggregate, step_token=step_token, batch_size=3)
    assert rewards.probability
    combine = {"last": lambda steps: steps[-1], "min": min, "prod": np.prod}[aggregate]
    mark = tokenizer.encode(step_token or "\n", add_special_tokens=False)
    expected = []
    for steps in STEPS:
        ids = [1, *tokenizer.encode(PROMPT, add_special_tokens=False)]
        grades = []
        for step in steps:  # causal, so what follows a step does not change its grade
            ids += tokenizer.encode(step, add_special_tokens=False) + mark
            out = logits(model, ids)[-1]
            grades.append(softmax(out)[1] if num_labels == 2 else 1 / (1 + np.exp(-out[0])))
        expected.append(combine(grades))
    assert close(rewards.grade(PROMPT, TEXTS), expected)


def test_texts_are_computed_once_in_batches():
    model = make_model("llama", SEQUENCE, 2)
    shapes = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    texts = ["a" * n for n in (1, 9, 2, 9, 1, 30, 2)]
    RewardModel(model, make_tokenizer(), batch_size=2).grade(PROMPT, texts)
    assert [tuple(shape) for shape in shapes] == [(2, len(PROMPT) + 2), (2, len(PROMPT) + 30)]
    assert len(RewardModel(model, make_tokenizer()).grade(PROMPT, [])) == 0


def test_steps_are_what_the_separator_ends():
    rewards = RewardModel(make_model("llama", TOKEN, 2), make_tokenizer(), step_separator=". ", step_token="<step>")
    lines = RewardModel(rewards.model, rewards.tokenizer, step_token="<step>")
    assert rewards.grade(PROMPT, ["one. two. "]).tolist() == lines.grade(PROMPT, ["one\ntwo\n"]).tolist()
    assert rewards.grade(PROMPT, ["one\ntwo"]) != lines.grade(PROMPT, ["one\ntwo"])


def test_branches_are_scored_beside_what_decodes(make_decoder):
    dec = make_decoder()
    rewards = RewardModel(make_model("qwen2", TOKEN, 2), make_tokenizer(), aggregate="min")
    problem = Problem("p", PROMPT)

    async def one(texts):
        frontier = (await dec.roots(["the"])).fork(len(texts))
        frontier.append(texts)
        scores = await rewards(frontier, problem)
        assert frontier.scores.tolist() == scores.tolist()
        return scores.tolist()

    async def run():
        return await asyncio.gather(one(["a\nb", "c"]), one(["d\n"]), dec.generate_async("a", max_new_tokens=4))

    first, second, _ = dec.run(run())
    assert first == rewards.grade(PROMPT, ["a\nb", "c"]).tolist(), "whatever else is scored at the same time"
    assert second == rewards.grade(PROMPT, ["d\n"]).tolist()


@pytest.mark.parametrize("head", [SEQUENCE, TOKEN])
def test_a_chat_template_is_used_when_asked_for(head):
    model, tokenizer = make_model("llama", head, 2), make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}#{{ m['role'] }} {{ m['content'] }}.{% endfor %}"
        "{% if add_generation_prompt %}#assistant {% endif %}"
    )
    (found,) = RewardModel(model, tokenizer, chat=True).grade(PROMPT, ["four"])
    end = "." if head is SEQUENCE else "\n"
    out = logits(model, tokenizer.encode(f"#user what is 1..#assistant four{end}"))
    assert close(found, softmax(out if head is SEQUENCE else out[-1])[1])


@pytest.mark.parametrize("head", [SEQUENCE, TOKEN])
def test_a_folder_is_loaded_with_its_head(tmp_path, head):
    model, tokenizer = make_model("llama", head, 2), make_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = RewardModel(tmp_path)
    assert type(loaded.model) is type(model)
    assert close(loaded.grade(PROMPT, TEXTS), RewardModel(model, tokenizer).grade(PROMPT, TEXTS))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"aggregate": "mean"}, ValueError, "aggregate: expected one of last, min, prod, got 'mean'"),
        ({"aggregate": "min"}, ValueError, "aggregate: .* grades no steps, so expected 'last', got 'min'"),
        ({"batch_size": 0}, ValueError, "batch_size: expected an int >= 1, got 0"),
        ({"step_token": ""}, ValueError, "step_token: expected texts, got an empty one"),
        ({"positive_label": "good"}, ValueError, "positive_label: expected one of LABEL_0, LABEL_1; got 'good'"),
        ({"positive_label": 2}, ValueError, "positive_label: .*; got 2"),
        ({"tokenizer": None}, TypeError, "tokenizer: expected the reward model's, got None"),
        ({"chat": True}, ValueError, "chat: the tokenizer has no chat template"),
    ],
)
def test_settings_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        RewardModel(**({"path_or_model": make_model("llama", SEQUENCE, 2), "tokenizer": make_tokenizer()} | options))


def test_models_are_checked():
    tokenizer = make_tokenizer()
    with pytest.raises(
        TypeError, match=r"expected a model with a head ForSequenceClassification or .*, got LlamaForCausalLM"
    ):
        RewardModel(make_model("llama", AutoModelForCausalLM, 2), tokenizer)
    with pytest.raises(ValueError, match="positive_label: expected one of the model's 3 labels, got None"):
        RewardModel(make_model("llama", SEQUENCE, 3), tokenizer)
    with pytest.raises(
        ValueError, match="positive_label: expected one of none, as the model has a single output; got 0"
    ):
        RewardModel(make_model("llama", SEQUENCE, 1), tokenizer, positive_label=0)
    with pytest.raises(ValueError, match="in training mode"):
        RewardModel(make_model("llama", SEQUENCE, 2).train(), tokenizer)
    unpadded = make_model("llama", SEQUENCE, 2, pad_token_id=None)
    with pytest.raises(ValueError, match="batch_size: expected 1 for a model whose config has no pad_token_id"):
        RewardModel(unpadded, tokenizer)
    assert RewardModel(unpadded, tokenizer, batch_size=1).grade(PROMPT, ["a", "bc"]).shape == (2,)
    with pytest.raises(ValueError, match="a text of 73 tokens is longer than the reward model's 64"):
        RewardModel(make_model("llama", SEQUENCE, 2), tokenizer).grade("", ["a" * 73])
