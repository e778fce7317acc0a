from click.testing import CliRunner


def test_scores_of_several_seeds_stand_in_one_table_as_mean_and_range():
    from demo_seeds import table

    def line(accuracy):
        return {"colour": {"questions": 6, "accuracy": accuracy, "chance": 0.25}}

    text = table([line(0.5), line(1.0)], [line(0.25), line(0.25)], "7,8")
    assert text.splitlines()[2] == "| colour | 6 | 0.75 (0.50-1.00) | 0.25 (0.25-0.25) | 0.25 |"


def test_every_seed_is_trained_with_and_without_visual_tokens(tmp_path, question_store):
    from demo_seeds import main

    arguments = ["--store", question_store, "--seeds", "7,8", "--steps", 2, "--out", tmp_path / "seeds"]
    grid = ["--grid", "2,2,2"]  # the toy store is coarser than the demo's
    result = CliRunner().invoke(main, [str(word) for word in [*arguments, *grid]], catch_exceptions=False)
    assert result.exit_code == 0
    assert sorted(path.name for path in (tmp_path / "seeds").iterdir()) == [
        "7",
        "7-text-only",
        "8",
        "8-text-only",
        "table.md",
    ]
    assert "| colour | 6 | " in result.output
