"""From a checkpoint to numbers, pictures and one page: the one stage that looks at true factors.

    python evaluate.py out/shapes3d-laptop/ckpt.pt            # everything, at the paper's counts
    python evaluate.py out/shapes3d-laptop/ckpt.pt --quick    # under a minute, at smaller counts
    python evaluate.py out/shapes3d-laptop/ckpt.pt --only factorvae,mig
    python evaluate.py --codes codes.npz --dataset shapes3d   # codes of any model, yours or another

It prints a table with the paper's numbers beside ours, and writes metrics.json, a PNG per figure
and index.html (open it in a browser, offline too) to --out, by default to eval beside the input.

The metrics ask one question in many ways: does each latent unit follow one factor, and each factor
one unit? They are plain functions that know nothing of this project, to be called with any codes:
    evaluate.mig(lambda idx: my_codes[idx], factor_sizes=[10, 10, 10, 8, 4, 15])
"""

import base64
import functools
import inspect
import io
import json
import math
import warnings
from pathlib import Path

import joblib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.feature_selection import mutual_info_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.metrics.cluster import contingency_matrix
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import data
import train
from data import UserError
from unet import ddim

BATCH = 500  # images that go through the extractor at once
ACTIVE = 0.05  # FactorVAE's rule: a unit of smaller standard deviation is silent
TEMPLATE = Path(__file__).parent / "assets" / "page.html"
INCEPTION = ("https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
             "inception-2015-12-05.pt")


def progress(work, words, total=None):
    """Go through `work` with a bar that says what is done and how long it still takes."""
    return tqdm(work, words, total, leave=False, disable=None)  # None: only on a terminal


# ---- Codes: from images to one number per unit --------------------------------------------------


def fit_pca(c):
    """One-component PCA of every unit. c: (n, N, D) -> mean and direction, each (N, D) float32.

    All metrics but FID see a unit as one number (section 4.1). A unit IS one number under an MLP,
    so little is lost. Units of one number (D = 1) are taken as they are.
    """
    if c.shape[2] == 1:
        return torch.zeros_like(c[0]), torch.ones_like(c[0])
    mean = c.double().mean(0)  # (N, D)
    x = c.double() - mean  # (n, N, D)
    cov = torch.einsum("nud,nue->ude", x, x) / len(c)  # (N, D, D)
    direction = torch.linalg.eigh(cov).eigenvectors[..., -1]  # (N, D), of the largest eigenvalue
    # An eigenvector's sign is free: fix it, or the same model might be drawn the other way round.
    largest = direction.abs().argmax(1, keepdim=True)  # (N, 1)
    sign = direction.gather(1, largest).sign()  # (N, 1)
    return mean.float(), (direction * sign).float()


def project(c, pca):
    """Units c (n, N, D) to their coordinates along the first component, (n, N)."""
    mean, direction = pca
    return ((c - mean) * direction).sum(-1)  # (n, N)


class Codes:
    """encode(idx) for the metrics: each image is encoded once, when first asked for, and kept.

    units: a function idx int64 (B,) -> c (B, N, D), of a model or of a file; count: of images.
    """

    def __init__(self, units, pca, count):
        self.units, self.pca = units, pca
        self.table = np.full((count, len(pca[0])), np.nan)  # (images, N); nan: not yet known

    def __call__(self, idx):
        """idx int64 (B,) -> float (B, N)."""
        new = np.unique(idx[np.isnan(self.table[idx, 0])])  # metrics draw with replacement
        parts = torch.from_numpy(new).split(BATCH)
        for part in progress(parts, f"encoding {len(new):,} images, {BATCH} at once"):
            self.table[part] = project(self.units(part), self.pca).cpu()
        return self.table[idx]


def read_codes(path, count):
    """A file of codes, see --codes, of `count` images -> (images, N, D). UserError otherwise."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # foreign bytes fail in any way; nothing of ours is inside this try
        raise UserError(f"{path}: not a readable .npz file ({type(error).__name__}); expected one "
                        "written with numpy.savez(FILE, codes=ARRAY)") from error
    name = "codes" if len(arrays) != 1 else list(arrays)[0]
    if name not in arrays:
        raise UserError(f"{path}: holds {', '.join(arrays) or 'no array'}; expected one array, or "
                        "one that is named codes")
    codes = arrays[name]
    fits = codes.ndim in (2, 3) and len(codes) == count and codes.size
    if codes.dtype.kind not in "fiub" or not fits:
        raise UserError(f"{path}: {name} is {codes.dtype} {codes.shape}; expected numbers "
                        f"({count:,} images, U) or ({count:,} images, N, D)")
    if not np.isfinite(codes).all():
        raise UserError(f"{path}: {name} holds NaN or Inf; expected finite numbers")
    return codes.reshape(*codes.shape[:2], -1)  # (images, N, D); D is 1 for (images, U)


class Probe:
    """A random sample of images, and which unit knows which factor on it.

    idx (n,); units c (n, N, D) before alignment; pca and codes (n, N); factors int64 (n, F).
    active: bool (N,), FactorVAE's rule; nmi: (F, N), mutual information of factor and unit over the
    factor's entropy; favourite: int64 (N,), the factor that a unit knows best.
    groups: {factor: its best unit, then all other active units whose favourite it is}; the eight
    best known factors at most (CelebA has 40).
    """

    def __init__(self, units, ds, n, seed):
        order = np.random.default_rng(seed).permutation(len(ds))
        self.idx = torch.from_numpy(order[:n])  # (n,), none twice
        parts = progress(self.idx.split(BATCH), f"units of a sample, {BATCH} images at once")
        self.c = torch.cat([units(part) for part in parts])  # (n, N, D)
        if not self.c.isfinite().all():
            raise UserError("units are NaN or Inf: the training diverged; train it again")
        if self.c.shape[1] < 2:
            raise UserError("found 1 unit, expected two or more: metrics compare units")
        self.pca = fit_pca(self.c)
        self.codes = project(self.c, self.pca).cpu().numpy()  # (n, N)
        self.names, self.factors = ds.factor_names, ds.factors(self.idx).cpu().numpy()
        self.active = self.codes.std(0, ddof=1) >= ACTIVE
        mi, h = mutual_information(self.codes, self.factors)  # (N, F), (F,)
        self.nmi = (mi / np.maximum(h, 1e-12)).T
        self.favourite = self.nmi.argmax(0)
        self.groups = {}
        for f in sorted(np.argsort(-self.nmi.max(1))[:8].tolist()):
            ranked = np.argsort(-self.nmi[f]).tolist()
            fans = self.active & (self.favourite == f)  # (N,)
            self.groups[f] = [u for u in ranked if u == ranked[0] or fans[u]]

    def labels(self, most=None):
        """A text for each group, such as "floor hue: unit 3, 7"; of its `most` first, or all."""
        return [f"{self.names[f]}: unit {', '.join(map(str, units[:most]))}"
                for f, units in self.groups.items()]


# ---- Metrics ------------------------------------------------------------------------------------
# Common to all: encode(idx int64 (B,)) -> float (B, U), one number per unit. idx counts the full
# grid of factor_sizes in row-major order (the first factor changes slowest). K factors, U units,
# natural logarithms. Samples draw every factor independently and with replacement, train before
# test. What one should know about a score (no active unit, an undefined value) is a warning.
#
# Scores disagree, because they ask different things. FactorVAE asks only which unit is most silent:
# one that leaks a bit of a second factor still wins its votes, while DCI charges for each leak.
# Both let several units share a factor; MIG does not.


class Sampler:
    """Draws codes and their factors for one metric, all from one generator.

    A factor of one value is left out: nothing can be told of it, and the indices stay right.
    ValueError for fewer than at_least factors or units; if encode gives another shape, NaN or Inf.
    """

    def __init__(self, encode, factor_sizes, seed, at_least=1, units=1):
        self.encode, self.units = encode, units
        self.rng = np.random.default_rng(seed)
        self.sizes = np.array([size for size in factor_sizes if size != 1], dtype=np.int64)  # (K,)
        if len(self.sizes) < at_least or (self.sizes < 1).any():
            raise ValueError(f"factor_sizes {list(factor_sizes)}: at least {at_least} factors of "
                             "two or more values needed")

    def factors(self, *shape):
        """Factors int64 (*shape, K)."""
        return self.rng.integers(0, self.sizes, size=(*shape, len(self.sizes)))

    def codes(self, factors):
        """Codes float64 (n, U) of factors int64 (n, K)."""
        idx = np.ravel_multi_index(factors.T, self.sizes)  # (n,)
        codes = np.asarray(self.encode(idx), dtype=np.float64)
        if codes.ndim != 2 or len(codes) != len(factors) or codes.shape[1] < self.units:
            raise ValueError(f"encode gave shape {codes.shape} for {len(factors)} indices; "
                             f"expected ({len(factors)}, U), U at least {self.units}")
        return finite(codes)

    def __call__(self, n):
        """n codes (n, U) and their factors int64 (n, K)."""
        factors = self.factors(n)
        return self.codes(factors), factors


def finite(codes):
    """codes (n, U), unchanged. ValueError naming the units that hold NaN or Inf."""
    bad = np.flatnonzero(~np.isfinite(codes).all(0))  # one bad number spoils its whole unit
    if len(bad):
        raise ValueError(f"the codes of unit {', '.join(map(str, bad))} hold NaN or Inf; metrics "
                         "need finite codes")
    return codes


def gap(scores):
    """Best minus second best unit. scores: (U, K) -> (K,)."""
    ranked = np.sort(scores, axis=0)  # (U, K), the best last
    return ranked[-1] - ranked[-2]


def entropy(p, axis=None):
    """Entropy of distributions along an axis, or of the whole array, in nats; 0 log 0 is 0."""
    return -(p * np.log(np.where(p > 0, p, 1))).sum(axis)


def factor_vae(encode, factor_sizes, seed=0, n_variance=10_000, n_train=10_000, n_test=5_000,
               batch=64):
    """FactorVAE score (reference 31), 0 to 1: hold one factor fixed, and see which unit is silent.

    A vote: fix a random factor k at a random value in `batch` samples. The unit of least variance,
    relative to its variance over everything, gets a vote for k. Training votes name each unit after
    its most frequent factor; the score is how often that name is right on new votes. Units of
    sd < 0.05 take no part; if none is left the score is 0.
    """
    draw = Sampler(encode, factor_sizes, seed)
    K = len(draw.sizes)
    overall = draw(n_variance)[0].var(0, ddof=1)  # (U,)
    # Absolute, as in the reference: a good code that is scaled down far enough scores 0.
    active = np.sqrt(overall) >= ACTIVE  # (U,)
    if not active.any():
        warnings.warn("FactorVAE: no active unit (all have sd < 0.05), so the score is 0")
        return 0.0

    def votes(n):
        """How often factor k was fixed and active unit d was the most silent, (A, K)."""
        table = np.zeros((active.sum(), K))  # (A, K)
        for start in progress(range(0, n, 1024), f"FactorVAE, {n:,} votes, 1,024 at once"):
            m = min(1024, n - start)
            fixed = draw.rng.integers(K, size=m)  # (m,) a factor k for each vote
            factors = draw.factors(m, batch)  # (m, batch, K)
            for vote, k in enumerate(fixed):
                factors[vote, :, k] = factors[vote, 0, k]  # the first sample sets the value
            codes = draw.codes(factors.reshape(m * batch, K))  # (m*batch, U)
            codes = codes.reshape(m, batch, -1)[:, :, active]  # (m, batch, A)
            silent = (codes.var(1, ddof=1) / overall[active]).argmin(1)  # (m,)
            np.add.at(table, (silent, fixed), 1)
        return table

    # argmax takes the lowest factor where votes tie, and factor 0 for a unit that got none.
    name = votes(n_train).argmax(1)  # (A,)
    right = votes(n_test)[np.arange(len(name)), name]  # (A,)
    return float(right.sum() / n_test)


def fit_trees(x, y, x_test, y_test, seed):
    """Boosted trees from codes to one factor -> importances (U,), test accuracy."""
    # The reference sets no seed. It only decides between splits that are equally good.
    model = GradientBoostingClassifier(random_state=seed).fit(x, y)
    return model.feature_importances_, model.score(x_test, y_test)


def fit_all_trees(x, y, x_test, y_test, seed, jobs, words):
    """fit_trees for every factor, in `jobs` processes -> importances (U, K), accuracies (K,)."""
    K = y.shape[1]
    importances, accuracies = np.zeros((x.shape[1], K)), np.zeros(K)
    # A fit's time goes with the number of classes. The longest first: then no process is left
    # alone with a long one at the end, a fifth of DCI's time on two cores.
    order = np.argsort(-y.max(0))  # (K,)
    tasks = [joblib.delayed(fit_trees)(x, y[:, k], x_test, y_test[:, k], seed) for k in order]
    fits = joblib.Parallel(min(jobs or joblib.cpu_count(), K), return_as="generator")(tasks)
    for k, (importance, accuracy) in zip(order, progress(fits, words, K)):
        importances[:, k], accuracies[k] = importance, accuracy
    return importances, accuracies


def dci(encode, factor_sizes, seed=0, n_train=10_000, n_test=5_000, jobs=None):
    """DCI (reference 14): who is asked for what? jobs: processes, None for one per core.

    Boosted trees predict each factor from all units; R[u, k] is the importance of unit u for factor
    k. Returns dict, all 0 to 1: disentanglement (a unit is important for one factor), completeness
    (a factor needs one unit), informativeness (the trees' test accuracy). Scores depend strongly on
    the sample counts: never compare across counts. A badly predicted factor weighs as much as a
    well predicted one, as in the reference. ValueError for fewer than two factors or units.
    """
    draw = Sampler(encode, factor_sizes, seed, at_least=2, units=2)
    x, y = draw(n_train)
    x_test, y_test = draw(n_test)
    # R: (U, K). Importances sum to 1 per factor, so every factor has the same say.
    R, accuracies = fit_all_trees(x, y, x_test, y_test, seed, jobs, "DCI, trees of one factor each")
    if R.sum() == 0:  # no tree found anything to split, so all units are equally important
        R = np.ones_like(R)

    def certainty(axis):
        """1 - entropy in units of its largest value. A row or column of zeros gets 0."""
        p = (R + 1e-11) / (R + 1e-11).sum(axis, keepdims=True)  # (U, K)
        return 1 - entropy(p, axis) / np.log(R.shape[axis])

    per_unit, per_factor = certainty(1), certainty(0)  # (U,), (K,)
    return {"disentanglement": float((per_unit * R.sum(1)).sum() / R.sum()),
            "completeness": float(per_factor.mean()),
            "informativeness": float(accuracies.mean())}


def mutual_information(codes, factors, bins=20):
    """Mutual information of units, cut into bins, with factors, and factors' entropies; in nats.

    codes (n, U), factors int64 (n, K) -> (U, K), (K,). Plug-in estimates: a unit and a factor that
    have nothing to do with each other still get about (bins-1)(values-1)/2n.
    """
    n, U = codes.shape
    mi, h = np.zeros((U, factors.shape[1])), np.zeros(factors.shape[1])  # (U, K), (K,)
    for u in range(U):
        # Bins of equal widths from the least to the largest value. Only their left edges count,
        # or the largest value would get a bin of its own.
        edges = np.histogram(codes[:, u], bins)[1]
        labels = np.digitize(codes[:, u], edges[:-1])  # (n,), 1 to bins
        for k in range(len(h)):
            joint = contingency_matrix(labels, factors[:, k]) / n  # (bins in use, values)
            h[k] = entropy(joint.sum(0))  # the same for every unit
            mi[u, k] = entropy(joint.sum(1)) + h[k] - entropy(joint)  # H(u) + H(k) - H(u, k)
    return np.where(mi > 1e-12, mi, 0), h  # no information may come out as +-1e-16


def mig(encode, factor_sizes, seed=0, n_train=10_000, bins=20):
    """Mutual information gap (reference 9), 0 to 1: does exactly one unit know a factor?

    Mean over factors of (best - second best unit's information) / H(factor). ValueError: one unit.
    """
    codes, factors = Sampler(encode, factor_sizes, seed, units=2)(n_train)
    mi, h = mutual_information(codes, factors, bins)
    return float((gap(mi) / h).mean())


def modularity(encode, factor_sizes, seed=0, n_train=10_000, bins=20, active_only=False):
    """Modularity (reference 49), 0 to 1: does a unit know one factor? It does not mind copies.

    Per unit 1 - (sum over the other factors of MI^2) / ((K-1) max MI^2), and 0 for a unit that
    knows nothing; the mean over ALL units. Beyond the paper: active_only leaves out units of
    sd < 0.05; nan if there is no other. ValueError for fewer than two factors.
    """
    codes, factors = Sampler(encode, factor_sizes, seed, at_least=2)(n_train)
    squared = mutual_information(codes, factors, bins)[0] ** 2  # (U, K)
    best = squared.max(1)  # (U,)
    others = (squared.sum(1) - best) / np.where(best > 0, best, 1)  # (U,), 0 to K - 1
    per_unit = np.where(best > 0, 1 - others / (squared.shape[1] - 1), 0)  # (U,)
    if active_only:
        per_unit = per_unit[codes.std(0, ddof=1) >= ACTIVE]
    if len(per_unit) == 0:
        warnings.warn("Modularity over active units: undefined, as all have sd < 0.05")
        return math.nan
    return float(per_unit.mean())


def sap(encode, factor_sizes, seed=0, n_train=10_000, n_test=5_000):
    """SAP score (reference 33), 0 to 1: does one unit alone predict a factor, by a straight cut?

    Mean over factors of best minus second best unit's test accuracy. ValueError for one unit.
    """
    draw = Sampler(encode, factor_sizes, seed, units=2)
    x, y = draw(n_train)
    x_test, y_test = draw(n_test)
    table = np.zeros((x.shape[1], y.shape[1]))  # (U, K)
    for u, k in progress(list(np.ndindex(table.shape)), "SAP, a unit and a factor each"):
        # Numbers go in as they are: the penalty C makes this metric depend on a unit's scale.
        model = LinearSVC(C=0.01, class_weight="balanced", dual="auto", random_state=seed)
        model.fit(x[:, [u]], y[:, k])
        table[u, k] = model.score(x_test[:, [u]], y_test[:, k])
    return float(gap(table).mean())


def linear_error(x, y):
    """Training log loss of a linear classifier without penalty (C = inf), 100 steps at most."""
    # One BLAS thread: products of 20 columns are too small to share. Where other programs ran too,
    # threads that waited for each other made this fit 150 times slower.
    with threadpool_limits(1):
        model = LogisticRegression(C=np.inf, class_weight="balanced").fit(x, y)
        return log_loss(y, model.predict_proba(x))


def infomec(encode, factor_sizes, seed=0, n_train=10_000):
    """InfoMEC (reference 24), without bins. Returns dict, all at most 1:

    infom, modularity: how far a unit knows one factor only; infoc, compactness: how far one unit
    only knows a factor; infoe, explicitness: what units save of the error that a linear classifier
    makes without them. Units whose inter-quartile range is at most a tenth of the largest take no
    part in infom and infoc. infom counts an active unit of no information as 0, infoc is nan for
    fewer than two active units; a warning says so. ValueError for fewer than two factors.
    """
    x, y = Sampler(encode, factor_sizes, seed, at_least=2)(n_train)  # (n, U), (n, K)
    # This looks at scale, not information: noise of ordinary spread stays, and a unit whose middle
    # half is one value goes.
    low, high = np.percentile(x, [25, 75], axis=0)  # (U,) each
    active = high - low > (high - low).max() / 10  # (U,)
    x = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)  # a constant unit: zeros
    K, A = y.shape[1], int(active.sum())
    nmi, saved = np.zeros((K, A)), np.zeros(K)
    for k in progress(range(K), "InfoMEC, a factor each"):
        h = entropy(np.bincount(y[:, k]) / n_train)
        if A:
            # By nearest neighbours. The estimator adds noise of 1e-10, so that no two values are
            # equal: that is what its random_state is for.
            nmi[k] = mutual_info_classif(x[:, active], y[:, k], n_neighbors=10,
                                         random_state=seed) / h
        saved[k] = 1 - linear_error(x, y[:, k]) / linear_error(0 * x, y[:, k])

    informative = nmi[:, nmi.sum(0) > 0]  # (K, informative units)
    lost = A - informative.shape[1]
    if A == 0 or lost:
        warnings.warn(f"InfoM: {A} active units, {lost} of them without information, which count "
                      "as 0")
    share = informative.max(0) / informative.sum(0)  # 1/K to 1
    infom = ((share - 1 / K) / (1 - 1 / K)).sum() / max(A, 1)
    infoc = math.nan
    if A > 1:
        share = nmi.max(1) / (nmi.sum(1) + 1e-6)  # (K,), 1/A to 1
        infoc = (share.mean() - 1 / A) / (1 - 1 / A)
    else:
        warnings.warn(f"InfoC: undefined for {A} active unit(s), reported as nan")
    return {"infom": float(infom), "infoc": float(infoc), "infoe": float(saved.mean())}


def gbt_efficiency(encode, factor_sizes, seed=0, n_test=5_000, jobs=None):
    """Are few labels enough (Table 5)? Trees from 10,000 labels, from 1,000 and from 100.

    Returns dict: acc (mean test accuracy at 10,000); acc_1000_ratio, acc_100_ratio, the share of
    it that is left. jobs: see dci.
    """
    draw, means = Sampler(encode, factor_sizes, seed), []
    for n in (10_000, 1_000, 100):
        x, y = draw(n)
        x_test, y_test = draw(n_test)
        words = f"trees from {n:,} labels, one factor each"
        means.append(fit_all_trees(x, y, x_test, y_test, seed, jobs, words)[1].mean())
    acc, acc_1000, acc_100 = map(float, means)
    return {"acc": acc, "acc_1000_ratio": acc_1000 / acc, "acc_100_ratio": acc_100 / acc}


def stepped_auroc(codes, attribute, step):
    """AUROC of a unit (n,) for an attribute (n,) of 0 and 1, in the better direction: by a few
    thresholds, up to 0.14 too high, which is the reference's rule, and so the paper's."""
    thresholds = codes.min() + np.arange(0, 1 + step / 2, step) * np.ptp(codes)  # (T,)
    above = codes >= thresholds[:, None]  # (T, n)
    areas = []
    for predicted in (above, ~above):
        tpr = np.sort(predicted[:, attribute == 1].mean(1))  # (T,)
        fpr = np.sort(predicted[:, attribute == 0].mean(1))  # (T,)
        # Rectangles as high as their right end: more than the area under the curve.
        areas.append((tpr[1:] * np.diff(fpr)).sum())
    return max(areas)


def tad(codes, attributes, step=0.1):
    """Total AUROC difference (reference 70, Table 2), for images that have attributes and no grid.

    codes: (n, U); attributes: (n, A) of 0 and 1. An attribute is captured if a unit predicts it
    (AUROC at least 0.75) and no other attribute gives it away (mutual information at most 0.2 of
    its own entropy). Returns dict: tad, the sum over captured attributes of best minus second best
    unit's AUROC; captured, how many. ValueError for NaN, one unit, or other labels than 0 and 1.
    """
    codes = finite(np.asarray(codes, dtype=np.float64))
    attributes = np.asarray(attributes)
    fit = codes.shape[1] >= 2 and len(codes) == len(attributes)
    if not fit or not np.isin(attributes, (0, 1)).all():
        raise ValueError(f"codes {codes.shape}, attributes {attributes.shape}: expected (n, U), U "
                         "at least 2, and (n, A) of 0, 1")
    shared, own = mutual_information(attributes, attributes)  # (A, A), (A,)
    np.fill_diagonal(shared, 0)  # an attribute may give itself away
    # An attribute that all have, or none, cannot be captured.
    clean = (shared.max(1) <= 0.2 * own) & (own > 0)  # (A,)
    auroc = np.full((codes.shape[1], len(own)), 0.5)  # (U, A)
    for u in np.flatnonzero(np.ptp(codes, axis=0) > 0.2):  # a smaller range counts as a guess
        for k in np.flatnonzero(clean):
            auroc[u, k] = stepped_auroc(codes[:, u], attributes[:, k], step)
    captured = clean & (auroc.max(0) >= 0.75)  # (A,)
    return {"tad": float(gap(auroc)[captured].sum()), "captured": int(captured.sum())}


def frechet_distance(mu1, cov1, mu2, cov2):
    """Squared Frechet distance of Gaussians: |mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^1/2).

    mu: (D,), cov: (D, D), symmetric, no eigenvalue below 0 (0 is fine: fewer images than features).
    """
    # cov1 cov2 is not symmetric; root cov2 root, of the same eigenvalues, is (root root = cov1).
    values, vectors = np.linalg.eigh(cov1)  # (D,), (D, D)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T  # (D, D)
    eigenvalues = np.maximum(np.linalg.eigvalsh(root @ cov2 @ root), 0)  # (D,)
    trace = np.trace(cov1) + np.trace(cov2) - 2 * np.sqrt(eigenvalues).sum()
    return float(((mu1 - mu2) ** 2).sum() + trace)


def load_inception(data_dir, device):
    """The Inception network of FID, a TorchScript copy. UserError if its file is not there.

    A TorchScript file is a program: take it from that address only.
    """
    path = Path(data_dir) / Path(INCEPTION).name
    if not path.is_file():
        raise UserError(f"--fid: {path} is not there; put the file there (91 MB) from {INCEPTION}")
    return torch.jit.load(path, map_location=device).eval()


@torch.no_grad()
def fid(model, ds, inception, n, steps, seed=0):
    """Frechet Inception Distance (reference 20) of n generated and n real images; low is good.

    Paper: does not say what samples are conditioned on. Here: aligned units of n images, others
    than the n real ones where the dataset is large enough.
    """
    if n < 2_048:
        warnings.warn(f"FID of {n:,} images: far too high below 2,048, the number of features; "
                      "quote no such value")
    generator, moments = torch.Generator().manual_seed(seed), []
    order = torch.randperm(len(ds), generator=generator)
    for kind, idx in (("real", order[:n]), ("generated", order[-n:])):
        features = []
        for part in progress(idx.split(64), f"FID, {kind} images, 64 at once"):
            images = ds.images(part)  # (B, 3, 64, 64)
            if kind == "generated":
                c_tilde = model.dyga.align(model.units(images))  # (B, N, D)
                images = model.sample(c_tilde, model.noise(len(part), generator), steps)
            features.append(inception(images, return_features=True).cpu().double())  # (B, 2048)
        features = torch.cat(features).numpy()  # (n, 2048)
        moments += [features.mean(0), np.cov(features, rowvar=False)]
    return frechet_distance(*moments)


def separation(dyga, c, labels, active):
    """How well anchors separate attributes (Figure 1). Before alignment with c, after it with c~.

    c: units (n, N, D); labels: int64 (n, N), the value of each unit's favourite factor; active:
    bool (N,), of which some must have anchors. A sample belongs to the anchor that dyga.nearest
    names. Returns dict, means over active units:
    purity: share of samples that have their anchor's most frequent value. Quote it beside
    chance: the same if there were one single anchor.
    margin: 1 - (distance to the own anchor) / (distance to the nearest other one); 1 on an anchor,
        0 half-way between two. Alignment should raise it, and hardly change purity.
    """
    number = torch.cat([dyga.nearest(part)[1] for part in c.split(BATCH)])  # (n, N)
    rows = []
    for u in np.flatnonzero(active & dyga.mask.any(1).cpu().numpy()):
        own = number[:, [u]]  # (n, 1)
        distance = torch.cdist(c[:, u], dyga.anchors[u])  # (n, K)
        distance[:, ~dyga.mask[u]] = math.inf
        nearest = distance.gather(1, own)[:, 0]  # (n,)
        other = distance.scatter(1, own, math.inf).amin(1).clamp(min=1e-12)  # (n,)
        # 0 for a sample nearer to another anchor than to its own, whose Gaussian is wider.
        margin = (1 - nearest / other).clamp(min=0).mean().item()
        counts = contingency_matrix(own[:, 0].cpu(), labels[:, u])  # (anchors, values)
        rows.append([counts.max(1).sum() / len(c), counts.sum(0).max() / len(c), margin])
    purity, chance, margin = np.mean(rows, axis=0).tolist()
    return {"purity": purity, "chance": chance, "margin": margin}


# ---- Figures: each gives a PIL.Image ------------------------------------------------------------


class Painter:
    """Draws the figures that need the model. steps: of DDIM.

    All start from ONE noise: what differs between two pictures comes from their units.
    idx, source, target, pair: int64 (B,), images of the dataset.
    """

    def __init__(self, model, ds, probe, steps, seed):
        self.model, self.ds, self.probe, self.steps = model, ds, probe, steps
        self.noise = model.noise(1, torch.Generator().manual_seed(seed))  # (1, z, h, w)

    def c_tilde(self, idx):
        """Aligned units of true images, (B, N, D)."""
        return self.model.dyga.align(self.model.units(self.ds.images(idx)))

    def generate(self, c_tilde, words):
        """DDIM images uint8 (..., 3, H, W) under aligned units (..., N, D)."""
        made = []
        for part in progress(c_tilde.flatten(0, -3).split(64), f"{words}, 64 images at once"):
            noise = self.noise.expand(len(part), -1, -1, -1)  # (B, z, h, w)
            made.append(self.model.sample(part, noise, self.steps))
        return torch.cat(made).unflatten(0, c_tilde.shape[:-2])  # (..., 3, H, W)

    def exchange(self, c_tilde, other):
        """Units (B, N, D) -> (R, B, N, D): in each row one factor's units are the other's."""
        rows = c_tilde.repeat(len(self.probe.groups), 1, 1, 1)
        for row, units in zip(rows, self.probe.groups.values()):
            row[:, units] = other[:, units]
        return rows

    def interchange(self, source, target):
        """Figures 3 and 8: give the source the target's units of one factor.

        Paper: exchanges one unit. Several may stand for one factor, as for hues here. One of them
        then changes it by half, and the question is whether all of them change it alone.
        """
        c_tilde = self.c_tilde(source)  # (B, N, D)
        rows = torch.cat([c_tilde[None], self.exchange(c_tilde, self.c_tilde(target))])
        made = self.generate(rows, "interchange")  # (1 + R, B, 3, H, W)
        inputs = torch.stack([self.ds.images(source), self.ds.images(target)])  # (2, B, 3, H, W)
        labels = [f"target's {label}" for label in self.probe.labels()]
        return data.image_grid(
            torch.cat([inputs, made]), ["source", "target", "source, generated", *labels], None,
            "Latent interchange: one factor's units from the target", 2)

    def interpolation(self, pair, columns):
        """Figure 6: from image A to image B, all units at once, then one factor's at a time."""
        # What lies between aligned units is not aligned once more: that would make steps.
        a, b = self.c_tilde(pair)  # (N, D) each
        t = torch.linspace(0, 1, columns, device=a.device)  # (T,)
        path = a + t[:, None, None] * (b - a)  # (T, N, D)
        rows = torch.cat([path[None], self.exchange(a.expand_as(path), path)])
        return data.image_grid(
            self.generate(rows, "interpolation"), ["all units", *self.probe.labels()], None,
            "Interpolation from A (left) to B (right): all units, then one factor's", 2)

    @torch.no_grad()
    def attention(self, idx):
        """Figures 4, 9, 10: where each factor's best unit is looked up, averaged in DAAM's way."""
        c_tilde = self.c_tilde(idx)  # (B, N, D)
        noise = self.noise.expand(len(idx), -1, -1, -1)  # (B, z, h, w)
        z0, maps = ddim(self.model.unet, noise, c_tilde, self.model.alpha_bar, self.steps,
                        attention=True)
        made = self.model.vqgan.decode(z0)  # (B, 3, H, W)
        maps = maps[:, [units[0] for units in self.probe.groups.values()]]  # (B, F, h, w)
        maps = F.interpolate(maps, size=made.shape[2:], mode="bilinear")  # (B, F, H, W)
        # From dark, which is 0, to the sample's own colours where the unit is looked up most.
        strength = (maps / maps.amax((2, 3), keepdim=True))[:, :, None]  # (B, F, 1, H, W)
        lit = (made[:, None] * strength).byte()  # (B, F, 3, H, W)
        tiles = torch.cat([self.ds.images(idx)[:, None], made[:, None], lit], dim=1)
        return data.image_grid(
            tiles, None, ["input", "sample", *self.probe.labels(1)],
            "Cross-attention per unit (light: most), averaged over heads, layers and steps", 2)

    def traversal(self, idx, units, stops):
        """What the page's slider shows: each unit of each image at `stops` values, as a dict.

        A stop is a quantile of the unit's PCA coordinate, 0.02 to 0.98. The unit is taken WHOLE
        from a real image: a straight line along the axis would leave the curve of the units.
        """
        probe = self.probe
        ranks = (np.linspace(0.02, 0.98, stops) * (len(probe.idx) - 1)).round().astype(int)  # (S,)
        c_tilde = self.c_tilde(idx)[:, None, None].repeat(1, len(units), stops, 1, 1)
        for j, u in enumerate(units):  # c_tilde: (I, U, S, N, D)
            order = probe.codes[:, u].argsort()  # (n,)
            donors = self.c_tilde(probe.idx[order[ranks]])  # (S, N, D)
            c_tilde[:, j, :, u] = donors[:, u]
        made = self.generate(c_tilde, "the page's slider")  # (I, U, S, 3, H, W)
        # One strip per image and unit, the stops side by side: the page shows one window of it.
        strips = [[inline(data.image_grid(unit[None])) for unit in image] for image in made]
        labels = [f"unit {u} ({probe.names[probe.favourite[u]]}, NMI {probe.nmi[:, u].max():.2f})"
                  for u in units]
        return {"images": [f"image {i}" for i in idx.tolist()], "units": labels, "stops": stops,
                "strips": strips}

    def draw(self, quick):
        """All figures {name: PIL.Image}, and what the page's slider shows."""
        ds, idx = self.ds, self.probe.idx
        width, columns, shown, most = (6, 5, 2, 4) if quick else (8, 9, 4, 12)
        made = {
            "samples": data.image_grid(ds.images(idx[:48]).unflatten(0, (4, 12)),
                                       title=f"{ds.name}, {ds.source}: a random sample"),
            # Each source has the next image as its target.
            "interchange": self.interchange(idx[:width], idx[1:width + 1]),
            "interpolation": self.interpolation(idx[:2], columns),
            "attention": self.attention(idx[:4]),
            "units": figure_units(self.model.dyga, self.probe, ds.factor_sizes),
        }
        units = np.argsort(-self.probe.nmi.max(0))[:most].tolist()
        return made, self.traversal(idx[:shown], units, columns)


def pixels(picture):
    """A PIL.Image as a tensor uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture)).movedim(2, 0)


def figure_matrix(probe):
    """Normalised mutual information of factors (rows) and units (columns); silent ones in ()."""
    nmi = probe.nmi.clip(0, 1)  # (F, N)
    tiles, font = torch.zeros(*nmi.shape, 3, 30, 44, dtype=torch.uint8), ImageFont.load_default(12)
    for f, u in np.ndindex(nmi.shape):
        cell = Image.new("RGB", (44, 30), f"hsl(215, 70%, {95 - 70 * nmi[f, u]:.0f}%)")
        fill = "white" if nmi[f, u] > 0.5 else "black"
        ImageDraw.Draw(cell).text((22, 15), f"{nmi[f, u]:.2f}", fill, font, "mm")
        tiles[f, u] = pixels(cell)
    units = [u if active else f"({u})" for u, active in enumerate(probe.active)]
    return data.image_grid(tiles, probe.names, units,
                           "Normalised mutual information of factor and unit, 0 to 1")


def scatter(points, hues, anchors, side=230):
    """A panel uint8 (3, side, side): points (n, 2) in [0, 1] with hues (n,), anchors (K, 2)."""
    S = 2 * side  # drawn at twice the size, then halved: smooth dots
    panel = Image.new("RGB", (S, S), "#f4f4f4")
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(30)
    for (x, y), hue in zip((S * points).tolist(), hues.tolist()):
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], f"hsl({hue}, 80%, 45%)")
    for place in (S * anchors).tolist():
        draw.text(place, "x", "black", font, "mm")
    return pixels(panel.resize((side, side), Image.LANCZOS))


def figure_units(dyga, probe, sizes, n=1500):
    """Figures 1 and 11: each factor's best unit before and after alignment, in two dimensions."""
    c, c_tilde = probe.c[:n].cpu(), dyga.align(probe.c[:n]).cpu()  # (n, N, D)
    # A small lambda moves units too little to be seen. Equation 6 is linear in it.
    rows = {"before": c, f"after, lambda {dyga.lam:g}": c_tilde,
            "if lambda were 1": c + (c_tilde - c) / max(dyga.lam, 1e-9)}
    panels = []
    for f, (u, *_) in probe.groups.items():
        mean = c[:, u].mean(0)  # (D,)
        axes = torch.linalg.svd(c[:, u] - mean, full_matrices=False).Vh[:2].T  # (D, 2)
        width = 6 * ((c[:, u] - mean) @ axes).std(0).clamp(min=1e-9)  # (2,) of all panels

        def place(units):
            """Units (n, D) to places in the panel, (n, 2)."""
            return 0.5 + (units - mean) @ axes / width

        hues = 300 * probe.factors[:n, f] // max(sizes[f] - 1, 1)  # (n,) red to violet
        anchors = place(dyga.anchors[u][dyga.mask[u]].cpu())  # (K, 2)
        panels += [scatter(place(units[:, u]), hues, anchors) for units in rows.values()]
    tiles = torch.stack(panels).unflatten(0, (-1, len(rows))).transpose(0, 1)  # (3, F, 3, H, W)
    return data.image_grid(tiles, list(rows), probe.labels(1), "Principal components 1 and 2 of "
                           "units, red (the factor's first value) to violet; crosses: anchors")


# ---- Report -------------------------------------------------------------------------------------

# Name on the command line -> function, counts of --quick; the functions' defaults are the paper's.
METRICS = {
    "factorvae": (factor_vae, dict(n_variance=2_000, n_train=500, n_test=250)),
    "dci": (dci, dict(n_train=1_000, n_test=1_000)),
    "mig": (mig, dict(n_train=2_000)),
    "modularity": (modularity, dict(n_train=2_000)),
    "modularity_active": (functools.partial(modularity, active_only=True), dict(n_train=2_000)),
    "sap": (sap, dict(n_train=2_000, n_test=1_000)),
    "infomec": (infomec, dict(n_train=2_000)),
    "gbt": (gbt_efficiency, dict(n_test=5_000)),  # training sets are fixed: left out if quick
}
# The paper's own rows (Tables 1 and 10, 5, 2).
PAPER = """
score               | shapes3d        | cars3d          | mpi3d_toy       | celeba
factorvae           | 1.000 +- 0.000  | 0.941 +- 0.002  | 0.930 +- 0.004  |
dci_disentanglement | 0.938 +- 0.001  | 0.414 +- 0.013  | 0.627 +- 0.002  |
mig                 | 0.507 +- 0.002  | 0.109 +- 0.002  | 0.364 +- 0.001  |
modularity          | 0.930 +- 0.001  | 0.934 +- 0.001  | 0.882 +- 0.002  |
sap                 | 0.183 +- 0.006  | 0.009 +- 0.002  | 0.174 +- 0.002  |
infomec_infom       | 0.569 +- 0.002  | 0.417 +- 0.004  | 0.495 +- 0.003  |
gbt_acc_1000_ratio  | 0.990 +- 0.000  |                 | 0.888 +- 0.002  |
gbt_acc_100_ratio   | 0.863 +- 0.001  |                 | 0.757 +- 0.001  |
tad_tad             |                 |                 |                 | 0.954 +- 0.024
fid                 |                 |                 |                 | 12.0 +- 1.2
"""


def paper_value(score, dataset):
    """The cell of that table, or "" where the paper says nothing."""
    for row in PAPER.strip().splitlines():
        name, *values = [cell.strip() for cell in row.split("|")]
        if name == "score":
            datasets = values
        if name == score and dataset in datasets:
            return values[datasets.index(dataset)]
    return ""


def score(name, counts, metric, *arguments, **settings):
    """Call a metric with these arguments -> {score: dict of value, counts, notes}."""
    print(f"{name}: {counts_in_words(counts)}", flush=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        found = metric(*arguments, **settings)  # a number, or a dict of numbers
    notes = [str(w.message) for w in caught if w.category is UserWarning]
    if not isinstance(found, dict):
        found = {"": found}
    rows = {}
    for part, value in found.items():
        # JSON knows no nan: an undefined score is null, and a note says why.
        value = None if math.isnan(value) else value
        rows[f"{name}_{part}".rstrip("_")] = {"value": value, "counts": counts, "notes": notes}
    return rows


def counts_in_words(counts):
    """Sample counts as a text."""
    return ", ".join(f"{name.removeprefix('n_')} {count:,}" for name, count in counts.items())


def table(report):
    """The scores as rows of texts, the first of them the head."""
    whose = "yours" if report["source"] == "codes" else "ours"
    rows = [("score", f"{whose} ({report['dataset']}, {report['source']})", "paper", "samples")]
    for name, row in report["scores"].items():
        value = "undefined" if row["value"] is None else f"{row['value']:.3f}"
        paper = paper_value(name, report["dataset"])
        rows.append((name, value, paper, counts_in_words(row["counts"])))
    return rows


def remarks(report):
    """What a reader must know before quoting a number: a list of sentences."""
    said = []
    if report["source"] == "codes":
        said.append(f"The codes are the user's, from {report['checkpoint']}: no model was run.")
    if report["source"] == "rendered":
        said.append("The images are the rendered twin, not Shapes3D itself: no score here is a "
                    "Shapes3D score, and the paper's numbers are for orientation only.")
    if report["quick"]:
        said.append("Quick run: scores at other counts than the paper's cannot be compared.")
    said += [note for row in report["scores"].values() for note in row["notes"]]
    silent = ", ".join(map(str, report["silent"])) or "none"
    said.append(f"Units by factor, the best first: {'; '.join(report['units'])}. "
                f"Silent units (sd < {ACTIVE}): {silent}.")
    if report["anchors"]:
        said.append("Separation before and after alignment, means over active units: purity of "
                    "anchors by labels {before[purity]:.3f}, {after[purity]:.3f} (one single "
                    "anchor: {before[chance]:.3f}); margin {before[margin]:.3f}, "
                    "{after[margin]:.3f}. Mean delta of equation 6: {mean_delta:.1e}, lambda "
                    "{lambda:g}.".format(**report["anchors"]))
    elif report["source"] != "codes":
        said.append("No anchors of active units: nothing is aligned.")
    return list(dict.fromkeys(said))  # each sentence once


def inline(picture):
    """A PIL.Image as an address that holds the picture itself."""
    buffer = io.BytesIO()  # a file in memory
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def page(report, config, pictures, loss, slider):
    """index.html as text. pictures: {figure: PIL.Image}; loss: points; slider: a dict or None."""
    content = json.dumps({
        "title": f"Disentangled units: {report['dataset']}, {report['source']}",
        "notes": remarks(report), "scores": table(report), "loss": loss, "player": slider,
        "figures": {name: inline(picture) for name, picture in pictures.items()},
        "config": [["setting", "value"], ["checkpoint", report["checkpoint"]],
                   *sorted(config.items())]})
    content = content.replace("<", "\\u003c")  # or a user's name could end the script
    return TEMPLATE.read_text("utf-8").replace("$page", content)


# ---- Main ---------------------------------------------------------------------------------------


def build_parser():
    """Every flag with its help."""
    p = data.Parser(description="Score a checkpoint of train.py or codes of any model; draw it.")
    p.add_argument("checkpoint", nargs="?", help="ckpt.pt of train.py; nothing else is needed")
    p.add_argument("--codes", metavar="FILE.npz", help="score these codes, not a checkpoint: an "
                   "array (images, U) or (images, N, D), all images in the dataset's order; the "
                   "file's only array, or the one named codes. Needs --dataset, but no images")
    p.add_argument("--dataset", choices=list(data.DATASETS), help="what the codes are of")
    p.add_argument("--out", help="folder for everything written (default: eval, beside the input)")
    p.add_argument("--quick", action="store_true", help="smaller sample counts (scores at other "
                   "counts cannot be compared), fewer pictures, no gbt")
    p.add_argument("--only", type=lambda words: words.split(","), metavar="A,B", help=f"some of "
                   f"{', '.join(METRICS)}, figures (celeba: tad, figures), and nothing else")
    p.add_argument("--fid", type=int, default=0, metavar="N", help="FID of N generated images as "
                   "well, 2 to the dataset's size; needs a file; 0: no FID")
    p.add_argument("--seed", type=int, default=0, help="of the metrics' samples and the figures' "
                   "noise, not of any training; 0 to 2^32 - 1")
    p.add_argument("--data_dir", default="data", help="folder of the datasets' files")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    return p


def check_flags(args, ds):
    """Metrics to run, and "figures". UserError for what is unknown or out of range."""
    possible = [*(METRICS if ds.is_grid else ["tad"]), "figures"]
    parts = args.only or [part for part in possible if not (args.quick and part == "gbt")]
    wrong = set(parts) - set(possible)
    if wrong:
        raise UserError(f"--only {','.join(sorted(wrong))}: for {ds.name} choose from "
                        f"{', '.join(possible)} (metrics but tad need a grid of factors)")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed}: expected 0 to 2^32 - 1")
    if args.fid and (args.codes or not 2 <= args.fid <= len(ds)):
        raise UserError(f"--fid {args.fid}: expected 2 to {len(ds):,}, the images of {ds.name}, "
                        "best 2,048 and more; and a checkpoint, which generates images")
    return parts


def open_codes(args):
    """--codes -> the dataset, and the function idx int64 (B,) -> c (B, N, D)."""
    if args.dataset == "celeba":
        ds = data.load("celeba", args.data_dir)
        ds.source = "codes"
    else:  # a grid: no image is looked at
        ds = data.Dataset(args.dataset, "codes", "", None, data.DATASETS[args.dataset], "cpu")
    codes = torch.from_numpy(read_codes(args.codes, len(ds)))  # (images, N, D)
    return ds, codes.__getitem__


def loss_curve(log):
    """Points [images seen, loss] of stage 2 from train.py's log.jsonl; none without that file."""
    if not log.is_file():
        return []
    rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    return [[row["images"], row["loss"]] for row in rows if "loss" in row]


def write(path, content):
    """A text or a PIL.Image as a file."""
    with data.replacing(path) as temporary:
        if isinstance(content, str):
            temporary.write_text(content, "utf-8")
        else:
            content.save(temporary)


def main():
    """Check everything, score, draw, and write the report."""
    args = build_parser().parse_args()
    # All that can be wrong with the command is found before anything is computed or written.
    if bool(args.checkpoint) == bool(args.codes) or bool(args.codes) != bool(args.dataset):
        raise UserError("expected a checkpoint of train.py, or --codes FILE.npz --dataset NAME")
    if not TEMPLATE.is_file():
        raise UserError(f"{TEMPLATE}: not there; evaluate.py fills in this page, so copy both")
    device = train.pick_device(args.device)  # "auto" prefers a GPU
    model, ckpt = None, {"config": {}, "images_seen": None, "minutes": None}
    if args.codes:
        ds, units = open_codes(args)
    else:
        model, ckpt = train.load_checkpoint(args.checkpoint, device)
        images = ckpt["dataset"]
        ds = data.load(images["name"], args.data_dir, images["source"], device)

        def units(idx):
            return model.units(ds.images(idx))

    parts = check_flags(args, ds)
    inception = load_inception(args.data_dir, device) if args.fid else None
    source = Path(args.checkpoint or args.codes)
    out = Path(args.out or source.parent / "eval")
    out.mkdir(parents=True, exist_ok=True)  # before the long part: if it cannot be made, say so now

    print(f"{source}: {ds.name}, {ds.source}", flush=True)
    # Paper: released code fits the PCA on all images; it needs far fewer. TAD is of 10,000.
    n = 4_000 if args.quick else 20_000
    probe = Probe(units, ds, n if ds.is_grid else 10_000, args.seed)
    scores, anchors = {}, {}
    if model and model.dyga.mask[probe.active].any():
        dyga = model.dyga
        c_tilde = torch.cat([dyga.align(part) for part in probe.c.split(BATCH)])  # (n, N, D)
        labels = probe.factors[:, probe.favourite]  # (n, N)
        anchors = {"before": separation(dyga, probe.c, labels, probe.active),
                   "after": separation(dyga, c_tilde, labels, probe.active),
                   "mean_delta": dyga.delta(probe.c[:5_000]).mean().item(), "lambda": dyga.lam}
    encode = Codes(units, probe.pca, len(ds))
    for name in parts:
        if name in METRICS:
            metric, counts = METRICS[name]
            if not args.quick:
                defaults = inspect.signature(metric).parameters
                counts = {count: defaults[count].default for count in counts}
            scores |= score(name, counts, metric, encode, ds.factor_sizes, args.seed, **counts)
    if "tad" in parts:
        scores |= score("tad", {"images": len(probe.idx)}, tad, probe.codes, probe.factors)
    steps = ckpt["config"].get("ddim_steps", 0)
    steps = min(steps, 20) if args.quick else steps
    if inception:
        scores |= score("fid", {"images": args.fid, "DDIM steps": steps}, fid, model, ds,
                        inception, args.fid, steps, args.seed)

    report = {
        "checkpoint": str(source), "dataset": ds.name, "source": ds.source,
        "images_seen": ckpt["images_seen"], "minutes": ckpt["minutes"], "seed": args.seed,
        "quick": args.quick, "scores": scores, "anchors": anchors, "nmi": probe.nmi.tolist(),
        "units": probe.labels(), "silent": np.flatnonzero(~probe.active).tolist()}
    write(out / "metrics.json", json.dumps(report, indent=1))
    if scores:
        for row in table(report):
            print("{:21}{:30}{:17}{}".format(*row))
    print(*remarks(report), sep="\n", flush=True)

    pictures, slider, loss = {}, None, []
    if "figures" in parts:
        pictures["matrix"] = figure_matrix(probe)
        if model:
            made, slider = Painter(model, ds, probe, steps, args.seed).draw(args.quick)
            pictures |= made
            loss = loss_curve(source.parent / "log.jsonl")
    for name, picture in pictures.items():
        write(out / f"{name}.png", picture)
    write(out / "index.html", page(report, ckpt["config"], pictures, loss, slider))
    print(f"wrote {out}: metrics.json, {len(pictures)} figures, index.html (open it in a browser)")


if __name__ == "__main__":
    data.run(main)
