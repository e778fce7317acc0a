from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mervcache.errors import UserError
from trainer.data.collate import collate, distinct_clips
from trainer.data.prompts import IGNORE_INDEX, Rendered
from trainer.data.tokens import PrefixedTokens

X = IGNORE_INDEX
LONG = Rendered(input_ids=(1, 5, 6, 7, 2), labels=(X, X, X, 7, 2), visual_at=1)
SHORT = Rendered(input_ids=(1, 9, 2), labels=(X, 9, 2), visual_at=0)


def test_visual_tokens_have_a_place_and_no_label():
    batch = collate([LONG, SHORT], [0, 0], {}, num_visual_tokens=2)
    assert batch.labels_BS.tolist() == [[X, X, X, X, X, 7, 2], [X, X, X, 9, 2, X, X]]
    assert batch.attention_mask_BS.tolist() == [[1] * 7, [1, 1, 1, 1, 1, 0, 0]]
    assert batch.input_ids_BL.tolist() == [[1, 5, 6, 7, 2], [1, 9, 2, 0, 0]]
    assert (batch.first_label, batch.num_supervised) == (3, 4)


def test_text_only_samples_get_no_visual_tokens_at_all():
    batch = collate([LONG, SHORT], [-1, 0], {}, num_visual_tokens=4)
    assert batch.labels_BS.tolist() == [[X, X, X, 7, 2, X, X], [X, X, X, X, X, 9, 2]]
    assert batch.attention_mask_BS.sum(1).tolist() == [5, 7]


def test_an_end_token_that_is_the_pad_keeps_its_mask_and_label():
    ends = Rendered(input_ids=(1, 0, 0), labels=(X, 0, 0), visual_at=0)  # 0 is end token and fill
    batch = collate([ends, LONG], [-1, -1], {}, num_visual_tokens=0)
    assert batch.attention_mask_BS[0].tolist() == [1, 1, 1, 0, 0]
    assert batch.labels_BS[0].tolist() == [X, 0, 0, X, X]


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=6), st.integers(0, 5))
def test_mask_and_labels_follow_from_lengths(samples, num_visual_tokens):
    rendered = [Rendered(input_ids=tuple(range(n)), labels=tuple(range(n)), visual_at=0) for n, _ in samples]
    rows = [0 if has_clip else -1 for _, has_clip in samples]
    batch = collate(rendered, rows, {}, num_visual_tokens=num_visual_tokens)
    lengths = [n + (num_visual_tokens if has_clip else 0) for n, has_clip in samples]
    assert batch.attention_mask_BS.sum(1).tolist() == lengths
    assert batch.num_supervised == sum(n for n, _ in samples)
    assert ((batch.labels_BS != IGNORE_INDEX) <= batch.attention_mask_BS.bool()).all()


def test_a_sequence_beyond_the_context_is_refused_with_its_lengths():
    with pytest.raises(UserError, match="1024 visual tokens and 5 text tokens exceed the LLM's context of 1028"):
        collate([LONG], [0], {}, num_visual_tokens=1024, context=1028)


def test_a_clip_that_samples_share_is_read_once():
    assert distinct_clips(["b", None, "a", "b"]) == (["b", "a"], [0, -1, 1, 0])


def test_a_batch_moves_with_its_tokens():
    both = PrefixedTokens(tokens_BTHWD=torch.zeros(1, 1, 1, 1, 2), prefix_BTKD=torch.zeros(1, 1, 1, 2))
    tokens = {"dinov2": torch.zeros(1, 1, 1, 1, 2), "clip": both, "vivit": replace(both, tokens_BTHWD=None)}
    batch = collate([LONG], [0], tokens, num_visual_tokens=1).to("meta")
    assert {batch.input_ids_BL.device.type, batch.tokens["dinov2"].device.type} == {"meta"}
    assert {batch.tokens["clip"].tokens_BTHWD.device.type, batch.tokens["clip"].prefix_BTKD.device.type} == {"meta"}
    assert batch.tokens["vivit"].prefix_BTKD.device.type == "meta"
    assert batch.tokens["vivit"].tokens_BTHWD is None
    assert batch.lengths == (5,)
