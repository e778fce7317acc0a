"""Linear and attentive probes: small classifiers on frozen features, cross-validated.

Both standardise channels by the clips they learn from. Predictions are a pure function of features, labels, splits and
seed, for one number of threads.

n clips, D channels, R directions, C classes, P tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mervcache.errors import NonFiniteError
from trainer.ablation.probe_features import LARGEST_BATCH
from trainer.ablation.probe_labels import Split
from trainer.data.order import derive_seed

LINEAR_FORMULA = (
    "mean cross-entropy + l2 / 2 x sum of squared weights, without the bias, on standardised features; l2 of"
    " 10^-4, 10^-3, ..., 10^2 with the least mean cross-entropy on inner folds, the larger one of equals; L-BFGS in"
    " float64"
)
ATTENTIVE_FORMULA = (
    "one learned query per encoder: softmax(x q / sqrt(D)) over its standardised tokens x weights their sum, and the"
    " sums of all encoders enter one linear layer; mean cross-entropy + 10^-4 / 2 x sum of squared weights; L-BFGS on"
    " all clips, as many iterations as gave the least cross-entropy on one inner fold, then anew on all"
)
L2 = tuple(10.0**power for power in range(2, -5, -1))  # from simple to flexible: each fit starts at the one before
GRADIENT = 1e-7  # largest entry of the gradient of a finished fit, in coordinates of curvature about 1
ROUGH = 1e-4  # the same where penalties are compared
MAX_ITERATIONS = 1000
CONSTANT = 1e-6  # a channel whose deviation is below this part of its mean does not change: float32 has 7 digits
QUERY_STD = 0.3  # of a query's start: attention that is nearly even, but not a stationary point
ATTENTIVE_L2 = 1e-4
ROUND, MAX_ROUNDS, PATIENCE = 5, 30, 4  # iterations of L-BFGS in a round; rounds


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """The class predicted for every clip by the probe that did not learn from it, and what was chosen per fold."""

    class_N: NDArray[np.int64]
    chosen: tuple[float, ...]  # l2, or rounds


def predict_linear(features: Sequence[NDArray], label_N: NDArray, splits: Sequence[Split]) -> Prediction:
    """Of one or several encoders' features [N, D], which are joined."""
    class_N, chosen, label = np.empty_like(label_N), [], torch.from_numpy(label_N)
    for split in splits:
        joined = torch.from_numpy(np.concatenate([each[split.train] for each in features], axis=1)).double()
        rotation = Rotation(joined)
        rotated_nR, place = rotation.train_nR, {row: index for index, row in enumerate(split.train.tolist())}
        inner = [[[place[row] for row in part.tolist()] for part in pair] for pair in split.inner]
        l2 = _choose_l2(rotated_nR, rotation.square_R, label[split.train], inner)
        model = fit_logistic(rotated_nR, label[split.train], [l2], rotation.square_R)[0]
        test = torch.from_numpy(np.concatenate([each[split.test] for each in features], axis=1)).double()
        class_N[split.test] = model.log_probabilities(rotation(test)).argmax(dim=1).numpy()
        chosen.append(l2)
    return Prediction(class_N=class_N, chosen=tuple(chosen))


class Rotation:
    """Standardise channels, and turn them to the directions in which the training clips vary.

    A penalty on squared weights does not see a rotation, and has no weight outside of the span of the clips: the fit is
    the same, with at most n directions instead of D channels, and of known curvature. It also serves fits on a part of
    the clips, whose span is inside.
    """

    def __init__(self, train_nD: Tensor) -> None:
        self._mean_D = train_nD.mean(dim=0)
        deviation_D = train_nD.std(dim=0, correction=0)
        is_constant_D = deviation_D <= CONSTANT * self._mean_D.abs()
        self._scale_D = torch.where(is_constant_D, 0.0, 1 / torch.where(is_constant_D, 1.0, deviation_D))
        standard_nD = self._standardise(train_nD)
        n, width = standard_nD.shape
        if width <= n:
            square_R, vectors = torch.linalg.eigh(standard_nD.T @ standard_nD / n)
        else:
            square_R, vectors = torch.linalg.eigh(standard_nD @ standard_nD.T / n)
        kept = square_R > max(n, width) * torch.finfo(square_R.dtype).eps * square_R.max().clamp_min(1e-300)
        self.square_R = square_R[kept]  # mean square of each direction
        vectors = vectors[:, kept]
        if width > n:
            vectors = standard_nD.T @ (vectors / (self.square_R * n).sqrt())
        self._basis_DR = vectors
        self.train_nR = standard_nD @ vectors

    def __call__(self, features_nD: Tensor) -> Tensor:
        return self._standardise(features_nD) @ self._basis_DR

    def _standardise(self, features_nD: Tensor) -> Tensor:
        return (features_nD - self._mean_D) * self._scale_D


@dataclass(frozen=True, kw_only=True, eq=False)
class Logistic:
    """A fitted multinomial logistic regression over the classes it has seen."""

    weight_RC: Tensor
    bias_C: Tensor
    classes: Tensor

    def log_probabilities(self, features_nR: Tensor) -> Tensor:
        """[n, all classes]; classes that were not there to learn from have -inf."""
        found = (features_nR @ self.weight_RC + self.bias_C).log_softmax(dim=1)
        full = found.new_full((len(found), int(self.classes.max()) + 1), -torch.inf)
        full[:, self.classes] = found
        return full


def fit_logistic(
    features_nR: Tensor,
    label_n: Tensor,
    penalties: Sequence[float],
    square_R: Tensor | None = None,
    *,
    tolerance: float = GRADIENT,
) -> list[Logistic]:
    """Minimise mean cross-entropy + l2 / 2 x |W|^2 for each l2, each fit beginning at the one before.

    `square_R` is the mean square of each feature where they are uncorrelated. At equal probabilities the curvature
    along feature r is then square_r / C + l2; in coordinates scaled by its root L-BFGS needs tens of iterations.
    `tolerance` is the largest entry of the gradient at the end.
    """
    square_R = features_nR.square().mean(dim=0) if square_R is None else square_R
    classes, target_n = label_n.unique(return_inverse=True)
    target_nC = F.one_hot(target_n, len(classes)).to(features_nR.dtype)
    weight_RC = features_nR.new_zeros(features_nR.shape[1], len(classes))
    bias_C = features_nR.new_zeros(len(classes))
    fits = []
    for l2 in penalties:
        scale_R1 = (square_R / len(classes) + l2).rsqrt()[:, None]
        scaled_RC, bias_C = weight_RC / scale_R1, bias_C.clone()
        optimizer = torch.optim.LBFGS(
            [scaled_RC, bias_C],
            max_iter=MAX_ITERATIONS,
            tolerance_grad=tolerance,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def loss(scaled_RC=scaled_RC, bias_C=bias_C, scale_R1=scale_R1, l2=l2) -> Tensor:
            own_RC = scaled_RC * scale_R1
            log_nC = (features_nR @ own_RC + bias_C).log_softmax(dim=1)
            residual_nC = (log_nC.exp() - target_nC) / len(target_nC)
            scaled_RC.grad = (features_nR.T @ residual_nC + l2 * own_RC) * scale_R1
            bias_C.grad = residual_nC.sum(dim=0)
            return l2 / 2 * own_RC.square().sum() - (log_nC * target_nC).sum() / len(target_nC)

        if not torch.isfinite(optimizer.step(loss)):
            raise NonFiniteError("the loss of a linear probe is not finite: its features are out of range")
        weight_RC = scaled_RC * scale_R1
        fits.append(Logistic(weight_RC=weight_RC, bias_C=bias_C, classes=classes))
    return fits


def _choose_l2(features_nR: Tensor, square_R: Tensor, label_n: Tensor, inner: Sequence[Sequence[list[int]]]) -> float:
    """The penalty with the least mean cross-entropy on inner folds; clips of a class not learnt from do not count."""
    total = torch.zeros(len(L2), dtype=torch.float64)
    for train, check in inner:
        known = torch.isin(label_n[check], label_n[train])
        rows = torch.tensor(check)[known]
        if not len(rows) or len(label_n[train].unique()) < 2:
            continue
        for index, model in enumerate(fit_logistic(features_nR[train], label_n[train], L2, square_R, tolerance=ROUGH)):
            total[index] += F.nll_loss(model.log_probabilities(features_nR[rows]), label_n[rows], reduction="sum")
    return L2[int(total.argmin())]


class AttentiveProbe(nn.Module):
    """A learned query attends to each encoder's tokens, and a linear layer reads what the queries have gathered."""

    def __init__(self, widths: Sequence[int], num_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.queries = nn.ParameterList(QUERY_STD * torch.randn(width, generator=generator) for width in widths)
        self.head = nn.Linear(sum(widths), num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Sequence[Tensor], constants: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Logits of tokens_BPD of each encoder, with (mean_D, 1 / deviation_D).

        Standardising is folded in: the mean adds the same to all scores of a query, and weights sum to 1.
        """
        gathered = []
        for tokens_BPD, query_D, (mean_D, scale_D) in zip(tokens, self.queries, constants, strict=True):
            score_BP = tokens_BPD @ (query_D * scale_D) / len(query_D) ** 0.5
            mean_BD = torch.einsum("bp,bpd->bd", score_BP.softmax(dim=1), tokens_BPD)
            gathered.append((mean_BD - mean_D) * scale_D)
        return self.head(torch.cat(gathered, dim=1))


def predict_attentive(features: Sequence[NDArray], label_N: NDArray, splits: Sequence[Split], seed: int) -> Prediction:
    """Of one or several encoders' tokens [N, P, D]."""
    class_N, chosen = np.empty_like(label_N), []
    for fold, split in enumerate(splits):
        begin = derive_seed("attentive probe", seed, fold)
        train, check = split.inner[0]
        rounds = _AttentiveFit(features, label_N, train, begin).count_rounds(check)
        fit = _AttentiveFit(features, label_N, split.train, begin)
        for _ in range(rounds):
            fit.improve()
        class_N[split.test] = fit.logits(split.test).argmax(dim=1).numpy()
        chosen.append(float(rounds))
    return Prediction(class_N=class_N, chosen=tuple(chosen))


class _AttentiveFit:
    """An attentive probe that learns from some clips, a round of iterations at a time.

    Gradients are of all these clips, summed over batches: small steps of Adam learn noise as fast as what matters, and
    need ten times as many passes.
    """

    def __init__(self, features: Sequence[NDArray], label_N: NDArray, train: NDArray, seed: int) -> None:
        self._features, self._label_N, self._train = features, torch.from_numpy(label_N), train
        self._constants = [_constants(each, train) for each in features]
        widths = [each.shape[2] for each in features]
        self._model = AttentiveProbe(widths, int(label_N.max()) + 1, torch.Generator().manual_seed(seed))
        self._optimizer = torch.optim.LBFGS(
            self._model.parameters(),
            max_iter=ROUND,
            tolerance_grad=GRADIENT,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

    def improve(self) -> None:
        """Do the next round."""
        if not torch.isfinite(self._optimizer.step(self._objective)):
            raise NonFiniteError("the loss of an attentive probe is not finite: its tokens are out of range")

    def count_rounds(self, check: NDArray) -> int:
        """Learn until the clips in `check` are predicted no better, and return after how many rounds they were best."""
        best, best_round = torch.inf, 1
        for number in range(1, MAX_ROUNDS + 1):
            self.improve()
            value = float(F.cross_entropy(self.logits(check), self._label_N[check]))
            if value < best:
                best, best_round = value, number
            if number - best_round >= PATIENCE:
                break
        return best_round

    @torch.no_grad()
    def logits(self, rows: NDArray) -> Tensor:
        return torch.cat([self._model(tokens, self._constants) for _, tokens in self._batches(rows)])

    def _objective(self) -> Tensor:
        self._optimizer.zero_grad()
        weights = [self._model.head.weight, *self._model.queries]
        total = ATTENTIVE_L2 / 2 * sum((each.square().sum() for each in weights), start=torch.zeros(()))
        total.backward()
        total = total.detach()
        for rows, tokens in self._batches(self._train):
            logits = self._model(tokens, self._constants)
            loss = F.cross_entropy(logits, self._label_N[rows], reduction="sum") / len(self._train)
            loss.backward()
            total += loss.detach()
        return total

    def _batches(self, rows: NDArray) -> Iterator[tuple[NDArray, list[Tensor]]]:
        for start in range(0, len(rows), LARGEST_BATCH):
            part = rows[start : start + LARGEST_BATCH]
            yield part, [torch.from_numpy(each[part]).float() for each in self._features]


def _constants(tokens_NPD: NDArray, rows: NDArray) -> tuple[Tensor, Tensor]:
    """(mean_D, 1 / deviation_D) over all tokens of these clips; a channel that does not change counts 0."""
    count = len(rows) * tokens_NPD.shape[1]
    shift_D = tokens_NPD[rows[0], 0].astype(np.float64)  # a constant far above what differs would take the precision
    total_D = square_D = np.zeros(tokens_NPD.shape[2])
    for start in range(0, len(rows), LARGEST_BATCH):
        part = tokens_NPD[rows[start : start + LARGEST_BATCH]].astype(np.float64).reshape(-1, len(shift_D)) - shift_D
        total_D, square_D = total_D + part.sum(axis=0), square_D + np.square(part).sum(axis=0)
    mean_D = total_D / count
    deviation_D = np.sqrt(np.maximum(square_D / count - mean_D**2, 0))
    is_constant_D = deviation_D <= CONSTANT * np.abs(mean_D + shift_D)
    scale_D = np.where(is_constant_D, 0.0, 1 / np.where(is_constant_D, 1.0, deviation_D))
    return torch.from_numpy(mean_D + shift_D).float(), torch.from_numpy(scale_D).float()
