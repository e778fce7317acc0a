"""Projectors: one encoder's stored tokens -> visual tokens of the LLM's width.

A projector is a resampler, an optional standardisation and layer norm, and a trained head (arXiv 2501.01426, section 3
and its projector ablation; heads as in princetonvisualai/merv). The average has no parameters and commutes with a
linear head, so a pooled store serves it exactly; trained resamplers were run on the encoder's own grid and refuse a
pooled store. `trainer.config` lists resamplers and heads by name.

B clips, T time, H W height width, K prefix tokens, D encoder width, M LLM width, N visual tokens, X frames of all
clips, P tokens of a frame, Q queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt, prod, sqrt
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mervcache.errors import UserError
from trainer.config import HEADS, RESAMPLERS, ProjectorConfig, import_choice, row_of
from trainer.data.tokens import ClipTokens, Part, PrefixedTokens, TokenShape, grid_of

Grid = tuple[int, int, int]
TRAINED_GRID = (8, 8)  # H, W behind a trained resampler where the config names none: 64 tokens per frame
NUM_HEADS = 8  # of the attention
INIT_STD = 0.02  # of the attention's weights
STAGE_DEPTH = 3  # blocks before, and blocks behind the pooling of the 2D convolution
UPSAMPLED = "; tokens finer than an encoder's own grid, from a raw store: --projector 2d-average-upsampled"
EXTRACT_OPTIONS = {  # what a resampler needs of a store, as a name for it -> how it is extracted
    "raw": "--grid raw",
    "class": "--prefix-tokens",
    "raw-class": "--grid raw --prefix-tokens",
}


class Resampler(nn.Module):
    """What all resamplers share: what they read, and the grid and width of what comes out."""

    reads: tuple[Part, ...] = ("tokens",)  # tokens alone come as a tensor, else as `PrefixedTokens`
    is_trained = False

    def __init__(self, grid: Grid, width: int) -> None:
        super().__init__()
        self.grid, self.width = grid, width

    def start_head(self, head: nn.Module) -> None:
        """Give the head the starting weights that belong to this resampler; torch's own stay by default."""

    def forward(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError


class Average(Resampler):
    """Adaptive average pooling over T, H and W; the identity when both grids are equal.

    The 2D average of the paper is the case of equal T. What was pooled before is pooled again only where that is the
    average of the encoder's own grid: the stored grid divides that one, so that its windows do not overlap, and each
    target divides the stored one. 16 -> 8 -> 4 is exact; 14 -> 8 -> 4 is not, since the windows of 14 -> 8 overlap.
    """

    def __init__(self, config: ProjectorConfig, stored: TokenShape, llm_width: int) -> None:
        grid = config.grid or (_divided_time(config, stored), *stored.grid[1:])
        self.nested = {tokens: (grid[0], isqrt(tokens), isqrt(tokens)) for tokens in config.nested_grids}
        grid = self.nested[max(self.nested)] if self.nested else grid
        super().__init__(grid, stored.width)
        for each in self.nested.values() or [grid]:
            self._check(each, stored)

    def _check(self, grid: Grid, stored: TokenShape) -> None:
        _check_not_finer(grid, stored.grid, UPSAMPLED)
        if stored.is_pooled and not pools_exactly(grid, stored):
            native = f" of the encoder's {_text(stored.native_grid)}" if stored.native_grid else ""
            raise UserError(
                f"projector grid {_text(grid)} is not exact from the stored grid {_text(stored.grid)}, which is an"
                f" average{native} already: choose the stored grid, or divisors of it where it divides the encoder's;"
                f" or make a store of the encoders' own grids: {_extract_command('raw')}, and `merv-pipeline plan` with"
                " the same options for its price"
            )

    def forward(self, tokens_BTHWD: Tensor, tokens_per_frame: int | None = None) -> Tensor:
        """The tokens on the grid, or on that of `nested` with so many tokens per frame."""
        grid = self.grid if tokens_per_frame is None else self.nested[tokens_per_frame]
        return average_windows(tokens_BTHWD.float(), grid)


class UpsampledAverage(Average):
    """The same windows on a grid that may be finer than the encoder's own, as princetonvisualai/merv pools any grid.

    Window i of m over n < m places still begins at floor(i n / m) and ends before ceil((i + 1) n / m), so that it holds
    one place or the mean of two neighbours. It adds visual tokens and no information: 256 tokens per frame of a
    14 x 14 grid, next to encoders of 16 x 16. Other grids are those of `Average`; time steps are never added.
    """

    def _check(self, grid: Grid, stored: TokenShape) -> None:
        if stored.is_pooled or grid[0] > stored.grid[0]:
            super()._check(grid, stored)


class Attention(Resampler):
    """Learned queries attend to each frame's tokens: the attentive pooler of V-JEPA (arXiv 2404.08471), one block.

    q = q + attention(q, LN(x)), q = q + MLP(LN(q)), a query for each place of the grid. Weights start truncated normal,
    biases zero, and the two layers that end a residual branch are divided by sqrt(2). The keys have no bias: it adds
    the same to all scores of a query and cancels in the softmax.
    """

    is_trained = True

    def __init__(self, config: ProjectorConfig, stored: TokenShape, llm_width: int) -> None:
        width = stored.width
        super().__init__(_trained_grid(config, stored, keeps_time=True), width)
        if width % NUM_HEADS:
            raise UserError(f"attention has {NUM_HEADS} heads, which do not divide the encoder's width {width}")
        self.query_QD = nn.Parameter(torch.empty(self.grid[1] * self.grid[2], width))
        self.token_norm, self.query_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        nn.init.trunc_normal_(self.query_QD, std=INIT_STD)
        self.apply(_start_small)
        with torch.no_grad():
            self.out.weight /= sqrt(2)
            cast("nn.Linear", self.mlp[-1]).weight /= sqrt(2)

    def start_head(self, head: nn.Module) -> None:
        head.apply(_start_small)

    def forward(self, tokens_BTHWD: Tensor) -> Tensor:
        batch = len(tokens_BTHWD)
        tokens_XPD = self.token_norm(tokens_BTHWD.flatten(0, 1).flatten(1, 2))
        query_XQD = self.query_QD.expand(len(tokens_XPD), -1, -1)
        query_XQD = query_XQD + self._attend(query_XQD, tokens_XPD)
        query_XQD = query_XQD + self.mlp(self.query_norm(query_XQD))
        return query_XQD.unflatten(1, self.grid[1:]).unflatten(0, (batch, -1))  # (B T) (H W) D -> B T H W D

    def _attend(self, query_XQD: Tensor, tokens_XPD: Tensor) -> Tensor:
        projected = self.query(query_XQD), self.key(tokens_XPD), self.value(tokens_XPD)
        by_head = [each.unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2) for each in projected]
        return self.out(F.scaled_dot_product_attention(*by_head).transpose(1, 2).flatten(2))


class Convolution(Resampler):
    """Three RegNet blocks, average pooling, three blocks, per frame: Honeybee's C-Abstractor (arXiv 2312.06742)."""

    is_trained = True

    def __init__(self, config: ProjectorConfig, stored: TokenShape, llm_width: int) -> None:
        super().__init__(_trained_grid(config, stored, keeps_time=True), llm_width)
        widths = [stored.width] + [llm_width] * (STAGE_DEPTH - 1)
        self.before = nn.Sequential(*(RegBlock(width, llm_width) for width in widths))
        self.behind = nn.Sequential(*(RegBlock(llm_width, llm_width) for _ in range(STAGE_DEPTH)))

    def forward(self, tokens_BTHWD: Tensor) -> Tensor:
        batch = len(tokens_BTHWD)
        mixed_XHWM = self.before(tokens_BTHWD.flatten(0, 1))
        pooled_BTHWM = average_windows(mixed_XHWM.unflatten(0, (batch, -1)), self.grid)
        return self.behind(pooled_BTHWM.flatten(0, 1)).unflatten(0, (batch, -1))


class RegBlock(nn.Module):
    """A RegNet bottleneck of ratio 1 and stride 1 with depth-wise convolution (arXiv 2003.13678, 1709.01507).

    1 x 1, depth-wise 3 x 3, squeeze and excite, 1 x 1, with a shortcut; layer norm over channels behind every
    convolution, SiLU. Channels are last, so 1 x 1 convolutions are linear layers.
    """

    def __init__(self, width: int, width_out: int) -> None:
        super().__init__()
        excited = round(width / 4)
        self.first = _linear_norm(width, width_out)
        self.depthwise = nn.Conv2d(width_out, width_out, 3, padding=1, groups=width_out, bias=False)
        self.depthwise_norm = nn.LayerNorm(width_out)
        self.squeeze, self.excite = nn.Linear(width_out, excited), nn.Linear(excited, width_out)
        self.last = _linear_norm(width_out, width_out)
        self.shortcut = nn.Identity() if width == width_out else _linear_norm(width, width_out)

    def forward(self, tokens_XHWD: Tensor) -> Tensor:
        mixed_XHWM = F.silu(self.first(tokens_XHWD))
        mixed_XHWM = F.silu(self.depthwise_norm(self.depthwise(mixed_XHWM.movedim(-1, 1)).movedim(1, -1)))
        mean_XM = mixed_XHWM.mean((1, 2))
        gate_XM = self.excite(F.silu(self.squeeze(mean_XM))).sigmoid()
        mixed_XHWM = self.last(mixed_XHWM * gate_XM[:, None, None])
        return F.silu(mixed_XHWM + self.shortcut(tokens_XHWD))


class Convolution3D(Resampler):
    """One 3 x 3 x 3 convolution at the stored resolution, then average pooling."""

    is_trained = True

    def __init__(self, config: ProjectorConfig, stored: TokenShape, llm_width: int) -> None:
        super().__init__(_trained_grid(config, stored, keeps_time=False), llm_width)
        self.convolution = nn.Conv3d(stored.width, llm_width, 3, padding=1)

    def forward(self, tokens_BTHWD: Tensor) -> Tensor:
        mixed_BTHWM = self.convolution(tokens_BTHWD.movedim(-1, 1)).movedim(1, -1)
        return average_windows(mixed_BTHWM, self.grid)


class ClassToken(Resampler):
    """Each frame's class token alone, so T tokens; of an encoder with one class token per clip, T times the same.

    A pooled store serves as well as a raw one: pooling leaves class tokens alone, but for means over merged frames.
    """

    reads = ("prefix",)

    def __init__(self, config: ProjectorConfig, stored: TokenShape, llm_width: int) -> None:
        super().__init__((stored.grid[0], 1, 1), stored.width)
        _check_class_token(stored, "class")

    def forward(self, tokens: PrefixedTokens) -> Tensor:
        return tokens.prefix_BTKD[:, :, :1, None].float()  # registers follow the class token


class AllTokens(Resampler):
    """Each frame's class token and then its whole raw grid, row by row: a grid of T x (1 + H W) x 1."""

    reads = ("tokens", "prefix")

    def __init__(self, config: ProjectorConfig, stored: TokenShape, llm_width: int) -> None:
        time, height, width = stored.grid
        super().__init__((time, 1 + height * width, 1), stored.width)
        _check_raw(config, stored, "raw-class")
        _check_class_token(stored, "raw-class")

    def forward(self, tokens: PrefixedTokens) -> Tensor:
        # float32 first: under autocast the CPU cannot join halves
        assert tokens.tokens_BTHWD is not None  # by `reads`
        class_BT1D, patches_BTPD = tokens.prefix_BTKD[:, :, :1].float(), tokens.tokens_BTHWD.flatten(2, 3).float()
        return torch.cat([class_BT1D, patches_BTPD], dim=2).unsqueeze(3)


def average_windows(tokens_BTHWD: Tensor, grid: Grid) -> Tensor:
    """Means over torch's adaptive windows; the tensor itself where it has that grid."""
    if tuple(tokens_BTHWD.shape[1:4]) == tuple(grid):
        return tokens_BTHWD
    return F.adaptive_avg_pool3d(tokens_BTHWD.movedim(-1, 1), grid).movedim(1, -1)


def _linear_norm(width: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width_out, bias=False), nn.LayerNorm(width_out))


def _start_small(module: nn.Module) -> None:
    """Linear layers as V-JEPA starts them."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _trained_grid(config: ProjectorConfig, stored: TokenShape, *, keeps_time: bool) -> Grid:
    """Where a trained resampler ends, once it is clear that the store serves it."""
    _check_raw(config, stored, "raw")
    grid = config.grid or (_divided_time(config, stored), *TRAINED_GRID)
    _check_not_finer(grid, stored.grid)
    if keeps_time and grid[0] != stored.grid[0]:
        raise UserError(
            f"projector {row_of(config.resampler)} works frame by frame: its grid {_text(grid)} must keep the"
            f" {stored.grid[0]} time steps of the store; 3d-average and 3d-convolution can merge them"
        )
    return grid


def _divided_time(config: ProjectorConfig, stored: TokenShape) -> int:
    time, rest = divmod(stored.grid[0], config.frame_divisor)
    if rest:
        raise UserError(f"frame_divisor {config.frame_divisor} does not divide the {stored.grid[0]} stored time steps")
    return time


def _check_not_finer(grid: Grid, stored: Grid, advice: str = "") -> None:
    if any(want > have for want, have in zip(grid, stored, strict=True)):
        raise UserError(
            f"projector grid {_text(grid)} is finer than the stored grid {_text(stored)}; set projector.grid to a"
            f" coarser one, or extract a finer one{advice}"
        )


def pools_exactly(grid: Grid, stored: TokenShape) -> bool:
    """Whether pooling the stored average to `grid` gives the average of the encoder's own grid."""
    native = stored.native_grid or stored.grid  # unknown in records of older runs
    return all(
        want == have or (have % want == 0 and own % have == 0)
        for want, have, own in zip(grid, stored.grid, native, strict=True)
    )


def _check_raw(config: ProjectorConfig, stored: TokenShape, needed: str) -> None:
    """Refuse any pooled grid, the encoder's own size included: a store says that it pooled, not what from."""
    if stored.is_pooled:
        raise UserError(
            f"projector {row_of(config.resampler)} reads the encoder's own grid, the stored {_text(stored.grid)} is"
            f" pooled: make a raw store with {_extract_command(needed)}, or choose --projector 2d-average"
        )


def _check_class_token(stored: TokenShape, needed: str) -> None:
    if not stored.num_prefix:
        raise UserError(
            "no class token is stored of it. If the encoder has one, make a store that holds it with"
            f" {_extract_command(needed)}; if it has none, as SigLIP, leave it out of the setting encoders"
        )


def _extract_command(needed: str) -> str:
    """Advise a separate store: raw and pooled tokens of one encoder would be easy to confuse in one."""
    return (
        f"`merv-pipeline extract --dataset NAME {EXTRACT_OPTIONS[needed]} --store features/NAME-{needed}.zarr` and the"
        " --config, --weights and --root that this store was made with"
    )


def _text(grid: Grid) -> str:
    return "x".join(map(str, grid))


def parts_of(config: ProjectorConfig) -> tuple[Part, ...]:
    """What a projector reads of a clip."""
    return import_choice(RESAMPLERS, config.resampler).reads


EPS = 1e-6  # deviation of a channel that never changes


class Standardise(nn.Module):
    """(tokens - mean) / deviation by channel, measured once on training tokens; the identity until `fit`.

    Encoders differ in scale by orders of magnitude, and a channel's constant part can be far larger than what differs
    between clips. Short runs do not learn around this, so small recipes turn it on; it is off by default, as in arXiv
    2501.01426. The constants are buffers, applied before the first trained layer: a checkpoint carries them.
    """

    mean_D: Tensor
    std_D: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean_D", torch.zeros(width))
        self.register_buffer("std_D", torch.ones(width))

    def forward(self, tokens_BTHWD: Tensor) -> Tensor:
        return (tokens_BTHWD - self.mean_D) / self.std_D

    def fit(self, moments: Moments) -> None:
        """Take the constants from what was measured."""
        mean_D = moments.total_D / moments.count
        variance_D = (moments.square_D / moments.count - mean_D.square()).clamp_min(0)
        self.mean_D.copy_(mean_D)
        self.std_D.copy_(variance_D.sqrt().clamp_min(EPS))


class Moments:
    """Sums of tokens and of their squares over clips and positions, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total_D = self.square_D = torch.zeros((), dtype=torch.float64)

    def add(self, tokens_BTHWD: Tensor) -> None:
        for tokens_PD in tokens_BTHWD.flatten(1, 3):  # a clip at a time: a raw grid is 32 MiB in float64
            exact_PD = tokens_PD.double()
            self.count += len(exact_PD)
            self.total_D = self.total_D + exact_PD.sum(0)
            self.square_D = self.square_D + exact_PD.square().sum(0)


class Projector(nn.Module):
    """Resampler, standardisation, layer norm, head."""

    def __init__(self, config: ProjectorConfig, stored: TokenShape, llm_width: int) -> None:
        super().__init__()
        self.resampler: Resampler = import_choice(RESAMPLERS, config.resampler)(config, stored, llm_width)
        self.standardise = Standardise(stored.width) if config.standardise else None
        coarser = [tokens for tokens in config.nested_grids if tokens < max(config.nested_grids)]
        self.standardise_at = (
            nn.ModuleDict(  # tokens per frame -> that of a coarser grid: means have smaller deviations
                {str(tokens): Standardise(stored.width) for tokens in coarser if config.standardise}
            )
        )
        width = self.resampler.width
        self.norm = nn.LayerNorm(width) if config.pre_layer_norm else None
        self.head: nn.Module = import_choice(HEADS, config.head)(width, llm_width)
        self.resampler.start_head(self.head)

    @property
    def grid(self) -> Grid:
        """T, H, W of the visual tokens."""
        return self.resampler.grid

    @property
    def num_tokens(self) -> int:
        """Visual tokens of a clip: N."""
        return prod(self.grid)

    def num_tokens_at(self, tokens_per_frame: int | None) -> int:
        """The same at one of the nested grids; None is the finest, that of every other run."""
        return self.num_tokens if tokens_per_frame is None else self.grid[0] * tokens_per_frame

    def standardisations(self) -> dict[str, tuple[int | None, Standardise]]:
        """Name of the module -> tokens per frame that it is for, where grids are nested, and the module."""
        found: dict[str, tuple[int | None, Standardise]] = {}
        if self.standardise is not None:
            found["standardise"] = (None, self.standardise)
        for tokens, module in self.standardise_at.items():
            found[f"standardise_at.{tokens}"] = (int(tokens), cast("Standardise", module))
        return found

    def resample(self, tokens: ClipTokens, tokens_per_frame: int | None = None) -> Tensor:
        """Tokens in float32 as the first trained layer finds them: on the target grid, or as stored where the
        resampler itself is trained. What a standardisation is measured on."""
        # a source may give more than is needed
        wanted = tokens if "prefix" in self.resampler.reads else grid_of(tokens)
        if tokens_per_frame is not None:
            return self.resampler(wanted, tokens_per_frame)
        return cast("Tensor", wanted).float() if self.resampler.is_trained else self.resampler(wanted)

    def forward(self, tokens: ClipTokens, tokens_per_frame: int | None = None) -> Tensor:
        """Visual tokens; with nested grids those of the finest one, or of one that is named by its tokens per frame."""
        tokens_BTHWD = self.resample(tokens, tokens_per_frame)
        standardise = self.standardise
        if str(tokens_per_frame) in self.standardise_at:
            standardise = self.standardise_at[str(tokens_per_frame)]
        if standardise is not None:
            tokens_BTHWD = standardise(tokens_BTHWD)
        if self.resampler.is_trained:
            tokens_BTHWD = self.resampler(tokens_BTHWD)
        if self.norm is not None:
            tokens_BTHWD = self.norm(tokens_BTHWD)
        return self.head(tokens_BTHWD.flatten(1, 3))  # B (T H W) D -> B N M


def build_projectors(config: ProjectorConfig, shapes: Mapping[str, TokenShape], llm_width: int) -> dict[str, Projector]:
    """A projector for every encoder, all with one grid; an error names its encoder."""
    projectors = {}
    for encoder, shape in shapes.items():
        try:
            projectors[encoder] = Projector(config, shape, llm_width)
        except UserError as error:
            raise UserError(f"{encoder}: {error}") from error
    if len({projector.num_tokens for projector in projectors.values()}) > 1:
        grids = ", ".join(f"{encoder} {'x'.join(map(str, p.grid))}" for encoder, p in projectors.items())
        remedy = "projector.grid to one they share" if config.takes_grid else "encoders to those that share one"
        raise UserError(f"encoders must share one grid to be fused, got {grids}; set {remedy}")
    return projectors


def linear(width: int, llm_width: int) -> nn.Module:
    """The paper's head: d x sum of d_e weights over all encoders."""
    return nn.Linear(width, llm_width)


def gelu_mlp(width: int, llm_width: int) -> nn.Module:
    """Linear, GELU, Linear."""
    return nn.Sequential(nn.Linear(width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width))


def fused_gelu_mlp(width: int, llm_width: int) -> nn.Module:
    """As `gelu_mlp` behind a hidden layer of 4 x the incoming width."""
    hidden = 4 * width
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.GELU(),
        nn.Linear(hidden, llm_width),
        nn.GELU(),
        nn.Linear(llm_width, llm_width),
    )
