"""From a checkpoint to numbers, pictures and one page: the one stage that looks at true factors.

    python evaluate.py out/shapes3d-laptop/ckpt.pt            # everything, at the paper's counts
    python evaluate.py out/shapes3d-laptop/ckpt.pt --quick    # a minute or two, at smaller counts
    python evaluate.py --codes codes.npz --dataset shapes3d   # codes of any model: scores alone

It prints scores beside the paper's, and writes metrics.json, PNGs and one page, index.html (--out).

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
from PIL import Image, ImageDraw
from scipy.stats import entropy, iqr
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.feature_selection import mutual_info_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.preprocessing import scale
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
    Metrics see a unit as one number (section 4.1). It IS one under an MLP: little is lost."""
    if c.shape[2] == 1:
        return torch.zeros_like(c[0]), torch.ones_like(c[0])  # a number stays as it is
    mean = c.double().mean(0)  # (N, D)
    x = c - mean  # (n, N, D) float64
    cov = torch.einsum("nud,nue->ude", x, x) / len(c)  # (N, D, D)
    direction = torch.linalg.eigh(cov).eigenvectors[..., -1]  # (N, D), of the largest eigenvalue
    largest = direction.abs().argmax(1, keepdim=True)  # (N, 1)
    sign = direction.gather(1, largest).sign()  # (N, 1): of +-direction the one that this makes > 0
    return mean.float(), (direction * sign).float()

def project(c, pca):
    """Units c (n, N, D) to their coordinates along the first component, (n, N)."""
    mean, direction = pca
    return ((c - mean) * direction).sum(-1)  # (n, N)

def cached(units, pca, count):
    """The encode(idx) of the metrics. units: a function idx int64 (B,) -> c (B, N, D)."""
    table = np.full((count, len(pca[0])), np.nan)  # (images, N); nan: not yet encoded

    def encode(idx):
        new = np.unique(idx[np.isnan(table[idx, 0])])  # metrics draw with replacement
        if len(new):
            parts = torch.from_numpy(new).split(BATCH)
            for part in progress(parts, f"encoding {len(new):,} images, {BATCH} at once"):
                table[part] = project(units(part), pca).cpu()
        return table[idx]
    return encode

def read_codes(path, count):
    """A file of codes, see --codes, of `count` images -> (images, N, D), D = 1 for (images, U)."""
    try:
        with np.load(path) as file:
            name = "codes" if len(file.files) != 1 else file.files[0]
            codes = file[name]
    except Exception as error:  # foreign bytes fail in any way; nothing of ours is inside this try
        raise UserError(f"{path}: cannot be read ({error}); expected an .npz file of one array, or "
                        "with one named codes: numpy.savez(FILE, codes=ARRAY)") from error
    fits = codes.ndim in (2, 3) and len(codes) == count and codes.dtype.kind in "fiub"
    if not fits or not codes.size or not np.isfinite(codes).all():
        raise UserError(f"{path}: {name} is {codes.dtype} {codes.shape}; expected numbers without "
                        f"NaN and Inf, ({count:,} images, U) or ({count:,} images, N, D)")
    return 1.0 * codes.reshape(len(codes), codes.shape[1], -1)  # (images, N, D), no whole numbers

class Probe:
    """A random sample of images, and which unit knows which factor on it.
    groups: {factor: [the unit that knows it best, then all other active ones whose favourite factor
    it is]}, of the eight best known factors (CelebA has 40). The first may be silent, or know yet
    another factor better. Without labels {unit: [itself]}, of the eight of largest deviation."""
    def __init__(self, units, ds, n, seed):
        order = np.random.default_rng(seed).permutation(len(ds))
        self.idx = torch.from_numpy(order[:n])  # (n,), none twice
        parts = progress(self.idx.split(BATCH), f"units of a sample, {BATCH} images at once")
        self.c = torch.cat([units(part) for part in parts])  # (n, N, D), before alignment
        if not self.c.isfinite().all():
            raise UserError("units are NaN or Inf: the training diverged; train it again")
        if self.c.shape[1] < 2:
            raise UserError("found 1 unit, expected two or more: metrics compare units")
        self.pca = fit_pca(self.c)
        self.codes = project(self.c, self.pca).cpu().double().numpy()  # (n, N)
        self.names = ds.factor_names
        self.factors = ds.factors(self.idx).cpu().numpy()  # (n, F); F is 0 without labels
        sd = self.codes.std(0, ddof=1)  # (N,)
        self.active = sd >= ACTIVE
        self.order = np.argsort(-sd)  # (N,), the unit of the largest deviation first
        mi, h = mutual_information(self.codes, self.factors)  # (N, F), (F,)
        self.nmi = (mi / np.maximum(h, 1e-12)).T  # (F, N), information over the factor's entropy
        if not self.names:
            self.groups = {u: [u] for u in self.order[:8].tolist()}
            return
        self.favourite = self.nmi.argmax(0)  # (N,), the factor that a unit knows best
        self.groups = {}
        best_known = np.argsort(-self.nmi.max(1))[:8]
        for f in sorted(best_known.tolist()):
            best, *others = np.argsort(-self.nmi[f]).tolist()
            member = self.active & (self.favourite == f)  # (N,)
            self.groups[f] = [best, *(u for u in others if member[u])]

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
# Where they disagree: a unit that leaks a bit of a second factor still wins its votes in FactorVAE,
# while DCI charges for each leak. MIG and DCI's completeness mind if several units share a factor.

class Sampler:
    """Draws codes and factors for one metric, from one generator; factors of one value left out."""
    def __init__(self, encode, factor_sizes, seed, least_factors=1, least_units=1):
        self.encode = encode
        self.least_units = least_units
        self.rng = np.random.default_rng(seed)
        self.labels = None
        sizes = np.array(factor_sizes)  # (K,) or (images, K)
        if sizes.ndim == 2:
            counts = sizes.max(0) + 1  # of values
            self.labels = sizes[:, (counts > 1) & (counts < len(sizes))]
            sizes = self.labels.max(0) + 1
        self.sizes = sizes[sizes != 1]  # (K,)
        if len(self.sizes) < least_factors:
            raise ValueError(f"{len(self.sizes)} factors vary, expected at least {least_factors}")

    def codes(self, idx):
        """Codes float64 (n, U) of idx int64 (n,)."""
        return checked(self.encode(idx), len(idx), self.least_units)

    def draw(self, n):
        """n codes (n, U), their factors int64 (n, K). Without a grid no image is drawn twice."""
        if self.labels is None:
            factors = self.rng.integers(0, self.sizes, size=(n, len(self.sizes)))
            return self.codes(np.ravel_multi_index(factors.T, self.sizes)), factors
        idx = self.rng.permutation(len(self.labels))[:n]
        return self.codes(idx), self.labels[idx]

    def split(self, n_train, n_test):
        """Codes and factors to learn from, then others to test on: x, y, x_test, y_test."""
        if self.labels is None:
            return *self.draw(n_train), *self.draw(n_test)
        x, y = self.draw(n_train + n_test)
        n = len(x) * n_train // (n_train + n_test)  # fewer images are shared in this proportion
        return x[:n], y[:n], x[n:], y[n:]

def checked(codes, n, least_units):
    """codes as float64 (n, U). ValueError: another shape, too few units, NaN or Inf in a unit."""
    codes = np.asarray(codes, float)
    if codes.ndim != 2 or len(codes) != n or codes.shape[1] < least_units:
        raise ValueError(f"codes {codes.shape}: expected ({n}, U), U at least {least_units}")
    bad = np.flatnonzero(~np.isfinite(codes).all(0))
    if len(bad):
        raise ValueError(f"NaN or Inf in the codes of units {bad.tolist()}")
    return codes

def gap(scores):
    """Best minus second best unit. scores: (U, K) -> (K,)."""
    ranked = np.sort(scores, axis=0)  # (U, K), the best last
    return ranked[-1] - ranked[-2]

def factor_vae(encode, factor_sizes, seed=0, n_variance=10_000, n_train=10_000, n_test=5_000,
               batch=64):
    """FactorVAE score (reference 31), 0 to 1: hold one factor fixed, and see which unit stays.
    A vote: fix a random factor k at a random value in `batch` samples. The unit of least variance,
    relative to its variance over everything, gets a vote for k. Training votes name each unit after
    its most frequent factor; the score is how often that name is right on new votes. Units of
    sd < 0.05 take no part, as in the reference: a good code that is scaled down enough scores 0."""
    sampler = Sampler(encode, factor_sizes, seed)
    if sampler.labels is not None:
        raise ValueError("labels of images found; FactorVAE needs the sizes of a grid")
    K = len(sampler.sizes)
    overall = sampler.draw(n_variance)[0].var(0, ddof=1)  # (U,)
    active = np.sqrt(overall) >= ACTIVE  # (U,)
    if not active.any():
        warnings.warn("FactorVAE: no active unit (all have sd < 0.05), so the score is 0")
        return 0.0
    def votes(n):
        """How often factor k was fixed and active unit d was the steadiest, (A, K)."""
        table = np.zeros((active.sum(), K))  # (A, K)
        for start in progress(range(0, n, 1024), f"FactorVAE, {n:,} votes, 1,024 at once"):
            m = min(1024, n - start)
            fixed = sampler.rng.integers(K, size=m)  # (m,) a factor k for each vote
            factors = sampler.rng.integers(0, sampler.sizes, size=(m, batch, K))
            for vote, k in enumerate(fixed):
                factors[vote, :, k] = factors[vote, 0, k]  # the first sample sets the value
            idx = np.ravel_multi_index(factors.reshape(-1, K).T, sampler.sizes)  # (m*batch,)
            codes = sampler.codes(idx).reshape(m, batch, -1)[:, :, active]  # (m, batch, A)
            steadiest = (codes.var(1, ddof=1) / overall[active]).argmin(1)  # (m,)
            np.add.at(table, (steadiest, fixed), 1)
        return table
    name = votes(n_train).argmax(1)  # (A,), the lowest where votes tie, 0 where there are none
    return float(votes(n_test)[np.arange(len(name)), name].sum() / n_test)

def fit_trees(x, y, x_test, y_test, seed, jobs, words):
    """Boosted trees from codes to each factor -> importances (U, K), test accuracies (K,)."""
    def fit(labels, truth):
        if (labels == labels[0]).all():  # of few images a rare value may be missing
            return np.zeros(x.shape[1]), (truth == labels[0]).mean()
        model = GradientBoostingClassifier(random_state=seed).fit(x, labels)
        return model.feature_importances_, model.score(x_test, truth)
    fits = joblib.Parallel(jobs, return_as="generator")(map(joblib.delayed(fit), y.T, y_test.T))
    importances, accuracies = zip(*progress(fits, words, y.shape[1]))
    return np.stack(importances, axis=1), np.array(accuracies)

def dci(encode, factor_sizes, seed=0, n_train=10_000, n_test=5_000, jobs=-1):
    """DCI (reference 14): who is asked for what? jobs: processes, -1 for one per core.
    Boosted trees predict each factor from all units; R[u, k] is the importance of unit u for factor
    k. Returns dict, all 0 to 1: disentanglement (a unit is important for one factor), completeness
    (a factor needs one unit), informativeness (test accuracy). Never compare across counts."""
    sampler = Sampler(encode, factor_sizes, seed, least_factors=2, least_units=2)
    samples = sampler.split(n_train, n_test)
    R, accuracies = fit_trees(*samples, seed, jobs, "DCI, trees of one factor each")  # R: (U, K)
    if R.sum() == 0:  # no tree found anything to split, so all units are equally important
        R = np.ones_like(R)
    U, K = R.shape
    per_unit = 1 - entropy(R + 1e-11, base=K, axis=1)  # (U,); entropy() first divides by the sum
    per_factor = 1 - entropy(R + 1e-11, base=U)  # (K,)
    return {"disentanglement": float(np.average(per_unit, weights=R.sum(1))),
            "completeness": float(per_factor.mean()),
            "informativeness": float(accuracies.mean())}

def mutual_information(codes, factors, bins=20):
    """Mutual information of units, cut into bins, with factors, and factors' entropies; in nats.
    codes (n, U), factors int64 (n, K) -> (U, K), (K,). Plug-in estimates: a unit and a factor that
    have nothing to do with each other still get about (bins-1)(values-1)/2n."""
    mi = np.zeros((codes.shape[1], factors.shape[1]))  # (U, K)
    for u, unit in enumerate(codes.T):
        edges = np.histogram(unit, bins)[1]  # of equal widths, from the least to the largest value
        labels = np.digitize(unit, edges[:-1])  # (n,), 1 to bins: the largest value is in the last
        mi[u] = [mutual_info_score(labels, values) for values in factors.T]
    return mi, np.array([mutual_info_score(values, values) for values in factors.T])

def mig(encode, factor_sizes, seed=0, n_train=10_000, bins=20):
    """Mutual information gap (reference 9), 0 to 1: does exactly one unit know a factor?
    Mean over factors of (best - second best unit's information) / H(factor)."""
    codes, factors = Sampler(encode, factor_sizes, seed, least_units=2).draw(n_train)
    mi, h = mutual_information(codes, factors, bins)
    return float((gap(mi) / h).mean())

def modularity(encode, factor_sizes, seed=0, n_train=10_000, bins=20, active_only=False):
    """Modularity (reference 49), 0 to 1: does a unit know one factor? It does not mind copies.
    Per unit 1 - (sum over the other factors of MI^2) / ((K-1) max MI^2), and 0 for a unit that
    knows nothing; the mean over ALL units. Beyond the paper: active_only, units of sd >= 0.05."""
    codes, factors = Sampler(encode, factor_sizes, seed, least_factors=2).draw(n_train)
    squared = mutual_information(codes, factors, bins)[0] ** 2  # (U, K)
    best = squared.max(1)  # (U,)
    others = (squared.sum(1) - best) / np.where(best > 0, best, 1)  # (U,), 0 to K - 1
    per_unit = (best > 0) * (1 - others / (squared.shape[1] - 1))  # (U,)
    if active_only:
        per_unit = per_unit[codes.std(0, ddof=1) >= ACTIVE]
    if len(per_unit) == 0:
        warnings.warn("Modularity over active units: undefined, as all have sd < 0.05")
        return math.nan
    return float(per_unit.mean())

def sap(encode, factor_sizes, seed=0, n_train=10_000, n_test=5_000):
    """SAP score (reference 33), 0 to 1: does one unit alone predict a factor, by a straight cut?
    Mean over factors of best minus second best unit's test accuracy."""
    sampler = Sampler(encode, factor_sizes, seed, least_units=2)
    x, y, x_test, y_test = sampler.split(n_train, n_test)  # (n, U), (n, K), and to test
    table = np.zeros((x.shape[1], y.shape[1]))  # (U, K)
    for u, k in progress(list(np.ndindex(table.shape)), "SAP, a unit and a factor each"):
        # Numbers go in as they are: the penalty C makes this metric depend on a unit's scale.
        model = LinearSVC(C=0.01, class_weight="balanced", dual="auto", random_state=seed)
        model.fit(x[:, [u]], y[:, k])
        table[u, k] = model.score(x_test[:, [u]], y_test[:, k])
    return float(gap(table).mean())

def linear_error(x, y):
    """Training log loss of a linear classifier without penalty (C = inf), 100 steps at most."""
    with threadpool_limits(1):  # 20 columns: threads would only wait, 150 times as long at worst
        model = LogisticRegression(C=np.inf, class_weight="balanced").fit(x, y)
        return log_loss(y, model.predict_proba(x))

def infomec(encode, factor_sizes, seed=0, n_train=10_000):
    """InfoMEC (reference 24), without bins. Returns dict, all at most 1:
    infom, modularity: does a unit know one factor only; infoc, compactness: does only one unit know
    a factor; infoe, explicitness: how much of its error units save a linear classifier."""
    x, y = Sampler(encode, factor_sizes, seed, least_factors=2).draw(n_train)  # (n, U), (n, K)
    # A measure of scale, not of information: noise may pass, a unit mostly of one value does not.
    spread = iqr(x, axis=0)  # (U,), interquartile ranges
    active = spread > spread.max() / 10  # (U,)
    x = scale(x)  # to mean 0 and standard deviation 1; a constant unit: zeros
    K, A = y.shape[1], int(active.sum())
    nmi, saved = np.zeros((K, A)), np.zeros(K)
    for k in progress(range(K), "InfoMEC, a factor each"):
        if A:  # by nearest neighbours; scikit-learn adds noise of 1e-10, so no two codes are equal
            mi = mutual_info_classif(x[:, active], y[:, k], n_neighbors=10, random_state=seed)
            nmi[k] = mi / entropy(np.bincount(y[:, k]))
        saved[k] = 1 - linear_error(x, y[:, k]) / linear_error(0 * x, y[:, k])
    # The share of its best factor in all that a unit knows, from 1/K (it scores 0) to 1.
    informative = nmi[:, nmi.sum(0) > 0]  # (K, units that know something)
    share = informative.max(0) / informative.sum(0)  # (units that know something,)
    infom = ((share - 1 / K) / (1 - 1 / K)).sum() / max(A, 1)
    if len(share) < max(A, 1):
        warnings.warn(f"InfoM: {A} active units; {A - len(share)} know nothing and count as 0")
    # The same from the factor's side: its best unit's share, 0 if no unit knows it.
    share = nmi.max(1, initial=0) / (nmi.sum(1) + 1e-6)  # (K,)
    infoc = (share.mean() - 1 / A) / (1 - 1 / A) if A > 1 else math.nan
    if A < 2:
        warnings.warn(f"InfoC: undefined for {A} active unit(s), reported as nan")
    return {"infom": float(infom), "infoc": float(infoc), "infoe": float(saved.mean())}

def gbt_efficiency(encode, factor_sizes, seed=0, n_test=5_000, jobs=-1, n_train=10_000):
    """Are few labels enough (Table 5)? Trees from n_train labels, from 1,000 and from 100.
    Returns dict: acc, test accuracy at n_train; acc_1000_ratio, acc_100_ratio: what is left."""
    sampler = Sampler(encode, factor_sizes, seed)
    means = []
    for n in (n_train, 1_000, 100):
        samples = sampler.split(min(n, n_train), n_test)
        means.append(fit_trees(*samples, seed, jobs, f"trees from {n:,} labels")[1].mean())
    acc, acc_1000, acc_100 = map(float, means)
    return {"acc": acc, "acc_1000_ratio": acc_1000 / acc, "acc_100_ratio": acc_100 / acc}

def stepped_auroc(codes, attribute, step):
    """AUROC of a unit (n,) for an attribute (n,) of 0 and 1, in the better direction. From 1 / step
    + 1 thresholds, which can be 0.14 too high: the reference's rule, and so the paper's."""
    thresholds = codes.min() + np.arange(0, 1 + step / 2, step) * np.ptp(codes)  # (T,)
    above = codes >= thresholds[:, None]  # (T, n), what each threshold predicts of each image
    areas = []
    for predicted in (above, ~above):  # a large code may mean 1 or 0
        tpr = np.sort(predicted[:, attribute == 1].mean(1))  # (T,) rates of true positives, and
        fpr = np.sort(predicted[:, attribute == 0].mean(1))  # (T,) of false, each sorted by itself
        areas.append((np.diff(fpr) * tpr[1:]).sum())  # rectangles as high as their right end
    return max(areas)

def tad(codes, attributes, step=0.1):
    """Total AUROC difference (reference 70, Table 2), for images that have attributes and no grid.
    codes (n, U), attributes (n, A) of 0, 1. An attribute is captured if a unit predicts it (AUROC
    at least 0.75) and no other attribute gives it away (mutual information at most 0.2 of its own
    entropy). Returns dict: tad, sum of their best minus second best AUROC; captured, how many."""
    codes = checked(codes, len(attributes), 2)
    attributes = np.asarray(attributes)
    if not np.isin(attributes, (0, 1)).all():
        raise ValueError("attributes: expected (n, A) of 0, 1")
    shared, own = mutual_information(attributes, attributes)  # (A, A), (A,)
    np.fill_diagonal(shared, 0)  # an attribute may give itself away
    clean = (shared.max(1) <= 0.2 * own) & (own > 0)  # (A,); own is 0 if all have it, or none
    auroc = np.full((codes.shape[1], len(own)), 0.5)  # (U, A)
    for u in np.flatnonzero(np.ptp(codes, axis=0) > 0.2):  # a smaller range counts as a guess
        for k in np.flatnonzero(clean):
            auroc[u, k] = stepped_auroc(codes[:, u], attributes[:, k], step)
    captured = clean & (auroc.max(0) >= 0.75)  # (A,)
    return {"tad": float(gap(auroc)[captured].sum()), "captured": int(captured.sum())}

def separation(dyga, probe):
    """How well anchors separate the values of each unit's favourite factor (Figure 1).
    {"before": dict, "after": dict} alignment, or {} without anchors or labels; means over active
    units. purity: share of samples that have the most frequent value of their own (likeliest)
    anchor's samples; chance: the same if there were one single anchor; margin: 1 - (distance to own
    anchor) / (distance to nearest other), 0 if negative, 1 if there is no other; should rise."""
    units = np.flatnonzero(probe.active & dyga.mask.any(1).cpu().numpy())
    if not probe.names or not len(units):
        return {}
    c_tilde = torch.cat([dyga.align(part) for part in probe.c.split(BATCH)])  # (n, N, D)
    found = {}
    for name, c in {"before": probe.c, "after": c_tilde}.items():
        number = torch.cat([dyga.nearest(part)[1] for part in c.split(BATCH)])  # (n, N)
        rows = []
        for u in units:
            own = number[:, [u]]  # (n, 1)
            distance = torch.cdist(c[:, u], dyga.anchors[u])  # (n, K)
            to_own = distance.gather(1, own)  # (n, 1)
            others = distance.scatter(1, own, math.inf).masked_fill(~dyga.mask[u], math.inf)
            to_other = others.amin(1, True).clamp(min=1e-12)  # two anchors may be in one place
            margin = (1 - to_own / to_other).clamp(min=0).mean().item()
            values = probe.factors[:, probe.favourite[u]]  # (n,)
            counts = contingency_matrix(own[:, 0].cpu(), values)  # (anchors, values)
            rows.append([counts.max(1).sum() / len(c), counts.sum(0).max() / len(c), margin])
        found[name] = dict(zip(("purity", "chance", "margin"), np.mean(rows, axis=0).tolist()))
    return found

# ---- Figures: each gives a PIL.Image ------------------------------------------------------------
def exchange(c_tilde, other, groups):
    """Units (B, N, ...) -> (R, B, N, ...): in each row one group's units are the other's.
    The same for factors (B, F), where a group is one number."""
    rows = torch.stack([c_tilde] * len(groups))
    for row, units in zip(rows, groups):
        row[:, units] = other[:, units]
    return rows

class Painter:
    """Generates images, and draws the figures that need the model. steps: of DDIM.
    In figures all start from ONE noise: what differs between two pictures comes from their units.
    Of several `noises` image i starts from number i modulo noises. Figures take idx int64 (B,)."""
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
        made = [self.model.sample(c, z, self.steps) for c, z in zip(parts, noise.split(64))]
        return torch.cat(made).unflatten(0, c_tilde.shape[:-2])  # (..., 3, H, W)

    def interchange(self, source, target):
        """Figures 3 and 8: give the source the target's units of one factor.
        Paper: exchanges one unit. Where several stand for a factor, one changes it by half."""
        rows = exchange(self.c_tilde(source), self.c_tilde(target), [[], *self.groups])
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
        rows = exchange(a.expand_as(path), path, [slice(None), *self.groups])  # (1 + R, T, N, D)
        return data.image_grid(
            self.generate(rows, "interpolation"), ["all units", *self.probe.labels()], (),
            "Interpolation from A (left) to B (right): all units, then one factor's", 2)

    def attention(self, idx):
        """Figures 4, 9, 10: where each factor's best unit is looked up, averaged in DAAM's way."""
        noise = self.noise.expand(len(idx), -1, -1, -1)  # (B, z, h, w)
        z0, maps = ddim(self.model.unet, noise, self.c_tilde(idx), self.model.alpha_bar,
                        self.steps, attention=True)
        made = self.model.vqgan.decode(z0)  # (B, 3, H, W)
        maps = maps[:, [units[0] for units in self.groups]]  # (B, F, h, w)
        maps = F.interpolate(maps, size=made.shape[2:], mode="bilinear")  # (B, F, H, W)
        # From dark, which is 0, to the sample's own colours where the unit is looked up most.
        maps /= maps.amax((2, 3), keepdim=True)
        lit = (made[:, None] * maps[:, :, None]).byte()  # (B, F, 3, H, W)
        tiles = torch.cat([self.ds.images(idx)[:, None], made[:, None], lit], dim=1)
        return data.image_grid(
            tiles, (), ["input", "sample", *self.probe.labels(1)],
            "Cross-attention per unit (light: most), averaged over heads, layers and steps", 2)

    def slider(self, idx, most, stops):
        """Pictures for the page's slider: a strip for each factor's units, and for each of `most`
        units. At each stop the images idx get these units from another image, the donor; donors are
        sorted by factor or by unit. (Not interpolated: between two units no image's need lie.)
        Returns {"images": numbers, "strips": {text: {"stops": how many donors, `stops` at most,
        "pictures": one for each image, all stops in a row}}}."""
        probe = self.probe
        choices = {}  # by text: the units, and a number for each image to sort the sample by, (n,)
        if probe.names:
            for text, (f, units) in zip(probe.labels(), probe.groups.items()):
                choices[text] = units, probe.factors[:, f]
        for u in probe.order[:most]:
            factor = f" ({probe.names[probe.favourite[u]]})" if probe.names else ""
            choices[f"unit {u}{factor}"] = [u], probe.codes[:, u]
        strips, c_tilde = {}, self.c_tilde(idx)[:, None]  # (I, 1, N, D)
        for text, (units, values) in choices.items():
            found = np.unique(values, return_index=True)[1]  # one image of each value, in order
            # Not the very ends: a unit's may be outliers.
            places = np.linspace(0.02, 0.98, min(stops, len(found))) * (len(found) - 1)  # (S,)
            donors = self.c_tilde(probe.idx[found[places.round().astype(int)]])  # (S, N, D)
            rows = c_tilde.repeat(1, len(donors), 1, 1)  # (I, S, N, D)
            rows[:, :, units] = donors[:, units]
            made = self.generate(rows, f"slider, {text}")  # (I, S, 3, H, W)
            pictures = [inline(data.image_grid(image[None])) for image in made]
            strips[text] = {"stops": len(donors), "pictures": pictures}
        return {"images": idx.tolist(), "strips": strips}

    def draw(self, quick):
        """All figures {name: PIL.Image}, and what the page's slider shows."""
        idx = self.probe.idx.repeat(48)[:48]  # a smaller sample is repeated
        width, columns, shown, most = (6, 5, 2, 4) if quick else (8, 9, 3, 8)
        made = {  # in the interchange each source has the next image as its target
            "samples": data.image_grid(self.ds.images(idx).unflatten(0, (4, 12))),
            "interchange": self.interchange(idx[:width], idx[1:width + 1]),
            "interpolation": self.interpolation(idx[:2], columns),
            "attention": self.attention(idx[:4])}
        if self.probe.names:
            made["units"] = figure_units(self.model.dyga, self.probe, self.ds.factor_sizes)
        return made, self.slider(idx[:shown], most, columns)

def nearest_image(ds, images):
    """The image of the WHOLE dataset that looks most like each of these n -> idx int64 (n,).
    Compared at 8x8 pixels: enough to tell all factors of 576 of laptop's reconstructions."""
    def small(images):
        return F.avg_pool2d(images.float(), 8).flatten(1)  # (B, 192)
    query = small(images)  # (n, 192)
    least = math.inf
    nearest = 0
    parts = torch.arange(len(ds), device=query.device).split(256)
    for part in progress(parts, f"reading {len(query):,} images, 256 candidates at once"):
        distance, place = torch.cdist(query, small(ds.images(part))).min(1)
        nearest = torch.where(distance < least, part[place], nearest)  # (n,)
        least = distance.clamp(max=least)  # (n,)
    return nearest

def control(painter, seed):
    """Beyond the paper: does exchanging a factor's units change that factor, and nothing else?
    P random pairs of images differ in all factors. For each of R factors the source is generated
    with the target's units of it; the factors of the result are those of the nearest true image.
    Returns {factor's name, or "mean": {measure: four numbers}}, means over pairs. moved: it has the
    target's value of the factor; kept: the source's of all others; control: both; off: |value -
    target's|. The four: all units of the factor exchanged; its best alone, as in Figures 3 and 8;
    ceiling, the true image of the wanted factors through stage 1; chance, any image."""
    ds = painter.ds
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(ds.factor_sizes)  # (F,)
    u, v = torch.rand(2, len(painter.noise), len(sizes), generator=generator)
    source = (u * sizes).long()  # (P, F)
    target = (source + 1 + (v * (sizes - 1)).long()) % sizes
    exchanged = list(painter.probe.groups)  # R factors
    wanted = exchange(source, target, exchanged)  # (R, P, F)
    a, b = painter.c_tilde(ds.index(source)), painter.c_tilde(ds.index(target))  # (P, N, D)
    ways = painter.groups + [units[:1] for units in painter.groups]  # 2 R lists of units
    different = [units for row, units in enumerate(ways) if units not in ways[:row]]  # each once
    made = painter.generate(exchange(a, b, different), "control")  # (different, P, 3, H, W)
    # In this order: with all units (R rows), with the best (R), reconstructions (R); then chance.
    images = [made[different.index(units)] for units in ways]
    images += [painter.model.vqgan.reconstruct(ds.images(ds.index(row))) for row in wanted]
    idx = nearest_image(ds, torch.cat(images)).cpu()  # (3 R P,)
    chance = torch.randint(len(ds), (len(idx) // 3,), generator=generator)
    read = ds.factors(torch.cat([idx, chance])).cpu().view(4, *wanted.shape)  # (4, R, P, F)
    found = {}
    for f, got, want in zip(exchanged, read.unbind(1), wanted):  # (4, P, F) and (P, F)
        right = got == want  # (4, P, F)
        moved = right[..., f]  # (4, P)
        kept = right[..., torch.arange(len(sizes)) != f].all(-1)  # (4, P)
        off = (got - want)[..., f].abs()  # (4, P)
        # (4 measures, 4 kinds of results)
        found[ds.factor_names[f]] = torch.stack([moved, kept, moved & kept, off]).double().mean(-1)
    found["mean"] = torch.stack([*found.values()], -1).mean(-1)
    return {name: dict(zip(("moved", "kept", "control", "off"), numbers.tolist()))
            for name, numbers in found.items()}

def scatter(points, hues, anchors):
    """A panel uint8 (3, 230, 230): points (n, 2) in [0, 1] with hues (n,), anchors (K, 2)."""
    S = 460  # drawn at twice the size, then halved: smooth dots
    panel = Image.new("RGB", (S, S), "#f4f4f4")
    draw = ImageDraw.Draw(panel)
    for place, hue in zip((S * points).tolist(), hues.tolist()):
        draw.circle(place, 4, f"hsl({hue}, 80%, 45%)")
    for place in (S * anchors).tolist():
        draw.text(place, "x", "black", anchor="mm", font_size=30)
    return torch.from_numpy(np.array(panel.reduce(2))).movedim(2, 0)

def figure_units(dyga, probe, sizes, n=1500):
    """Figures 1 and 11: each factor's best unit before and after alignment, in two dimensions."""
    c = probe.c[:n].cpu()  # (n, N, D)
    moves = dyga.align(probe.c[:n]).cpu() - c
    rows = {"before": 0, f"after, lambda {dyga.lam:g}": 1}
    if dyga.lam:  # a small one moves units too little to see
        rows["if lambda were 1"] = 1 / dyga.lam
    panels = []
    for f, (u, *_) in probe.groups.items():
        mean = c[:, u].mean(0)  # (D,)
        x = c[:, u] - mean  # (n, D)
        axes = torch.linalg.svd(x, full_matrices=False).Vh[:2].T  # (D, 2), the components
        axes /= 6 * (x @ axes).std(0).clamp(min=1e-9)  # a panel is 6 deviations wide
        anchors = 0.5 + (dyga.anchors[u][dyga.mask[u]].cpu() - mean) @ axes  # (K, 2)
        hues = 300 * probe.factors[:n, f] // max(sizes[f] - 1, 1)  # (n,) red to violet
        panels += [scatter(0.5 + (x + times * moves[:, u]) @ axes, hues, anchors)
                   for times in rows.values()]
    tiles = torch.stack(panels).unflatten(0, (-1, len(rows))).transpose(0, 1)  # (rows, F, 3, H, W)
    return data.image_grid(tiles, rows, probe.labels(1), "Principal components 1 and 2 of "
                           "units, red (the factor's first value) to violet; crosses: anchors")

# ---- Report and command -------------------------------------------------------------------------
# Name on the command line -> function, counts of --quick; the functions' defaults are the paper's.
# A metric of your own needs a function and a row here (without a grid, in check_flags, too).
METRICS = {
    "factorvae": (factor_vae, dict(n_variance=2_000, n_train=500, n_test=250)),
    "dci": (dci, dict(n_train=1_000, n_test=1_000)),
    "mig": (mig, dict(n_train=2_000)),
    "modularity": (modularity, dict(n_train=2_000)),
    "modularity_active": (functools.partial(modularity, active_only=True), dict(n_train=2_000)),
    "sap": (sap, dict(n_train=2_000, n_test=1_000)),
    "infomec": (infomec, dict(n_train=2_000)),
    "gbt": (gbt_efficiency, dict(n_train=10_000, n_test=5_000)),  # slow: --quick skips it
}
# The paper's own rows (Tables 1 and 10, 5, 2).
PAPER_TEXT = """\
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
NAMES, *COLUMNS = zip(*map(str.split, PAPER_TEXT.splitlines()))
PAPER = {column[0]: dict(zip(NAMES[1:], column[1:])) for column in COLUMNS}  # by dataset

def score(name, counts, metric, *arguments, **settings):
    """Call a metric with these arguments -> {score: dict of value, counts, notes}."""
    print(f"{name}: {counts_in_words(counts)}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = metric(*arguments, **settings)  # a number, or a dict of numbers
    notes = [str(w.message) for w in caught if w.category is UserWarning]
    parts = found if isinstance(found, dict) else {"": found}
    # JSON knows no nan: an undefined score is null, and a note says why.
    return {f"{name}_{part}".rstrip("_"): {
        "value": None if math.isnan(value) else value, "counts": counts, "notes": notes}
        for part, value in parts.items()}

def counts_in_words(counts):
    """Sample counts as a text."""
    return ", ".join(f"{name.removeprefix('n_')} {count:,}" for name, count in counts.items())

def remarks(report):
    """What a reader must know before quoting a number: a list of sentences."""
    said = []
    if report["source"] == "rendered":
        said.append("The images are the rendered twin, not Shapes3D itself: no score here is a "
                    "Shapes3D score, and the paper's numbers are for orientation only.")
    if not report["factors"]:
        said.append("No scores: they compare units with true factors, and these images have no "
                    "labels (labels.csv). Shown are the units of the largest standard deviation.")
    if report["quick"]:
        said.append("Quick run: scores at other counts than the paper's cannot be compared.")
    said += dict.fromkeys(note for row in report["scores"].values() for note in row["notes"])
    said.append(f"Units, the best of each factor first: {'; '.join(report['units'])}. "
                f"Silent units (sd < {ACTIVE}): {report['silent'] or 'none'}.")
    if report["anchors"]:
        said.append("Separation before and after alignment, means over active units: purity of "
                    "anchors by labels {before[purity]:.3f}, {after[purity]:.3f} (one single "
                    "anchor: {before[chance]:.3f}); margin {before[margin]:.3f}, "
                    "{after[margin]:.3f}.".format(**report["anchors"]))
    elif report["source"] != "codes" and report["factors"]:
        said.append("No anchors of active units: nothing is aligned.")
    return said

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

def build_parser():
    """Every flag with its help."""
    p = data.Parser(description="Score a checkpoint of train.py or codes of any model; draw it.")
    p.add_argument("checkpoint", nargs="?", help="ckpt.pt of train.py; nothing else is needed")
    p.add_argument("--codes", metavar="FILE.npz", help="score these codes, not a checkpoint: an "
                   "array (images, U) or (images, N, D), all images in the dataset's order; the "
                   "file's only array, or the one named codes. Needs --dataset; images only for "
                   "celeba and folder, whose labels come with them")
    p.add_argument("--dataset", choices=data.DATASETS, help="what the codes are of")
    p.add_argument("--out", help="folder for everything written; none: eval, beside the input")
    p.add_argument("--quick", action="store_true", help="smaller sample counts (scores at other "
                   "counts cannot be compared), fewer pictures, no gbt")
    p.add_argument("--only", type=lambda words: words.split(","), metavar="A,B", help=f"some of "
                   f"{', '.join(METRICS)}, control, figures (celeba: tad, figures; a folder with "
                   "labels: dci, infomec, gbt, figures), and nothing else")
    p.add_argument("--seed", type=train.within(int, "0..4294967295"), default=0, help="of the "
                   "metrics' samples and the figures' noise, not of any training; 0 to 2^32 - 1")
    p.add_argument("--data_dir", help="folder of the images (default: as in training, or data)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    return p

def check_flags(args, ds):
    """What to compute: metrics, "control", "figures". UserError for what is unknown."""
    possible = list(METRICS) if ds.is_grid else ["dci", "infomec", "gbt"]
    if ds.name == "celeba":
        possible = ["tad"]
    # A factor with one value for all images, or another for each, cannot be scored.
    if sum(1 < size < len(ds) for size in ds.factor_sizes) < 2:
        possible = []
    if args.checkpoint:
        possible += ["control", "figures"] if ds.is_grid else ["figures"]
    parts = args.only or [part for part in possible if part != "gbt" or not args.quick]
    wrong = set(parts) - set(possible)
    if wrong:
        raise UserError(f"--only {','.join(sorted(wrong))}: for {ds.name} choose from "
                        f"{', '.join(possible)} (control needs a model, most others a grid)")
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

def main():
    """Check all that can be wrong, then score, draw, and write the report."""
    args = build_parser().parse_args()
    if bool(args.checkpoint) == bool(args.codes) or bool(args.codes) != bool(args.dataset):
        raise UserError("expected a checkpoint of train.py, or --codes FILE.npz --dataset NAME")
    TEMPLATE.stat()  # the page to fill in: if it is missing, say so before all scoring
    device = train.pick_device(args.device)  # "auto" prefers a GPU
    model, config, ckpt = None, {}, {}
    if args.codes:
        ds, units = open_codes(args)
    else:
        model, ckpt = train.load_checkpoint(args.checkpoint, device)
        config = ckpt["config"]
        ds = data.load(config["dataset"], args.data_dir or config["data_dir"], config["source"],
                       device, vary=config["vary"])
        units = lambda idx: model.units(ds.images(idx))  # noqa: E731
    parts = check_flags(args, ds)
    source = Path(args.checkpoint or args.codes)
    out = Path(args.out or source.parent / "eval")
    out.mkdir(parents=True, exist_ok=True)  # before the long part: if it cannot be made, say so now
    print(f"{source}: {ds.name}, {ds.source}")
    # Paper: released code fits the PCA on all images; it needs far fewer. TAD is of 10,000.
    n = 4_000 if args.quick else 20_000
    probe = Probe(units, ds, n if ds.is_grid else 10_000, args.seed)
    encode = cached(units, probe.pca, len(ds))
    scores = {}
    truth = ds.factor_sizes if ds.is_grid else ds.factors(torch.arange(len(ds))).cpu()
    for name in parts:
        if name not in METRICS:
            continue
        metric, counts = METRICS[name]
        if not args.quick:
            defaults = inspect.signature(metric).parameters
            counts = {count: defaults[count].default for count in counts}
        if not ds.is_grid:
            total = max(sum(counts.values()), len(ds))
            counts = {count: wish * len(ds) // total for count, wish in counts.items()}
        scores |= score(name, counts, metric, encode, truth, args.seed, **counts)
    if "tad" in parts:
        scores |= score("tad", {"images": len(probe.idx)}, tad, probe.codes, probe.factors)
    controls = {}
    control_counts = {"pairs": 16 if args.quick else 200, "DDIM_steps": 10}
    if "control" in parts:
        print(f"control: {counts_in_words(control_counts)}")
        pairs, steps = control_counts.values()
        controls = control(Painter(model, ds, probe, steps, args.seed, pairs), args.seed)
    report = {
        "checkpoint": str(source), "dataset": ds.name, "source": ds.source, "seed": args.seed,
        "seen": ckpt.get("seen"), "minutes": ckpt.get("minutes"), "quick": args.quick,
        "scores": scores, "control": controls, "control_counts": control_counts,
        "paper": {} if config.get("vary") else PAPER.get(ds.name, {}),  # of a part it has none
        "silent": np.flatnonzero(~probe.active).tolist(),
        "anchors": separation(model.dyga, probe) if model else {},
        "factors": ds.factor_names, "nmi": probe.nmi.tolist(),
        "units": probe.labels()}
    with data.replacing(out / "metrics.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1))
    for name, row in scores.items():
        value = "undefined" if row["value"] is None else f"{row['value']:.3f}"
        paper = report["paper"].get(name, "-")
        print(f"{name:21}{value:11}paper {paper:14}{counts_in_words(row['counts'])}")
    for factor, numbers in controls.items():
        print("control of {}: {:.3f}; its best unit alone {:.3f}, ceiling {:.3f}, chance {:.3f}"
              .format(factor, *numbers["control"]))
    print(*remarks(report), sep="\n")
    pictures, slider = {}, None
    if model and "figures" in parts:
        steps = min(config["ddim_steps"], 20) if args.quick else config["ddim_steps"]
        pictures, slider = Painter(model, ds, probe, steps, args.seed).draw(args.quick)
    for name, picture in pictures.items():
        with data.replacing(out / f"{name}.png") as temporary:
            picture.save(temporary)
    log = source.parent / "log.jsonl"
    log = log.read_text() if model and log.is_file() else ""
    with data.replacing(out / "index.html") as temporary:
        temporary.write_text(page(report, config, pictures, log, slider), "utf-8")
    print(f"wrote {out}: metrics.json, {len(pictures)} figures, index.html (open it in a browser)")

if __name__ == "__main__":
    data.run(main)
