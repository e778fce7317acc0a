from trainer.render import dry_run_rows, print_dry_run, print_scores, result_lines


def report(**changes):
    return {
        "samples": 1200,
        "dropped": {"text only": 3, "clip without tokens of every encoder": 1},
        "text_limit": 2048,
        "cut": 0,
        "without_answer": 0,
        "steps": 10,
        "unread": {"text": 4, "visual": 3},
        "batch_size": 128,
        "visual_tokens": 1024,
        "text_tokens": {"median": 40, "longest": 92},
        "longest_sequence": 1116,
        "context": 2048,
        "parameters": {"projectors": {"total": 5000, "trained": 5000}, "llm": {"total": 70000, "trained": 0}},
        "micro_batch": "micro_batch_size 8",
        "useful_share": {"micro_batch_size 8": 0.69, "token_budget 9000": 0.961},
        "activation_checkpointing": True,
        "device_bytes": None,
        "memory_bytes": {
            "parameters": 26_800_000_000,
            "gradients": 10_000_000,
            "moments": 20_000_000,
            "copies": 0,
            "tokens": 0,
            "activations": 5_000_000_000,
            "logits": 2_000_000_000,
            "total": 33_830_000_000,
            "activations_formula": "",
        },
        "checkpoints": {"weights": 1_000_000_000, "optimizer": 2_000_000_000, "kept": 2, "at_most": 9_000_000_000},
        **changes,
    }


def test_a_stage_in_rows():
    assert dry_run_rows(report()) == {
        "steps": "10 of 128 samples",
        "samples": "1,200",
        "dropped": "3 text only, 1 clip without tokens of every encoder",
        "left over at the end": "4 text, 3 visual",
        "text tokens": "median 40, longest 92",
        "visual tokens": "1,024",
        "longest sequence": "1,116 of 2,048",
        "trained of projectors": "5,000 of 5,000",
        "trained of llm": "0 of 70,000",
        "micro-batch": "micro_batch_size 8",
        "besides padding": "69% with micro_batch_size 8, 96% with token_budget 9000",
        "activation checkpointing": "on",
        "GB, parameters": "26.8",
        "GB, gradients": "0.01",
        "GB, moments": "0.02",
        "GB, copies": "0",
        "GB, tokens": "0",
        "GB, activations": "about 5",
        "GB, logits": "about 2",
        "GB, total": "about 33.8",
        "GB on disk": "6 (2 checkpoints of 3: weights and optimizer), at most 9 while one is written",
    }


def test_samples_that_fill_no_batch_are_a_row_where_there_are_some():
    assert "left over at the end" not in dry_run_rows(report(unread={"all": 0}))
    assert dry_run_rows(report(unread={"all": 3}))["left over at the end"] == "3 samples"


def test_the_memory_that_was_planned_for_is_a_row():
    assert dry_run_rows(report(device_bytes=80 * 10**9))["GB, device"] == "80"


def test_what_not_every_stage_has_is_a_row_where_it_is():
    rows = dry_run_rows(report(without_answer=2, cut=1003, init="all weights of stage align", context=None))
    assert (rows["answer cut off"], rows["starts from"]) == ("2", "all weights of stage align")
    assert rows["longest sequence"] == "1,116"
    assert rows["texts cut"] == "1,003 at 2,048 tokens"


def result(run, steps, num_steps=600, num_questions=9):
    return {"run": run, "steps": steps, "num_steps": num_steps, "loss": 0.25, "num_questions": num_questions}


def test_a_stopped_run_says_how_to_go_on():
    assert result_lines([result("r/align", 600), result("r/finetune", 214)]) == [
        "r/align: step 600 of 600, loss 0.2500",
        "r/finetune: stopped and saved at step 214 of 600; go on with --resume auto",
    ]


def test_a_finished_run_names_the_next_command():
    assert result_lines([result("r/align", 600), result("r/finetune", 600)]) == [
        "r/align: step 600 of 600, loss 0.2500",
        "r/finetune: step 600 of 600, loss 0.2500; next: merv-eval run --checkpoint r/finetune",
    ]


def test_without_questions_the_next_command_asks_one():
    (line,) = result_lines([result("r/a b", 600, num_questions=0)])
    assert "next: merv-eval ask --checkpoint 'r/a b' --video FILE" in line


def test_warnings_of_sizes_are_below_the_table(capsys):
    print_dry_run({"stages": {"align": report(warnings=["too few"]), "finetune": report(warnings=[])}})
    assert capsys.readouterr().out.splitlines()[-1] == "align: too few"


def score(category, accuracy):
    return {"category": category, "questions": 8, "accuracy": accuracy, "chance": 0.25, "tied": 0, "unreadable": 0}


def evaluation(scores, beside, **facts):
    shared = {"protocol": "likelihood", "template": None, "questions": {"MSVD": {"scored": 8}}}
    return {**shared, "scores": scores, "beside": beside, **facts}


def test_the_last_lines_name_the_protocol_and_all_that_was_lost(capsys):
    half = {**score("all", 0.5), "tied": 3, "unreadable": 2}
    questions = {"MSVD": {"scored": 8}, "TVQA": {"scored": 0, "open-ended, which are not scored": 1_500}}
    template = {"name": "letters.txt", "text": "{question} {options}"}
    facts = {"protocol": "letters", "template": template, "questions": questions}
    print_scores(evaluation([half], {"words": [{**score("all", 0.25), "unreadable": 8}]}, **facts))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-6].startswith("Protocol letters: ")
    assert lines[-5].startswith("Prompt: letters.txt")
    assert lines[-4].startswith("Ties: 3 of 8 questions")
    assert lines[-3] == "Unreadable answers: 2 of 8 (25.0%), counted as wrong."
    assert lines[-2] == "Unreadable answers of words: 8 of 8 (100.0%), counted as wrong."
    assert lines[-1] == "TVQA: 0 of 1,500 questions scored; 1,500 open-ended, which are not scored."


def test_a_few_open_answers_are_listed_and_many_are_not(capsys):
    shared = {"question": "What runs?", "correct": "A dog.", "verdict": None}
    answers = [{**shared, "text": "a dog", "normalised": True}, {**shared, "text": "a\ncat", "normalised": False}]
    answers += [{**answers[1], "verdict": {"is_match": True}}, {**answers[0], "verdict": {"is_match": None}}]
    row = {"category": "all", "questions": 4, "exact": 0.0, "normalised": 0.5, "unfinished": 0}
    facts = {"scores": {"own": [row]}, "beside": {}, "judge": None, "normalisation": "", "max_new_tokens": 8}
    shown = {}
    for times in (1, 11):
        print_scores(evaluation([], {}, split="train", open_ended={**facts, "answers": answers * times}))
        shown[times] = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in shown[1] if "A dog." in line] == [
        "What runs? A dog. a dog right",
        "What runs? A dog. a\\ncat wrong",
        "What runs? A dog. a\\ncat right",
        "What runs? A dog. a dog unreadable verdict",
    ]
    assert not any("A dog." in line for line in shown[11])
    assert any(line.startswith("Split train: ") for line in shown[11])


def test_scores_have_a_line_per_category_with_other_runs_beside(capsys):
    beside = [score("colour", 0.5), score("all", 0.375)]  # their order is their own
    print_scores(evaluation([score("all", 0.75), score("colour", 1.0)], {"words": beside}))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["questions", "about", "number", "accuracy", "chance", "words"] in rows
    at = rows.index(["all", "8", "0.75", "0.25", "0.38"])
    assert rows[at + 1] == ["colour", "8", "1.00", "0.25", "0.50"]
