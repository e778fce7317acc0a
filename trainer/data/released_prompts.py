"""Prompts as princetonvisualai/merv renders them, oddities included: what its checkpoints were trained on.

Each turn is right-stripped and tokenised by itself, special tokens that are spelled out in it included; BOS is added in
front of the first one. At inference the whole prompt is tokenised in one go, and three formats differ from training:

- `llama2_chat_released` (llama2-*-chat, llama3-8b-chat): every instruction begins with a written `<s>`, so the first
  one has BOS twice in training and once at inference; the system marker lacks a `>`.
- `llama3_released` (llama3.1-8b-chat), `qwen2_released` (qwen2.5-*): no system text in training, one at inference;
  the newline behind the assistant's header is stripped in training.

`pure_released` and `vicuna_released` end answers with a written `</s>`, which LLaMA 3 reads as text. "<video>" is never
removed; the last two formats remove "<image>" neither and strip no message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from featurestore.clips import Turn
from trainer.config import PromptName

LLAMA2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True, kw_only=True)
class ReleasedPrompt:
    """The strings around messages, by role."""

    question: Callable[[str, bool], str]  # message, and whether it is the first
    answer: Callable[[str], str]
    cleans: bool = True  # removes "<image>" and strips messages
    written_bos: str = ""  # begins the text, and is taken off at inference, where the tokenizer adds BOS
    system: str = ""  # in front of an inference prompt alone

    def turns(self, turns: Sequence[Turn]) -> list[str]:
        """The texts of all turns, before they are right-stripped."""
        texts = []
        for index, turn in enumerate(turns):
            message = turn.text.replace("<image>", "").strip() if self.cleans else turn.text
            texts.append(self.question(message, index == 0) if turn.role == "human" else self.answer(message))
        return texts

    def training(self, turns: Sequence[Turn]) -> list[tuple[str, bool]]:
        """Texts that are tokenised one by one, and whether they are answers."""
        return [(text.rstrip(), turn.role == "gpt") for text, turn in zip(self.turns(turns), turns, strict=True)]

    def inference(self, turns: Sequence[Turn]) -> str:
        """The text up to where the answer to the last question begins; `turns` end with that question."""
        text = self.system + "".join(self.turns(turns)).removeprefix(self.written_bos)
        return text.rstrip() if self.cleans else text


def _closed(message: str) -> str:
    return f"{message or ' '}</s>"


def _llama2_chat(message: str, is_first: bool) -> str:
    system = f"<<SYS>\n{LLAMA2_SYSTEM}\n<</SYS>>\n\n" if is_first else ""
    return f"<s>[INST] {system}{message} [/INST] "


RELEASED_PROMPTS: dict[PromptName, ReleasedPrompt] = {
    "pure_released": ReleasedPrompt(question=lambda message, is_first: f"In: {message}\nOut: ", answer=_closed),
    "vicuna_released": ReleasedPrompt(
        question=lambda message, is_first: f"{VICUNA_SYSTEM + ' ' if is_first else ''}USER: {message} ASSISTANT: ",
        answer=_closed,
    ),
    "llama2_chat_released": ReleasedPrompt(question=_llama2_chat, answer=_closed, written_bos="<s>"),
    "llama3_released": ReleasedPrompt(
        question=lambda message, is_first: (
            f"<|start_header_id|>user<|end_header_id|>\n\n{message}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        answer=lambda message: f"{message}<|eot_id|>",
        cleans=False,
        system=f"<|start_header_id|>system<|end_header_id|>\n\n{LLAMA2_SYSTEM}<|eot_id|>",
    ),
    "qwen2_released": ReleasedPrompt(
        question=lambda message, is_first: f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n",
        answer=lambda message: f"{message}<|im_end|>",
        cleans=False,
        system=f"<|im_start|>system\n{LLAMA2_SYSTEM}<|im_end|>\n",
    ),
}
