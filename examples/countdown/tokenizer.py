"""The tokenizer of the countdown model: one token for every number, word and sign, with the space before it."""

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

MAX_NUMBER = 999
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer for texts of the task with numbers up to 999, which decodes them to the same characters.

    The text of a sequence is the concatenation of its tokens' texts.
    """
    words = ["\n", "Use", " to", " make", ",", " left", " =", " +", " -", " *", " /"]
    numbers = [str(number) for number in range(MAX_NUMBER + 1)]
    vocab = [*SPECIAL, *words, *(f" {number}" for number in numbers), *numbers]
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(vocab)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?[0-9]+| ?[A-Za-z]+| ?[^ \n0-9A-Za-z]| "), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocab.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
