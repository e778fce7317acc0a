"""Answer questions about a media file with a trained run.

The file is decoded and encoded by encoders rebuilt from the run's record; encoders other than those it was trained on
are refused. Answers are generated greedily. A text-only run answers without the file (`looks` is False).

    from trainer import Asker
    with Asker("runs/demo") as asker:
        print(asker.answer("What colour is the shape?", video="clip.mp4"))
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from featurestore.clips import Clip, Turn
from mervcache.errors import UserError, no_file
from mervcache.reprs import brief
from trainer.data.collate import make_batch
from trainer.data.tokens import MemoryTokens
from trainer.model.generate import generate_texts
from trainer.runs.load import LoadedRun, load_run

if TYPE_CHECKING:
    from trainer.end_to_end import LiveTokens

Span = tuple[float | None, float | None]  # seconds; None: the file's start or end
WHOLE: Span = (None, None)
DATASET = "asked"  # dataset name of these clips
MAX_NEW_TOKENS = 64


class Asker:
    """A run ready to answer; encoders and a decode process are held from the first media file until `close`.

    Parameters
    ----------
    run
        Folder of a run or an export, or a loaded one.
    weights
        SPEC or NAME=SPEC, where encoders' weights are if they have moved since training.
    llm
        Where the LLM is, if it has moved since training and is not in the run's folder.
    device
        "auto" is cuda where torch sees one, else cpu.
    """

    def __init__(
        self,
        run: LoadedRun | Path | str,
        *,
        weights: Sequence[str] = (),
        llm: str | None = None,
        device: str = "auto",
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.run = run if isinstance(run, LoadedRun) else load_run(Path(run), llm=llm)
        self.model = self.run.built.model.to(device).eval()
        self._weights, self._device = tuple(weights), device
        self._opened = ExitStack()
        self._source: LiveTokens | None = None

    def __repr__(self) -> str:
        return brief(self, f"of {self.run!r} on {self._device}")

    @property
    def looks(self) -> bool:
        """Whether the run reads visual tokens; False for a text-only run."""
        return self.model.has_visual

    @property
    def notes(self) -> list[str]:
        """Caveats about the answers: a text-only run, encoders with random weights."""
        if not self.looks:
            return ["this run was trained on text alone: it answers without looking"]
        facts = self.run.record.encoders
        seeded = [name for name in self.model.encoders if facts.get(name, {}).get("weights", "").startswith("random:")]
        return [f"encoders with random weights: {', '.join(seeded)}"] if seeded else []

    def answer(self, question: str, **media: Any) -> str:
        """The answer to one `question`; `media` are the keywords of `answers`."""
        return self.answers([question], **media)[0]

    def answers(
        self,
        questions: Sequence[str],
        *,
        video: Path | str | None = None,  # a file, or a folder of frames
        image: Path | str | None = None,
        span: Span = WHOLE,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> list[str]:
        """An answer to each of `questions` about one video or image, which is decoded and encoded once.

        Parameters
        ----------
        video, image
            A file, or for a video a folder of frames; one of the two. A text-only run takes none.
        span
            (start, end) of the video in seconds, None for an end that is open.
        max_new_tokens
            Longest answer.

        Raises
        ------
        UserError
            The medium does not exist or does not fit, or the run's output is not finite.
        MediaError
            The file cannot be decoded.
        """
        clip_id, source = None, MemoryTokens([], {})
        if self.looks:
            root, clip = parse_clip(video, image, span)
            source = self._opened_source()
            source.include(root, [clip])
            clip_id = clip.clip_id
        renderer = self.run.built.renderer
        rendered = [renderer.question(_turns(question)) for question in questions]
        model = self.model
        try:
            batch = make_batch(rendered, [clip_id] * len(rendered), source, model.num_visual_tokens, model.context)
        except UserError as error:  # sources name clips, the user gave a path
            raise UserError(str(error).replace(str(clip_id), str(video or image))) from error
        texts = generate_texts(self.run.built, batch, max_new_tokens=max_new_tokens, device=self._device)
        found = [text for text in texts if text is not None]
        if len(found) < len(texts):
            raise UserError(
                "the run's output is not finite (NaN or infinite), so it has no answer; use an older checkpoint"
            )
        return found

    def close(self) -> None:
        """Stop the decode process and release the encoders."""
        self._opened.close()
        self._source = None

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened_source(self) -> LiveTokens:
        if self._source is None:
            from trainer.end_to_end import source_like  # the pipeline, only where it runs

            source = source_like(
                self.run.built.config,
                self.run.record,
                trained=self.model.trained,
                weights=self._weights,
                device=self._device,
            )
            self._source = self._opened.enter_context(source)
        return self._source


def ask(
    run: Path | str,
    question: str,
    *,
    weights: Sequence[str] = (),
    llm: str | None = None,
    device: str = "auto",
    **media: Any,
) -> str:
    """A run's answer to one `question` about a `video` or an `image`; keep an `Asker` open for several.

    `run`, `weights`, `llm` and `device` are those of `Asker`, `media` the keywords of `Asker.answers`.
    """
    with Asker(run, weights=weights, llm=llm, device=device) as asker:
        return asker.answer(question, **media)


def parse_clip(video: Path | str | None, image: Path | str | None, span: Span = WHOLE) -> tuple[str, Clip]:
    """Root folder and clip of a media file.

    Raises UserError unless exactly one of `video` and `image` is given and exists.
    """
    if (video is None) == (image is None):
        raise UserError("this run reads visual tokens: give one video or one image")
    typed = image or video or ""
    path = Path(typed).resolve()
    if not path.exists():
        raise UserError(no_file(typed))
    if image is not None and span != WHOLE:
        raise UserError("a span is a part of a video; an image has none")
    kind = "video" if image is None else "image"
    return str(path.parent), Clip(dataset=DATASET, path=path.name, kind=kind, start_s=span[0], end_s=span[1])


def _turns(question: str) -> tuple[Turn, Turn]:
    if not question.strip():
        raise UserError("the question is empty")
    return Turn(role="human", text=question), Turn(role="gpt", text="")
