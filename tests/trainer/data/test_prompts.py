import itertools

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from featurestore.clips import Turn
from mervcache.errors import UserError
from trainer.data.prompts import (
    IGNORE_INDEX,
    LLAMA2_SYSTEM,
    VICUNA_SYSTEM,
    Renderer,
    reason_to_refuse,
    without_placeholder,
)
from trainer.model.llm import word_tokenizer

ONE = (Turn(role="human", text="<video>\nWhat is it?"), Turn(role="gpt", text="A cat."))
TWO = (*ONE, Turn(role="human", text="Where?"), Turn(role="gpt", text="On a mat."))
STILL = (Turn(role="human", text="What is it?\n<image>"), Turn(role="gpt", text="A cat."))
PLAIN = (Turn(role="human", text="What is it?"), Turn(role="gpt", text="A cat."))  # text only
CONVERSATIONS = ["pure", "vicuna", "llama2_chat", "chat_template"]
IM_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADER_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>{{ m['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>{% endif %}"
)


def words(*texts):
    """The word-level tokenizer of fresh LLMs: `<s>` is added to plain text."""
    return word_tokenizer(texts)


def characters(*, bos, eos, template, special, adds_bos):
    """One token per byte, special tokens whole: shows every blank and newline of a template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.add_special_tokens([bos])
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, extra_special_tokens=list(special)
    )
    made.chat_template = template
    return made


@pytest.fixture
def im_tokenizer():
    """As SmolLM2: the BOS is the head of every chat header and is not added to plain text; pad is the end token."""
    return characters(
        bos="<|im_start|>", eos="<|im_end|>", template=IM_TEMPLATE, special=["<|im_start|>"], adds_bos=False
    )


@pytest.fixture
def header_tokenizer():
    """As LLaMA 3: a BOS that stands alone, and an end of turn that is not the end of text."""
    return characters(
        bos="<|begin|>",
        eos="<|end|>",
        template=HEADER_TEMPLATE,
        special=["<|head|>", "<|/head|>", "<|eot|>"],
        adds_bos=True,
    )


def supervised(rendered, tokenizer):
    return tokenizer.decode([label for label in rendered.labels if label != IGNORE_INDEX])


def read(rendered, tokenizer):
    return tokenizer.convert_ids_to_tokens(list(rendered.input_ids))


def check_labels(rendered):
    assert len(rendered.labels) == len(rendered.input_ids)
    assert all(label in (IGNORE_INDEX, token) for label, token in zip(rendered.labels, rendered.input_ids, strict=True))


def test_pure_golden():
    tokenizer = words("In: What is it? Where Out: A cat. On a mat.")
    rendered = Renderer("pure", tokenizer)(TWO)
    assert " ".join(read(rendered, tokenizer)) == (
        "<s> In : What is it ? Out : A cat . </s> In : Where ? Out : On a mat . </s>"
    )
    assert supervised(rendered, tokenizer) == "A cat . </s> On a mat . </s>"
    assert rendered.visual_at == 1
    check_labels(rendered)


def test_vicuna_golden():
    tokenizer = words(VICUNA_SYSTEM, "USER: What is it? Where ASSISTANT: A cat. On a mat.")
    rendered = Renderer("vicuna", tokenizer)(TWO)
    spaced = VICUNA_SYSTEM.replace(".", " .").replace(",", " ,").replace("'s", " ' s")
    assert " ".join(read(rendered, tokenizer)) == (
        f"<s> {spaced} USER : What is it ? ASSISTANT : A cat . </s> USER : Where ? ASSISTANT : On a mat . </s>"
    )
    assert supervised(rendered, tokenizer) == "A cat . </s> On a mat . </s>"
    assert rendered.visual_at == 1


def test_llama2_chat_golden():
    tokenizer = words(f"[INST] <<SYS>> <</SYS>> {LLAMA2_SYSTEM} What is it? Where [/INST] A cat. On a mat.")
    rendered = Renderer("llama2_chat", tokenizer)(TWO)
    system = LLAMA2_SYSTEM.replace(".", " .").replace(",", " ,")
    assert " ".join(read(rendered, tokenizer)) == (
        f"<s> [ INST ] << SYS >> {system} <</ SYS >> What is it ? [/ INST ] A cat . </s>"
        " <s> [ INST ] Where ? [/ INST ] On a mat . </s>"
    )
    assert supervised(rendered, tokenizer) == "A cat . </s> On a mat . </s>"
    assert rendered.visual_at == 1


def test_chat_template_golden_where_bos_opens_a_chat_header(im_tokenizer):
    rendered = Renderer("chat_template", im_tokenizer)(TWO)
    assert "".join(im_tokenizer.decode(list(rendered.input_ids))) == (
        "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\nOn a mat.<|im_end|>\n"
    )
    assert supervised(rendered, im_tokenizer) == "A cat.<|im_end|>On a mat.<|im_end|>"
    assert rendered.visual_at == 0  # the header is not torn apart
    check_labels(rendered)


def test_chat_template_golden_where_bos_stands_alone(header_tokenizer):
    rendered = Renderer("chat_template", header_tokenizer)(TWO)
    assert header_tokenizer.decode(list(rendered.input_ids)) == (
        "<|begin|><|head|>user<|/head|>What is it?<|eot|><|head|>assistant<|/head|>A cat.<|eot|>"
        "<|head|>user<|/head|>Where?<|eot|><|head|>assistant<|/head|>On a mat.<|eot|>"
    )
    assert supervised(rendered, header_tokenizer) == "A cat.<|eot|>On a mat.<|eot|>"
    assert rendered.visual_at == 1


def test_caption_golden(header_tokenizer, im_tokenizer):
    rendered = Renderer("caption", header_tokenizer)(ONE)
    assert header_tokenizer.decode(list(rendered.input_ids)) == "<|begin|>A cat.<|end|>"
    assert supervised(rendered, header_tokenizer) == "A cat.<|end|>"
    assert rendered.visual_at == 1
    check_labels(rendered)
    bare = Renderer("caption", im_tokenizer)(ONE)  # its BOS belongs to chat headers
    assert im_tokenizer.decode(list(bare.input_ids)) == supervised(bare, im_tokenizer) == "A cat.<|im_end|>"
    assert bare.visual_at == 0


def test_a_caption_is_asked_for_by_the_visual_tokens_alone(header_tokenizer):
    question = Renderer("caption", header_tokenizer).question(ONE)
    assert question.input_ids == (header_tokenizer.bos_token_id,)
    assert (question.visual_at, question.num_supervised) == (1, 0)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (ONE, None),
        (TWO, "caption prompt: not one question and one answer"),
        ((ONE[0], Turn(role="gpt", text="a <video>")), "caption prompt: the answer holds a media placeholder"),
        ((ONE[0], Turn(role="gpt", text="an <image>")), "caption prompt: the answer holds a media placeholder"),
    ],
)
def test_a_caption_is_one_plain_answer(turns, reason):
    assert reason_to_refuse("caption", turns) == reason
    assert reason_to_refuse("pure", turns) is None
    if reason:
        with pytest.raises(UserError, match=reason):
            Renderer("caption", words("a"))(turns)


@pytest.mark.parametrize("prompt", [*CONVERSATIONS, "caption"])
def test_videos_images_and_plain_texts_have_the_same_ids(prompt, header_tokenizer):
    renderer = Renderer(prompt, header_tokenizer)
    assert renderer(ONE) == renderer(STILL) == renderer(PLAIN)


@pytest.mark.parametrize("fixture", ["im_tokenizer", "header_tokenizer"])
def test_a_chat_template_has_the_ids_of_transformers(fixture, request):
    tokenizer = request.getfixturevalue(fixture)
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]
    expected = tokenizer.apply_chat_template(messages, return_dict=False)
    assert list(Renderer("chat_template", tokenizer)(ONE).input_ids) == expected


@pytest.mark.parametrize("prompt", CONVERSATIONS)
def test_no_format_doubles_the_bos(prompt, header_tokenizer):
    ids = Renderer(prompt, header_tokenizer)(TWO).input_ids
    bos = header_tokenizer.bos_token_id
    assert ids[0] == bos
    assert all((left, right) != (bos, bos) for left, right in itertools.pairwise(ids))


@pytest.mark.parametrize("prompt", CONVERSATIONS)
def test_a_question_is_the_conversation_up_to_its_last_answer(prompt, header_tokenizer):
    renderer = Renderer(prompt, header_tokenizer)
    whole, question = renderer(TWO), renderer.question(TWO)
    assert question.num_supervised == 0
    assert whole.input_ids[: len(question.input_ids)] == question.input_ids
    answer = whole.labels[len(question.input_ids) :]
    assert header_tokenizer.decode([i for i in answer if i != IGNORE_INDEX]).startswith("On a mat.")
    assert sum(label != IGNORE_INDEX for label in whole.labels[: len(question.input_ids)]) == len("A cat.") + 1


@pytest.mark.parametrize("prompt", ["pure", "vicuna", "llama2_chat", "caption"])
def test_the_end_token_is_supervised_although_it_is_the_pad(prompt):
    tokenizer = words("a")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rendered = Renderer(prompt, tokenizer)(ONE)
    assert rendered.labels[-1] == tokenizer.eos_token_id


def test_visual_tokens_come_first_on_request_and_where_there_is_no_bos(im_tokenizer):
    tokenizer = words("a")
    assert Renderer("pure", tokenizer, position="first")(ONE).visual_at == 0
    plain = Renderer("pure", im_tokenizer)(ONE)
    assert plain.visual_at == 0
    assert im_tokenizer.decode(list(plain.input_ids)) == "In: What is it?\nOut:A cat.<|im_end|>"


@pytest.mark.parametrize("prompt", ["pure", "vicuna", "llama2_chat"])
def test_an_answer_is_a_word_of_its_own_where_words_hold_their_blank(prompt):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "Ġa", "Ġas", "as"])}
    backend = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("Ġa", "s"), ("a", "s")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    turns = (Turn(role="human", text="How?"), Turn(role="gpt", text="as"))
    rendered = Renderer(prompt, tokenizer)(turns)
    assert read(rendered, tokenizer)[-2:] == ["Ġas", "<|end|>"]
    assert supervised(rendered, tokenizer) == " as<|end|>"
    asked = Renderer(prompt, tokenizer).question(turns)
    assert asked.input_ids == rendered.input_ids[:-2]  # what is generated begins with the blank
    assert read(Renderer("caption", tokenizer)((turns[0], turns[1])), tokenizer) == ["as", "<|end|>"]


def test_long_texts_are_cut_at_the_right():
    tokenizer = words("In: What is it? Out: A cat.")
    cut = Renderer("pure", tokenizer, max_tokens=10)(ONE)
    assert " ".join(read(cut, tokenizer)) == "<s> In : What is it ? Out : A"
    assert cut.num_supervised == 1
    whole = Renderer("pure", tokenizer, max_tokens=12)(ONE)  # "cat", "." and the end token: one more than there is room
    assert (cut.is_cut, whole.is_cut, Renderer("pure", tokenizer, max_tokens=13)(ONE).is_cut) == (True, True, False)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("<video>\nWhat?", "What?"),
        ("What?\n<image>", "What?"),
        (" a <b> ", "a <b>"),
        ("<image><image>\nWhat?", "What?"),
        ("<video>\nIs <video> an HTML tag?", "Is <video> an HTML tag?"),
        ("In the clip <video>, what is <image>?", "In the clip , what is <image>?"),
        ("<video>", ""),
    ],
)
def test_the_placeholder_of_a_clip_is_removed_from_its_question(question, expected):
    turns = (Turn(role="human", text=question), Turn(role="gpt", text="A <video> tag. <image>"))
    assert [turn.text for turn in without_placeholder(turns, has_clip=True)] == [expected, "A <video> tag. <image>"]


def test_every_question_that_repeats_the_placeholder_loses_it():
    turns = (*ONE, Turn(role="human", text="<video> Where?"), Turn(role="gpt", text="On <video>."))
    assert [t.text for t in without_placeholder(turns, True)] == ["What is it?", "A cat.", "Where?", "On <video>."]


@pytest.mark.parametrize("prompt", [*CONVERSATIONS, "caption"])
def test_without_a_clip_tags_are_words_that_are_read_and_trained(prompt, header_tokenizer):
    turns = (
        Turn(role="human", text="Which tag plays a film, <image> or <video>"),
        Turn(role="gpt", text="It is <video>"),
    )
    if prompt == "caption":
        turns = (turns[0], Turn(role="gpt", text="It is a tag"))
    rendered = Renderer(prompt, header_tokenizer)(turns, has_clip=False)
    assert ("film, <image> or <video>" in header_tokenizer.decode(list(rendered.input_ids))) == (prompt != "caption")
    assert turns[1].text in supervised(rendered, header_tokenizer)


@pytest.mark.parametrize("prompt", CONVERSATIONS)
def test_the_released_code_keeps_the_video_token_and_its_older_builders_delete_the_image_token(
    prompt, header_tokenizer
):
    renderer = Renderer(prompt, header_tokenizer, placeholder="as_released")
    texts = [header_tokenizer.decode(list(renderer(turns).input_ids)) for turns in (ONE, STILL)]
    assert "<video>\nWhat is it?" in texts[0]
    assert ("<image>" in texts[1]) == (prompt == "chat_template")


def test_a_template_that_rewrites_history_is_refused(im_tokenizer):
    im_tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(UserError, match="rewrites earlier turns"):
        Renderer("chat_template", im_tokenizer)(ONE)


def test_a_tokenizer_without_template_is_refused():
    with pytest.raises(UserError, match="has no chat template"):
        Renderer("chat_template", words("a"))(ONE)


def test_an_unknown_prompt_lists_the_known_ones():
    with pytest.raises(UserError, match=r"unknown prompt 'purse', the nearest known one is 'pure'; known: pure"):
        Renderer("purse", words("a"))
