"""Examples at the end of the help of `merv-train`, and of the commands of `merv-eval` in `trainer.cli_eval`."""

from mervcache.console import examples

EXAMPLES = {
    "train": examples(
        "merv-train --from-cache features/lab.zarr --llm FOLDER_OR_HUB_ID --out runs/first --resume auto",
        "merv-train --from-cache features/demo.zarr --recipe demo --out runs/demo --dry-run",
        "merv-train --from-cache features/demo.zarr --recipe demo --exclude exclude.txt --out runs/clean",
    ),
    "eval": examples("merv-eval run --checkpoint runs/first"),
    "run": examples(
        "merv-eval run --checkpoint runs/first --baseline runs/text-only",
        "merv-eval run --checkpoint runs/live --dataset eval --root eval_data",
    ),
    "distortion": examples("merv-eval distortion --checkpoint runs/first --limit 64"),
    "export": examples(
        "merv-eval export --checkpoint runs/first --out exports/first --license apache-2.0",
        "merv-eval export --checkpoint runs/first --out exports/prompts --format prompt-embeds --limit 100",
    ),
    "import-official": examples(
        "merv-eval import-official latest.pt --config config.json --llm meta-llama/Llama-2-7b-hf --out runs/official"
    ),
    "ask": examples("merv-eval ask --checkpoint runs/first --video clip.mp4 'What happens first?'"),
}
