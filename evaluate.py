"""From a checkpoint to numbers, pictures and one page: the one stage that looks at true factors.

    python evaluate.py out/shapes3d-laptop/ckpt.pt            # everything, at the paper's counts
    python evaluate.py out/shapes3d-laptop/ckpt.pt --quick    # under a minute, at smaller counts
    python evaluate.py out/shapes3d-laptop/ckpt.pt --only factorvae,mig
    python evaluate.py --codes codes.npz --dataset shapes3d   # codes of any model, yours or another

It prints scores with the paper's beside them, and writes metrics.json, PNGs and index.html (open it
in a browser, offline too) to --out, by default to eval beside the input.

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
import sys
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


def progress(work, words, total=None):
    """Go through `work` with a bar that says what is done and how long it still takes."""
    if not sys.stderr.isatty():
        print(words, file=sys.stderr)  # no bar there: a line at the start
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


def cached(units, pca, count):
    """The encode(idx) of the metrics: each image is encoded once, when first asked for, and kept.

    units: a function idx int64 (B,) -> c (B, N, D); count: of images.
    """
    table = np.full((count, len(pca[0])), np.nan)  # (images, N); nan: not yet known

    def encode(idx):
        """idx int64 (B,) -> float (B, N)."""
        new = np.unique(idx[np.isnan(table[idx, 0])])  # metrics draw with replacement
        if len(new):
            parts = torch.from_numpy(new).split(BATCH)
            for part in progress(parts, f"encoding {len(new):,} images, {BATCH} at once"):
                table[part] = project(units(part), pca).cpu()
        return table[idx]

    return encode


def read_codes(path, count):
    """A file of codes, see --codes, of `count` images -> (images, N, D). UserError otherwise."""
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except Exception as error:  # foreign bytes fail in any way; nothing of ours is inside this try
        raise UserError(f"{path}: not a readable .npz file ({type(error).__name__}); expected one "
                        "written with numpy.savez(FILE, codes=ARRAY)") from error
    name = "codes" if len(arrays) != 1 else list(arrays)[0]
    if name not in arrays:
        raise UserError(f"{path}: holds {', '.join(arrays) or 'no array'}; expected one array, or "
                        "one that is named codes")
    codes = arrays[name]
    fits = codes.ndim in (2, 3) and len(codes) == count and codes.dtype.kind in "fiub"
    if not fits or not codes.size or not np.isfinite(codes).all():
        raise UserError(f"{path}: {name} is {codes.dtype} {codes.shape}; expected numbers without "
                        f"NaN and Inf, ({count:,} images, U) or ({count:,} images, N, D)")
    return codes.reshape(*codes.shape[:2], -1)  # (images, N, D); D is 1 for (images, U)


class Probe:
    """A random sample of images, and which unit knows which factor on it.

    idx (n,); units c (n, N, D) before alignment; pca and codes (n, N); factors int64 (n, F).
    active: bool (N,), FactorVAE's rule; nmi: (F, N), mutual information of factor and unit over the
    factor's entropy; favourite: int64 (N,), the factor that a unit knows best; order: of the units
    by standard deviation, the largest first.
    groups: {factor: its best unit, then all other active units whose favourite it is}; the eight
    best known factors (CelebA has 40). Without labels F is 0, and {unit: that unit}, eight too.
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
        sd = self.codes.std(0, ddof=1)  # (N,)
        self.active = sd >= ACTIVE
        mi, h = mutual_information(self.codes, self.factors)  # (N, F), (F,)
        self.nmi = (mi / np.maximum(h, 1e-12)).T
        self.order = np.argsort(-sd)
        if not self.names:
            self.groups = {u: [u] for u in self.order[:8].tolist()}
            return
        self.favourite, self.groups = self.nmi.argmax(0), {}
        for f in sorted(np.argsort(-self.nmi.max(1))[:8].tolist()):
            best, *others = np.argsort(-self.nmi[f]).tolist()
            fans = self.active & (self.favourite == f)  # (N,)
            self.groups[f] = [best, *(u for u in others if fans[u])]

    def labels(self, most=None):
        """A text for each group, such as "floor hue: unit 3, 7"; of its `most` first, or all."""
        said = []
        for f, units in self.groups.items():
            factor = f"{self.names[f]}: " if self.names else ""
            said.append(f"{factor}unit {', '.join(map(str, units[:most]))}")
        return said


# ---- Metrics ------------------------------------------------------------------------------------
# Most take encode(idx int64 (B,)) -> float (B, U), one number per unit, and factor_sizes: idx
# counts their grid in row-major order (the first factor changes slowest), and samples draw every
# factor independently and with replacement, train before test. For images that form no grid give
# labels 0, 1, ..., int64 (images, K), as factor_sizes. K factors, U units, natural logarithms.
# What one should know about a score (no active unit, an undefined value) is a warning.
# Scores disagree, because they ask different things. FactorVAE asks only which unit is most silent:
# one that leaks a bit of a second factor still wins its votes, while DCI charges for each leak.
# Both let several units share a factor; MIG does not.


class Sampler:
    """Draws codes and their factors for one metric, all from one generator.

    A factor of one value is left out: nothing can be told of it, and the indices stay right.
    factor_sizes may be labels (images, K) of images that form no grid: then none is drawn twice.
    ValueError for fewer than at_least factors or units; if encode gives another shape, NaN or Inf.
    """

    def __init__(self, encode, factor_sizes, seed, at_least=1, units=1):
        self.encode, self.units = encode, units
        self.rng = np.random.default_rng(seed)
        self.labels, sizes = None, np.array(factor_sizes, dtype=np.int64)  # (K,) or (images, K)
        if sizes.ndim == 2:
            self.labels = sizes[:, np.ptp(sizes, axis=0) > 0]
            sizes = self.labels.max(0) + 1
        self.sizes = sizes[sizes != 1]  # (K,)
        if len(self.sizes) < at_least:
            raise ValueError(f"factor_sizes {list(factor_sizes)}: at least {at_least} factors of "
                             "two or more values needed")

    def factors(self, *shape):
        """Factors int64 (*shape, K) of a grid."""
        if self.labels is not None:
            raise ValueError("labels of images found; this metric needs the sizes of a grid")
        return self.rng.integers(0, self.sizes, size=(*shape, len(self.sizes)))

    def of(self, factors):
        """Codes float64 (n, U) of factors int64 (n, K) of a grid."""
        return self.codes(np.ravel_multi_index(factors.T, self.sizes))

    def codes(self, idx):
        """Codes float64 (n, U) of idx int64 (n,)."""
        codes = np.asarray(self.encode(idx), dtype=np.float64)
        if codes.ndim != 2 or len(codes) != len(idx) or codes.shape[1] < self.units:
            raise ValueError(f"encode gave shape {codes.shape} for {len(idx)} indices; "
                             f"expected ({len(idx)}, U), U at least {self.units}")
        return finite(codes)

    def __call__(self, n):
        """n codes (n, U) and their factors int64 (n, K); of labels no more than there are."""
        if self.labels is None:
            factors = self.factors(n)
            return self.of(factors), factors
        idx = self.rng.permutation(len(self.labels))[:n]
        return self.codes(idx), self.labels[idx]

    def split(self, n_train, n_test):
        """Codes and factors to learn from, then others to test on: x, y, x_test, y_test."""
        if self.labels is None:
            return *self(n_train), *self(n_test)
        x, y = self(n_train + n_test)
        n = len(x) * n_train // (n_train + n_test)  # fewer images are shared in this proportion
        return x[:n], y[:n], x[n:], y[n:]


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
            codes = draw.of(factors.reshape(-1, K))  # (m*batch, U)
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
    if (y == y[0]).all():  # of few labels a rare value may be missing: nothing to learn
        return np.zeros(x.shape[1]), (y_test == y[0]).mean()
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
    fits = joblib.Parallel(jobs or -1, return_as="generator")(tasks)
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
    x, y, x_test, y_test = draw.split(n_train, n_test)
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
    x, y, x_test, y_test = draw.split(n_train, n_test)
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
        if A:
            # By nearest neighbours. The estimator adds noise of 1e-10, so that no two values are
            # equal: that is what its random_state is for.
            mi = mutual_info_classif(x[:, active], y[:, k], n_neighbors=10, random_state=seed)
            nmi[k] = mi / entropy(np.bincount(y[:, k]) / len(y))
        saved[k] = 1 - linear_error(x, y[:, k]) / linear_error(0 * x, y[:, k])

    def above_chance(share, n):
        """1 of n equal shares, 1/n, becomes 0, and all of it, 1, stays 1."""
        return (share - 1 / n) / (1 - 1 / n)

    informative = nmi[:, nmi.sum(0) > 0]  # (K, informative units)
    lost = A - informative.shape[1]
    if A == 0 or lost:
        warnings.warn(f"InfoM: {A} active units, {lost} of them without information, which count "
                      "as 0")
    best_factor = informative.max(0) / informative.sum(0)  # of each unit, 1/K to 1
    infom = above_chance(best_factor, K).sum() / max(A, 1)
    infoc = math.nan
    if A > 1:
        best_unit = nmi.max(1) / (nmi.sum(1) + 1e-6)  # of each factor, 0 if no unit knows it
        infoc = above_chance(best_unit.mean(), A)
    else:
        warnings.warn(f"InfoC: undefined for {A} active unit(s), reported as nan")
    return {"infom": float(infom), "infoc": float(infoc), "infoe": float(saved.mean())}


def gbt_efficiency(encode, factor_sizes, seed=0, n_test=5_000, jobs=None, n_train=10_000):
    """Are few labels enough (Table 5)? Trees from n_train labels, from 1,000 and from 100.

    Returns dict: acc, mean test accuracy at n_train; acc_1000_ratio, acc_100_ratio: what is left.
    """
    draw, means = Sampler(encode, factor_sizes, seed), []
    for n in (n_train, 1_000, 100):
        samples = draw.split(min(n, n_train), n_test)
        words = f"trees from {n:,} labels, one factor each"
        means.append(fit_all_trees(*samples, seed, jobs, words)[1].mean())
    acc, acc_1000, acc_100 = map(float, means)
    return {"acc": acc, "acc_1000_ratio": acc_1000 / acc, "acc_100_ratio": acc_100 / acc}


def stepped_auroc(codes, attribute, step):
    """AUROC of a unit (n,) for an attribute (n,) of 0 and 1, in the better direction.

    By a few thresholds, up to 0.14 too high: the reference's rule, and so the paper's.
    """
    thresholds = codes.min() + np.arange(0, 1 + step / 2, step) * np.ptp(codes)  # (T,)
    above = codes >= thresholds[:, None]  # (T, n)
    areas = []
    for said_yes in (above, ~above):  # of each image, by each threshold
        tpr = np.sort(said_yes[:, attribute == 1].mean(1))  # (T,), rising
        fpr = np.sort(said_yes[:, attribute == 0].mean(1))  # (T,)
        areas.append((np.diff(fpr) * tpr[1:]).sum())  # rectangles as high as their right end
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
    if codes.shape[1] < 2 or not np.isin(attributes, (0, 1)).all():
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
    samples = torch.arange(len(c), device=c.device)
    rows = []
    for u in np.flatnonzero(active & dyga.mask.any(1).cpu().numpy()):
        own = number[:, u]  # (n,)
        distance = torch.cdist(c[:, u], dyga.anchors[u])  # (n, K)
        distance[:, ~dyga.mask[u]] = math.inf
        to_own = distance[samples, own]  # (n,)
        distance[samples, own] = math.inf
        to_other = distance.amin(1).clamp(min=1e-12)  # (n,)
        # 0 for a sample nearer to another anchor than to its own, whose Gaussian is wider.
        margin = (1 - to_own / to_other).clamp(min=0).mean().item()
        counts = contingency_matrix(own.cpu(), labels[:, u])  # (anchors, values)
        rows.append([counts.max(1).sum() / len(c), counts.sum(0).max() / len(c), margin])
    purity, chance, margin = np.mean(rows, axis=0).tolist()
    return {"purity": purity, "chance": chance, "margin": margin}


# ---- Figures: each gives a PIL.Image ------------------------------------------------------------


def exchange(c_tilde, other, groups):
    """Units (B, N, ...) -> (R, B, N, ...): in each row one group's units are the other's."""
    rows = torch.stack([c_tilde] * len(groups))
    for row, units in zip(rows, groups):
        row[:, units] = other[:, units]
    return rows


class Painter:
    """Generates images, and draws the figures that need the model. steps: of DDIM.

    In figures all start from ONE noise: what differs between two pictures comes from their units.
    Of several `noises` image i starts from number i modulo noises.
    idx, source, target, pair: int64 (B,), images of the dataset.
    """

    def __init__(self, model, ds, probe, steps, seed, noises=1):
        self.model, self.ds, self.probe, self.steps = model, ds, probe, steps
        self.groups = list(probe.groups.values())
        self.noise = model.noise(noises, torch.Generator().manual_seed(seed))  # (noises, z, h, w)

    def c_tilde(self, idx):
        """Aligned units of true images, (B, N, D)."""
        return self.model.dyga.align(self.model.units(self.ds.images(idx)))

    def generate(self, c_tilde, words):
        """DDIM images uint8 (..., 3, H, W) under aligned units (..., N, D)."""
        flat = c_tilde.flatten(0, -3)  # (n, N, D)
        noise = self.noise.repeat(len(flat) // len(self.noise), 1, 1, 1)  # (n, z, h, w)
        parts = progress(flat.split(64), f"{words}, 64 images at once")
        made = [self.model.sample(*part, self.steps) for part in zip(parts, noise.split(64))]
        return torch.cat(made).unflatten(0, c_tilde.shape[:-2])  # (..., 3, H, W)

    def interchange(self, source, target):
        """Figures 3 and 8: give the source the target's units of one factor.

        Paper: exchanges one unit. Several may stand for one factor, as for hues here. One of them
        then changes it by half, and the question is whether all of them change it alone.
        """
        c_tilde = self.c_tilde(source)  # (B, N, D)
        rows = torch.cat([c_tilde[None], exchange(c_tilde, self.c_tilde(target), self.groups)])
        made = self.generate(rows, "interchange")  # (1 + R, B, 3, H, W)
        inputs = torch.stack([self.ds.images(source), self.ds.images(target)])  # (2, B, 3, H, W)
        labels = ["source", "target", "source, generated", *self.probe.labels()]
        return data.image_grid(torch.cat([inputs, made]), labels, (),
                               "Latent interchange: one factor's units from the target", 2)

    def interpolation(self, pair, columns):
        """Figure 6: from image A to image B, all units at once, then one factor's at a time."""
        # What lies between aligned units is not aligned once more: that would make steps.
        a, b = self.c_tilde(pair)  # (N, D) each
        t = torch.linspace(0, 1, columns, device=a.device)  # (T,)
        path = a + t[:, None, None] * (b - a)  # (T, N, D)
        rows = torch.cat([path[None], exchange(a.expand_as(path), path, self.groups)])
        return data.image_grid(
            self.generate(rows, "interpolation"), ["all units", *self.probe.labels()], (),
            "Interpolation from A (left) to B (right): all units, then one factor's", 2)

    def attention(self, idx):
        """Figures 4, 9, 10: where each factor's best unit is looked up, averaged in DAAM's way."""
        c_tilde = self.c_tilde(idx)  # (B, N, D)
        noise = self.noise.expand(len(idx), -1, -1, -1)  # (B, z, h, w)
        z0, maps = ddim(self.model.unet, noise, c_tilde, self.model.alpha_bar, self.steps,
                        attention=True)
        made = self.model.vqgan.decode(z0)  # (B, 3, H, W)
        maps = maps[:, [units[0] for units in self.groups]]  # (B, F, h, w)
        maps = F.interpolate(maps, size=made.shape[2:], mode="bilinear")  # (B, F, H, W)
        # From dark, which is 0, to the sample's own colours where the unit is looked up most.
        strength = (maps / maps.amax((2, 3), keepdim=True))[:, :, None]  # (B, F, 1, H, W)
        lit = (made[:, None] * strength).byte()  # (B, F, 3, H, W)
        tiles = torch.cat([self.ds.images(idx)[:, None], made[:, None], lit], dim=1)
        return data.image_grid(
            tiles, (), ["input", "sample", *self.probe.labels(1)],
            "Cross-attention per unit (light: most), averaged over heads, layers and steps", 2)

    def slider(self, idx, most, stops):
        """What the page's slider shows, as a dict: each factor's units, and each of `most` units.

        Up to `stops` values, from images of the sample sorted by the factor (one for each value)
        or by the unit. Units are taken WHOLE: a straight line would leave the curve they are on.
        """
        probe = self.probe
        choices = {}  # by text: units, and what their values are sorted by, (n,)
        for u in probe.order[:most]:
            factor = f" ({probe.names[probe.favourite[u]]})" if probe.names else ""
            choices[f"unit {u}{factor}"] = [u], probe.codes[:, u]
        if probe.names:
            factors = zip(probe.groups.values(), probe.factors.T[list(probe.groups)])
            choices = dict(zip(probe.labels(), factors)) | choices
        strips, c_tilde = {}, self.c_tilde(idx)[:, None]  # (I, 1, N, D)
        for text, (units, values) in choices.items():
            first = np.unique(values, return_index=True)[1]  # an image of each value, by value
            places = np.linspace(0.02, 0.98, min(stops, len(first))) * (len(first) - 1)
            donors = self.c_tilde(probe.idx[first[places.round().astype(int)]])  # (S, N, D)
            rows = c_tilde.repeat(1, len(donors), 1, 1)  # (I, S, N, D)
            rows[:, :, units] = donors[:, units]
            made = self.generate(rows, f"slider, {text}")  # (I, S, 3, H, W)
            pictures = [inline(data.image_grid(image[None])) for image in made]
            strips[text] = {"stops": len(donors), "pictures": pictures}
        return {"images": [f"image {i}" for i in idx.tolist()], "strips": strips}

    def draw(self, quick):
        """All figures {name: PIL.Image}, and what the page's slider shows."""
        ds = self.ds
        idx = self.probe.idx.repeat(48)[:48]  # fewer images come again
        width, columns, shown, most = (6, 5, 2, 4) if quick else (8, 9, 3, 8)
        made = {
            "samples": data.image_grid(ds.images(idx).unflatten(0, (4, 12))),
            # Each source has the next image as its target.
            "interchange": self.interchange(idx[:width], idx[1:width + 1]),
            "interpolation": self.interpolation(idx[:2], columns),
            "attention": self.attention(idx[:4])}
        if ds.factor_names:
            made["units"] = figure_units(self.model.dyga, self.probe, ds.factor_sizes)
        return made, self.slider(idx[:shown], most, columns)


def nearest_image(ds, images):
    """The image of the WHOLE dataset that looks most like each of these n -> idx int64 (n,).

    Compared are 8x8 pixels: with the laptop preset's stage 1 that reads all factors of all of 576
    reconstructions. The dataset streams by in parts of 256, with n x 256 distances: some 10 MB.
    """
    def small(images):
        return F.adaptive_avg_pool2d(images.float(), 8).flatten(1)  # (B, 192)

    query = small(images)  # (n, 192)
    least, nearest = math.inf, 0
    parts = torch.arange(len(ds), device=query.device).split(256)
    for part in progress(parts, f"reading {len(query):,} images, 256 candidates at once"):
        distance, place = torch.cdist(query, small(ds.images(part))).min(1)  # by a matrix product
        nearest = torch.where(distance < least, part[place], nearest)  # (n,)
        least = torch.where(distance < least, distance, least)  # (n,)
    return nearest


def control(painter, seed):
    """Beyond the paper: does exchanging a factor's units change that factor, and nothing else?

    For random pairs of images (one for each noise) that differ in all factors, and each factor, the
    source is generated with the target's units of it. The result has the nearest image's factors.
    Returns {factor's name, or "mean": dict}: moved, the share of pairs where it has the target's
    value of the factor; kept, where it has the source's of all others; control, both; off, the
    distance from the target's value in steps (of no use for hues, whose values form a circle).
    Each is a list of four: all units of the factor exchanged; its best unit alone, as in Figures 3
    and 8; the ceiling, stage 1's reconstruction of what should come out; chance, a random image.
    """
    ds, generator = painter.ds, torch.Generator().manual_seed(seed)
    sizes = torch.tensor(ds.factor_sizes)  # (F,)
    uniform = torch.rand(2, len(painter.noise), len(sizes), generator=generator)
    source = (uniform[0] * sizes).long()  # (P, F)
    target = (source + 1 + (uniform[1] * (sizes - 1)).long()) % sizes
    exchanged = list(painter.probe.groups)  # R factors
    wanted = exchange(source, target, exchanged)  # (R, P, F)
    a, b = [painter.c_tilde(ds.index(factors)) for factors in (source, target)]  # (P, N, D)
    made = []  # of each row, (P, 3, H, W)
    for units in (painter.groups, [units[:1] for units in painter.groups]):
        made.extend(painter.generate(exchange(a, b, units), "control"))
    made += [painter.model.vqgan.reconstruct(ds.images(ds.index(row))) for row in wanted]
    idx = nearest_image(ds, torch.cat(made)).cpu()  # (3 R P,)
    chance = torch.randint(len(ds), (len(idx) // 3,), generator=generator)
    read = ds.factors(torch.cat([idx, chance])).cpu().view(4, *wanted.shape)  # (4, R, P, F)
    right = read == wanted
    own = torch.eye(len(sizes)).bool()[exchanged, None]  # (R, 1, F)
    moved, kept = (right | ~own).all(3), (right | own).all(3)  # (4, R, P)
    off = ((read - wanted).abs() * own).sum(3)  # (4, R, P)
    numbers = torch.stack([moved, kept, moved & kept, off]).double().mean(3)  # (4, 4, R)
    rows = {ds.factor_names[f]: numbers[:, :, row] for row, f in enumerate(exchanged)}
    rows["mean"] = numbers.mean(2)
    return {name: dict(zip(("moved", "kept", "control", "off"), four.tolist()))
            for name, four in rows.items()}


def scatter(points, hues, anchors):
    """A panel uint8 (3, 230, 230): points (n, 2) in [0, 1] with hues (n,), anchors (K, 2)."""
    S = 460  # drawn at twice the size, then halved: smooth dots
    panel = Image.new("RGB", (S, S), "#f4f4f4")
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(30)
    for (x, y), hue in zip((S * points).tolist(), hues.tolist()):
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], f"hsl({hue}, 80%, 45%)")
    for place in (S * anchors).tolist():
        draw.text(place, "x", "black", font, "mm")
    return torch.from_numpy(np.array(panel.reduce(2))).movedim(2, 0)


def figure_units(dyga, probe, sizes, n=1500):
    """Figures 1 and 11: each factor's best unit before and after alignment, in two dimensions."""
    c = probe.c[:n].cpu()  # (n, N, D)
    moves = dyga.align(probe.c[:n]).cpu() - c
    # A small lambda moves units too little to be seen. Equation 6 is linear in it.
    rows = {"before": 0, f"after, lambda {dyga.lam:g}": 1,
            "if lambda were 1": 1 / max(dyga.lam, 1e-9)}
    panels = []
    for f, (u, *_) in probe.groups.items():
        mean = c[:, u].mean(0)  # (D,)
        axes = torch.linalg.svd(c[:, u] - mean, full_matrices=False).Vh[:2].T  # (D, 2)
        axes /= 6 * ((c[:, u] - mean) @ axes).std(0).clamp(min=1e-9)  # 6 deviations are a panel
        places, shifts = 0.5 + (c[:, u] - mean) @ axes, moves[:, u] @ axes  # (n, 2)
        anchors = 0.5 + (dyga.anchors[u][dyga.mask[u]].cpu() - mean) @ axes  # (K, 2)
        hues = 300 * probe.factors[:n, f] // max(sizes[f] - 1, 1)  # (n,) red to violet
        panels += [scatter(places + times * shifts, hues, anchors) for times in rows.values()]
    tiles = torch.stack(panels).unflatten(0, (-1, len(rows))).transpose(0, 1)  # (3, F, 3, H, W)
    return data.image_grid(tiles, rows, probe.labels(1), "Principal components 1 and 2 of "
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
PAPER = """\
score               shapes3d     cars3d       mpi3d_toy    celeba
factorvae           1.000+-0.000 0.941+-0.002 0.930+-0.004 -
dci_disentanglement 0.938+-0.001 0.414+-0.013 0.627+-0.002 -
mig                 0.507+-0.002 0.109+-0.002 0.364+-0.001 -
modularity          0.930+-0.001 0.934+-0.001 0.882+-0.002 -
sap                 0.183+-0.006 0.009+-0.002 0.174+-0.002 -
infomec_infom       0.569+-0.002 0.417+-0.004 0.495+-0.003 -
gbt_acc_1000_ratio  0.990+-0.000 -            0.888+-0.002 -
gbt_acc_100_ratio   0.863+-0.001 -            0.757+-0.001 -
tad_tad             -            -            -            0.954+-0.024
"""
NAMES, *COLUMNS = zip(*map(str.split, PAPER.splitlines()))
PAPER = {column[0]: dict(zip(NAMES, column)) for column in COLUMNS}  # {dataset: {score: value}}


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
        rows[f"{name}_{part}".rstrip("_")] = {"value": None if math.isnan(value) else value,
                                              "counts": counts, "notes": notes}
    return rows


def counts_in_words(counts):
    """Sample counts as a text."""
    return ", ".join(f"{name.removeprefix('n_')} {count:,}" for name, count in counts.items())


def remarks(report):
    """What a reader must know before quoting a number: a list of sentences."""
    said = []
    if report["source"] == "codes":
        said.append(f"The codes are the user's, from {report['checkpoint']}: no model was run.")
    if report["source"] == "rendered":
        said.append("The images are the rendered twin, not Shapes3D itself: no score here is a "
                    "Shapes3D score, and the paper's numbers are for orientation only.")
    if not report["factors"]:
        said.append("No scores: they compare units with true factors, and these images have no "
                    "labels (labels.csv). Shown are the units of the largest standard deviation.")
    if report["quick"]:
        said.append("Quick run: scores at other counts than the paper's cannot be compared.")
    said += [note for row in report["scores"].values() for note in row["notes"]]
    silent = ", ".join(map(str, report["silent"])) or "none"
    said.append(f"Units, the best of each factor first: {'; '.join(report['units'])}. "
                f"Silent units (sd < {ACTIVE}): {silent}.")
    if report["anchors"]:
        said.append("Separation before and after alignment, means over active units: purity of "
                    "anchors by labels {before[purity]:.3f}, {after[purity]:.3f} (one single "
                    "anchor: {before[chance]:.3f}); margin {before[margin]:.3f}, "
                    "{after[margin]:.3f}. Mean delta of equation 6: {mean_delta:.1e}, lambda "
                    "{lambda:g}.".format(**report["anchors"]))
    elif report["source"] != "codes" and report["factors"]:
        said.append("No anchors of active units: nothing is aligned.")
    return list(dict.fromkeys(said))  # each sentence once


def inline(picture):
    """A PIL.Image as an address that holds the picture itself."""
    buffer = io.BytesIO()  # a file in memory
    picture.save(buffer, "JPEG", quality=90, subsampling=0)  # a third of a PNG
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def page(report, config, pictures, log, slider):
    """index.html as text. pictures: {figure: PIL.Image}; log: a text; slider: a dict or None."""
    figures = {name: inline(picture) for name, picture in pictures.items()}
    content = json.dumps({"report": report, "notes": remarks(report), "figures": figures,
                          "player": slider, "log": log, "config": config})
    content = content.replace("<", "\\u003c")  # or a user's name could end the script
    return TEMPLATE.read_text("utf-8").replace("$page", content)


# ---- Main ---------------------------------------------------------------------------------------


def build_parser():
    """Every flag with its help."""
    p = data.Parser(description="Score a checkpoint of train.py or codes of any model; draw it.")
    p.add_argument("checkpoint", nargs="?", help="ckpt.pt of train.py; nothing else is needed")
    p.add_argument("--codes", metavar="FILE.npz", help="score these codes, not a checkpoint: an "
                   "array (images, U) or (images, N, D), all images in the dataset's order; the "
                   "file's only array, or the one named codes. Needs --dataset; images only for "
                   "celeba and folder, whose labels come with them")
    p.add_argument("--dataset", choices=data.DATASETS, help="what the codes are of")
    p.add_argument("--out", help="folder for everything written (default: eval, beside the input)")
    p.add_argument("--quick", action="store_true", help="smaller sample counts (scores at other "
                   "counts cannot be compared), fewer pictures, no gbt")
    p.add_argument("--only", type=lambda words: words.split(","), metavar="A,B", help=f"some of "
                   f"{', '.join(METRICS)}, control, figures (celeba: tad, figures; a folder with "
                   "labels: dci, infomec, gbt, figures), and nothing else")
    p.add_argument("--seed", type=int, default=0, help="of the metrics' samples and the figures' "
                   "noise, not of any training; 0 to 2^32 - 1")
    p.add_argument("--data_dir", help="folder of the images (default: as in training, or data)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    return p


def check_flags(args, ds):
    """What to compute: metrics, "control", "figures". UserError for what is unknown."""
    possible = list(METRICS)
    if not ds.is_grid:
        possible = ["dci", "infomec", "gbt"]
    if ds.name == "celeba":
        possible = ["tad"]
    if len(ds.factor_names) < 2:  # scores compare factors
        possible = []
    if ds.is_grid and args.checkpoint:
        possible.append("control")
    possible.append("figures")
    parts = args.only or [part for part in possible if not (args.quick and part == "gbt")]
    wrong = set(parts) - set(possible)
    if wrong:
        raise UserError(f"--only {','.join(sorted(wrong))}: for {ds.name} choose from "
                        f"{', '.join(possible)} (control needs a model, most others a grid)")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed}: expected 0 to 2^32 - 1")
    return parts


def open_codes(args):
    """--codes -> the dataset, and the function idx int64 (B,) -> c (B, N, D)."""
    facts = data.DATASETS[args.dataset]
    if facts["factors"]:  # a grid: no image is looked at
        ds = data.Dataset(args.dataset, "codes", "", None, facts, "cpu")
    else:
        ds = data.load(args.dataset, args.data_dir or "data")
        ds.source = "codes"
    codes = torch.from_numpy(read_codes(args.codes, len(ds)))  # (images, N, D)
    return ds, codes.__getitem__


def anchor_facts(dyga, probe):
    """How anchors separate the factors' values, a dict; empty without anchors or labels."""
    if not probe.names or not dyga.mask[probe.active].any():
        return {}
    c_tilde = torch.cat([dyga.align(part) for part in probe.c.split(BATCH)])  # (n, N, D)
    labels = probe.factors[:, probe.favourite]  # (n, N)
    return {"before": separation(dyga, probe.c, labels, probe.active),
            "after": separation(dyga, c_tilde, labels, probe.active),
            "mean_delta": dyga.delta(probe.c[:5_000]).mean().item(), "lambda": dyga.lam}


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
    TEMPLATE.stat()  # the page to fill in: its error names the path
    device = train.pick_device(args.device)  # "auto" prefers a GPU
    model, config, ckpt = None, {}, {}
    if args.codes:
        ds, units = open_codes(args)
    else:
        model, ckpt = train.load_checkpoint(args.checkpoint, device)
        config = ckpt["config"]
        ds = data.load(config["dataset"], args.data_dir or config["data_dir"], config["source"],
                       device, vary=config["vary"])

        def units(idx):
            return model.units(ds.images(idx))

    parts = check_flags(args, ds)
    source = Path(args.checkpoint or args.codes)
    out = Path(args.out or source.parent / "eval")
    out.mkdir(parents=True, exist_ok=True)  # before the long part: if it cannot be made, say so now

    print(f"{source}: {ds.name}, {ds.source}")
    # Paper: released code fits the PCA on all images; it needs far fewer. TAD is of 10,000.
    n = 4_000 if args.quick else 20_000
    probe = Probe(units, ds, n if ds.is_grid else 10_000, args.seed)
    encode, scores = cached(units, probe.pca, len(ds)), {}
    truth = ds.factor_sizes if ds.is_grid else ds.factors(torch.arange(len(ds))).cpu()
    for name in parts:
        if name in METRICS:
            metric, counts = METRICS[name]
            if not args.quick:
                defaults = inspect.signature(metric).parameters
                counts = {count: defaults[count].default for count in counts}
            if not ds.is_grid:
                total = max(sum(counts.values()), len(ds))
                counts = {count: n * len(ds) // total for count, n in counts.items()}
            scores |= score(name, counts, metric, encode, truth, args.seed, **counts)
    if "tad" in parts:
        scores |= score("tad", {"images": len(probe.idx)}, tad, probe.codes, probe.factors)
    controls, counts = {}, {"pairs": 16 if args.quick else 200, "DDIM_steps": 10}
    if "control" in parts:
        print(f"control: {counts_in_words(counts)}")
        painter = Painter(model, ds, probe, counts["DDIM_steps"], args.seed, counts["pairs"])
        controls = control(painter, args.seed)

    report = {
        "checkpoint": str(source), "dataset": ds.name, "source": ds.source, "seed": args.seed,
        "seen": ckpt.get("seen"), "minutes": ckpt.get("minutes"), "quick": args.quick,
        "scores": scores, "control": controls, "control_counts": counts,
        "paper": PAPER.get(ds.name, {}), "silent": np.flatnonzero(~probe.active).tolist(),
        "anchors": anchor_facts(model.dyga, probe) if model else {},
        "factors": ds.factor_names, "nmi": probe.nmi.tolist(),
        "units": probe.labels()}
    write(out / "metrics.json", json.dumps(report, indent=1))
    for name, row in scores.items():
        value = "undefined" if row["value"] is None else f"{row['value']:.3f}"
        paper = report["paper"].get(name, "-")
        print(f"{name:21}{value:11}paper {paper:14}{counts_in_words(row['counts'])}")
    for factor, numbers in controls.items():
        print("control of {}: {:.3f}; its best unit alone {:.3f}, ceiling {:.3f}, chance {:.3f}"
              .format(factor, *numbers["control"]))
    print(*remarks(report), sep="\n")

    pictures, slider, log = {}, None, source.parent / "log.jsonl"
    if model and "figures" in parts:
        steps = min(config["ddim_steps"], 20) if args.quick else config["ddim_steps"]
        pictures, slider = Painter(model, ds, probe, steps, args.seed).draw(args.quick)
    for name, picture in pictures.items():
        write(out / f"{name}.png", picture)
    log = log.read_text() if model and log.is_file() else ""
    write(out / "index.html", page(report, config, pictures, log, slider))
    print(f"wrote {out}: metrics.json, {len(pictures)} figures, index.html (open it in a browser)")


if __name__ == "__main__":
    data.run(main)
