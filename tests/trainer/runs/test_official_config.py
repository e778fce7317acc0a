import pytest

from mervcache.errors import UserError
from trainer.official import parse_settings, read_settings, run_config

RELEASED = {  # config.json of the released merv-frozen, as far as it is read
    "arch_specifier": "no-align+3davg+linear",
    "feature_fusion": "cross_attention_avg_lq",
    "video_backbone_ids": [
        "languagebind-video-noclass",
        "dinov2-video-all-tokens",
        "vivit-google-b-all-no-cls-16frames",
        "siglip-vit-b16-224px-all-no-cls",
    ],
    "llm_backbone_id": "llama2-7b-pure",
    "image_resize_strategy": "resize-naive",
    "llm_max_length": 2048,
    "num_frames": [16, 16, 32, 16],
    "projector_token_length": 64,
    "visual_feature_length": 1024,
    "finetune_learning_rate": 2e-5,
    "finetune_weight_decay": 0.1,
    "finetune_global_batch_size": 128,
    "finetune_per_device_batch_size": 8,
}


def test_the_released_model_has_16_by_8_by_8_tokens_of_four_encoders():
    official = parse_settings(RELEASED)
    assert official.encoders == ("languagebind", "dinov2", "vivit", "siglip")
    assert [official.grid(index) for index in range(4)] == [(16, 8, 8)] * 4
    config = run_config(official, RELEASED, llm="meta-llama/Llama-2-7b-hf", query_width=3072)
    assert (config.train_llm, config.prompt, config.projector.grid) == ("full", "pure", (16, 8, 8))
    assert (config.fusion.name, config.fusion.query_width) == ("cross_attention_released", 3072)
    assert (config.batch_size, config.micro_batch_size, config.optimizer.weight_decay) == (128, 8, 0.1)


VIVIT = "vivit-google-b-all-no-cls"


@pytest.mark.parametrize(
    ("encoders", "num_frames", "rules", "steps"),
    [
        (RELEASED["video_backbone_ids"], [16, 16, 32, 16], ["linspace-32/2", "linspace-32/2", "linspace-32/1"], 16),
        (["dinov2-video-all-tokens"], [16], ["linspace-16"], 16),
        (["siglip-vit-b16-224px-all-no-cls"], [8], ["linspace-8"], 8),
        ([f"{VIVIT}-16frames"], [32], ["linspace-32/1"], 16),
        ([VIVIT], [32], ["linspace-32/1+steps/2"], 8),
        (["languagebind-video-noclass", "dinov2-video-all-tokens"], [8, 16], ["linspace-16/2", "linspace-16"], 8),
    ],
)
def test_the_rule_of_frames_is_that_of_the_encoder_with_most_of_them(encoders, num_frames, rules, steps):
    """MERV_SPEC 1.1 and 1.6: F = max(num_frames) indices, of which an encoder takes every (F / n)-th."""
    official = parse_settings({**RELEASED, "video_backbone_ids": encoders, "num_frames": num_frames})
    assert [official.wanted(index)["frame_rule"] for index in range(len(rules))] == rules
    assert official.grid(0)[0] == steps


def test_what_the_encoders_see_is_in_the_wanted_identity():
    official = parse_settings(RELEASED)
    fits = [official.wanted(index)["preprocessing.fit"] for index in range(4)]
    assert fits == ["centre-crop", "squash", "squash", "squash"]  # MERV_SPEC 1.3


@pytest.mark.parametrize(
    ("llm", "prompt"),
    [
        ("llama2-7b-pure", "pure"),
        ("vicuna-v15-13b", "vicuna"),
        ("llama3-8b-pure", "pure_released"),
        ("llama2-7b-chat", "llama2_chat_released"),
        ("llama2-13b-chat", "llama2_chat_released"),
        ("llama3-8b-chat", "llama2_chat_released"),
        ("llama3.1-8b-chat", "llama3_released"),
        ("qwen2.5-7b-instruct", "qwen2_released"),
    ],
)
def test_a_checkpoint_keeps_the_prompt_it_was_trained_with(llm, prompt):
    official = parse_settings({**RELEASED, "llm_backbone_id": llm})
    assert run_config(official, RELEASED, llm="x", query_width=None).prompt == prompt


def test_frames_are_divided_by_the_3d_average_only():
    assert parse_settings({**RELEASED, "arch_specifier": "3davg+frame4+linear"}).frame_divisor == 4
    assert parse_settings({**RELEASED, "arch_specifier": "avg+frame4+linear"}).frame_divisor == 1
    assert parse_settings(RELEASED).frame_divisor == 1


def test_one_number_of_frames_is_that_of_every_encoder():
    assert parse_settings({**RELEASED, "num_frames": 16}).num_frames == (16,) * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_backbone_ids": ["dinov2-video"], "num_frames": 16}, "nearest known one is 'dinov2-video-all-tokens'"),
        ({"feature_fusion": "query_mlp"}, "unknown feature_fusion 'query_mlp'"),
        ({"arch_specifier": "no-align+conv+linear"}, "only projectors that average"),
        ({"llm_backbone_id": "mistral"}, "unknown llm_backbone_id 'mistral'"),
        ({"num_frames": [16]}, "4 video_backbone_ids need as many num_frames, got 1"),
        ({"projector_token_length": 60}, "must be a square, got 60"),
        ({"video_backbone_ids": None}, "has no video_backbone_ids"),
        ({"image_resize_strategy": "letterbox"}, "image_resize_strategy 'letterbox' cannot be imported"),
        ({"image_resize_strategy": "resize-crop"}, "image_resize_strategy 'resize-crop' cannot be imported"),
        ({"num_frames": [16, 12, 32, 16]}, "must divide the largest of them, 32, got 12"),
        ({"llm_max_length": "long"}, "llm_max_length must be a whole number, got 'long'"),
    ],
)
def test_a_config_that_cannot_be_imported_is_an_error(change, message):
    with pytest.raises(UserError, match=message):
        parse_settings({**RELEASED, **change})


def test_an_unknown_head_is_named():
    with pytest.raises(UserError, match="unknown head in arch_specifier 'none'"):
        parse_settings({**RELEASED, "arch_specifier": "3davg+none"}).head  # noqa: B018


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError):
        parse_settings(read_settings(tmp_path / "config.json"))


def test_encoders_in_a_row_go_beyond_the_context_as_in_the_reference():
    for fusion, exceeds in (("concat", True), ("cross_attention_avg_lq", False)):
        settings = {**RELEASED, "feature_fusion": fusion}
        config = run_config(parse_settings(settings), settings, llm="meta-llama/Llama-2-7b-hf", query_width=None)
        assert config.exceed_context == exceeds
