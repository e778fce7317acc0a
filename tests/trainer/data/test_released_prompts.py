"""The prompts of princetonvisualai/merv, by strings written out by hand from its builders."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from featurestore.clips import Turn
from trainer.data.prompts import IGNORE_INDEX, Renderer

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TWO = (
    Turn(role="human", text=" <image>\nWhat is it?"),
    Turn(role="gpt", text="A cat. "),
    Turn(role="human", text="Where?"),
    Turn(role="gpt", text="On a mat."),
)


def characters(*, bos, eos, special):
    """A token per byte, special tokens whole; `bos` is added to plain text, where there is one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token in (bos, eos, *special) if token])
    if bos:
        opened = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=opened)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)


@pytest.fixture
def llama2():
    return characters(bos="<s>", eos="</s>", special=())


@pytest.fixture
def llama3():
    special = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return characters(bos="<|begin_of_text|>", eos="<|end_of_text|>", special=special)


@pytest.fixture
def qwen():
    return characters(bos=None, eos="<|im_end|>", special=("<|im_start|>",))


def parts(rendered, tokenizer):
    """What is read and what is supervised, as text."""
    supervised = [label for label in rendered.labels if label != IGNORE_INDEX]
    return tokenizer.decode(list(rendered.input_ids)), tokenizer.decode(supervised)


def ids_of_turns(tokenizer, texts):
    """As the released dataset: every turn by itself, special tokens on the first alone."""
    ids = [tokenizer(text, add_special_tokens=index == 0).input_ids for index, text in enumerate(texts)]
    return tuple(token for turn in ids for token in turn)


@pytest.mark.parametrize(
    ("prompt", "family", "texts"),
    [
        ("pure_released", "llama2", ["In: What is it?\nOut:", "A cat.</s>", "In: Where?\nOut:", "On a mat.</s>"]),
        ("pure_released", "llama3", ["In: What is it?\nOut:", "A cat.</s>", "In: Where?\nOut:", "On a mat.</s>"]),
        (
            "vicuna_released",
            "llama2",
            [f"{VICUNA} USER: What is it? ASSISTANT:", "A cat.</s>", "USER: Where? ASSISTANT:", "On a mat.</s>"],
        ),
        (
            "llama2_chat_released",
            "llama2",
            [
                f"<s>[INST] <<SYS>\n{SYSTEM}\n<</SYS>>\n\nWhat is it? [/INST]",
                "A cat.</s>",
                "<s>[INST] Where? [/INST]",
                "On a mat.</s>",
            ],
        ),
        (
            "llama3_released",
            "llama3",
            [
                "<|start_header_id|>user<|end_header_id|>\n\n <image>\nWhat is it?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>",
                "A cat. <|eot_id|>",
                "<|start_header_id|>user<|end_header_id|>\n\nWhere?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>",
                "On a mat.<|eot_id|>",
            ],
        ),
        (
            "qwen2_released",
            "qwen",
            [
                "<|im_start|>user\n <image>\nWhat is it?<|im_end|>\n<|im_start|>assistant",
                "A cat. <|im_end|>",
                "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant",
                "On a mat.<|im_end|>",
            ],
        ),
    ],
)
def test_a_conversation_has_the_ids_of_the_released_dataset(prompt, family, texts, request):
    tokenizer = request.getfixturevalue(family)
    rendered = Renderer(prompt, tokenizer)(TWO)
    assert rendered.input_ids == ids_of_turns(tokenizer, texts)
    assert parts(rendered, tokenizer)[1] == texts[1] + texts[3]
    assert rendered.visual_at == (0 if family == "qwen" else 1)


def test_the_first_instruction_of_llama2_chat_has_bos_twice_in_training_and_once_at_inference(llama2):
    renderer = Renderer("llama2_chat_released", llama2)
    text = f"[INST] <<SYS>\n{SYSTEM}\n<</SYS>>\n\nWhat is it? [/INST]"
    assert parts(renderer(TWO[:2]), llama2)[0] == f"<s><s>{text}A cat.</s>"
    question = renderer.question(TWO[:2])
    assert parts(question, llama2) == (f"<s>{text}", "")
    assert question.visual_at == 1
    later = parts(renderer.question(TWO), llama2)[0]
    assert later == f"<s>{text} A cat.</s><s>[INST] Where? [/INST]"


@pytest.mark.parametrize(
    ("prompt", "family", "text"),
    [
        ("pure_released", "llama2", "<s>In: What is it?\nOut:"),
        ("vicuna_released", "llama2", f"<s>{VICUNA} USER: What is it? ASSISTANT:"),
        (
            "llama3_released",
            "llama3",
            f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWhat is it?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "qwen2_released",
            "qwen",
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_a_question_is_the_released_inference_prompt(prompt, family, text, request):
    tokenizer = request.getfixturevalue(family)
    turns = (Turn(role="human", text="What is it?"), Turn(role="gpt", text="not read"))
    assert parts(Renderer(prompt, tokenizer).question(turns), tokenizer) == (text, "")


def test_an_empty_answer_is_a_blank_and_a_video_token_stays(llama2):
    turns = (Turn(role="human", text="<video>\nWhat?"), Turn(role="gpt", text=""))
    read, supervised = parts(Renderer("pure_released", llama2)(turns), llama2)
    assert read == "<s>In: <video>\nWhat?\nOut: </s>"
    assert supervised == " </s>"
